"""Where the keys of a LoRA lead in a FLUX transformer: the names that Black Forest Labs, XLabs and diffusers give to one linear module.

Original FLUX fuses what diffusers holds apart, so one name may lead to several modules, each with its rows of the fused output. Names are
compared with every dot as an underscore: kohya and OneTrainer write them so, and no two names collide. Reads no file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal, cast

from torch import nn

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

Naming = Literal["diffusers", "bfl", "xlabs"]

# black-forest-labs/flux, src/flux/modules/layers.py and model.py, against diffusers, scripts/convert_flux_to_diffusers.py.
_IMAGE_QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
_TEXT_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "img_attn.qkv": _IMAGE_QKV,
    "img_attn.proj": ("attn.to_out.0",),
    "img_mlp.0": ("ff.net.0.proj",),
    "img_mlp.2": ("ff.net.2",),
    "img_mod.lin": ("norm1.linear",),
    "txt_attn.qkv": _TEXT_QKV,
    "txt_attn.proj": ("attn.to_add_out",),
    "txt_mlp.0": ("ff_context.net.0.proj",),
    "txt_mlp.2": ("ff_context.net.2",),
    "txt_mod.lin": ("norm1_context.linear",),
}
_SINGLE: Mapping[str, tuple[str, ...]] = {
    "linear1": (*_IMAGE_QKV, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation.lin": ("norm.linear",),
}
# XLabs-AI/x-flux, src/flux/modules/layers.py: DoubleStreamBlockLoraProcessor (1: picture, 2: text), SingleStreamBlockLoraProcessor.
_XLABS_DOUBLE: Mapping[str, tuple[str, ...]] = {
    "processor.qkv_lora1": _IMAGE_QKV,
    "processor.proj_lora1": ("attn.to_out.0",),
    "processor.qkv_lora2": _TEXT_QKV,
    "processor.proj_lora2": ("attn.to_add_out",),
}
_XLABS_SINGLE: Mapping[str, tuple[str, ...]] = {"processor.qkv_lora": _IMAGE_QKV, "processor.proj_lora": ("proj_out",)}
_OUTSIDE: Mapping[str, tuple[str, ...]] = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
# Its output is shift and scale in original FLUX, scale and shift in diffusers (AdaLayerNormContinuous).
_SWAPPED = "final_layer.adaLN_modulation.1"


@dataclass(frozen=True)
class Piece:
    """One module's share of a name. rows: ranges (start, stop) of the named output that, in this order, are the module's output."""

    module: str
    rows: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Place:
    """What a name leads to. shape: (out, in) of the weight as the name's owner holds it, all pieces together."""

    naming: Naming
    pieces: tuple[Piece, ...]
    shape: tuple[int, int]


def underscored(name: str) -> str:
    """The spelling under which names are compared."""
    return name.replace(".", "_")


def places(transformer: FluxTransformer2DModel) -> dict[str, Place]:
    """Underscored name -> place, for every name of a linear module that this transformer has; it may lie on the meta device.

    Modules that others put into it (an adapter's projections, say) have no name here: no LoRA is meant for them.
    """
    sizes = {name: (module.out_features, module.in_features) for name, module in _linears(transformer)}
    found: dict[str, Place] = {}
    for naming, name, modules in _names(transformer):
        if not all(module in sizes for module in modules):  # FLUX.1-schnell has no guidance embedder
            continue
        found[underscored(name)] = _place(naming, name, modules, sizes)
        for module in modules:
            found[underscored(module)] = _place("diffusers", module, (module,), sizes)
    return found


def original_places(transformer: FluxTransformer2DModel) -> dict[str, Place]:
    """Black Forest Labs' name, with its dots -> place: all linear modules of a checkpoint of theirs, each in exactly one place."""
    sizes = {name: (module.out_features, module.in_features) for name, module in _linears(transformer)}
    return {
        name: _place(naming, name, modules, sizes)
        for naming, name, modules in _names(transformer)
        if naming == "bfl" and all(module in sizes for module in modules)
    }


def _linears(transformer: FluxTransformer2DModel) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in cast(nn.Module, transformer).named_modules():
        if isinstance(module, nn.Linear):
            yield name, module


def _names(transformer: FluxTransformer2DModel) -> Iterator[tuple[Naming, str, tuple[str, ...]]]:
    """Every name that is not diffusers' own, and the modules that it means."""
    model = cast(Any, transformer)  # diffusers declares no attribute
    for name, modules in _OUTSIDE.items():
        yield "bfl", name, modules
    kinds: list[tuple[int, str, str, Naming, Mapping[str, tuple[str, ...]]]] = [
        (len(model.transformer_blocks), "double_blocks", "transformer_blocks", "bfl", _DOUBLE),
        (len(model.single_transformer_blocks), "single_blocks", "single_transformer_blocks", "bfl", _SINGLE),
        (len(model.transformer_blocks), "double_blocks", "transformer_blocks", "xlabs", _XLABS_DOUBLE),
        (len(model.single_transformer_blocks), "single_blocks", "single_transformer_blocks", "xlabs", _XLABS_SINGLE),
    ]
    for count, theirs, ours, naming, table in kinds:
        for index in range(count):
            for name, modules in table.items():
                yield naming, f"{theirs}.{index}.{name}", tuple(f"{ours}.{index}.{module}" for module in modules)


def _place(naming: Naming, name: str, modules: tuple[str, ...], sizes: Mapping[str, tuple[int, int]]) -> Place:
    ends = [0]
    for module in modules:
        ends.append(ends[-1] + sizes[module][0])
    shape = (ends[-1], sizes[modules[0]][1])
    if name == _SWAPPED:
        half = shape[0] // 2
        return Place(naming, (Piece(modules[0], ((half, 2 * half), (0, half))),), shape)
    return Place(naming, tuple(Piece(module, (rows,)) for module, rows in zip(modules, pairwise(ends), strict=True)), shape)
