"""The identity loss of PuLID (Guo et al. 2024, section 3.2), at one step: decode the face that a velocity implies, and ask the recogniser.

Only a window around the face is decoded; the rest of the picture says nothing of who it is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.mini.generator import autoencoder
from training.mini.generator.bank import REFERENCE_SIZE_PX, Bank, crop
from training.mini.generator.base import Batch, mixed_precision
from training.mini.generator.flow import predicted_clean, sample_times, unpack
from training.mini.world.canvas import Grid
from training.mini.world.landmarks import arcface_grid

_WINDOW = 32
"""Latents: 128 px, which holds the largest face crop of the world (about 110 px)."""
_TIMES = 0.4, 0.95
"""Before 0.4 the noisy picture still holds the face, and any adapter scores well; after 0.95 there is not even its place."""


def times_with_faces(n: int, faces: int, device: torch.device) -> Tensor:
    """[n] training times, the first `faces` of them where the face is decided, for the identity loss."""
    first, last = _TIMES
    return torch.cat([first + (last - first) * torch.rand(faces, device=device), sample_times(n - faces, device)])


class IdentityLoss:
    def __init__(self, vae: AutoencoderKL, recogniser: nn.Module, bank: Bank) -> None:
        assert bank.references is not None, "the identity loss needs a bank with references"
        self.vae, self.recogniser, self.bank = vae, recogniser, bank
        each = F.normalize(bank.references.embedding.float(), dim=-1).view(bank.per_person, bank.people, -1)
        self.centroids = F.normalize(each.mean(0), dim=-1)

    def __call__(self, batch: Batch, velocity: Tensor, faces: int) -> tuple[Tensor, Tensor]:
        """(loss, mean cosine) of the first `faces` items."""
        index, times = batch.index[:faces], batch.times[:faces]
        clean = predicted_clean(batch.noisy[:faces], velocity[:faces].float(), times)
        latents = unpack(clean, autoencoder.LATENT_SIZE, autoencoder.LATENT_SIZE)
        grid = arcface_grid(self.bank.landmarks[index], REFERENCE_SIZE_PX)
        windows, window_grid = _windows(latents, grid)
        with mixed_precision(latents.device):
            found = self.recogniser(crop(autoencoder.decode(self.vae, windows), window_grid))
        cosine = (F.normalize(found.float(), dim=-1) * self.centroids[self.bank.person(index)]).sum(-1)
        return (1 - cosine).mean(), cosine.detach().mean()


def _windows(latents: Tensor, grid: Grid) -> tuple[Tensor, Grid]:
    """Cuts a window of latents around each grid's centre; the grid comes back in the window's own coordinates."""
    n, _, height, width = latents.shape
    half = height / 2
    starts = [((g.mean((1, 2)) + 1) * half - _WINDOW / 2).round().clamp(0, height - _WINDOW).long() for g in (grid.y, grid.x)]
    span = torch.arange(_WINDOW, device=latents.device)
    rows, columns = (start[:, None] + span for start in starts)
    cut = latents[torch.arange(n, device=latents.device)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    top, left = (start.view(-1, 1, 1).float() for start in starts)
    x = ((grid.x + 1) * half - left) / _WINDOW * 2 - 1
    y = ((grid.y + 1) * half - top) / _WINDOW * 2 - 1
    return cut.permute(0, 3, 1, 2), Grid(x, y, grid.pixel * height / _WINDOW)
