"""What the stages `pulid` and `ip-adapter` share: an identity adapter learns on a frozen generator.

The reference is always another picture of the person, so nothing can be copied; the loss is the flow's, and the recogniser's
verdict on the face that it implies (identity_loss.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from training.mini.generator import autoencoder, base
from training.mini.generator.bank import References
from training.mini.generator.context import Context
from training.mini.generator.flow import flow_loss
from training.mini.generator.forward import TrainableFlux
from training.mini.generator.identity_loss import IdentityLoss, times_with_faces
from training.mini.generator.text import TEXT_TOKENS
from training.mini.optimise import Losses, Outcome, Recipe, optimise

Attach = Callable[[References, Tensor, Tensor], dict[str, Any]]
"""(references, index of each item's reference [n], drop [n]: condition on nobody) -> arguments of TrainableFlux.velocity."""

_UNCONDITIONAL = 0.05
_IDENTITY_WEIGHT = 0.3
_IDENTITY_FROM = 0.15
"""Progress from which the identity loss counts: before, the faces are not yet the reference's at all."""


def train_adapter(
    name: str, module: nn.Module, attach: Attach, context: Context, recipe: Recipe, rounded: nn.Module | None = None
) -> Outcome:
    """Trains `module` under the stage's name and saves its state under it."""
    device, bank = context.device, context.reference_bank
    references = bank.references
    assert references is not None
    generator = base.load(context.workspace, device)
    flux = TrainableFlux(generator.transformer, autoencoder.LATENT_SIZE, TEXT_TOKENS, compiled=device.type == "cuda")
    verdict = IdentityLoss(context.vae, context.recogniser, bank)
    n, faces = (2, 1) if recipe.smoke else (192, 48)
    unguided = torch.ones(n, device=device)

    def loss(progress: float) -> Losses:
        judged = progress >= _IDENTITY_FROM or recipe.smoke
        batch = base.draw_batch(bank, n, times_with_faces(n, faces, device) if judged else None)
        drop = torch.rand(n, device=device) < _UNCONDITIONAL
        drop[:faces] = False
        with base.mixed_precision(device):
            with torch.no_grad():
                prompt = generator.text(bank.captions.pick(batch.index))
            attached = attach(references, bank.another(batch.index), drop)
            velocity = flux.velocity(batch.noisy, prompt, batch.times, unguided, **attached)
        flow = flow_loss(velocity, batch.clean, batch.noise, batch.weights)
        if not judged:
            return {"loss": flow, "flow": flow.detach()}
        identity, cosine = verdict(batch, velocity, faces)
        return {"loss": flow + _IDENTITY_WEIGHT * identity, "flow": flow.detach(), "cosine": cosine}

    outcome = optimise(name, module, recipe, context.workspace, loss, rounded=rounded)
    context.workspace.save(name, module.state_dict(), halved=True)
    return outcome
