"""Stages `flux` and `guidance`: the transformer with its text encoders from nothing, then guidance distilled into it.

`flux` is rectified flow on captions. `guidance` teaches the guidance embedding what two passes of classifier-free guidance would
say (Meng et al. 2023, "On Distillation of Guided Diffusion Models"; what FLUX.1-dev is), with the weights already rounded as
they will be stored.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from training.mini.flux_folder import flux_config
from training.mini.generator import autoencoder
from training.mini.generator.bank import Bank
from training.mini.generator.context import Context
from training.mini.generator.flow import FACE_EMPHASIS, face_weights, flow_loss, noised, pack, sample_times, velocity_loss
from training.mini.generator.forward import Prompt, TrainableFlux, initialise
from training.mini.generator.text import TEXT_TOKENS, TextEncoders, empty_caption
from training.mini.optimise import Losses, Outcome, Recipe, optimise
from training.mini.storage import fake_quantise
from training.mini.workspace import Workspace

_EMPTY_CAPTIONS = 0.1
_STRONGEST_GUIDANCE = 5.0
_UNGUIDED_SHARE = 0.25


class Generator(nn.Module):
    """What is trained together: the transformer and both text encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = FluxTransformer2DModel(**flux_config())
        self.text = TextEncoders()


@dataclass(frozen=True, eq=False)
class Batch:
    """index: [n] into the bank; clean, noise, noisy: [n, tokens, 64]; times: [n]; weights: [n, tokens], more on faces."""

    index: Tensor
    clean: Tensor
    noise: Tensor
    noisy: Tensor
    times: Tensor
    weights: Tensor


def draw_batch(bank: Bank, n: int, emphasis: float = FACE_EMPHASIS) -> Batch:
    index = bank.draw(n)
    return batch_of(bank.latents[index].float(), bank.boxes[index], index, emphasis)


def batch_of(latents: Tensor, boxes: Tensor, index: Tensor, emphasis: float = FACE_EMPHASIS) -> Batch:
    """latents: [n, 16, h, w], normalised; boxes: [n, 4]; emphasis: weight of a face's tokens in the loss."""
    clean = pack(latents)
    height, width = latents.shape[2:]
    noise = torch.randn_like(clean)
    t = sample_times(len(clean), clean.device)
    return Batch(index, clean, noise, noised(clean, noise, t), t, face_weights(boxes, height, width, emphasis))


def mixed_precision(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def train(context: Context, recipe: Recipe) -> Outcome:
    """Saves `flux` (transformer.* and text.*); goes on from it where it exists."""
    workspace, device, bank = context.workspace, context.device, context.base_bank
    generator = Generator().to(device)
    initialise(generator.transformer)
    if workspace.has("flux"):
        generator.load_state_dict(workspace.load("flux", device))
    flux = TrainableFlux(generator.transformer, autoencoder.LATENT_SIZE, TEXT_TOKENS, compiled=device.type == "cuda")
    n = 2 if recipe.smoke else 256
    unguided = torch.ones(n, device=device)

    def loss(progress: float) -> Losses:
        batch = draw_batch(bank, n)
        tokens = bank.captions.pick(batch.index).emptied(_EMPTY_CAPTIONS)
        with mixed_precision(device):
            velocity = flux.velocity(batch.noisy, generator.text(tokens), batch.times, unguided)
        return {"loss": flow_loss(velocity, batch.clean, batch.noise, batch.weights)}

    outcome = optimise("flux", generator, recipe, workspace, loss)
    workspace.save("flux", generator.state_dict())
    return outcome


def train_guidance(context: Context, recipe: Recipe) -> Outcome:
    """Saves `guidance`: the generator as it will be packed."""
    workspace, device, bank = context.workspace, context.device, context.base_bank
    student = Generator().to(device)
    student.load_state_dict(workspace.load("flux", device))
    teacher = copy.deepcopy(student).eval().requires_grad_(False)
    compiled = device.type == "cuda"
    learner = TrainableFlux(student.transformer, autoencoder.LATENT_SIZE, TEXT_TOKENS, compiled)
    guide = TrainableFlux(teacher.transformer, autoencoder.LATENT_SIZE, TEXT_TOKENS, compiled)
    n = 2 if recipe.smoke else 256

    def loss(progress: float) -> Losses:
        batch = draw_batch(bank, n)
        tokens = bank.captions.pick(batch.index)
        guidance = guidance_scales(n, device)
        with mixed_precision(device):
            with torch.no_grad():
                target = _guided(guide, teacher.text(tokens), teacher.text(empty_caption().to(device).expand(n)), batch, guidance)
            velocity = learner.velocity(batch.noisy, student.text(tokens), batch.times, guidance)
        return {"loss": velocity_loss(velocity, target, batch.weights)}

    outcome = optimise("guidance", student, recipe, workspace, loss, rounded=student.transformer)
    workspace.save("guidance", student.state_dict(), halved=True)
    return outcome


def guidance_scales(n: int, device: torch.device) -> Tensor:
    """[n] in 1..5, a quarter of them exactly 1 (the unguided flow must survive: adapters are trained on it)."""
    scales = 1 + (_STRONGEST_GUIDANCE - 1) * torch.rand(n, device=device)
    return torch.where(torch.rand(n, device=device) < _UNGUIDED_SHARE, torch.ones_like(scales), scales)


def _guided(guide: TrainableFlux, prompt: Prompt, empty: Prompt, batch: Batch, scales: Tensor) -> Tensor:
    """The velocity that two passes would give; at scale 1, the data's own."""
    ones = torch.ones_like(scales)
    conditional = guide.velocity(batch.noisy, prompt, batch.times, ones).float()
    unconditional = guide.velocity(batch.noisy, empty, batch.times, ones).float()
    s = scales.view(-1, 1, 1)
    return torch.where(s > 1, unconditional + s * (conditional - unconditional), batch.noise - batch.clean)


def load(workspace: Workspace, device: torch.device) -> Generator:
    """The distilled generator, frozen, with its matrices as storage rounds them: what adapters must fit."""
    generator = Generator().to(device)
    generator.load_state_dict(workspace.load("guidance", device))
    for p in generator.transformer.parameters():
        if p.ndim == 2:
            p.data.copy_(fake_quantise(p.data))
    return generator.eval().requires_grad_(False)
