"""The optimisers that a LoRA can be trained with, and the course of the learning rate. Knows no model.

AdamW with fp32 moments is the default: 8 bits save 0.8 GB for a LoRA of rank 32 on FLUX.1-dev, beside a base of 24 GB.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from deployments.errors import ProviderUnavailable
from training.settings import TrainingSettings


def optimiser_of(settings: TrainingSettings, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """Raises ProviderUnavailable, which names the package, for one whose package is not installed."""
    shared: dict[str, Any] = {"lr": settings.learning_rate, "weight_decay": settings.weight_decay}
    if settings.optimiser == "adamw":
        return torch.optim.AdamW(parameters, fused=parameters[0].is_cuda, **shared)
    if settings.optimiser == "adamw8bit":
        kind = _imported("bitsandbytes.optim", "AdamW8bit", "bitsandbytes") or _imported("torchao.optim", "AdamW8bit", "torchao")
        if kind is None:
            raise _missing("adamw8bit", "bitsandbytes (or torchao)")
    else:
        kind = _imported("prodigyopt", "Prodigy", "prodigyopt")
        if kind is None:
            raise _missing("prodigy", "prodigyopt")
        # konstmish/prodigy, README: what its authors advise for diffusion models.
        shared |= {"use_bias_correction": True, "safeguard_warmup": True}
    made: torch.optim.Optimizer = kind(parameters, **shared)
    return made


def bytes_per_parameter(optimiser: str) -> float:
    """Of its state: two fp32 moments; two of 8 bits with their scales (measured); four fp32 values of Prodigy's."""
    return {"adamw": 8.0, "adamw8bit": 2.05, "prodigy": 16.0}[optimiser]


def rate_at(settings: TrainingSettings, step: int) -> float:
    """Of step 0, 1, ...: linear warm-up, then constant, or half a cosine to zero at the ceiling."""
    if step < settings.warm_up_steps:
        return settings.learning_rate * (step + 1) / settings.warm_up_steps
    if settings.schedule == "constant":
        return settings.learning_rate
    done = (step - settings.warm_up_steps) / max(1, settings.steps - settings.warm_up_steps)
    return settings.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def _imported(module: str, name: str, package: str) -> Any:
    """None only where the package itself is not there: one that is there and broken says so itself."""
    try:
        return getattr(importlib.import_module(module), name)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == package:
            return None
        raise


def _missing(optimiser: str, package: str) -> ProviderUnavailable:
    return ProviderUnavailable(f"The optimiser {optimiser} needs the package {package}.", f"Install {package}, or choose adamw.")
