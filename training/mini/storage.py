"""How trained weights become files: matrices of the large networks as fp8 e4m3, everything else as fp16, safetensors only.

Stock `from_pretrained` casts what it reads to the dtype that it computes in (float32 unless told otherwise), so nothing has to be
known of fp8 to open these files. The same weights give the same bytes. Knows no architecture and no training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save
from torch import Tensor

MATRIX_DTYPE: Final = torch.float8_e4m3fn
REST_DTYPE: Final = torch.float16
_MATRIX_MAX: Final = torch.finfo(MATRIX_DTYPE).max


class _FakeQuantise(torch.autograd.Function):
    """Rounds forwards, does nothing backwards. (The usual weight + (rounded - weight).detach() loses the sign of a zero.)"""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        return as_matrix(weight).to(weight.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def fake_quantise(weight: Tensor) -> Tensor:
    """What storage gives back for a matrix, bit for bit, in the weight's own dtype; the gradient passes straight through.

    (Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons": the straight-through estimator.)
    """
    return _FakeQuantise.apply(weight)  # type: ignore[no-any-return, no-untyped-call]


def as_matrix(weight: Tensor) -> Tensor:
    """Rounded to fp8 e4m3, to nearest even, on any device. Beyond +-448 it saturates, where torch's own cast would give NaN."""
    return weight.detach().clamp(-_MATRIX_MAX, _MATRIX_MAX).to(MATRIX_DTYPE)


def stored(state: Mapping[str, Tensor], matrices: torch.dtype = REST_DTYPE) -> dict[str, Tensor]:
    """The tensors as they are written, on the CPU: two-dimensional ones as `matrices`, other floating ones as fp16, the rest as is.

    Of names that share one storage (tied embeddings) the first is kept. Raises ValueError naming a tensor that is not finite, or
    beyond fp16.
    """
    written: dict[str, Tensor] = {}
    seen: set[tuple[int, torch.Size]] = set()
    for name, value in state.items():
        place = (value.data_ptr(), value.shape)
        if value.numel() == 0 or place not in seen:
            written[name] = _as_written(name, value.detach(), matrices)
            seen.add(place)
    return written


def _as_written(name: str, value: Tensor, matrices: torch.dtype) -> Tensor:
    if not value.is_floating_point():
        return value.cpu().contiguous()
    largest = float(value.abs().max()) if value.numel() else 0.0
    if not largest <= torch.finfo(REST_DTYPE).max:  # "not" so that NaN is caught
        raise ValueError(f"'{name}' reaches {largest}, which no file holds: the weights are broken, train the stage again")
    if value.ndim == 2 and matrices == MATRIX_DTYPE:
        return as_matrix(value).cpu().contiguous()
    return value.to(matrices if value.ndim == 2 else REST_DTYPE).cpu().contiguous()


def save_weights(path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Writes tensors as they are, in one step: a reader sees the old file or the new one. Creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.draft")
    draft.write_bytes(_in_order(save(dict(state), metadata={"format": "pt", **(metadata or {})})))
    os.replace(draft, path)


def _in_order(data: bytes) -> bytes:
    """A safetensors file with its metadata sorted: the library (0.8) writes them in an order that changes from call to call.

    Layout: the header's length (8 bytes, little-endian), the header (JSON, padded with spaces to a multiple of 8), the tensors.
    """
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[end:]
