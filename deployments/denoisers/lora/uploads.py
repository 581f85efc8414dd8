"""LoRA files from strangers: what `read_lora` would refuse of an operator's file is refused here as the caller's fault, and what would
take endless time or memory to find out is refused before.

Keeps nothing and needs no weights of the transformer: it may lie on the meta device (`outline`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from deployments.denoisers.lora.formats import read_lora
from deployments.denoisers.lora.weights import LoraFacts
from deployments.errors import InvalidLora, UnsafeWeights
from deployments.weights import refuse_pickle

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

_PREFIX_BYTES = 8
# The largest headers that are published (kohya's, with every tag of every picture) stay below 2 MB.
HEADER_BYTES = 8 * 2**20
# As many tensors as a LoKr with every part of every linear module of FLUX.1-dev (506) would have, several times over.
TENSORS = 20_000
# Types of four and of six bits, which torch holds and does not compute with.
_SHORT = ("F4", "F6")
# Where peft's patterns of alphas are, see alphas.py. One is a module's name, or a regular expression with so many repetitions: with more
# of them, or one around another, matching a name could take exponential time.
_PEFT = "lora_adapter_metadata"
_PATTERN_CHARACTERS, _REPETITIONS = 200, 2
_REPEATED_GROUP = re.compile(r"\)\s*[*+{?]")
_REPETITION = re.compile(r"[*+{]")
# Sum of long side x short side squared over the singular value decompositions that LoKr and LoHa need: minutes on one core.
_WORK = 4e11


def outline(config: Path) -> FluxTransformer2DModel:
    """The transformer of a diffusers config.json, on the meta device: shapes without memory."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        transformer: FluxTransformer2DModel = FluxTransformer2DModel.from_config(json.loads(config.read_text(encoding="utf-8")))
    return transformer


def read_uploaded(path: Path, transformer: FluxTransformer2DModel, source: str) -> LoraFacts:
    """What the file holds, after all of it was read and fitted to the transformer.

    source: what errors call the file, which has an arbitrary name meanwhile. Raises InvalidLora for what is no whole safetensors file, or
    one of extreme size inside; LoraIncompatible, as `read_lora`, for a LoRA that is not for this transformer.
    """
    # The library's own reading, in Rust, checks every promise of the header; pickles it would only call invalid.
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _refuse_what_is_no_file(path, source)
    metadata, shapes = _header(path, source)
    _refuse_bombs(metadata, shapes, transformer, source)
    try:
        state = load_file(path)
    except (SafetensorError, KeyError, AttributeError) as error:  # the latter two: types of tensors that torch has not
        raise InvalidLora(f"The tensors of {source} cannot be read: {error}.") from error
    weights = read_lora(state, transformer, metadata=metadata, source=source)
    wild = [name for name, change in weights.modules.items() if not math.isfinite(change.scale)]
    if wild:
        raise InvalidLora(f"{source} changes {wild[0]} (of {len(wild)}) with a strength that is no finite number.", "Train it again.")
    return weights.facts


def _refuse_what_is_no_file(path: Path, source: str) -> None:
    if not path.stat().st_size:
        raise InvalidLora(f"{source} is empty.")
    try:
        refuse_pickle(path)
    except UnsafeWeights as error:
        message = f"{source} holds a pickle, whatever it is called: opening it could run code."
        raise InvalidLora(message, "Convert it to safetensors where you trust it, and send that.") from error
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_PREFIX_BYTES), "little")
    if length > path.stat().st_size - _PREFIX_BYTES:
        raise InvalidLora(f"{source} is no whole safetensors file: its header is not there, or not all of it.")
    if length > HEADER_BYTES:
        raise InvalidLora(f"The header of {source} has {length} bytes, at most {HEADER_BYTES} are read.", "Save it with less metadata.")


def _header(path: Path, source: str) -> tuple[Mapping[str, str], Mapping[str, tuple[int, ...]]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            if len(names) > TENSORS:
                raise InvalidLora(f"{source} holds {len(names)} tensors, at most {TENSORS} are read.")
            slices = {name: file.get_slice(name) for name in names}
            short = [name for name, tensor in slices.items() if str(tensor.get_dtype()).startswith(_SHORT)]
            if short:
                raise InvalidLora(f"{short[0]} in {source} has numbers of less than a byte, which are not read.", "Save it in bf16.")
            return file.metadata() or {}, {name: tuple(tensor.get_shape()) for name, tensor in slices.items()}
    except SafetensorError as error:
        raise InvalidLora(f"{source} is no whole safetensors file: {error}.") from error


def _refuse_bombs(
    metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]], transformer: FluxTransformer2DModel, source: str
) -> None:
    linears = sum(isinstance(module, torch.nn.Linear) for module in transformer.modules())
    patterns = _patterns(metadata, source)
    if len(patterns) > linears:
        raise InvalidLora(f"{source} has {len(patterns)} patterns of alphas for {linears} modules.", "Save it with one for each module.")
    for pattern in patterns:
        repetitions = len(_REPETITION.findall(pattern))
        if len(pattern) > _PATTERN_CHARACTERS or repetitions > _REPETITIONS or _REPEATED_GROUP.search(pattern):
            message = f"{source} has a pattern of alphas that could take forever to match: {pattern[:80]!r}."
            raise InvalidLora(message, "Name the modules themselves in `alpha_pattern`.")
    if _work(shapes) > _WORK:
        message = f"{source} is a LoKr or LoHa whose changes are too large to be brought to a low rank here."
        raise InvalidLora(message, "Extract a plain LoRA from it, or train a smaller one (LoKr: a larger factor; LoHa: a lower rank).")


def _patterns(metadata: Mapping[str, str], source: str) -> list[str]:
    """Of peft's configuration. What is wrong in it otherwise is left for the reader to refuse by name."""
    try:
        said: Any = json.loads(metadata.get(_PEFT, "{}"))
    except RecursionError as error:
        raise InvalidLora(f"The metadata `{_PEFT}` of {source} have too many levels.", "Save it without them.") from error
    except ValueError:
        return []
    found = [value for key, value in said.items() if key.endswith("alpha_pattern")] if isinstance(said, dict) else []
    return [str(pattern) for value in found if isinstance(value, dict) for pattern in value]


def _work(shapes: Mapping[str, tuple[int, ...]]) -> float:
    """long x short^2 of every matrix that will be decomposed, from the shapes of its factors alone."""
    found = 0.0
    for name, shape in shapes.items():
        if len(shape) != 2:
            continue
        if name.endswith((".lokr_w1", ".lokr_w2")):
            found += _svd(*shape)
        elif name.endswith((".lokr_w1_a", ".lokr_w2_a")):
            found += _svd(shape[0], _width(shapes, f"{name[:-1]}b"))
        elif name.endswith(".hada_w1_a"):
            rank = shape[1] * max((shapes.get(f"{name[: -len('w1_a')]}w2_b") or (0,))[:1])
            sides = sorted((shape[0], _width(shapes, f"{name[:-1]}b")))
            found += _svd(sides[1], min(rank, sides[0]))
    return found


def _svd(rows: int, columns: int) -> float:
    return float(max(rows, columns)) * min(rows, columns) ** 2


def _width(shapes: Mapping[str, tuple[int, ...]], name: str) -> int:
    shape = shapes.get(name, ())
    return shape[1] if len(shape) == 2 else 0
