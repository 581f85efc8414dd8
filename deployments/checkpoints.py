"""One part of a model in a safetensors file that others made: its names and shapes before a tensor is read, then its tensors one by one.

A file may hold the part alone or, under prefixes, a whole pipeline (as ComfyUI's all-in-one checkpoints do). Weights in plain fp8 are
read like any others; those that need a factor beside them are refused. Knows no model.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from deployments.errors import CheckpointMismatch
from deployments.weights import safetensors_header

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What quantisers put beside a weight that is not to be read as it stands: ComfyUI's scaled fp8, bitsandbytes, optimum-quanto (which made
# XLabs-AI/flux-dev-fp8).
_FACTORS = (
    "scaled_fp8", ".scale_weight", ".weight_scale", ".scale_input", ".input_scale", ".output_scale", ".comfy_quant",
    ".absmax", ".quant_map", "._data", "._scale",
)  # fmt: skip


class Checkpoint:
    """One part of a file. shapes: name, without the prefix -> shape."""

    def __init__(self, path: Path, prefix: str) -> None:
        """prefix: of the part's names in a file that holds more than this part.

        Raises UnsafeWeights, DamagedWeights, and CheckpointMismatch for weights that are not stored as themselves.
        """
        shapes = safetensors_header(path).shapes
        scaled = sorted(name for name in shapes if name.endswith(_FACTORS))
        if scaled:
            message = (
                f"{path} holds scaled or quantised weights ({scaled[0]}, {len(scaled)} such tensors), which mean nothing by themselves."
            )
            raise CheckpointMismatch(
                message,
                "Use the bf16 or the plain fp8 (e4m3) form of this checkpoint; memory modes pack bf16 weights on loading.",
                {"factors": scaled},
            )
        self.path = path
        self._prefix = prefix if any(name.startswith(prefix) for name in shapes) else ""
        self.shapes = {name.removeprefix(self._prefix): shape for name, shape in shapes.items() if name.startswith(self._prefix)}

    def tensors(self, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the part with its name, on the CPU: one at a time, so that a file in another type is never held twice."""
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as file:
            for name in self.shapes:
                yield name, file.get_tensor(self._prefix + name).to(dtype)
