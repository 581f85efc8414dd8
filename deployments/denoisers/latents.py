"""FLUX's latents: noise from a seed, 2 x 2 patches as tokens, and pixels on either side of the VAE. Pure functions; knows no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from deployments.contracts import RGB

PATCH = 2
"""Latent pixels along each side of a token (diffusers, pipelines/flux/pipeline_flux.py: _pack_latents)."""


@dataclass(frozen=True)
class Grid:
    """The tokens of one picture: rows x columns, each a patch of `channels` latent channels."""

    rows: int
    columns: int
    channels: int

    @property
    def tokens(self) -> int:
        return self.rows * self.columns


def noise(grid: Grid, generator: torch.Generator) -> Tensor:
    """[1, tokens, 4 * channels] fp32 on the CPU: what stock FluxPipeline draws in fp32 from a generator on the CPU, on any device."""
    return pack(torch.randn(1, grid.channels, PATCH * grid.rows, PATCH * grid.columns, generator=generator))


def pack(latents: Tensor) -> Tensor:
    """[n, c, 2 rows, 2 columns] -> [n, rows * columns, 4 c]."""
    patches: Tensor = latents.unflatten(-1, (-1, PATCH)).unflatten(-3, (-1, PATCH))
    return patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def unpack(tokens: Tensor, grid: Grid) -> Tensor:
    """[n, rows * columns, 4 c] -> [n, c, 2 rows, 2 columns]."""
    patches: Tensor = tokens.unflatten(1, (grid.rows, grid.columns)).unflatten(-1, (grid.channels, PATCH, PATCH))
    return patches.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def positions(grid: Grid) -> Tensor:
    """[tokens, 3] fp32: 0, row, column. In bf16 a row beyond 256 would be rounded to its neighbour."""
    rows, columns = torch.meshgrid(torch.arange(grid.rows), torch.arange(grid.columns), indexing="ij")
    return torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1).float()


def from_picture(picture: RGB) -> Tensor:
    """[H, W, 3] uint8 -> what an encoder reads, [1, 3, H, W] fp32 in -1..1, on the CPU."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_picture(decoded: Tensor) -> RGB:
    """The decoder's [1, 3, H, W] in -1..1 -> [H, W, 3] uint8."""
    pixels = ((decoded[0].float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return cast(RGB, pixels.permute(1, 2, 0).contiguous().cpu().numpy())
