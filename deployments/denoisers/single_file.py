"""A FLUX transformer and its VAE out of single files, as Black Forest Labs publish them and as ComfyUI keeps them, strictly.

diffusers' own `from_single_file` fills what is missing with random weights, passes over what it does not know, and counts on FLUX.1's
width; here every name of a file is accounted for and every parameter filled, at any size. The configuration comes from the folder of
the diffusers pipeline that the file belongs to. Knows no text encoder: see deployments/prompts/single_file.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from torch import Tensor, nn

from deployments.checkpoints import Checkpoint
from deployments.denoisers.lora.places import original_places
from deployments.weights import check_state_dict

# ComfyUI's all-in-one checkpoints.
_TRANSFORMER_PREFIX, _VAE_PREFIX = "model.diffusion_model.", "vae."

# black-forest-labs/flux, src/flux/modules/layers.py: QKNorm, against diffusers, scripts/convert_flux_to_diffusers.py.
_DOUBLE_NORMS: Mapping[str, str] = {
    "img_attn.norm.query_norm.scale": "attn.norm_q.weight",
    "img_attn.norm.key_norm.scale": "attn.norm_k.weight",
    "txt_attn.norm.query_norm.scale": "attn.norm_added_q.weight",
    "txt_attn.norm.key_norm.scale": "attn.norm_added_k.weight",
}
_SINGLE_NORMS: Mapping[str, str] = {"norm.query_norm.scale": "attn.norm_q.weight", "norm.key_norm.scale": "attn.norm_k.weight"}

# The names of diffusers' AutoencoderKL -> those of black-forest-labs/flux, src/flux/modules/autoencoder.py. Up blocks are counted from
# the other end there; the decoder's number is put in later.
_VAE_NAMES: Sequence[tuple[str, str]] = (
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", r"up.\1.block.\2"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", r"up.\1.upsample"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"mid_block\.resnets\.0", "mid.block_1"),
    (r"mid_block\.resnets\.1", "mid.block_2"),
    (r"conv_shortcut", "nin_shortcut"),
    (r"conv_norm_out", "norm_out"),
)
_UP = re.compile(r"^decoder\.up\.(\d+)\.")


@dataclass(frozen=True)
class _Target:
    """Where a tensor of a file goes. pieces: the parameter's name, and the ranges of rows that, in this order, make it up.
    shape: of the tensor in the file."""

    shape: tuple[int, ...]
    pieces: Sequence[tuple[str, Sequence[tuple[int, int]]]]


def open_transformer(path: Path, config: Path, dtype: torch.dtype) -> FluxTransformer2DModel:
    """path: `flux1-dev.safetensors` or one of its kind, in any type, plain fp8 too. config: the pipeline's folder `transformer`.

    On the CPU, in evaluation mode. Raises UnsafeWeights, DamagedWeights or CheckpointMismatch, which names the keys.
    """
    model = _empty(FluxTransformer2DModel, config)
    return cast(FluxTransformer2DModel, _filled(model, Checkpoint(path, _TRANSFORMER_PREFIX), transformer_layout(model), dtype))


def open_vae(path: Path, config: Path, dtype: torch.dtype) -> AutoencoderKL:
    """path: `ae.safetensors` or one of its kind. config: the pipeline's folder `vae`. Otherwise as `open_transformer`."""
    model = _empty(AutoencoderKL, config)
    return cast(AutoencoderKL, _filled(model, Checkpoint(path, _VAE_PREFIX), vae_layout(model), dtype))


def transformer_layout(model: FluxTransformer2DModel) -> dict[str, _Target]:
    """Name in a file of Black Forest Labs -> where it goes, for this transformer; it may lie on the meta device."""
    blocks = cast(Any, model)  # diffusers declares no attribute
    layout = {}
    for name, place in original_places(model).items():
        pieces = [(piece.module, piece.rows) for piece in place.pieces]
        layout[f"{name}.weight"] = _Target(place.shape, [(f"{module}.weight", rows) for module, rows in pieces])
        layout[f"{name}.bias"] = _Target(place.shape[:1], [(f"{module}.bias", rows) for module, rows in pieces])
    kinds = (
        ("double_blocks", "transformer_blocks", len(blocks.transformer_blocks), _DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", len(blocks.single_transformer_blocks), _SINGLE_NORMS),
    )
    width = blocks.config.attention_head_dim
    for theirs, ours, count, norms in kinds:
        for index in range(count):
            for their, our in norms.items():
                layout[f"{theirs}.{index}.{their}"] = _Target((width,), [(f"{ours}.{index}.{our}", ((0, width),))])
    return layout


def vae_layout(model: AutoencoderKL) -> dict[str, _Target]:
    """Name in a file of Black Forest Labs -> where it goes, for this VAE; it may lie on the meta device."""
    layout = {}
    levels = len(cast(Any, model).config.block_out_channels)
    for name, tensor in cast(nn.Module, model).state_dict().items():
        shape = tuple(tensor.shape)
        # Attention is made of 1 x 1 convolutions there.
        convolved = "mid_block.attentions.0.to_" in name and len(shape) == 2
        layout[_vae_name(name, levels)] = _Target((*shape, 1, 1) if convolved else shape, [(name, ((0, shape[0]),))])
    return layout


def _vae_name(name: str, levels: int) -> str:
    for ours, theirs in _VAE_NAMES:
        name = re.sub(ours, theirs, name)
    return _UP.sub(lambda found: f"decoder.up.{levels - 1 - int(found[1])}.", name)


def _empty(kind: Any, config: Path) -> Any:
    with torch.device("meta"):
        return kind.from_config(kind.load_config(config, local_files_only=True))


def _filled(model: Any, checkpoint: Checkpoint, layout: Mapping[str, _Target], dtype: torch.dtype) -> Any:
    check_state_dict({name: target.shape for name, target in layout.items()}, _Shapes.of(checkpoint), str(checkpoint.path))
    expected, state = model.state_dict(), dict[str, Tensor]()
    for name, tensor in checkpoint.tensors(dtype):
        for parameter, rows in layout[name].pieces:
            parts = [tensor[start:stop] for start, stop in rows]
            state[parameter] = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(expected[parameter].shape)
    model.load_state_dict(state, strict=True, assign=True)
    return model.requires_grad_(False).eval()


@dataclass(frozen=True)
class _Shapes:
    """A tensor of which only the shape is known."""

    shape: tuple[int, ...]

    @staticmethod
    def of(checkpoint: Checkpoint) -> dict[str, _Shapes]:
        return {name: _Shapes(shape) for name, shape in checkpoint.shapes.items()}
