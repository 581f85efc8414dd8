"""Models of the transformers library out of a local folder: safetensors only, and strictly.

By itself the library fills what a checkpoint lacks with random numbers and a warning. Knows no particular model and no network.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deployments.errors import CheckpointMismatch, MissingWeights

_NAMES_SHOWN = 5


def load_pretrained(kind: Any, folder: Path, device: torch.device | str, dtype: torch.dtype, spare: tuple[str, ...] = ()) -> Any:
    """kind: a class of transformers with `from_pretrained`; the model it holds, in evaluation mode.

    spare: beginnings of the names that the checkpoint may have and the model has not (the other tower of a whole CLIP).
    Raises MissingWeights, and CheckpointMismatch, which names the keys that are missing, left over or misshapen.
    """
    if not (folder / "config.json").is_file():
        raise MissingWeights(f"{folder} holds no config.json of a {kind.__name__}.", "Fetch the folder, or correct the catalogue's entry.")
    try:
        model, report = kind.from_pretrained(folder, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True)
    except OSError as error:
        raise MissingWeights(f"{folder} holds no weights of a {kind.__name__}: {error}", "Fetch the folder again.") from error
    except RuntimeError as error:  # how the library reports tensors of another shape
        raise CheckpointMismatch(f"{folder} does not fit a {kind.__name__}: {error}.") from error
    missing = sorted(report["missing_keys"])
    left_over = sorted(name for name in report["unexpected_keys"] if not name.startswith(spare))
    if missing or left_over:
        parts = {"missing": missing, "left over": left_over}
        said = "; ".join(f"{len(names)} {what}: {', '.join(names[:_NAMES_SHOWN])}" for what, names in parts.items() if names)
        raise CheckpointMismatch(f"{folder} does not fit a {kind.__name__}: {said}.", details={"missing": missing, "left_over": left_over})
    return model.to(device).eval()
