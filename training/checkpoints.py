"""Checkpoints of a training on disk: a folder per checkpoint that is there whole or not at all, and the newest that can be resumed from.

    step-000250/lora.safetensors   the LoRA, to be drawn with: of every checkpoint
    step-000250/state.pt           all that the next step depends on: of the newest few

Knows nothing of what a state holds.
"""

from __future__ import annotations

import logging
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step-(\d{6,})")
STATE, LORA = "state.pt", "lora.safetensors"


def write_checkpoint(folder: Path, step: int, state: Mapping[str, Any], write_lora: Callable[[Path], None], keep_states: int) -> Path:
    """Returns the checkpoint's folder. Older states beyond `keep_states` go."""
    target = folder / f"step-{step:06d}"
    draft = folder / f".{target.name}.part"
    shutil.rmtree(draft, ignore_errors=True)  # of a process that died here
    draft.mkdir(parents=True)
    write_lora(draft / LORA)
    with (draft / STATE).open("wb") as stream:
        torch.save(dict(state), stream)
        stream.flush()
        os.fsync(stream.fileno())
    shutil.rmtree(target, ignore_errors=True)  # of this very step, before a resume from an earlier one
    draft.rename(target)
    for old in _with_states(folder)[keep_states:]:
        (old / STATE).unlink(missing_ok=True)
    return target


def newest_state(folder: Path) -> dict[str, Any] | None:
    """Of the last checkpoint that can be read, on the CPU; None where there is none."""
    for checkpoint in _with_states(folder):
        try:
            state: dict[str, Any] = torch.load(checkpoint / STATE, map_location="cpu", weights_only=True)
            return state
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            _LOG.warning("%s cannot be read, an earlier checkpoint is tried: %s", checkpoint / STATE, error)
    return None


def checkpoints(folder: Path) -> dict[int, Path]:
    """LoRA files by step, the first one first."""
    found = {int(match[1]): path / LORA for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name))}
    return {step: found[step] for step in sorted(found) if found[step].is_file()}


def _with_states(folder: Path) -> list[Path]:
    """The newest first."""
    found = [(int(match[1]), path) for path in folder.glob("step-*") if (match := _NAME.fullmatch(path.name)) and (path / STATE).is_file()]
    return [path for _, path in sorted(found, reverse=True)]
