"""The XLabs adapter against stock diffusers' `load_ip_adapter`, from the file to the latents: relative error at most 1e-5.

One picture at a time: stock FluxPipeline (diffusers 0.42) repeats the embeddings of a batch once more for each of its pictures, and
everybody's tokens are then mixed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from deployments.denoisers.flux1_loop import Call, Influence, Text, denoise
from deployments.denoisers.latents import Grid, noise, positions
from deployments.denoisers.schedule import sampler
from deployments.identity.image_attention import IMAGE_KEY
from deployments.identity.xlabs_ip_adapter import XLabs, XLabsAdapter, XLabsConfig, load_projection, ramp
from tests.mini_drawing import FLUX, LENGTH, SIZE, STEPS, XLABS, XLABS_FILE, clip_embedding, request, texts, xlabs_person
from tests.named_weights import fill, named_tensor
from tests.parity.agreement import TOLERANCE, relative_error

_GRID = Grid(SIZE // 8, SIZE // 8, 16)


@pytest.fixture(scope="module")
def stock() -> Iterator[FluxPipeline]:
    """mini with its adapter, as anybody would load it, and without encoders: texts and pictures come embedded."""
    pipe = FluxPipeline.from_pretrained(FLUX, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    pipe.load_ip_adapter(XLABS_FILE.parent, weight_name=XLABS_FILE.name, image_encoder_pretrained_model_name_or_path=None)
    yield pipe


def _stock_latents(pipe: FluxPipeline, strengths: list[float], cfg: bool) -> Tensor:
    pipe.set_ip_adapter_scale(strengths)
    given, embedding = texts(), clip_embedding("Ada")
    negative = {"negative_prompt_embeds": given.states[1:], "negative_pooled_prompt_embeds": given.pooled[1:], "true_cfg_scale": 2.0}
    latents = pipe(
        prompt_embeds=given.states[:1], pooled_prompt_embeds=given.pooled[:1], width=SIZE, height=SIZE, num_inference_steps=STEPS,
        guidance_scale=2.5, generator=torch.Generator().manual_seed(5), output_type="latent", max_sequence_length=LENGTH,
        ip_adapter_image_embeds=[embedding[:, None]], negative_ip_adapter_image_embeds=[torch.zeros_like(embedding)[:, None]],
        **(negative if cfg else {}),
    ).images  # fmt: skip
    assert isinstance(latents, Tensor)
    return latents


def _our_latents(weight: float, options: Mapping[str, str], cfg: bool, config: Any) -> Tensor:
    transformer = FluxTransformer2DModel.from_pretrained(FLUX, subfolder="transformer", dtype=torch.float32).eval()
    adapter, ada, wanted, given = (
        XLabsAdapter(transformer, XLABS_FILE),
        xlabs_person("Ada"),
        request(XLABS, weight=weight, options=options),
        texts(),
    )
    with torch.inference_mode():
        own, nobody = adapter.condition(ada.tokens, wanted), adapter.condition(ada.unconditional, wanted)
        call = Call(
            noise(_GRID, torch.Generator().manual_seed(5)), positions(_GRID), Text(given.states[:1], given.pooled[:1]), 2.5,
            negative=Text(given.states[1:], given.pooled[1:]) if cfg else None, true_cfg_scale=2.0,
            influences=[Influence(adapter.key, own, nobody, 0.0, 1.0)],
        )  # fmt: skip
        scheduler = sampler(config, STEPS, _GRID.tokens)
        return denoise(transformer, scheduler, call, before_forward=lambda: None, after_step=lambda step: None)


@pytest.mark.parametrize("cfg", [False, True])
@pytest.mark.parametrize(("weight", "form"), [(1.0, "constant"), (0.8, "linear"), (0.5, "second_half")])
def test_the_whole_loop_ends_where_stock_fluxpipeline_ends(stock: FluxPipeline, weight: float, form: str, cfg: bool) -> None:
    options = {"weight_type": form}
    strengths = [weight * strength for strength in ramp(options, 2)]
    theirs = _stock_latents(stock, strengths, cfg)
    assert relative_error(_our_latents(weight, options, cfg, stock.scheduler.config), theirs) <= TOLERANCE
    # The case would prove nothing if the adapter hardly mattered in it.
    assert relative_error(_stock_latents(stock, [0.0, 0.0], cfg), theirs) > 1e-3


def test_one_forward_with_a_strong_adapter_of_v2s_kind_equals_stocks(tmp_path: Path) -> None:
    """16 tokens of 4096, the one size at which stock diffusers reads more than four; drawn weights, hence a large effect."""
    config = XLabsConfig(image_dim=8, tokens=16, token_dim=4096, dim=32, blocks=3)
    whole = XLabs(config)
    fill(whole)
    file = tmp_path / "ip_adapter.safetensors"
    save_file(whole.state_dict(), file)
    embedding, form = named_tensor("a picture", 1, config.image_dim), {"weight_type": "linear"}
    call = {
        "hidden_states": named_tensor("picture", 1, 6, 8), "encoder_hidden_states": named_tensor("text", 1, 4, config.token_dim),
        "pooled_projections": named_tensor("pooled", 1, 12), "timestep": torch.tensor([0.5]), "img_ids": torch.zeros(6, 3),
        "txt_ids": torch.zeros(4, 3), "return_dict": False,
    }  # fmt: skip

    theirs = _transformer(config)
    pipe = FluxPipeline(None, None, None, None, None, None, theirs)
    pipe.load_ip_adapter(tmp_path, weight_name=file.name, image_encoder_pretrained_model_name_or_path=None)
    pipe.set_ip_adapter_scale([0.8 * strength for strength in ramp(form, config.blocks)])
    ours = _transformer(config)
    adapter = XLabsAdapter(ours, file)
    with torch.inference_mode():
        (base,) = ours(**call)
        (expected,) = theirs(**call, joint_attention_kwargs={"ip_adapter_image_embeds": [embedding[:, None]]})
        item = adapter.condition(load_projection(file).tokens(embedding), request(XLABS, weight=0.8, options=form))
        (drawn,) = ours(**call, joint_attention_kwargs={IMAGE_KEY: item})
    assert relative_error(drawn, expected) <= TOLERANCE
    assert relative_error(base, expected) > 0.05


def _transformer(config: XLabsConfig) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=config.blocks, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=config.token_dim, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    fill(model)
    return model.eval()
