"""A LoRA as a file: diffusers' names, and a header that says what it is, whom it shows and how good it is.

Stock `load_lora_weights` gives the same picture from it to the last bit (with saved_dtype float32; else, of the weights as rounded).
Knows no training.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from training.adapters import adapter_state
from training.mini.storage import save_weights

_PREFIX = "transformer"
_ADAPTER = "lora_adapter_metadata"
"""diffusers (loaders/lora_base.py: LORA_ADAPTER_METADATA_KEY): without it, alpha would be taken to be the rank."""
_ARCHITECTURES = {"flux1": "flux-1-dev/lora", "qwen-image": "qwen-image/lora"}
"""Stability-AI/ModelSpec, as kohya's and ComfyUI's tools read it."""


@dataclass(frozen=True)
class LoraCard:
    """What the header says beside the adapter's own settings. scores: as far as there are any; those of an evaluation come later, see
    lora_header.py."""

    base: str
    family: str
    trigger_word: str
    dataset: str
    pictures: int
    step: int = 0
    scores: Mapping[str, float] = field(default_factory=dict)

    def metadata(self) -> dict[str, str]:
        said = {
            "base": self.base, "trigger_word": self.trigger_word, "dataset_sha256": self.dataset, "pictures": str(self.pictures),
            "step": str(self.step), "software": "likeness", "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": _ARCHITECTURES[self.family], "modelspec.implementation": "diffusers",
            "modelspec.trigger_phrase": self.trigger_word,
        }  # fmt: skip
        return said | ({"scores": json.dumps(dict(self.scores), sort_keys=True)} if self.scores else {})


def write_lora(path: Path, transformer: Any, card: LoraCard, dtype: torch.dtype) -> None:
    """The adapter as it is now (under `Average.applied`, the averaged one). Written whole or not at all; the same LoRA, the same bytes."""
    config: dict[str, Any] = {}
    for name, value in transformer.peft_config["default"].to_dict().items():
        config[f"{_PREFIX}.{name}"] = sorted(value) if isinstance(value, set) else value
    header = {
        **card.metadata(), "rank": str(config[f"{_PREFIX}.r"]), "alpha": str(config[f"{_PREFIX}.lora_alpha"]),
        _ADAPTER: json.dumps(config, sort_keys=True),
    }  # fmt: skip
    save_weights(path, {f"{_PREFIX}.{name}": value.to(dtype) for name, value in adapter_state(transformer).items()}, header)
