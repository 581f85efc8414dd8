"""The small models and the inputs for which goldens/ holds what a reference computed. The scripts that do so and the tests share them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor

from deployments.identity.eva_clip import EvaConfig
from deployments.identity.instantx_ip_adapter import InstantXConfig
from deployments.identity.pulid import SCALES, PuLIDConfig
from deployments.identity.xlabs_ip_adapter import XLabsConfig
from tests.named_weights import fill, named_tensor

# The reference taps blocks 4, 8, ... 20 whatever its size: hence so deep. The grids differ, so that positions are interpolated.
EVA = EvaConfig(image_size=28, patch_size=7, width=32, depth=21, heads=2, mlp_width=85, embed_dim=24, rope_grid=3)

# The reference has 1024 and 1280 written into its input layers.
PULID = PuLIDConfig(
    dim=32, depth=10, heads=2, head_dim=8, ff_mult=2, id_tokens=2, queries=4, output_dim=24, vision_tokens=3,
    ca_dim=32, ca_heads=2, ca_head_dim=12, double_interval=2, single_interval=4, num_double=3, num_single=5,
)  # fmt: skip
FLUX: dict[str, Any] = {
    "patch_size": 1, "in_channels": 8, "num_layers": 3, "num_single_layers": 5, "attention_head_dim": 16, "num_attention_heads": 2,
    "joint_attention_dim": 20, "pooled_projection_dim": 12, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
WEIGHTS = (0.75, 2.0)
STEPS = 5
GUIDANCE = 3.5
# What FLUX.1-dev's folder says of its schedule; the references have these numbers written into get_schedule.
SCHEDULE = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}

XLABS = XLabsConfig(image_dim=12, tokens=6, token_dim=16, dim=32, blocks=3)
IP_SCALES = (0.4, 1.0)
# Its text is as wide as FLUX's own; every block has a reader.
INSTANTX = InstantXConfig(image_dim=12, tokens=6, token_dim=20, dim=32, blocks=8)
# Each form of ours: the function of x-flux-comfyui's utils.py, and the begin_strength and end_strength at which it gives the same.
RAMPS = {
    "linear": ("LinearStrengthModel", 0.3, 0.92),
    "first_half": ("FirstHalfStrengthModel", 0.0, 1.0),
    "second_half": ("SecondHalfStrengthModel", 0.0, 1.0),
    "sigmoid": ("SigmoidStrengthModel", 0.5, 1.5),
}
# FLUX.1's number, and two others, even and odd.
RAMP_BLOCKS = (19, 8, 5)
# The forms that the node has for as few blocks as the small model's: it divides by the steps of half of them.
SMALL_RAMPS = ("linear", "sigmoid")


@dataclass(frozen=True)
class Denoising:
    """One run of the whole loop, in the reference's words: step numbers, of STEPS. weight None: no identity."""

    name: str
    weight: float | None = 1.0
    start_step: int = 0
    true_cfg: float = 1.0
    timestep_to_start_cfg: int = 1


DENOISINGS = (
    Denoising("nobody", weight=None),
    Denoising("identity", weight=0.75),
    Denoising("late_identity", start_step=2),
    Denoising("true_cfg", true_cfg=3.0, timestep_to_start_cfg=0),
    Denoising("delayed_true_cfg_and_identity", weight=1.5, start_step=1, true_cfg=2.5, timestep_to_start_cfg=3),
)


@dataclass(frozen=True)
class Steering:
    """One run of x-flux's whole loop, in its words; the adapter acts from the first step to the last, there being no window.

    ip_scale, neg_ip_scale: of the picture in the pass of the prompt, and of the other picture in that of the negative prompt.
    true_gs: 1 is off by arithmetic alone, x-flux makes the second pass all the same.
    """

    name: str
    ip_scale: float = 1.0
    neg_ip_scale: float = 1.0
    true_gs: float = 1.0
    timestep_to_start_cfg: int = 0


STEERINGS = (
    Steering("nobody", ip_scale=0.0),
    Steering("adapter", ip_scale=0.75),
    Steering("true_cfg", true_gs=3.5),
    Steering("true_cfg_with_a_fainter_negative", neg_ip_scale=0.25, true_gs=3.5),
    Steering("delayed_true_cfg", ip_scale=0.6, neg_ip_scale=0.5, true_gs=3.5, timestep_to_start_cfg=3),
)


def transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(**FLUX)
    fill(model)
    return model.eval()


def eva_input() -> Tensor:
    return named_tensor("pixels", 2, 3, EVA.image_size, EVA.image_size)


def encoder_input() -> tuple[Tensor, list[Tensor]]:
    """The condition and five states of two people."""
    condition = named_tensor("condition", 2, PULID.face_dim + PULID.vision_dim)
    return condition, [named_tensor(f"state_{index}", 2, PULID.vision_tokens, PULID.vision_width) for index in range(SCALES)]


def flux_input() -> dict[str, Any]:
    """Two calls at once: a picture of 3 x 2 tokens and four tokens of text."""
    rows = torch.tensor([[0.0, float(y), float(x)] for y in range(3) for x in range(2)])
    return {
        "hidden_states": named_tensor("picture", 2, len(rows), FLUX["in_channels"]),
        "encoder_hidden_states": named_tensor("text", 2, 4, FLUX["joint_attention_dim"]),
        "pooled_projections": named_tensor("pooled", 2, FLUX["pooled_projection_dim"]),
        "timestep": torch.tensor([0.25, 0.9]),
        "guidance": torch.tensor([1.0, 3.5]),
        "img_ids": rows,
        "txt_ids": torch.zeros(4, 3),
    }


def denoise_input() -> dict[str, Tensor]:
    """One picture of 3 x 2 tokens: the noise, prompt and negative prompt, the identity and nobody's."""
    return {
        "noise": named_tensor("noise", 1, 6, FLUX["in_channels"]),
        "positions": flux_input()["img_ids"],
        **{f"{which}states": named_tensor(f"{which}states", 1, 4, FLUX["joint_attention_dim"]) for which in ("", "negative_")},
        **{f"{which}pooled": named_tensor(f"{which}pooled", 1, FLUX["pooled_projection_dim"]) for which in ("", "negative_")},
        **{which: named_tensor(which, 1, PULID.queries, PULID.output_dim) for which in ("own", "nobody")},
    }


def image_embeds() -> dict[str, Tensor]:
    """What CLIP or SigLIP would say of two pictures, one a pass."""
    return {which: named_tensor(f"{which} picture's embedding", 1, XLABS.image_dim) for which in ("own", "negative")}
