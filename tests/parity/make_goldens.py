"""Writes goldens/pulid.npz, goldens/eva_clip.npz and goldens/denoise.npz by running the published PuLID code: see goldens/README.md.

    PYTHONPATH=. python tests/parity/make_goldens.py <checkout of ToTheBeginning/PuLID>

No test: it needs that checkout and the package einops. Nothing of ours computes a stored number, except for drawing inputs and weights.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from tests.named_weights import fill, named_tensor
from tests.parity import cases

GOLDENS = Path(__file__).parent / "goldens"
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


def _provide(name: str, **attributes: object) -> None:
    """Stands in for a module that the reference imports: for packages whose other content is not needed here."""
    module = ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def _reference_eva(checkout: Path) -> Any:
    """eva_clip.eva_vit_model without its package's __init__ (tokenisers, torchvision). It calls timm for sizes and initial weights."""
    _provide("eva_clip", __path__=[str(checkout / "eva_clip")])
    _provide("eva_clip.utils", to_2tuple=lambda x: (x, x))
    _provide("timm")
    _provide("timm.layers", drop_path=None, to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_)
    return importlib.import_module("eva_clip.eva_vit_model")


def eva_golden(checkout: Path) -> dict[str, Tensor]:
    config = cases.EVA
    model = _reference_eva(checkout).EVAVisionTransformer(
        img_size=config.image_size, patch_size=config.patch_size, num_classes=config.embed_dim, use_mean_pooling=False,
        embed_dim=config.width, depth=config.depth, num_heads=config.heads, mlp_ratio=config.mlp_width / config.width, qkv_bias=True,
        norm_layer=lambda width: nn.LayerNorm(width, eps=1e-6), rope=True, pt_hw_seq_len=config.rope_grid, intp_freq=True,
        naiveswiglu=True, subln=True,
    )  # fmt: skip
    fill(model)
    embedding, states = model.eval()(cases.eva_input(), return_hidden=True)
    return {"embedding": embedding, **{f"state_{index}": state for index, state in enumerate(states)}}


def _reference_flux(source: FluxTransformer2DModel) -> Any:
    """The reference's own FLUX with the weights of a diffusers transformer."""
    params = importlib.import_module("flux.model").FluxParams(
        in_channels=cases.FLUX["in_channels"], vec_in_dim=cases.FLUX["pooled_projection_dim"],
        context_in_dim=cases.FLUX["joint_attention_dim"], hidden_size=source.inner_dim, mlp_ratio=4.0,
        num_heads=cases.FLUX["num_attention_heads"], depth=cases.FLUX["num_layers"],
        depth_single_blocks=cases.FLUX["num_single_layers"], axes_dim=list(cases.FLUX["axes_dims_rope"]), theta=10_000,
        qkv_bias=True, guidance_embed=True,
    )  # fmt: skip
    model = importlib.import_module("flux.model").Flux(params)
    model.load_state_dict(_original_names(source.state_dict()), strict=True)
    return model.eval()


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


def _reference_pulid() -> Any:
    reference = importlib.import_module("pulid.encoders_transformer")
    config = cases.PULID
    pulid: Any = nn.Module()
    pulid.pulid_encoder = reference.IDFormer(
        dim=config.dim, depth=config.depth, dim_head=config.head_dim, heads=config.heads, num_id_token=config.id_tokens,
        num_queries=config.queries, output_dim=config.output_dim, ff_mult=config.ff_mult,
    )  # fmt: skip
    pulid.pulid_ca = nn.ModuleList(
        reference.PerceiverAttentionCA(dim=config.ca_dim, dim_head=config.ca_head_dim, heads=config.ca_heads, kv_dim=config.output_dim)
        for _ in range(config.attentions)
    )
    fill(pulid)
    return pulid


def _reference_flux_with(pulid: Any) -> Any:
    flux, config = _reference_flux(cases.transformer()), cases.PULID
    flux.pulid_ca, flux.pulid_double_interval, flux.pulid_single_interval = pulid.pulid_ca, config.double_interval, config.single_interval
    return flux


def pulid_golden() -> dict[str, Tensor]:
    pulid, config = _reference_pulid(), cases.PULID
    condition, states = cases.encoder_input()
    tokens = pulid.pulid_encoder(condition, states)
    nobody = pulid.pulid_encoder(torch.zeros_like(condition[:1]), [torch.zeros_like(state[:1]) for state in states])

    flux = _reference_flux_with(pulid)
    call = cases.flux_input()
    original = {"img": call["hidden_states"], "img_ids": call["img_ids"].expand(2, -1, -1), "txt": call["encoder_hidden_states"],
                "txt_ids": call["txt_ids"].expand(2, -1, -1), "timesteps": call["timestep"], "y": call["pooled_projections"],
                "guidance": call["guidance"]}  # fmt: skip
    identity = named_tensor("identity", 2, config.queries, config.output_dim)
    velocities = {f"velocity_{weight}": flux(**original, id=identity, id_weight=weight) for weight in cases.WEIGHTS}
    return {"tokens": tokens, "unconditional": nobody, "velocity_base": flux(**original), **velocities}


def denoise_golden() -> dict[str, Tensor]:
    """The latents that the reference's loop ends with, for every case."""
    sampling = importlib.import_module("flux.sampling")
    flux, call = _reference_flux_with(_reference_pulid()), cases.denoise_input()
    ids = {"img_ids": call["positions"][None], "txt_ids": torch.zeros(1, 4, 3), "neg_txt_ids": torch.zeros(1, 4, 3)}
    texts = {"txt": call["states"], "vec": call["pooled"], "neg_txt": call["negative_states"], "neg_vec": call["negative_pooled"]}
    timesteps = sampling.get_schedule(cases.STEPS, call["noise"].shape[1])
    return {
        case.name: sampling.denoise(
            flux, call["noise"], **ids, **texts, timesteps=timesteps, guidance=cases.GUIDANCE, id_weight=case.weight or 0.0,
            id=None if case.weight is None else call["own"], uncond_id=call["nobody"], start_step=case.start_step,
            true_cfg=case.true_cfg, timestep_to_start_cfg=case.timestep_to_start_cfg,
        )
        for case in cases.DENOISINGS
    }  # fmt: skip


def main(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    torch.set_num_threads(1)
    with torch.no_grad():
        for name, golden in (("eva_clip", eva_golden(checkout)), ("pulid", pulid_golden()), ("denoise", denoise_golden())):
            arrays: dict[str, Any] = {key: value.numpy() for key, value in golden.items()}
            np.savez_compressed(GOLDENS / f"{name}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
