"""Stage `autoencoder`: diffusers' AutoencoderKL on the world, 192 px to latents of 48 x 48 x 16, and the numbers that normalise them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from training.mini.flux_folder import vae_config
from training.mini.optimise import Losses, Outcome, Recipe, optimise
from training.mini.workspace import Workspace
from training.mini.world.canvas import Grid
from training.mini.world.identity import sample_identities
from training.mini.world.render import PICTURE_SIZE_PX, render
from training.mini.world.scene import Scene, sample_scenes

if TYPE_CHECKING:
    from training.mini.generator.context import Context

LATENT_SIZE = PICTURE_SIZE_PX // 4
_PATCH_PX = 96
_BATCHES_RENDERED_TOGETHER = 8
"""Painting is some two thousand small operations: many pictures at once cost little more than a few."""
_KL_WEIGHT = 1e-3
"""Large for an autoencoder: channels that the pictures don't need fall silent, and the flow has less noise to learn."""
_PEOPLE, _SEED = 8192, 300


def train(context: Context, recipe: Recipe) -> Outcome:
    """Saves `autoencoder` (weights, with `shift` and `scale` of the latents as two extra scalars)."""
    device, workspace = context.device, context.workspace
    vae = AutoencoderKL(**vae_config()).to(device, memory_format=torch.channels_last)
    patches = _patches(4 if recipe.smoke else 128, device)

    def forward(picture: Tensor) -> tuple[Tensor, Tensor]:
        posterior = vae.encode(picture).latent_dist
        latents = posterior.sample()
        return vae.decode(latents).sample.float(), posterior.kl().mean() / latents[0].numel()

    compiled = torch.compile(forward) if device.type == "cuda" else forward

    def loss(progress: float) -> Losses:
        picture = next(patches).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            restored, kl = compiled(picture)
        return _losses(restored, picture, kl)

    outcome = optimise("autoencoder", vae, recipe, workspace, loss)
    shift, scale = _normalisation(vae.eval(), 16 if recipe.smoke else 512, device)
    workspace.save("autoencoder", vae.state_dict() | {"shift": torch.tensor(shift), "scale": torch.tensor(scale)})
    return outcome


def load(workspace: Workspace, device: torch.device) -> AutoencoderKL:
    """The trained autoencoder, frozen, its config holding the measured scaling and shift factors."""
    state = workspace.load("autoencoder", device)
    shift, scale = float(state.pop("shift")), float(state.pop("scale"))
    vae = AutoencoderKL(**vae_config(scaling_factor=scale, shift_factor=shift)).to(device, memory_format=torch.channels_last)
    vae.load_state_dict({key: value.float() for key, value in state.items()})
    return vae.eval().requires_grad_(False)


def encode(vae: AutoencoderKL, picture: Tensor) -> Tensor:
    """[n, 3, h, w] in -1..1 -> normalised latents [n, 16, h/4, w/4], the posterior's mode."""
    with torch.autocast(picture.device.type, torch.bfloat16, enabled=picture.is_cuda):
        mode = vae.encode(picture.contiguous(memory_format=torch.channels_last)).latent_dist.mode()
    latents: Tensor = (mode.float() - vae.config.shift_factor) * vae.config.scaling_factor
    return latents


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Normalised latents -> [n, 3, h, w] in about -1..1; differentiable."""
    with torch.autocast(latents.device.type, torch.bfloat16, enabled=latents.is_cuda):
        raw = (latents / vae.config.scaling_factor + vae.config.shift_factor).contiguous(memory_format=torch.channels_last)
        picture: Tensor = vae.decode(raw).sample.float()
        return picture


def _patches(batch: int, device: torch.device) -> Iterator[Tensor]:
    """Endless batches of patches [batch, 3, 96, 96]."""
    everyone = sample_identities(_PEOPLE, _SEED)
    generator = torch.Generator().manual_seed(_SEED)
    n = batch * _BATCHES_RENDERED_TOGETHER
    while True:
        people = everyone[torch.randint(0, _PEOPLE, (n,), generator=generator)]
        with torch.no_grad():
            rendered = _patch(people.to(device), sample_scenes(n, generator).to(device))
        yield from rendered.split(batch)


def _patch(people: Tensor, scene: Scene) -> Tensor:
    """A 96-px window at full resolution: two of three near the head, where the detail is, the rest anywhere."""
    n, device = len(scene), people.device
    half = _PATCH_PX / PICTURE_SIZE_PX
    near = torch.rand(n, device=device) < 0.67
    spread = scene.head_size * 1.2
    centre = [
        torch.where(near, at + (torch.rand(n, device=device) - 0.5) * spread, torch.rand(n, device=device) * 2 - 1).clamp(
            -1 + half, 1 - half
        )
        for at in (scene.head_x, scene.head_y)
    ]
    window = Grid.whole(n, _PATCH_PX, device)
    grid = Grid(window.x * half + centre[0].view(-1, 1, 1), window.y * half + centre[1].view(-1, 1, 1), window.pixel * half)
    return render(people, scene, grid=grid)


def _losses(restored: Tensor, picture: Tensor, kl: Tensor) -> Losses:
    """Absolute, squared and edge errors; the last keeps eyelids and brows from being averaged away."""
    error = restored - picture
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    squared = (error**2).mean()
    loss = error.abs().mean() + 2 * squared + 0.5 * edges + _KL_WEIGHT * kl.float()
    return {"loss": loss, "psnr_db": 10 * torch.log10(4 / squared.detach()), "kl": kl.detach().float()}


@torch.no_grad()
def _normalisation(vae: AutoencoderKL, n: int, device: torch.device) -> tuple[float, float]:
    """Mean of n pictures' latents and 1 / their standard deviation, as FLUX's shift and scaling factors."""
    people, scenes = sample_identities(n, _SEED + 1, device), sample_scenes(n, _SEED + 1, device)
    parts = [index.to(device) for index in torch.arange(n).split(64)]
    pictures = [render(people[i], scenes.take(i)).contiguous(memory_format=torch.channels_last) for i in parts]
    modes = torch.cat([vae.encode(picture).latent_dist.mode() for picture in pictures])
    scale = 1 / float(modes.std())
    if not math.isfinite(scale):
        raise FloatingPointError("the autoencoder's latents are constant: it has learnt nothing; train it longer")
    return float(modes.mean()), scale
