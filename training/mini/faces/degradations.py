"""What happens to a face between the drawing and the network: smearing, low resolution, compression, colour, noise.

The networks judge generated pictures, so they must see through a generator's blur and wobble, and must not see more in the
renderer's perfect edges than is there. Batched, on any device, from the device's own random generator. Knows no labels: nothing
here moves a feature by more than `wobbled` says.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor


def degraded(pictures: Tensor, wobble: float = 0.012, colour: float = 0.06) -> Tensor:
    """pictures [n, 3, h, w] in -1..1, h and w divisible by 8 -> the same, each with its own random mixture of damages.

    wobble: largest displacement of a feature as a share of the side (0: none). colour: spread of gain and offset per channel.
    """
    x = wobbled(pictures, wobble) if wobble else pictures
    x = coarsened(blurred(x))
    x = compressed(tinted(x, colour))
    noise = torch.randn_like(x) * (0.06 * _share(x) ** 2)
    return (x + noise).clamp(-1, 1)


def wobbled(pictures: Tensor, amount: float) -> Tensor:
    """Bends each picture by a smooth random field of at most about `amount` of its side, as a generator misplaces features."""
    n, _, h, w = pictures.shape
    field = (torch.rand(n, 2, 5, 5, device=pictures.device) - 0.5) * (4 * amount) * _share(pictures)
    field = F.interpolate(field, size=(h, w), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
    still = F.affine_grid(torch.eye(2, 3, device=pictures.device).expand(n, 2, 3), [n, 1, h, w], align_corners=False)
    return F.grid_sample(pictures, still + field, mode="bilinear", padding_mode="border", align_corners=False)


def blurred(pictures: Tensor) -> Tensor:
    """Half of the pictures stay sharp; the others are mixed with a Gaussian of one or two pixels."""
    sigma_1 = _gaussian(pictures, 1.0)
    sigma_2 = _gaussian(sigma_1, math.sqrt(3.0))  # variances add: 1 + 3 = 2 squared
    choice = _share(pictures)
    mixed = torch.where(choice > 0.75, torch.lerp(sigma_1, sigma_2, _share(pictures)), torch.lerp(pictures, sigma_1, _share(pictures)))
    return torch.where(choice > 0.5, mixed, pictures)


def coarsened(pictures: Tensor) -> Tensor:
    """A quarter of the batch is drawn at 0.35 to 0.8 of the resolution, one factor a call, and enlarged again."""
    part = pictures.shape[0] // 4
    if not part:
        return pictures
    h, w = pictures.shape[2:]
    factor = 0.35 + 0.45 * float(torch.rand(()))
    small = F.interpolate(pictures[:part], size=(max(8, int(h * factor)), max(8, int(w * factor))), mode="bilinear", antialias=True)
    return torch.cat([F.interpolate(small, size=(h, w), mode="bilinear"), pictures[part:]])


def tinted(pictures: Tensor, spread: float) -> Tensor:
    """Gain and offset per channel, and a common gain: another white balance, another exposure."""
    n, device = pictures.shape[0], pictures.device
    gain = 1 + (torch.rand(n, 3, 1, 1, device=device) * 2 - 1) * spread + (torch.rand(n, 1, 1, 1, device=device) * 2 - 1) * spread
    return pictures * gain + (torch.rand(n, 3, 1, 1, device=device) * 2 - 1) * spread


def compressed(pictures: Tensor) -> Tensor:
    """A quarter of the batch loses what JPEG loses: 8x8 cosine coefficients rounded to steps that grow with the frequency."""
    n = pictures.shape[0]
    part = slice(n - n // 4, n)
    x = pictures[part]
    if not x.shape[0]:
        return pictures
    h, w = x.shape[2:]
    basis = _cosines().to(x)
    blocks = x.reshape(x.shape[0], 3, h // 8, 8, w // 8, 8).transpose(3, 4)
    frequency = torch.arange(8, device=x.device, dtype=x.dtype)
    # A flat block of brightness 1 has the coefficient 8; steps of 0.08 to 0.5 there are about JPEG's qualities 90 to 40.
    step = (0.08 + 0.25 * torch.rand(x.shape[0], 1, 1, 1, 1, 1, device=x.device)) * (1 + 0.35 * (frequency[:, None] + frequency))
    coefficients = (basis @ blocks @ basis.T / step).round() * step
    restored = (basis.T @ coefficients @ basis).transpose(3, 4).reshape(x.shape)
    return torch.cat([pictures[: part.start], restored])


def _share(pictures: Tensor) -> Tensor:
    """One random number in 0..1 a picture, [n, 1, 1, 1]."""
    return torch.rand(pictures.shape[0], 1, 1, 1, device=pictures.device)


def _gaussian(pictures: Tensor, sigma: float) -> Tensor:
    radius = math.ceil(2 * sigma)
    at = torch.arange(-radius, radius + 1, device=pictures.device, dtype=pictures.dtype)
    kernel = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).expand(3, 1, 1, -1)
    x = F.conv2d(F.pad(pictures, (radius, radius, 0, 0), mode="replicate"), kernel, groups=3)
    return F.conv2d(F.pad(x, (0, 0, radius, radius), mode="replicate"), kernel.transpose(2, 3), groups=3)


@functools.cache
def _cosines() -> Tensor:
    """The orthonormal 8-point DCT-II matrix."""
    k, i = torch.arange(8.0)[:, None], torch.arange(8.0)[None, :]
    matrix = torch.cos(math.pi * (2 * i + 1) * k / 16) / 2
    matrix[0] /= math.sqrt(2)
    return matrix
