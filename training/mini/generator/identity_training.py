"""What the stages `pulid`, `ip-adapter` and `instantx` share: an identity adapter learns on a frozen generator.

Two losses. The flow's: the reference is always another picture of the person, so nothing can be copied; or, instead, the difference from
what an adapter that was trained before says (`teacher`). And the recogniser's verdict on pictures that the generator draws with the
adapter attached (identity_loss.py).
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
from training.mini.generator.forward import Prompt, TrainableFlux
from training.mini.generator.identity_loss import IdentityLoss, Judged
from training.mini.generator.text import TEXT_TOKENS
from training.mini.optimise import Losses, Outcome, Recipe, optimise

Attach = Callable[[References, Tensor, Tensor], dict[str, Any]]
"""(references, index of each item's reference [n], drop [n]: condition on nobody) -> arguments of TrainableFlux.velocity."""

_UNCONDITIONAL = 0.05
_STRANGERS = 0.5
"""Share of a teacher's lessons about somebody else than the picture shows. PuLID's velocity differs there from the generator's own by 0.40
(mean square, 16 cases), and by 0.10 where the noise holds the right face. Who has drawn half a wrong face must find the way back."""


@dataclass(frozen=True)
class Verdict:
    """How the losses count against one another.

    weight: of the recogniser's verdict, beside the flow's loss. alignment: of what changed outside the head; without it an adapter
    that reaches into every block finds patterns that please the recogniser and are no face. begins: progress before which the adapter
    learns from the flow alone, where it begins from nothing. guidance: how many times over what a person adds to the prompt is
    learnt (see `from_data` below); emphasis: of a face's tokens in the flow's loss; pictures: of one step of it.
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
    teacher: Attach | None = None,
) -> Outcome:
    """Trains `module` under the stage's name and saves its state under it; goes on from that state where it exists.

    teacher: of an adapter that is trained and frozen; `module` then learns its velocity instead of the data's (distillation). That is a
    signal without noise, and a dense one: of another picture of the person the data say little that the noisy picture does not.
    """
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
    somebody = torch.zeros(faces, dtype=torch.bool, device=device)

    def flow() -> Tensor:
        batch = base.draw_batch(bank, n, counts.emphasis)
        drop = torch.rand(n, device=device) < (_UNCONDITIONAL if teacher is None else 0.0)
        scales = base.guidance_scales(n, device)
        person = batch.index if teacher is None else _or_strangers(batch.index)
        with base.mixed_precision(device):
            with torch.no_grad():
                prompt = generator.text(bank.captions.pick(batch.index))
                if teacher is None:
                    target = from_data(flux, batch, prompt, scales, counts.guidance * (~drop).float())
                else:  # which sees the person's close-up, their best picture
                    taught = teacher(references, bank.person(person), drop)
                    target = flux.velocity(batch.noisy, prompt, batch.times, scales, **taught).float()
            attached = attach(references, bank.another(person), drop)
            velocity = flux.velocity(batch.noisy, prompt, batch.times, scales, **attached)
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


def from_data(flux: TrainableFlux, batch: base.Batch, prompt: Prompt, scales: Tensor, strength: Tensor) -> Tensor:
    """What the person adds to the prompt, `strength` [n] times over: guidance, distilled from the data alone (Meng et al. 2023 take it
    from a teacher; here the difference between a picture's own velocity and the generator's is right on average)."""
    plain = flux.velocity(batch.noisy, prompt, batch.times, torch.ones_like(scales)).float()
    anyone = flux.velocity(batch.noisy, prompt, batch.times, scales).float()
    return anyone + strength[:, None, None] * (batch.noise - batch.clean - plain)


def _or_strangers(index: Tensor) -> Tensor:
    """Of each item its own index, or, for a share of them, its neighbour's."""
    return torch.where(torch.rand(index.shape, device=index.device) < _STRANGERS, index.roll(1), index)
