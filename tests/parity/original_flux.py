"""The original FLUX code, which the published adapters carry along, with the weights of a diffusers transformer.

No test: the scripts that write goldens share it. Knows no adapter; the code itself comes from a checkout, never from here.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.parity import cases
from tests.parity.agreement import GOLDENS

# Names of the original FLUX code -> diffusers' names, where a tensor is stored alike.
_PLAIN = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "final_layer.linear": "proj_out",
    **{
        f"{theirs}.{end}_layer": f"time_text_embed.{ours}.linear_{number}"
        for theirs, ours in (("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder"), ("vector_in", "text_embedder"))
        for end, number in (("in", 1), ("out", 2))
    },
}
_DOUBLE = {
    "img_mod.lin": "norm1.linear", "txt_mod.lin": "norm1_context.linear", "img_attn.proj": "attn.to_out.0",
    "txt_attn.proj": "attn.to_add_out", "img_mlp.0": "ff.net.0.proj", "img_mlp.2": "ff.net.2", "txt_mlp.0": "ff_context.net.0.proj",
    "txt_mlp.2": "ff_context.net.2",
}  # fmt: skip


def provide(name: str, **attributes: object) -> None:
    """Stands in for a module that the reference imports: for packages whose other content is not needed here."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def reference_flux(code: ModuleType) -> Any:
    """The transformer of `cases.transformer` as a Flux of `code`, a checkout's own flux/model.py: same weights, same input, same output."""
    source = cases.transformer()
    params = code.FluxParams(
        in_channels=cases.FLUX["in_channels"], vec_in_dim=cases.FLUX["pooled_projection_dim"],
        context_in_dim=cases.FLUX["joint_attention_dim"], hidden_size=source.inner_dim, mlp_ratio=4.0,
        num_heads=cases.FLUX["num_attention_heads"], depth=cases.FLUX["num_layers"],
        depth_single_blocks=cases.FLUX["num_single_layers"], axes_dim=list(cases.FLUX["axes_dims_rope"]), theta=10_000,
        qkv_bias=True, guidance_embed=True,
    )  # fmt: skip
    model = code.Flux(params)
    model.load_state_dict(_original_names(source.state_dict()), strict=True)
    return model.eval()


def reference_call() -> dict[str, Tensor]:
    """`cases.flux_input` in the original's words."""
    call = cases.flux_input()
    return {
        "img": call["hidden_states"], "img_ids": call["img_ids"].expand(2, -1, -1), "txt": call["encoder_hidden_states"],
        "txt_ids": call["txt_ids"].expand(2, -1, -1), "timesteps": call["timestep"], "y": call["pooled_projections"],
        "guidance": call["guidance"],
    }  # fmt: skip


def reference_texts() -> dict[str, Tensor]:
    """Everything that the original's denoise loop reads beside noise, in its words: `cases.denoise_input`."""
    call = cases.denoise_input()
    return {
        "img_ids": call["positions"][None], "txt_ids": torch.zeros(1, 4, 3), "neg_txt_ids": torch.zeros(1, 4, 3), "txt": call["states"],
        "vec": call["pooled"], "neg_txt": call["negative_states"], "neg_vec": call["negative_pooled"],
    }  # fmt: skip


def write(name: str, arrays: dict[str, Tensor]) -> None:
    """goldens/<name>.npz."""
    np.savez_compressed(GOLDENS / f"{name}.npz", **{key: value.numpy() for key, value in arrays.items()})  # type: ignore[arg-type]


def _original_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' names and layout -> those of the original FLUX code."""
    out: dict[str, Tensor] = {}
    for kind in ("weight", "bias"):
        for theirs, ours in _PLAIN.items():
            out[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
        # diffusers has scale before shift (AdaLayerNormContinuous), the original has shift before scale.
        scale, shift = state[f"norm_out.linear.{kind}"].chunk(2)
        out[f"final_layer.adaLN_modulation.1.{kind}"] = torch.cat([shift, scale])
        for index in range(cases.FLUX["num_layers"]):
            ours, theirs = f"transformer_blocks.{index}", f"double_blocks.{index}"
            for a, b in _DOUBLE.items():
                out[f"{theirs}.{a}.{kind}"] = state[f"{ours}.{b}.{kind}"]
            for stream, names in (("img", ("to_q", "to_k", "to_v")), ("txt", ("add_q_proj", "add_k_proj", "add_v_proj"))):
                out[f"{theirs}.{stream}_attn.qkv.{kind}"] = torch.cat([state[f"{ours}.attn.{name}.{kind}"] for name in names])
        for index in range(cases.FLUX["num_single_layers"]):
            ours, theirs = f"single_transformer_blocks.{index}", f"single_blocks.{index}"
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            out[f"{theirs}.linear1.{kind}"] = torch.cat([state[f"{ours}.{name}.{kind}"] for name in parts])
            out[f"{theirs}.linear2.{kind}"] = state[f"{ours}.proj_out.{kind}"]
            out[f"{theirs}.modulation.lin.{kind}"] = state[f"{ours}.norm.linear.{kind}"]
    return out | _norms(state)


def _norms(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out = {}
    for index in range(cases.FLUX["num_layers"]):
        for stream, prefix in (("img", ""), ("txt", "added_")):
            for name, letter in (("query", "q"), ("key", "k")):
                norm = f"transformer_blocks.{index}.attn.norm_{prefix}{letter}.weight"
                out[f"double_blocks.{index}.{stream}_attn.norm.{name}_norm.scale"] = state[norm]
    for index in range(cases.FLUX["num_single_layers"]):
        for name, letter in (("query", "q"), ("key", "k")):
            out[f"single_blocks.{index}.norm.{name}_norm.scale"] = state[f"single_transformer_blocks.{index}.attn.norm_{letter}.weight"]
    return out
