"""The header of a LoRA's file, read and written without its tensors: what an evaluation found goes into it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

# safetensors: 8 bytes say how long the header is, JSON that is padded with spaces so that the tensors begin at a multiple of 8.
_LENGTH = _ALIGNED = 8


def header_of(content: bytes) -> dict[str, str]:
    """The metadata of a safetensors file."""
    return dict(_parsed(content)[0].get("__metadata__", {}))


def scored(content: bytes, scores: Mapping[str, float]) -> bytes:
    """The same LoRA with what was found of it in its header, beside the scores that are there. Its tensors stay as they are, to the byte;
    the same scores give the same file."""
    header, tensors = _parsed(content)
    said = dict(header.get("__metadata__", {}))
    known: dict[str, float] = json.loads(said.get("scores", "{}"))
    said["scores"] = json.dumps({**known, **scores}, sort_keys=True)
    text = json.dumps({**header, "__metadata__": said}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNED)
    return len(text).to_bytes(_LENGTH, "little") + text + tensors


def _parsed(content: bytes) -> tuple[dict[str, Any], bytes]:
    end = _LENGTH + int.from_bytes(content[:_LENGTH], "little")
    header: dict[str, Any] = json.loads(content[_LENGTH:end])
    return header, content[end:]
