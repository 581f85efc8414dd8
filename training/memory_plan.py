"""What a training needs of a device's memory, said before it starts, and what would fit where it does not.

Everything but activations is counted from the model's own shapes on the meta device; activations are estimated from two constants, which
are said below. Loads nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch

from deployments.errors import NotEnoughMemory
from training.adapters import parameter_count, target_names
from training.optimisers import bytes_per_parameter
from training.settings import TrainingSettings

_GB = 1e9
_SAVED_BYTES, _SAVED_BYTES_MLP = 34, 50
"""What one block keeps for its backward pass, per token and channel of its width, in bf16: stock diffusers' LoRA on attention alone, on an
H200, FLUX.1-dev, two pictures of 1024 x 1024: 77.5 GB, of which 53.4 GB are 57 blocks of 2 x 4608 tokens x 3072 channels (34 bytes); with
LoRAs on the MLPs too, counted on blocks of the true width, 0.72 GB for a picture (50 bytes)."""
_MISCELLANEOUS = 1.5e9
"""CUDA's context, kernels' workspaces, what the allocator cannot use. (On a CPU and for small models it is less.)"""
_LEFT_TO_OTHERS = 0.15
"""Of a machine's memory, what a training on its CPU leaves to whoever else is there. Ray kills processes from 95 % on, and might choose one
that serves; ten more are for what serving takes while it draws, and for files that it has mapped (weights), which count as available."""
_GROUPS = (
    ("", "sys/fs/cgroup", "memory.max", "memory.current", ""),
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)
"""Where limits of containers stand, for control groups of version 2 and of version 1: the controller in /proc/self/cgroup, the folder of
all groups, what one may have, what it has, and what the names of a group with all below it begin with in `memory.stat`."""


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes by what they are for, and whether blocks are computed twice instead of being kept."""

    parts: Mapping[str, int]
    checkpointing: bool

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())

    def __str__(self) -> str:
        said = ", ".join(f"{name} {size / _GB:.1f}" for name, size in self.parts.items())
        return f"{self.bytes / _GB:.1f} GB ({said}; blocks {'computed twice' if self.checkpointing else 'kept'})"


def estimate(
    settings: TrainingSettings, outline: Any, targets: str, pixels_of_a_token: int, text_tokens: int, checkpointing: bool
) -> MemoryPlan:
    """outline: the transformer on the meta device. pixels_of_a_token: its side."""
    width = 2 if settings.dtype == "bfloat16" else 4
    lora = parameter_count(outline, targets, settings.rank)
    blocks, channels = _blocks(outline), outline.config.num_attention_heads * outline.config.attention_head_dim
    tokens = (max(settings.resolutions) // pixels_of_a_token) ** 2 + text_tokens
    inputs = blocks * tokens * channels * width
    saved = _SAVED_BYTES_MLP if any(re.search("mlp|ff|proj_out", name) for name in target_names(outline, targets)) else _SAVED_BYTES
    kept = tokens * channels * saved * width // 2
    activations = inputs + kept if checkpointing else blocks * kept
    large = settings.dtype == "bfloat16"
    parts = {
        "base": sum(p.numel() for p in outline.parameters()) * width,
        "LoRA and its gradient": lora * 8,
        "optimiser": round(lora * bytes_per_parameter(settings.optimiser)),
        "average": lora * 4 if settings.ema else 0,
        "activations": settings.batch * activations,
        "other": round(_MISCELLANEOUS) if large else 0,
    }
    return MemoryPlan(parts, checkpointing)


def plan(settings: TrainingSettings, outline: Any, targets: str, pixels_of_a_token: int, text_tokens: int, free: int | None) -> MemoryPlan:
    """The quickest way that fits. free: bytes that it may take; None where nobody knows, and then nothing is refused.

    Raises NotEnoughMemory, which says what would fit.
    """

    def of(changed: TrainingSettings, checkpointing: bool) -> MemoryPlan:
        return estimate(changed, outline, targets, pixels_of_a_token, text_tokens, checkpointing)

    modes = {"on": (True,), "off": (False,), "auto": (False, True)}[settings.gradient_checkpointing]
    plans = [of(settings, mode) for mode in modes]
    fitting = [found for found in plans if free is None or found.bytes <= free]
    if fitting:
        return fitting[0]
    smaller = next((said for said, changed in _smaller(settings) if of(changed, True).bytes <= (free or 0)), None)
    message = f"Not enough memory: training with {settings.base} needs {plans[-1]}, and {(free or 0) / _GB:.1f} GB may be taken."
    remedy = f"This would fit: {smaller}." if smaller else "Nothing that can be set would fit: train on a device with more memory."
    raise NotEnoughMemory(message, remedy, {"needed_bytes": plans[-1].bytes, "free_bytes": free, "fits": smaller})


def _smaller(settings: TrainingSettings) -> Iterator[tuple[str, TrainingSettings]]:
    """What can be given up, the least painful first; each step keeps the ones before it."""
    changes: dict[str, Any] = {"gradient_checkpointing": "on"}
    yield _said(changes), settings.model_copy(update=changes)
    if settings.batch > 1:
        changes |= {"batch": 1, "grad_accum": settings.batch * settings.grad_accum}
        yield _said(changes), settings.model_copy(update=changes)
    if settings.optimiser != "adamw8bit":
        changes |= {"optimiser": "adamw8bit"}
        yield _said(changes), settings.model_copy(update=changes)
    for side in (768, 512):
        if max(settings.resolutions) > side:
            changes |= {"resolutions": tuple(s for s in settings.resolutions if s <= side) or (side,)}
            yield _said(changes), settings.model_copy(update=changes)
    if settings.rank > 8:
        changes |= {"rank": 8, "alpha": 8.0}
        yield _said(changes), settings.model_copy(update=changes)


def _said(changes: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} = {list(value) if isinstance(value, tuple) else value}" for name, value in changes.items())


def free_bytes(device: torch.device, root: Path = Path("/")) -> int | None:
    """What may be taken: of a GPU all that is free, of the machine, or of the container in it, what is available beyond the share that is
    left to others. None where it is not told. root: where `proc` and `sys` are."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    meminfo = root / "proc/meminfo"
    if not meminfo.is_file():
        return None
    told = {name: int(kib) * 1024 for name, kib in re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)}
    if len(told) < 2:
        return None
    limits = [(told["MemTotal"], told["MemAvailable"]), *_limits(root)]
    total, available = min(limit for limit, _ in limits), min(left for _, left in limits)
    return max(available - round(_LEFT_TO_OTHERS * total), 0)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Of each control group around this process that has a limit: (limit, what is left of it). Files that are only cached count as left,
    as in MemAvailable."""
    groups = root / "proc/self/cgroup"
    lines = [line.split(":", 2) for line in groups.read_text().splitlines()] if groups.is_file() else []
    own = {controllers: path for _, controllers, path in lines}
    for controller, folder, most, used, prefix in _GROUPS:
        # Inside a container its own group may be the uppermost that is seen, whatever it is called outside.
        group = PurePosixPath(own.get(controller, "/"))
        for path in (group, *group.parents):
            yield from _limit(root / folder / str(path).lstrip("/"), most, used, prefix)


def _limit(group: Path, most: str, used: str, prefix: str) -> Iterator[tuple[int, int]]:
    with suppress(OSError, ValueError):  # there is no such group here, or "max"
        limit, taken = int((group / most).read_text()), int((group / used).read_text())
        stat = group / "memory.stat"
        cached = re.findall(rf"^{prefix}(?:in)?active_file (\d+)$", stat.read_text() if stat.is_file() else "", re.MULTILINE)
        yield limit, limit - taken + sum(map(int, cached))


def _blocks(transformer: Any) -> int:
    return len(transformer.transformer_blocks) + len(getattr(transformer, "single_transformer_blocks", ()))
