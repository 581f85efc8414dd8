"""Models out of a diffusers pipeline folder, strictly: every tensor of a file finds its place, and every place its tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from deployments.errors import CheckpointMismatch, MissingWeights


def open_part(kind: Any, folder: Path, part: str, dtype: torch.dtype) -> Any:
    """The model of class `kind` in `folder/part`, on the CPU, in evaluation mode, without gradients. Opens no pickle and no network.

    Raises CheckpointMismatch, also where stock `from_pretrained` would warn and go on with weights that nobody trained, and MissingWeights
    for what is not there or is cut short.
    """
    options = {"subfolder": part, "dtype": dtype, "local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    try:
        model, facts = kind.from_pretrained(folder, **options)
    except OSError as error:
        raise MissingWeights(f"{folder / part} holds no readable {kind.__name__}: {error}", "Fetch the folder again.") from error
    except (ValueError, RuntimeError) as error:  # how the library reports tensors of another shape
        raise CheckpointMismatch(f"{folder / part} does not fit {kind.__name__}: {error}") from error
    wrong = {name: sorted(map(str, facts[name])) for name in ("missing_keys", "unexpected_keys", "mismatched_keys") if facts[name]}
    if wrong:
        said = "; ".join(f"{len(keys)} {name.replace('_', ' ')}: {', '.join(keys[:5])}" for name, keys in wrong.items())
        raise CheckpointMismatch(f"{folder / part} does not fit {kind.__name__}: {said}.", details=wrong)
    return model.requires_grad_(False).eval()
