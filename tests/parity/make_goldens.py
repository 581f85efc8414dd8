"""Writes goldens/pulid.npz, goldens/eva_clip.npz and goldens/denoise.npz by running the published PuLID code: see goldens/README.md.

    PYTHONPATH=. python tests/parity/make_goldens.py <checkout of ToTheBeginning/PuLID>

No test: it needs that checkout and the package einops. Nothing of ours computes a stored number, except for drawing inputs and weights.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.named_weights import fill, named_tensor
from tests.parity import cases
from tests.parity.original_flux import provide, reference_call, reference_flux, reference_texts, write


def _reference_eva(checkout: Path) -> Any:
    """eva_clip.eva_vit_model without its package's __init__ (tokenisers, torchvision). It calls timm for sizes and initial weights."""
    provide("eva_clip", __path__=[str(checkout / "eva_clip")])
    provide("eva_clip.utils", to_2tuple=lambda x: (x, x))
    provide("timm")
    provide("timm.layers", drop_path=None, to_2tuple=lambda x: (x, x), trunc_normal_=nn.init.trunc_normal_)
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
    flux, config = reference_flux(importlib.import_module("flux.model")), cases.PULID
    flux.pulid_ca, flux.pulid_double_interval, flux.pulid_single_interval = pulid.pulid_ca, config.double_interval, config.single_interval
    return flux


def pulid_golden() -> dict[str, Tensor]:
    pulid, config = _reference_pulid(), cases.PULID
    condition, states = cases.encoder_input()
    tokens = pulid.pulid_encoder(condition, states)
    nobody = pulid.pulid_encoder(torch.zeros_like(condition[:1]), [torch.zeros_like(state[:1]) for state in states])

    flux = _reference_flux_with(pulid)
    original = reference_call()
    identity = named_tensor("identity", 2, config.queries, config.output_dim)
    velocities = {f"velocity_{weight}": flux(**original, id=identity, id_weight=weight) for weight in cases.WEIGHTS}
    return {"tokens": tokens, "unconditional": nobody, "velocity_base": flux(**original), **velocities}


def denoise_golden() -> dict[str, Tensor]:
    """The latents that the reference's loop ends with, for every case."""
    sampling = importlib.import_module("flux.sampling")
    flux, call = _reference_flux_with(_reference_pulid()), cases.denoise_input()
    timesteps = sampling.get_schedule(cases.STEPS, call["noise"].shape[1])
    return {
        case.name: sampling.denoise(
            flux, call["noise"], **reference_texts(), timesteps=timesteps, guidance=cases.GUIDANCE, id_weight=case.weight or 0.0,
            id=None if case.weight is None else call["own"], uncond_id=call["nobody"], start_step=case.start_step,
            true_cfg=case.true_cfg, timestep_to_start_cfg=case.timestep_to_start_cfg,
        )
        for case in cases.DENOISINGS
    }  # fmt: skip


def main(checkout: Path) -> None:
    sys.path.insert(0, str(checkout))
    torch.set_num_threads(1)
    with torch.no_grad():
        write("eva_clip", eva_golden(checkout))
        write("pulid", pulid_golden())
        write("denoise", denoise_golden())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
