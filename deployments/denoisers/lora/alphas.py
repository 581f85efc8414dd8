"""The alphas that peft keeps beside the tensors: a configuration as JSON in the file's metadata.

diffusers writes it there (loaders/lora_base.py, LORA_ADAPTER_METADATA_KEY) and its tensors then carry none. Reads no tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from deployments.errors import LoraIncompatible

_KEY = "lora_adapter_metadata"
_PREFIX = "transformer."


@dataclass(frozen=True)
class Alphas:
    """peft's LoraConfig, as far as it says how strong a change is. patterns: ends of module names -> alpha."""

    alpha: float | None = None
    patterns: Mapping[str, float] = field(default_factory=dict)
    root: bool = False
    dora: bool = False

    def scale(self, module: str, rank: int) -> float:
        """Of a module of the diffusers transformer. Without a configuration the strength is in the factors: 1."""
        # As peft matches (utils/other.py, get_pattern_key): a pattern is the module's name or what follows one of its dots.
        fitting = (alpha for pattern, alpha in self.patterns.items() if re.fullmatch(rf"(.*\.)?({pattern})", module))
        alpha = next(fitting, self.alpha)
        if alpha is None:
            return 1.0
        return alpha / rank**0.5 if self.root else alpha / rank


def alphas(metadata: Mapping[str, str], source: str) -> Alphas:
    """What the metadata of a file say. Raises LoraIncompatible where they cannot be read: a guess would be a wrong strength."""
    if _KEY not in metadata:
        return Alphas()
    try:
        said: dict[str, Any] = json.loads(metadata[_KEY])
        own = {name.removeprefix(_PREFIX): value for name, value in said.items() if name.startswith(_PREFIX)}
        alpha = own.get("lora_alpha")
        return Alphas(
            alpha=None if alpha is None else float(alpha),
            patterns={re.compile(pattern).pattern: float(value) for pattern, value in (own.get("alpha_pattern") or {}).items()},
            root=bool(own.get("use_rslora")),
            dora=bool(own.get("use_dora")),
        )
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise LoraIncompatible(f"{source} has unreadable metadata `{_KEY}`: {error}.", "Save the LoRA again, or without them.") from error
