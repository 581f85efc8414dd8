"""The folder in which a training run keeps what its stages made: weights, resumable checkpoints, facts. Everything is written
beside its place and renamed, so that a killed run leaves whole files or none. Knows nothing of models.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Workspace:
    """writes: False in all but one of several processes that share the folder; they read only."""

    def __init__(self, folder: Path, writes: bool = True) -> None:
        self.folder, self.writes = folder, writes
        folder.mkdir(parents=True, exist_ok=True)

    def save(self, name: str, state: Mapping[str, Tensor], halved: bool = False) -> None:
        """Weights under a name, as they are, or halved: floating-point tensors as fp16, for results that only the pack needs."""
        if not self.writes:
            return
        path = self.folder / f"{name}.safetensors"
        beside = path.with_suffix(f".{os.getpid()}.part")
        save_file({key: _plain(value, halved) for key, value in state.items()}, beside)
        beside.replace(path)

    def has(self, name: str) -> bool:
        return (self.folder / f"{name}.safetensors").is_file()

    def load(self, name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
        """Raises FileNotFoundError saying which stage makes the weights."""
        path = self.folder / f"{name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: run the stage that makes '{name}' first, or import its exported parts (--import)"
            )
        return load_file(path, device=str(device))

    def note(self, stage: str, facts: Mapping[str, Any]) -> None:
        """Facts of a stage (steps, seconds, last losses), for the card; they also say that the stage is finished."""
        if not self.writes:
            return
        path = self.folder / f"{stage}.json"
        beside = path.with_suffix(f".{os.getpid()}.part")
        beside.write_text(json.dumps(dict(facts), indent=1, sort_keys=True) + "\n")
        beside.replace(path)

    def notes(self) -> dict[str, Any]:
        return {path.stem: json.loads(path.read_text()) for path in sorted(self.folder.glob("*.json"))}

    def finished(self, stage: str) -> bool:
        return (self.folder / f"{stage}.json").is_file()

    def checkpoint(self, name: str, state: Mapping[str, Any]) -> None:
        if not self.writes:
            return
        path = self.folder / f"{name}.resume"
        beside = path.with_suffix(f".{os.getpid()}.part")
        torch.save(dict(state), beside)
        beside.replace(path)

    def resumable(self, name: str, device: torch.device) -> dict[str, Any] | None:
        path = self.folder / f"{name}.resume"
        return torch.load(path, map_location=device, weights_only=True) if path.is_file() else None

    def forget(self, name: str) -> None:
        if self.writes:
            (self.folder / f"{name}.resume").unlink(missing_ok=True)


def _plain(value: Tensor, halved: bool) -> Tensor:
    """A copy on the CPU that shares no memory with another tensor."""
    tensor = value.detach().cpu().contiguous().clone()
    return tensor.half() if halved and tensor.is_floating_point() else tensor
