"""From the tensors of one module to two factors, up [out, r] and down [r, in]: LoRA as it is, LoKr and LoHa by singular values.

The forms of LoKr and LoHa: KohakuBlueleaf/LyCORIS, lycoris/modules/lokr.py and loha.py. Knows no names of models and no files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Singular values below this share of the largest are rounding of the stored half-precision tensors many times over.
_NOISE = 1e-7
# Parts by kind, each of which is whole with exactly these tensors (beside alpha).
_LORA = frozenset({"down", "up"})
_LOHA = frozenset({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"})
_LOKR_SIDES = tuple((frozenset({f"lokr_w{n}"}), frozenset({f"lokr_w{n}_a", f"lokr_w{n}_b"})) for n in (1, 2))


@dataclass(frozen=True)
class Approximation:
    """How far LoKr and LoHa may be brought down. rank: the highest that is kept. error: the highest relative Frobenius error allowed."""

    rank: int = 256
    error: float = 0.01


@dataclass(frozen=True, eq=False)
class Factors:
    """up @ down, times 1 / rank * alpha if there is one: divisor is that rank, None where an alpha means nothing (a full LoKr).

    error: relative Frobenius error of the product.
    """

    down: Tensor
    up: Tensor
    divisor: int | None
    error: float = 0.0


def missing(kinds: frozenset[str]) -> frozenset[str]:
    """What a module with these kinds of tensors (without alpha) lacks to be whole; empty where it is whole."""
    if not kinds:
        return _LORA
    if kinds <= _LORA:
        return _LORA - kinds
    if kinds <= _LOHA:
        return _LOHA - kinds
    lacking: frozenset[str] = frozenset()
    for full, factored in _LOKR_SIDES:
        if not full <= kinds:
            lacking |= (factored if factored & kinds else full) - kinds
    return lacking


def mixed(kinds: frozenset[str]) -> bool:
    """Whether the tensors are parts of more than one change, so that none can be told to be meant."""
    if kinds <= _LORA or kinds <= _LOHA:
        return False
    if not all(kind.startswith("lokr_") for kind in kinds):
        return True
    return any(full <= kinds and factored & kinds for full, factored in _LOKR_SIDES)


def shape(parts: Mapping[str, Tensor]) -> tuple[int, int] | None:
    """(out, in) of the change that these tensors make, before any of it is computed; None where their own sizes do not go together."""
    if any(part.ndim != 2 for part in parts.values()):
        return None
    if "down" in parts:
        return _product(parts["up"], parts["down"])
    if "hada_w1_a" in parts:
        first, second = (_product(parts[f"hada_w{n}_a"], parts[f"hada_w{n}_b"]) for n in (1, 2))
        return first if first == second else None
    sides = [_side(parts, name) for name in ("lokr_w1", "lokr_w2")]
    if sides[0] is None or sides[1] is None:
        return None
    return sides[0][0] * sides[1][0], sides[0][1] * sides[1][1]


def _side(parts: Mapping[str, Tensor], name: str) -> tuple[int, int] | None:
    if name in parts:
        return len(parts[name]), parts[name].shape[1]
    return _product(parts[f"{name}_a"], parts[f"{name}_b"])


def _product(left: Tensor, right: Tensor) -> tuple[int, int] | None:
    return (len(left), right.shape[1]) if left.shape[1] == len(right) > 0 else None


def factors(parts: Mapping[str, Tensor], limit: Approximation) -> Factors:
    """parts: the whole tensors of one module by kind, which have a `shape`. LoKr and LoHa come as fp32, LoRA in its own type."""
    if "down" in parts:
        return Factors(parts["down"], parts["up"], len(parts["down"]))
    exact = {kind: part.double() for kind, part in parts.items()}
    return _of_loha(exact, limit) if "hada_w1_a" in exact else _of_lokr(exact, limit)


def _of_lokr(parts: Mapping[str, Tensor], limit: Approximation) -> Factors:
    """kron(w1, w2): its singular values are all products of theirs, its vectors the products of theirs, so two small SVDs suffice."""
    divisor, sides = None, []
    for side in ("lokr_w1", "lokr_w2"):
        if side in parts:
            sides.append(torch.linalg.svd(parts[side], full_matrices=False))
        else:
            divisor = len(parts[f"{side}_b"])
            sides.append(torch.linalg.svd(parts[f"{side}_a"] @ parts[f"{side}_b"], full_matrices=False))
    (u1, s1, v1), (u2, s2, v2) = sides
    values, order = torch.outer(s1, s2).flatten().sort(descending=True, stable=True)
    kept, error = _cut(values, limit.rank)
    first, second = order[:kept] // len(s2), order[:kept] % len(s2)
    up = torch.einsum("ar,cr->acr", u1[:, first], u2[:, second]).flatten(0, 1)
    down = torch.einsum("rb,rd->rbd", v1[first], v2[second]).flatten(1)
    return _balanced(down, up, values[:kept], divisor, error)


def _of_loha(parts: Mapping[str, Tensor], limit: Approximation) -> Factors:
    """(w1_a w1_b) * (w2_a w2_b), element by element: of rank r1 r2 at most, with the products of rows and columns as its factors."""
    a1, b1, a2, b2 = (parts[kind] for kind in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
    divisor = len(b1)
    if len(b1) * len(b2) >= min(len(a1), b1.shape[1]):
        u, values, v = torch.linalg.svd((a1 @ b1) * (a2 @ b2), full_matrices=False)
    else:
        wide_up = torch.einsum("oi,oj->oij", a1, a2).flatten(1)
        wide_down = torch.einsum("in,jn->ijn", b1, b2).flatten(0, 1)
        q_up, r_up = torch.linalg.qr(wide_up)
        q_down, r_down = torch.linalg.qr(wide_down.T)
        core_u, values, core_v = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
        u, v = q_up @ core_u, core_v @ q_down.T
    kept, error = _cut(values, limit.rank)
    return _balanced(v[:kept], u[:, :kept], values[:kept], divisor, error)


def _cut(values: Tensor, rank: int) -> tuple[int, float]:
    """How many of the singular values (largest first) are kept, and the relative Frobenius error of leaving out the rest."""
    kept = min(rank, max(1, int((values > _NOISE * values[0]).sum())))
    total = float(values.square().sum())
    return kept, (float(values[kept:].square().sum()) / total) ** 0.5 if total else 0.0


def _balanced(down: Tensor, up: Tensor, values: Tensor, divisor: int | None, error: float) -> Factors:
    """Each factor takes the root of the singular values, lest one of them leave the range of half precision."""
    root = values.sqrt()
    return Factors((root[:, None] * down).float().contiguous(), (up * root).float().contiguous(), divisor, error)
