"""Stacks of LoRAs on a compiled transformer: room of one rank beside every linear module, refilled for each request.

torch.compile builds a graph for every set of modules that a LoRA changes and for every rank. Here no shape ever changes, so that it
builds one, whatever is applied. It costs the room, and the products with it, LoRA or none.
Uncompiled transformers are better served by `stack`. Knows no files and no cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deployments.denoisers.lora.places import places
from deployments.denoisers.lora.stack import heard_module, refuse_scales
from deployments.denoisers.lora.weights import LoraWeights
from deployments.errors import LoraIncompatible

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel


class _Roomy(nn.Linear):
    """A linear module with room beside its weight. lora_down: [rank, in], lora_up: [rank, out], zero where nothing is applied.

    A class, not a forward on the instance: compiled graphs are shared by blocks whose modules differ in nothing but their tensors.
    """

    lora_down: Tensor
    lora_up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        result = super().forward(input)
        inner = linear(input.flatten(0, -2), self.lora_down)
        return torch.addmm(result.flatten(0, -2), inner, self.lora_up).view_as(result)


class LoraSlots:
    """Room on all linear modules that a LoRA can name, from construction to `eject`. Construct it before the blocks are compiled."""

    def __init__(self, transformer: FluxTransformer2DModel, rank: int) -> None:
        """rank: for all LoRAs of a request together, on any one module.

        Raises ValueError for a module that is not a plain linear one: what quantises it or hooks into it would not see the room.
        """
        if rank < 1:
            raise ValueError(f"Room of rank {rank} holds no LoRA; give at least 1.")
        model = cast(nn.Module, transformer)
        names = sorted({piece.module for place in places(transformer).values() for piece in place.pieces})
        self._modules = {name: model.get_submodule(name) for name in names}
        strange = [name for name, module in self._modules.items() if type(module) is not nn.Linear or "forward" in module.__dict__]
        if strange:
            raise ValueError(f"{strange[0]} is no plain linear module (one of {len(strange)}); make room before hooks and quantisation.")
        self._transformer, self._rank, self._in_use = transformer, rank, False
        for module in self._modules.values():
            module.__class__ = _Roomy
            weight = cast(nn.Linear, module).weight
            for name, width in (("lora_down", weight.shape[1]), ("lora_up", weight.shape[0])):
                module.register_buffer(name, weight.new_zeros(rank, width), persistent=False)

    @contextmanager
    def applied(self, stack: Sequence[tuple[LoraWeights, float]]) -> Iterator[None]:
        """As `stack.applied`, and raises LoraIncompatible besides where the ranks of a stack exceed the room."""
        refuse_scales(stack)
        present = [(weights, scale) for weights, scale in stack if scale]
        self._refuse_misfits(present)
        if self._in_use:
            raise RuntimeError("Another stack of LoRAs is applied to this transformer; apply one at a time, under the denoiser's lock.")
        self._in_use = True
        try:
            self._fill(present)
            yield
        finally:
            self._clear({name for weights, _ in present for name in weights.modules})
            self._in_use = False

    def eject(self) -> None:
        """Leaves the transformer as it was."""
        for module in self._modules.values():
            del module.lora_down, module.lora_up
            module.__class__ = nn.Linear
        self._modules = {}

    def _refuse_misfits(self, stack: Sequence[tuple[LoraWeights, float]]) -> None:
        ranks: dict[str, int] = {}
        for weights, _ in stack:
            for name, change in weights.modules.items():
                heard_module(self._transformer, name)
                ranks[name] = ranks.get(name, 0) + change.rank
        highest = max(ranks.values(), default=0)
        if highest > self._rank:
            message = f"The LoRAs have rank {highest} together, and there is room for {self._rank}"
            raise LoraIncompatible(f"{message}.", "Use fewer LoRAs, or smaller ones.")

    @torch.no_grad()
    def _fill(self, stack: Sequence[tuple[LoraWeights, float]]) -> None:
        used = dict.fromkeys(self._modules, 0)
        for weights, scale in stack:
            for name, change in weights.modules.items():
                module, rows = cast(_Roomy, self._modules[name]), slice(used[name], used[name] + change.rank)
                module.lora_down[rows] = change.down
                torch.mul(change.up.t(), change.scale * scale, out=module.lora_up[rows])
                used[name] = rows.stop

    @torch.no_grad()
    def _clear(self, names: set[str]) -> None:
        for name in names:
            module = cast(_Roomy, self._modules[name])
            module.lora_down.zero_()
            module.lora_up.zero_()
