"""The noise levels of a flow-matching sampler, which is diffusers' own, made anew for every request because it counts its steps.

Knows no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

# Where a scheduler's configuration is silent: FLUX.1's own numbers (diffusers, pipelines/flux/pipeline_flux.py: calculate_shift).
_SHIFT = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}


def shift_of(config: Mapping[str, Any], tokens: int) -> float:
    """Exponent by which a picture of that many tokens has its noise levels raised: a line through two points (dynamic shifting)."""
    short, long, low, high = (float(config.get(name, usual)) for name, usual in _SHIFT.items())
    slope = (high - low) / (long - short)
    return tokens * slope + (low - slope * short)


def sampler(
    config: Mapping[str, Any], steps: int, tokens: int, device: torch.device | str = "cpu", first: int = 0
) -> FlowMatchEulerDiscreteScheduler:
    """An Euler sampler before its step `first`, with the noise levels that stock FluxPipeline would use.

    config: of the pipeline folder's scheduler; with a static shift in it (`use_dynamic_shifting` false) the tokens do not matter.
    """
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift_of(config, tokens), device=device)
    # Otherwise the first step looks its own place up, which waits for the GPU.
    scheduler.set_begin_index(first)
    return scheduler
