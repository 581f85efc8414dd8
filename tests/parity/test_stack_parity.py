"""PuLID, XLabs' adapter, a LoRA and a ControlNet at once: our loop on mini against stock FluxControlNetPipeline.

Stock loads the adapter, the LoRA and the net as anybody would. PuLID, which diffusers does not have, is held against its own authors'
code elsewhere (test_pulid_parity.py); here the same injection stands in both.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline
from torch import Tensor

from deployments.contracts import RGB, ControlRequest, Guides, LoraRequest
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.denoisers.flux1_controlnet import UnionControl
from deployments.denoisers.flux1_loop import denoise
from deployments.denoisers.latents import Grid, noise
from deployments.denoisers.lora.stack import applied
from deployments.denoisers.schedule import sampler
from deployments.identity.pulid import CONDITION_KEY, inject
from deployments.identity.pulid_adapter import load_reading_half
from tests.mini_drawing import (
    ATTACH,
    FLUX,
    LENGTH,
    PACK,
    PULID,
    PULID_FILE,
    SIZE,
    STEPS,
    XLABS,
    XLABS_FILE,
    clip_embedding,
    pulid_person,
    request,
    spec,
    texts,
    xlabs_person,
)  # fmt: skip
from tests.parity.agreement import TOLERANCE, relative_error

NET, LORA = PACK / "flux1-controlnet-union", PACK / "loras" / "ada.safetensors"
POSE, SCALE, LORA_SCALE, PULID_WEIGHT, XLABS_WEIGHT = 4, 0.7, 0.6, 0.9, 0.5
GRID = Grid(SIZE // 8, SIZE // 8, 16)


def picture() -> RGB:
    return np.random.default_rng(4).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def stock_latents() -> Tensor:
    pipe: Any = FluxControlNetPipeline.from_pretrained(
        FLUX, controlnet=FluxControlNetModel.from_pretrained(NET), text_encoder=None, text_encoder_2=None, tokenizer=None,
        tokenizer_2=None, dtype=torch.float32,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    # Stock draws the condition from its posterior; so narrow, it has one point.
    out, channels = pipe.vae.encoder.conv_out, pipe.vae.config.latent_channels
    out.weight.data[channels:], out.bias.data[channels:] = 0, -30
    injection = inject(pipe.transformer, load_reading_half(PULID_FILE))
    pipe.load_ip_adapter(XLABS_FILE.parent, weight_name=XLABS_FILE.name, image_encoder_pretrained_model_name_or_path=None)
    pipe.set_ip_adapter_scale([XLABS_WEIGHT] * len(pipe.transformer.transformer_blocks))
    pipe.load_lora_weights(LORA.parent, weight_name=LORA.name, adapter_name="ada")
    pipe.set_adapters(["ada"], [LORA_SCALE])
    given, embedding = texts(), clip_embedding("Ada")
    latents: Tensor = pipe(
        prompt_embeds=given.states[:1], pooled_prompt_embeds=given.pooled[:1], width=SIZE, height=SIZE, num_inference_steps=STEPS,
        guidance_scale=2.5, latents=noise(GRID, torch.Generator().manual_seed(7)), output_type="latent", max_sequence_length=LENGTH,
        control_image=torch.from_numpy(picture()).permute(2, 0, 1)[None].float() / 127.5 - 1, control_mode=POSE,
        controlnet_conditioning_scale=SCALE, ip_adapter_image_embeds=[embedding[:, None]],
        negative_ip_adapter_image_embeds=[torch.zeros_like(embedding)[:, None]],
        joint_attention_kwargs={CONDITION_KEY: injection.condition(pulid_person("Ada").tokens, PULID_WEIGHT)},
    ).images  # fmt: skip
    return latents


def ours() -> Flux1Denoiser:
    attach = {PULID: ATTACH[PULID], XLABS: ATTACH[XLABS]}
    return Flux1Denoiser(FLUX, attach, controls={"union": partial(UnionControl, folder=NET, modes={"pose": POSE})}, loras=lambda _: LORA)


def our_latents(flux: Flux1Denoiser) -> Tensor:
    people = (request(PULID, weight=PULID_WEIGHT), request(XLABS, weight=XLABS_WEIGHT, options={"weight_type": "constant"}))
    control = ControlRequest(model="union", mode="pose", scale=SCALE)
    asked = spec(*people, seed=7, controls=(control,), loras=(LoraRequest(id="ada", sha256="0" * 64, scale=LORA_SCALE),))
    scheduler = sampler(flux._schedule, STEPS, GRID.tokens)
    with torch.inference_mode(), flux._loras.held(asked.loras) as loras:
        tokens = [pulid_person("Ada"), xlabs_person("Ada")]
        call = flux._call(asked, GRID, texts(), tokens, Guides(controls=(picture(),)), 0, scheduler.sigmas[0])
        with applied(flux.transformer, loras):
            return denoise(flux.transformer, scheduler, call, before_forward=lambda: None, after_step=lambda step: None)


def test_the_whole_stack_ends_where_the_stock_pipeline_ends_and_leaves_the_base() -> None:
    flux = ours()
    base = flux.draw(spec(), texts()).picture
    assert relative_error(our_latents(flux), stock_latents()) <= TOLERANCE
    assert np.array_equal(flux.draw(spec(), texts()).picture, base)
    flux.eject()
    assert np.array_equal(flux.draw(spec(), texts()).picture, Flux1Denoiser(FLUX).draw(spec(), texts()).picture)
