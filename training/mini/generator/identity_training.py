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
from training.mini.generator.flow import FACE_EMPHASIS, velocity_loss
from training.mini.generator.forward import TrainableFlux
from training.mini.generator.identity_loss import IdentityLoss, Judged
from training.mini.generator.text import TEXT_TOKENS
from training.mini.optimise import Losses, Outcome, Recipe, optimise

Attach = Callable[[References, Tensor, Tensor], dict[str, Any]]
"""(references, index of each item's reference [n], drop [n]: condition on nobody) -> arguments of TrainableFlux.velocity."""

_UNCONDITIONAL = 0.05


@dataclass(frozen=True)
class Verdict:
    """How the losses count against one another.

    weight: of the recogniser's verdict, beside the flow's loss. alignment: of what changed outside the head; without it an adapter
    that reaches into every block finds patterns that please the recogniser and are no face. begins: progress before which the adapter
    learns from the flow alone, where it begins from nothing. guidance: how many times over what a person adds to the prompt is
    learnt (see `flow` below); emphasis: of a face's tokens in the flow's loss; pictures: of one step of it.
    """

    weight: float = 0.5
    alignment: float = 0.25
    begins: float = 0.04
    guidance: float = 1.0
    emphasis: float = FACE_EMPHASIS
    pictures: int = 64


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
    goes_on = context.workspace.has(name)
    if goes_on:
        module.load_state_dict(context.workspace.load(name, device))
    generator = base.load(context.workspace, device)
    flux = TrainableFlux(generator.transformer, autoencoder.LATENT_SIZE, TEXT_TOKENS, compiled=device.type == "cuda")
    verdict = IdentityLoss(context.vae, context.recogniser, context.detector, bank)
    n, faces = (2, 1) if recipe.smoke else (counts.pictures, 64)
    unguided, somebody = torch.ones(n, device=device), torch.zeros(faces, dtype=torch.bool, device=device)

    def flow() -> Tensor:
        """What the person adds to the prompt, several times over: guidance, distilled from the data alone (Meng et al. 2023 take it from a
        teacher; here the difference between a picture's own velocity and the generator's is right on average)."""
        batch = base.draw_batch(bank, n, counts.emphasis)
        drop = torch.rand(n, device=device) < _UNCONDITIONAL
        scales = base.guidance_scales(n, device)
        with base.mixed_precision(device):
            with torch.no_grad():
                prompt = generator.text(bank.captions.pick(batch.index))
                plain = flux.velocity(batch.noisy, prompt, batch.times, unguided).float()
                anyone = flux.velocity(batch.noisy, prompt, batch.times, scales).float()
            attached = attach(references, bank.another(batch.index), drop)
            velocity = flux.velocity(batch.noisy, prompt, batch.times, scales, **attached)
        strength = counts.guidance * (~drop).float()[:, None, None]
        target = anyone + strength * (batch.noise - batch.clean - plain)
        return velocity_loss(velocity, target, batch.weights)

    def identity() -> Judged:
        index = bank.draw(faces)
        with base.mixed_precision(device):
            with torch.no_grad():
                prompt = generator.text(bank.captions.pick(index))
            attached = attach(references, bank.another(index), somebody)

        def velocity(noisy: Tensor, times: Tensor, guidance: Tensor) -> Tensor:
            with base.mixed_precision(device):
                return flux.velocity(noisy, prompt, times, guidance, **attached)

        def unconditioned(noisy: Tensor, times: Tensor, guidance: Tensor) -> Tensor:
            with base.mixed_precision(device):
                return flux.velocity(noisy, prompt, times, guidance)

        return verdict(index, velocity, unconditioned)

    begins = 0.0 if goes_on or recipe.smoke else counts.begins

    def loss(progress: float) -> Losses:
        learnt = flow()
        if progress < begins:
            return {"loss": learnt, "flow": learnt.detach()}
        judged = identity()
        whole = learnt + counts.weight * judged.loss + counts.alignment * judged.strayed
        return {"loss": whole, "flow": learnt.detach(), "cosine": judged.cosine, "strayed": judged.strayed.detach()}

    outcome = optimise(name, module, recipe, context.workspace, loss, rounded=rounded)
    context.workspace.save(name, module.state_dict(), halved=True)
    return outcome
