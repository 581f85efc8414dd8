"""LoRA files of every published spelling, read strictly into `LoraWeights` for one transformer.

diffusers, peft, ai-toolkit, kohya (sd-scripts), ComfyUI, OneTrainer, XLabs, Black Forest Labs, LyCORIS. Every key of a file is
accounted for or the file is refused with its name: stock converters drop what they don't know without a word. Changes no model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from deployments.denoisers.lora.alphas import Alphas, alphas
from deployments.denoisers.lora.factors import Approximation, Factors, factors, missing, mixed, shape
from deployments.denoisers.lora.keys import format_of, name_of, of_dora, of_text_encoder, part_of
from deployments.denoisers.lora.places import Piece, Place, places
from deployments.denoisers.lora.weights import LoraFacts, LoraWeights, LowRank
from deployments.errors import LoraIncompatible
from deployments.weights import read_safetensors, safetensors_header

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

TextEncoderParts = Literal["refuse", "leave_out"]
_NAMES_SHOWN = 5
_INERT_IF_ZERO = ("diff", "diff_b")


@dataclass
class _Sorted:
    """The keys of a file by what becomes of them. modules: underscored name of a place -> kind of tensor -> key."""

    modules: dict[str, dict[str, str]] = field(default_factory=dict)
    formats: set[str] = field(default_factory=set)
    spelled: dict[str, str] = field(default_factory=dict)
    inert: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)


def open_lora(
    path: Path,
    transformer: FluxTransformer2DModel,
    *,
    limit: Approximation | None = None,
    text_encoders: TextEncoderParts = "refuse",
) -> LoraWeights:
    """The LoRA of a safetensors file. Raises DamagedWeights, UnsafeWeights (see `read_safetensors`) and whatever `read_lora` raises."""
    metadata = safetensors_header(path).metadata
    state = read_safetensors(path)
    return read_lora(state, transformer, metadata=metadata, source=path.name, limit=limit, text_encoders=text_encoders)


def read_lora(
    state: Mapping[str, Tensor],
    transformer: FluxTransformer2DModel,
    *,
    metadata: Mapping[str, str] | None = None,
    source: str = "The LoRA",
    limit: Approximation | None = None,
    text_encoders: TextEncoderParts = "refuse",
) -> LoraWeights:
    """state: all tensors of a file by key, on the CPU. transformer: what the LoRA is for; the meta device suffices.

    source: what errors call the file. limit: for LoKr and LoHa, which are brought to a low rank (`facts.errors` says how well).
    text_encoders: keys of text encoders that are not zero are refused, unless the caller takes it upon itself to leave them out.
    Raises LoraIncompatible, naming the keys or modules: DoRA, keys left over, incomplete modules, wrong shapes, values that are not
    finite, a module that is changed twice, too large an error, and a file that changes nothing. `details` holds all names.
    """
    said, known = alphas(metadata or {}, source), places(transformer)
    state = {key: _plain(tensor) for key, tensor in state.items()}
    _refuse_dora(state, said, source)
    found = _sort(state, known)
    if text_encoders == "refuse":
        _refuse(source, "holds a LoRA of text encoders, which is not applied here", found.left_out, "Use a LoRA of the transformer only.")
    _refuse_unread(source, found, state)
    _refuse(source, "changes a module in two spellings at once", found.twice, "Save it with one of them.")
    _refuse(source, "is incomplete, it lacks", _incomplete(found), "Fetch or save the file again.")
    parts = {name: {kind: state[key] for kind, key in keys.items()} for name, keys in found.modules.items()}
    _refuse_values(source, found, parts)
    _refuse_shapes(source, found, parts, known)
    modules, errors = _changes(parts, known, said, found, limit or Approximation(), source)
    ranks = [change.rank for change in modules.values()]
    facts = LoraFacts(
        format="+".join(sorted(found.formats)),
        keys=len(state),
        ranks=(min(ranks), max(ranks)),
        errors=errors,
        inert=tuple(found.inert),
        left_out=tuple(found.left_out),
        metadata=dict(metadata or {}),
    )
    return LoraWeights(modules, facts)


def _sort(state: Mapping[str, Tensor], known: Mapping[str, Place]) -> _Sorted:
    found = _Sorted()
    of_text = [key for key in state if of_text_encoder(key)]
    # ComfyUI saves untrained encoders too: what multiplies by zero may stay.
    (found.inert if _all_zero(state, of_text) else found.left_out).extend(of_text)
    for key, tensor in state.items():
        if of_text_encoder(key):
            continue
        part = part_of(key)
        place = name_of(part.module, known) if part else None
        if part and part.kind in _INERT_IF_ZERO and not tensor.any():
            found.inert.append(key)
        elif part is None or place is None or part.kind in _INERT_IF_ZERO:
            found.left_over.append(key)
        else:
            name, habit = place
            kinds = found.modules.setdefault(name, {})
            if part.kind in kinds:
                found.twice.append(key)
            kinds[part.kind] = key
            found.spelled.setdefault(name, part.module)
            found.formats.add(format_of(habit, known[name].naming))
    return found


def _all_zero(state: Mapping[str, Tensor], keys: Sequence[str]) -> bool:
    """Whether these keys are LoRAs (of whatever modules) whose upper factors are all there and all zero."""
    kinds: dict[str, set[str]] = {}
    for key in keys:
        part = part_of(key)
        if part is None or (part.kind == "up" and state[key].any()):
            return False
        kinds.setdefault(part.module, set()).add(part.kind)
    return all(present - {"alpha"} == {"down", "up"} for present in kinds.values())


def _refuse_dora(state: Mapping[str, Tensor], said: Alphas, source: str) -> None:
    remedy = "Merge it into a model and extract a plain LoRA, or train without DoRA."
    _refuse(source, "is a DoRA, which is not applied here", [key for key in state if of_dora(key)], remedy)
    if said.dora:
        raise LoraIncompatible(f"{source} is a DoRA by its metadata, but holds no magnitudes.", remedy)


def _refuse_unread(source: str, found: _Sorted, state: Mapping[str, Tensor]) -> None:
    if not found.modules:
        message = f"{source} changes no module of this transformer: none of its {len(state)} keys leads to one"
        raise LoraIncompatible(f"{message} ({_first(list(state))})." if state else f"{message}.", details={"left_over": sorted(state)})
    _refuse(source, f"has keys that lead nowhere in this transformer (of {len(state)})", found.left_over)


def _incomplete(found: _Sorted) -> list[str]:
    lacking = []
    for name, kinds in found.modules.items():
        present = frozenset(kinds) - {"alpha"}
        if mixed(present):
            lacking.append(f"{found.spelled[name]}: one kind of change instead of parts of several ({', '.join(sorted(present))})")
        else:
            lacking.extend(f"{found.spelled[name]}: {kind}" for kind in sorted(missing(present)))
    return lacking


def _plain(tensor: Tensor) -> Tensor:
    """As a matrix (a linear layer may be written as a convolution of one pixel), of a type that torch computes with.

    bf16 holds every value of both 8-bit types.
    """
    if tensor.ndim == 4 and tensor.shape[2:] == (1, 1):
        tensor = tensor[..., 0, 0]
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() and tensor.itemsize == 1 else tensor


def _refuse_values(source: str, found: _Sorted, parts: Mapping[str, Mapping[str, Tensor]]) -> None:
    wrong = [
        found.modules[name][kind]
        for name, tensors in parts.items()
        for kind, tensor in tensors.items()
        if not torch.isfinite(tensor).all() or not (tensor.numel() == 1 if kind == "alpha" else tensor.is_floating_point())
    ]
    _refuse(source, "holds values that are not finite numbers, or an alpha that is not one number", wrong, "Fetch or train it again.")


def _refuse_shapes(source: str, found: _Sorted, parts: Mapping[str, Mapping[str, Tensor]], known: Mapping[str, Place]) -> None:
    wrong = []
    for name, tensors in parts.items():
        matrices = {kind: tensor for kind, tensor in tensors.items() if kind != "alpha"}
        if shape(matrices) != known[name].shape:
            sizes = ", ".join(f"{kind} {list(tensor.shape)}" for kind, tensor in matrices.items())
            wrong.append(f"{found.spelled[name]} ({sizes}) for a weight of {list(known[name].shape)}")
    _refuse(source, "has shapes that do not fit this transformer", wrong)


def _changes(
    parts: Mapping[str, dict[str, Tensor]],
    known: Mapping[str, Place],
    said: Alphas,
    found: _Sorted,
    limit: Approximation,
    source: str,
) -> tuple[dict[str, LowRank], dict[str, float]]:
    """Module of the transformer -> change, and module of the file -> error of its low-rank form."""
    changes: dict[str, LowRank] = {}
    errors: dict[str, float] = {}
    twice = []
    for name, tensors in parts.items():
        alpha = tensors.pop("alpha", None)
        made = factors(tensors, limit)
        if "down" not in tensors:
            errors[found.spelled[name]] = made.error
        for piece in known[name].pieces:
            if piece.module in changes:
                twice.append(f"{found.spelled[name]} ({piece.module})")
            scale = _scale(made, alpha, said, piece.module)
            changes[piece.module] = _share(made, piece, scale, whole=len(known[name].pieces) == 1)
    _refuse(source, "changes a module in two spellings at once", twice, "Save it with one of them.")
    coarse = [f"{name} ({error:.1%})" for name, error in errors.items() if error > limit.error]
    what = f"loses more than {limit.error:.1%} of a change when brought to rank {limit.rank}"
    _refuse(source, what, coarse, "Use its low-rank form (LoRA), or a smaller LoKr or LoHa.")
    return changes, errors


def _scale(made: Factors, alpha: Tensor | None, said: Alphas, module: str) -> float:
    if made.divisor is None:  # a full LoKr: LyCORIS keeps an alpha beside it, and does not use it
        return 1.0
    return said.scale(module, made.divisor) if alpha is None else float(alpha) / made.divisor


def _share(made: Factors, piece: Piece, scale: float, *, whole: bool) -> LowRank:
    """One module's rows of a fused change. Ranks that don't reach it go (sd-scripts' split_qkv writes three LoRAs as one sparse one)."""
    up = torch.cat([made.up[start:stop] for start, stop in piece.rows]) if piece.rows != ((0, len(made.up)),) else made.up
    if whole:
        return LowRank(made.down, up, scale)
    reaching = up.any(0)
    reaching[0] |= not reaching.any()  # a change of nothing still has a rank
    if reaching.all():
        return LowRank(made.down, up.contiguous(), scale)
    return LowRank(made.down[reaching], up[:, reaching].contiguous(), scale)


def _refuse(source: str, what: str, names: Sequence[str], remedy: str | None = None) -> None:
    if names:
        raise LoraIncompatible(f"{source} {what}: {_first(names)}.", remedy, {"names": list(names)})


def _first(names: Sequence[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
