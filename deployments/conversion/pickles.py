"""The one place that opens a pickle: tensors and plain containers only (weights_only=True), on the CPU, for conversion.

Everything else in this project refuses pickles. Knows no model.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deployments.errors import CheckpointMismatch, DamagedWeights, UnsafeWeights

# Under which training scripts put the tensors, beside their optimisers (read in eva_clip/factory.py: load_state_dict).
_WRAPPERS = ("state_dict", "model", "module")
_PARALLEL_PREFIX = "module."


def read_pickle(path: Path) -> Any:
    """What torch.save wrote. Raises UnsafeWeights where it holds more than tensors, DamagedWeights where it cannot be read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UnsafeWeights(
            f"{path} holds more than tensors: {_first_line(error)}", "Use another source: this one is not opened."
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise DamagedWeights(f"{path} is no readable checkpoint: {_first_line(error)}") from error


def tensors_of(checkpoint: Any, source: str) -> dict[str, Tensor]:
    """The state dict inside a checkpoint, free of wrappers and of the prefix that parallel training leaves.

    Raises CheckpointMismatch where there is none, or anything in it is no tensor.
    """
    for wrapper in _WRAPPERS:
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
            break
    strangers = (
        [str(name) for name, value in checkpoint.items() if not isinstance(value, Tensor)] if isinstance(checkpoint, Mapping) else []
    )
    if not isinstance(checkpoint, Mapping) or not checkpoint or strangers:
        names = f": {', '.join(strangers[:5])} are none" if strangers else ""
        raise CheckpointMismatch(f"{source} is no table of tensors{names}.", details={"left_over": strangers})
    parallel = all(name.startswith(_PARALLEL_PREFIX) for name in checkpoint)
    return {name.removeprefix(_PARALLEL_PREFIX) if parallel else name: tensor for name, tensor in checkpoint.items()}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
