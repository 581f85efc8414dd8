"""The one form of a LoRA: a low-rank change of some linear modules, named as diffusers names them, and what is to be known of its file.

Knows no file format and no model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """What is added to the weight [out, in] of one linear module: scale * up @ down. down: [r, in], up: [out, r].

    scale: alpha / r where the file says an alpha, else 1. It stays apart from the factors, so that they lose no bit.
    """

    down: Tensor
    up: Tensor
    scale: float

    @property
    def rank(self) -> int:
        return len(self.down)

    def delta(self) -> Tensor:
        """The change itself, [out, in] fp32."""
        return self.scale * (self.up.float() @ self.down.float())


@dataclass(frozen=True)
class LoraFacts:
    """What was found in a file.

    format: the spelling of its keys (several, joined by +, where it mixes them). keys: how many it has; each is accounted for.
    ranks: the smallest and the largest. errors: module of the file -> relative Frobenius error of its low-rank form, for LoKr and LoHa.
    inert: keys that change nothing, being zero. left_out: keys of text encoders, where the caller allowed to leave them out.
    """

    format: str
    keys: int
    ranks: tuple[int, int]
    errors: Mapping[str, float] = field(default_factory=dict)
    inert: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def error(self) -> float:
        """The largest of `errors`; 0 for a file that was low-rank from the start."""
        return max(self.errors.values(), default=0.0)


@dataclass(frozen=True, eq=False)
class LoraWeights:
    """A LoRA that fits its transformer. modules: name in the diffusers transformer -> its change.

    Modules that were fused in the file share one `down`, which is counted and moved once.
    """

    modules: Mapping[str, LowRank]
    facts: LoraFacts

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self._tensors().values())

    def to(self, device: torch.device | str, dtype: torch.dtype) -> LoraWeights:
        """The same LoRA elsewhere, or in another type; scales stay what they are."""
        moved = {key: tensor.to(device, dtype) for key, tensor in self._tensors().items()}
        modules = {name: LowRank(moved[id(old.down)], moved[id(old.up)], old.scale) for name, old in self.modules.items()}
        return LoraWeights(modules, self.facts)

    def _tensors(self) -> dict[int, Tensor]:
        return {id(tensor): tensor for change in self.modules.values() for tensor in (change.down, change.up)}
