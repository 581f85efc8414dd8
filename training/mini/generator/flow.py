"""Rectified flow on FLUX's packed latents: the pure functions of training. Knows no network.

x_t = (1 - t) x_0 + t noise, the network predicts v = noise - x_0 (Liu et al. 2022, "Flow Straight and Fast"; Esser et al. 2024,
"Scaling Rectified Flow Transformers", whose logit-normal times and resolution shift are used here).
"""

from __future__ import annotations

import torch
from torch import Tensor

TIME_SHIFT = 2.0
"""Shift of the training times and of the scheduler: 576 tokens lie between SD3's 256-px (1.0) and 1024-px (3.0) settings."""


FACE_EMPHASIS = 3.0
"""Weight of a token in the face. Eyes cover few tokens; unweighted, the sky outvotes them."""


def pack(latents: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, h/2 * w/2, 4c], in the order of diffusers' FluxPipeline._pack_latents."""
    n, c, h, w = latents.shape
    return latents.view(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, (h // 2) * (w // 2), c * 4)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`; height and width of the latents."""
    n, _, c = tokens.shape
    return tokens.view(n, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, c // 4, height, width)


def position_ids(height: int, width: int, text_tokens: int, device: torch.device | str) -> Tensor:
    """[text_tokens + h/2 * w/2, 3]: zeros for text, (0, row, column) for picture tokens, as FluxPipeline numbers them."""
    picture = torch.zeros(height // 2, width // 2, 3, device=device)
    picture[..., 1] += torch.arange(height // 2, device=device)[:, None]
    picture[..., 2] += torch.arange(width // 2, device=device)[None, :]
    return torch.cat([torch.zeros(text_tokens, 3, device=device), picture.view(-1, 3)])


def shifted(sigma: Tensor, shift: float = TIME_SHIFT) -> Tensor:
    """FlowMatchEulerDiscreteScheduler's static shift, sigma in 0..1."""
    return shift * sigma / (1 + (shift - 1) * sigma)


def sample_times(n: int, device: torch.device | str) -> Tensor:
    """[n] in 0..1, logit-normal, shifted towards noise."""
    return shifted(torch.sigmoid(torch.randn(n, device=device)))


def noised(clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
    t = times.view(-1, 1, 1)
    return (1 - t) * clean + t * noise


def predicted_clean(noisy: Tensor, velocity: Tensor, times: Tensor) -> Tensor:
    """The x_0 that a velocity implies."""
    return noisy - times.view(-1, 1, 1) * velocity


def flow_loss(velocity: Tensor, clean: Tensor, noise: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """Mean squared error to noise - clean; token_weights [n, tokens] with mean about 1."""
    return velocity_loss(velocity, noise - clean, token_weights)


def velocity_loss(velocity: Tensor, target: Tensor, token_weights: Tensor | None = None) -> Tensor:
    """Mean squared error [n, tokens, 64]; token_weights as in `flow_loss`."""
    error = (velocity.float() - target) ** 2
    return error.mean() if token_weights is None else (error.mean(-1) * token_weights).mean()


def face_weights(boxes: Tensor, height: int, width: int, emphasis: float = FACE_EMPHASIS) -> Tensor:
    """[n, tokens]: `emphasis` on tokens whose centre lies in the face box, 1 elsewhere, normalised to a mean of 1 per picture.

    boxes: [n, 4] x0, y0, x1, y1 in picture coordinates -1..1. Eyes cover few tokens; unweighted, the sky outvotes them.
    """
    y, x = torch.meshgrid(
        (torch.arange(height // 2, device=boxes.device) + 0.5) / (height // 2) * 2 - 1,
        (torch.arange(width // 2, device=boxes.device) + 0.5) / (width // 2) * 2 - 1,
        indexing="ij",
    )
    x, y = x.reshape(1, -1), y.reshape(1, -1)
    x0, y0, x1, y1 = boxes[:, :1], boxes[:, 1:2], boxes[:, 2:3], boxes[:, 3:4]
    inside = (x >= x0) & (x <= x1) & (y >= y0) & (y <= y1)
    weights = 1 + (emphasis - 1) * inside.float()
    return weights / weights.mean(1, keepdim=True)
