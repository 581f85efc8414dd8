"""The identity loss of PuLID (Guo et al. 2024, section 3.2): draw in a few steps, decode, and ask the recogniser whose face it is.

The picture is the generator's own, drawn from noise with gradients through every step (as in "Directly Fine-Tuning Diffusion Models
on Differentiable Rewards", Clark et al. 2024). A picture that was noised and denoised would say little: its noise still
holds the face, and any adapter scores well.
"""

from __future__ import annotations

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


class IdentityLoss:
    def __init__(self, vae: AutoencoderKL, recogniser: nn.Module, detector: Detector, bank: Bank) -> None:
        assert bank.references is not None, "the identity loss needs a bank with references"
        self.vae, self.recogniser, self.detector, self.bank = vae, recogniser, detector, bank
        each = F.normalize(bank.references.embedding.float(), dim=-1).view(bank.per_person, bank.people, -1)
        self.centroids = F.normalize(each.mean(0), dim=-1)

    def __call__(self, index: Tensor, velocity: Velocity) -> tuple[Tensor, Tensor]:
        """(loss, mean cosine) of pictures of the indexed people [n], drawn by velocity(noisy, times [n], guidance [n])."""
        picture = autoencoder.decode(self.vae, drawn(velocity, len(index), index.device)).float()
        points, evidence = clearest_face(self.detector, picture)
        # The crop wavers and is damaged a little, so that no pattern in fixed pixels can please the recogniser.
        face = crop(picture, arcface_grid(unsure(points.detach(), DETECTION_ERROR), REFERENCE_SIZE_PX))
        face = blurred(tinted(face, _TINT))
        with mixed_precision(picture.device):
            found = self.recogniser(face)
        cosine = (F.normalize(found.float(), dim=-1) * self.centroids[self.bank.person(index)]).sum(-1)
        return (1 - cosine).mean() + _FACE_WEIGHT * F.softplus(-evidence).mean(), cosine.detach().mean()


def drawn(velocity: Velocity, n: int, device: torch.device) -> Tensor:
    """Normalised latents [n, 16, h, w] by Euler's method in a random number of steps, at random guidance, from noise."""
    steps = int(torch.randint(_STEPS[0], _STEPS[1] + 1, ()))
    sigmas = shifted(torch.linspace(1, 0, steps + 1)).tolist()
    weakest, strongest = _GUIDANCE
    guidance = weakest + (strongest - weakest) * torch.rand(n, device=device)
    side = autoencoder.LATENT_SIZE
    x = torch.randn(n, (side // 2) ** 2, flux_config()["in_channels"], device=device)
    for now, following in zip(sigmas[:-1], sigmas[1:], strict=True):
        x = x + (following - now) * velocity(x, torch.full((n,), now, device=device), guidance).float()
    return unpack(x, side, side)
