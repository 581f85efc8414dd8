"""The identity loss of PuLID (Guo et al. 2024, section 3.2): draw in a few steps, decode, and ask the recogniser whose face it is.

The picture is the generator's own, drawn from noise with gradients through every step (as in "Directly Fine-Tuning Diffusion Models
on Differentiable Rewards", Clark et al. 2024). A picture that was noised and denoised would say little: its noise still
holds the face, and any adapter scores well.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.mini.faces.crops import DETECTION_ERROR, unsure
from training.mini.faces.degradations import blurred, tinted
from training.mini.faces.detector import Detector, clearest_face
from training.mini.flux_folder import flux_config
from training.mini.generator import autoencoder
from training.mini.generator.bank import REFERENCE_SIZE_PX, Bank, crop
from training.mini.generator.base import mixed_precision
from training.mini.generator.flow import shifted, unpack
from training.mini.generator.forward import Velocity
from training.mini.world.landmarks import arcface_grid

_STEPS = 4, 7
"""Fewest and most steps of a drawing: all that gradients can be afforded for, and enough to be like twenty."""
_GUIDANCE = 1.0, 4.0
_FACE_WEIGHT = 0.2
"""Of the detector's doubt that there is a face at all. Where faceless pictures cost nothing, the generator learns to draw those."""
_TINT = 0.06
_LEARNING_STEPS = 3
"""Steps at the end through which gradients run (DRaFT-K of the paper). The first ones lay out the picture, which is not a face's to say."""
_HEAD_REACH = 3.4
"""Half the side of the square around a head, in distances from the eyes to the mouth: hair included."""


class IdentityLoss:
    def __init__(self, vae: AutoencoderKL, recogniser: nn.Module, detector: Detector, bank: Bank) -> None:
        assert bank.references is not None, "the identity loss needs a bank with references"
        self.vae, self.recogniser, self.detector, self.bank = vae, recogniser, detector, bank
        each = F.normalize(bank.references.embedding.float(), dim=-1).view(bank.per_person, bank.people, -1)
        self.centroids = F.normalize(each.mean(0), dim=-1)

    def __call__(self, index: Tensor, velocity: Velocity, unconditioned: Velocity) -> Judged:
        """Of pictures of the indexed people [n], drawn by velocity, beside those that `unconditioned` draws of the same noise."""
        plan = Drawing.random(len(index), index.device)
        latents = plan.by(velocity)
        with torch.no_grad():
            anyone = plan.by(unconditioned)
        picture = autoencoder.decode(self.vae, latents).float()
        points, evidence = clearest_face(self.detector, picture)
        # The crop wavers and is damaged a little, so that no pattern in fixed pixels can please the recogniser.
        face = crop(picture, arcface_grid(unsure(points.detach(), DETECTION_ERROR), REFERENCE_SIZE_PX))
        face = blurred(tinted(face, _TINT))
        with mixed_precision(picture.device):
            found = self.recogniser(face)
        cosine = (F.normalize(found.float(), dim=-1) * self.centroids[self.bank.person(index)]).sum(-1)
        elsewhere = 1 - _head(points.detach(), latents.shape[-1])
        strayed = ((latents - anyone) ** 2 * elsewhere[:, None]).mean()
        return Judged((1 - cosine).mean() + _FACE_WEIGHT * F.softplus(-evidence).mean(), strayed, cosine.detach().mean())


@dataclass(frozen=True, eq=False)
class Judged:
    """loss: of the recogniser, and of the detector's doubt; strayed: mean square by which latents changed outside the head, PuLID's
    alignment (section 3.2: an identity should change the face and leave the rest); cosine: mean, for the report."""

    loss: Tensor
    strayed: Tensor
    cosine: Tensor


@dataclass(frozen=True, eq=False)
class Drawing:
    """noise: [n, tokens, 64]; guidance: [n]; sigmas: from 1 to 0."""

    noise: Tensor
    guidance: Tensor
    sigmas: list[float]

    @classmethod
    def random(cls, n: int, device: torch.device) -> Drawing:
        steps = int(torch.randint(_STEPS[0], _STEPS[1] + 1, ()))
        weakest, strongest = _GUIDANCE
        guidance = weakest + (strongest - weakest) * torch.rand(n, device=device)
        noise = torch.randn(n, (autoencoder.LATENT_SIZE // 2) ** 2, flux_config()["in_channels"], device=device)
        return cls(noise, guidance, shifted(torch.linspace(1, 0, steps + 1)).tolist())

    def by(self, velocity: Velocity) -> Tensor:
        """Normalised latents [n, 16, h, w] by Euler's method, with gradients through the last steps."""
        x = self.noise
        steps = len(self.sigmas) - 1
        for step, (now, following) in enumerate(zip(self.sigmas[:-1], self.sigmas[1:], strict=True)):
            with torch.set_grad_enabled(torch.is_grad_enabled() and step >= steps - _LEARNING_STEPS):
                x = x + (following - now) * velocity(x, torch.full_like(self.guidance, now), self.guidance).float()
        return unpack(x, autoencoder.LATENT_SIZE, autoencoder.LATENT_SIZE)


def _head(points: Tensor, side: int) -> Tensor:
    """[n, side, side]: 1 within the head and its hair, around the five points [n, 5, 2] in picture coordinates."""
    eyes, mouth = points[:, :2].mean(1), points[:, 3:].mean(1)
    centre, reach = (eyes + mouth) / 2, _HEAD_REACH * (mouth - eyes).norm(dim=-1)
    at = (torch.arange(side, device=points.device) + 0.5) / side * 2 - 1
    near = (at - centre[..., None]).abs() < reach[:, None, None]  # [n, 2, side]
    inside: Tensor = near[:, 1, :, None] & near[:, 0, None, :]
    return inside.float()
