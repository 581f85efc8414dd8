"""Several LoRAs on a transformer for the length of one request, beside its weights: nothing is merged, so nothing has to be undone.

While applied, the transformer belongs to the request: the denoiser's lock must be held. Knows no files and no cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from deployments.denoisers.lora.weights import LoraWeights, LowRank
from deployments.errors import InvalidRequest, LoraIncompatible

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

SCALES = (-4.0, 4.0)
"""What a request may ask for. Sliders are used below zero; beyond these no published LoRA gives a picture."""


class _Beside:
    """The forward of a linear module, and low-rank changes of its result. Stands as `forward` on the instance, over what was there."""

    def __init__(self, forward: Any, changes: Sequence[tuple[LowRank, float]]) -> None:
        self._forward = forward
        self._changes = [(change.down, change.up.t(), change.scale * scale) for change, scale in changes]

    def __call__(self, given: Tensor) -> Tensor:
        result = cast(Tensor, self._forward(given))
        flat = result.flatten(0, -2)
        for down, up, scale in self._changes:
            # One kernel multiplies, scales and adds, and rounds once.
            flat = torch.addmm(flat, linear(given.flatten(0, -2), down), up, alpha=scale)
        return flat.view_as(result)


@contextmanager
def applied(transformer: FluxTransformer2DModel, stack: Sequence[tuple[LoraWeights, float]]) -> Iterator[None]:
    """Within it every weight W of the transformer acts as W + sum of scale * change. Afterwards no trace is left, whatever was raised.

    stack: LoRAs that were read for this transformer, on its device and in the type that it computes in, and their scales; 0 leaves one
    out. Raises InvalidRequest for a scale out of `SCALES`, LoraIncompatible for a module that is not there or would not be heard, and
    RuntimeError if a stack is applied already: whoever did that still draws.
    """
    refuse_scales(stack)
    changes: dict[str, list[tuple[LowRank, float]]] = {}
    for weights, scale in stack:
        for name, change in weights.modules.items() if scale else ():
            changes.setdefault(name, []).append((change, scale))
    modules = {name: heard_module(transformer, name) for name in changes}
    former = {name: module.__dict__.get("forward") for name, module in modules.items()}
    if any(isinstance(forward, _Beside) for forward in former.values()):
        raise RuntimeError("Another stack of LoRAs is applied to this transformer; apply one at a time, under the denoiser's lock.")
    try:
        for name, module in modules.items():
            # Past torch's __setattr__, which looks for parameters: 500 times a request that is most of a swap.
            module.__dict__["forward"] = _Beside(module.forward, changes[name])
        yield
    finally:
        for name, module in modules.items():
            module.__dict__.pop("forward", None)
            if (forward := former[name]) is not None:
                module.__dict__["forward"] = forward


def refuse_scales(stack: Sequence[tuple[LoraWeights, float]]) -> None:
    """Raises InvalidRequest for a scale out of `SCALES`, and for one that is no number."""
    for _, scale in stack:
        if not SCALES[0] <= scale <= SCALES[1]:
            raise InvalidRequest(f"A LoRA cannot have the scale {scale}.", f"Use one from {SCALES[0]} to {SCALES[1]}.")


def heard_module(transformer: FluxTransformer2DModel, name: str) -> nn.Module:
    """The module of this name, which the transformer calls. Raises LoraIncompatible if it is not there or is not called.

    Found by hand, because `get_submodule` takes several times as long, and this is done for 500 modules a request.
    """
    owner: nn.Module | None = None
    module: nn.Module | None = cast(nn.Module, transformer)
    for step in name.split("."):
        owner, module = module, module._modules.get(step) if module is not None else None
    if module is None:
        raise LoraIncompatible(f"The transformer has no module {name}: the LoRA was read for another one.")
    # diffusers' fuse_qkv_projections computes with a copy of the weights and calls the separate modules no more.
    if owner is not None and owner.__dict__.get("fused_projections"):
        raise LoraIncompatible(f"The projections of {name} are fused, so a LoRA would not be heard.", "Call unfuse_qkv_projections first.")
    return module
