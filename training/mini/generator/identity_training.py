"""What the stages `pulid` and `ip-adapter` share: an identity adapter learns on a frozen generator.

Two losses. The flow's: the reference is always another picture of the person, so nothing can be copied. And the recogniser's
verdict on pictures that the generator draws with the adapter attached (identity_loss.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from training.mini.generator import autoencoder, base
from training.mini.generator.bank import References
from training.mini.generator.context import Context
from training.mini.generator.flow import flow_loss
from training.mini.generator.forward import TrainableFlux
from training.mini.generator.identity_loss import IdentityLoss
from training.mini.generator.text import TEXT_TOKENS
from training.mini.optimise import Losses, Outcome, Recipe, optimise

Attach = Callable[[References, Tensor, Tensor], dict[str, Any]]
"""(references, index of each item's reference [n], drop [n]: condition on nobody) -> arguments of TrainableFlux.velocity."""

_UNCONDITIONAL = 0.05


@dataclass(frozen=True)
class Verdict:
    """How the recogniser's verdict counts. weight: beside the flow's loss; begins: progress before which the adapter learns from the
    flow alone. An adapter that reaches into every block finds patterns that please the recogniser and are no face, if it may."""

    weight: float = 0.5
    begins: float = 0.04


def train_adapter(
    name: str,
    module: nn.Module,
    attach: Attach,
    context: Context,
    recipe: Recipe,
    rounded: nn.Module | None = None,
    counts: Verdict = Verdict(),
) -> Outcome:
    """Trains `module` under the stage's name and saves its state under it; goes on from that state where it exists."""
    device, bank = context.device, context.reference_bank
    references = bank.references
    assert references is not None
    if context.workspace.has(name):
        module.load_state_dict(context.workspace.load(name, device))
    generator = base.load(context.workspace, device)
    flux = TrainableFlux(generator.transformer, autoencoder.LATENT_SIZE, TEXT_TOKENS, compiled=device.type == "cuda")
    verdict = IdentityLoss(context.vae, context.recogniser, context.detector, bank)
    n, faces = (2, 1) if recipe.smoke else (64, 64)
    unguided, somebody = torch.ones(n, device=device), torch.zeros(faces, dtype=torch.bool, device=device)

    def flow() -> Tensor:
        batch = base.draw_batch(bank, n)
        drop = torch.rand(n, device=device) < _UNCONDITIONAL
        with base.mixed_precision(device):
            with torch.no_grad():
                prompt = generator.text(bank.captions.pick(batch.index))
            attached = attach(references, bank.another(batch.index), drop)
            velocity = flux.velocity(batch.noisy, prompt, batch.times, unguided, **attached)
        return flow_loss(velocity, batch.clean, batch.noise, batch.weights)

    def identity() -> tuple[Tensor, Tensor]:
        index = bank.draw(faces)
        with base.mixed_precision(device):
            with torch.no_grad():
                prompt = generator.text(bank.captions.pick(index))
            attached = attach(references, bank.another(index), somebody)

        def velocity(noisy: Tensor, times: Tensor, guidance: Tensor) -> Tensor:
            with base.mixed_precision(device):
                return flux.velocity(noisy, prompt, times, guidance, **attached)

        return verdict(index, velocity)

    def loss(progress: float) -> Losses:
        learnt = flow()
        if progress < counts.begins and not recipe.smoke:
            return {"loss": learnt, "flow": learnt.detach()}
        recognised, cosine = identity()
        return {"loss": learnt + counts.weight * recognised, "flow": learnt.detach(), "cosine": cosine}

    outcome = optimise(name, module, recipe, context.workspace, loss, rounded=rounded)
    context.workspace.save(name, module.state_dict(), halved=True)
    return outcome
