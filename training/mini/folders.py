"""Writes model folders that stock `from_pretrained` opens: the FLUX pipeline, the ControlNet, the picture encoders.

Matrices of everything but the autoencoder are stored as fp8, the rest as fp16; configs say float32, so that both
libraries compute in it. Configs hold no path of the machine that wrote them. Knows no sizes: models bring their own.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import diffusers
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel
from transformers import (
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
    SiglipVisionModel,
    T5EncoderModel,
    T5TokenizerFast,
)

from training.mini.flux_folder import clip_processor_config, siglip_processor_config
from training.mini.storage import MATRIX_DTYPE, REST_DTYPE, save_weights, stored

# Part -> (library, class), with the names of FLUX.1-dev's own model_index.json.
_PIPELINE: Final = {
    "scheduler": ("diffusers", "FlowMatchEulerDiscreteScheduler"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "T5EncoderModel"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "tokenizer_2": ("transformers", "T5TokenizerFast"),
    "transformer": ("diffusers", "FluxTransformer2DModel"),
    "vae": ("diffusers", "AutoencoderKL"),
}


def save_flux_folder(
    out: Path,
    *,
    transformer: FluxTransformer2DModel,
    vae: AutoencoderKL,
    t5: T5EncoderModel,
    clip: CLIPTextModel,
    tokenisers: tuple[CLIPTokenizer, T5TokenizerFast],
    scheduler: FlowMatchEulerDiscreteScheduler,
) -> None:
    """A folder for FluxPipeline.from_pretrained. tokenisers: as build_tokenisers() gives them. The vae's config must hold its factors."""
    index: dict[str, Any] = {"_class_name": "FluxPipeline", "_diffusers_version": diffusers.__version__}
    _write_json(out / "model_index.json", index | {name: list(kind) for name, kind in _PIPELINE.items()})
    _save_diffusers(out / "transformer", transformer, MATRIX_DTYPE)
    _save_diffusers(out / "vae", vae, REST_DTYPE)
    _save_transformers(out / "text_encoder", clip)
    _save_transformers(out / "text_encoder_2", t5)
    for name, tokeniser in zip(("tokenizer", "tokenizer_2"), tokenisers, strict=True):
        tokeniser.save_pretrained(out / name)
    scheduler.save_pretrained(out / "scheduler")


def save_controlnet(out: Path, controlnet: FluxControlNetModel) -> None:
    """A folder for FluxControlNetModel.from_pretrained."""
    _save_diffusers(out, controlnet, MATRIX_DTYPE)


def save_picture_encoder(out: Path, encoder: CLIPVisionModelWithProjection) -> None:
    """A folder for `load_ip_adapter(image_encoder_pretrained_model_name_or_path=...)`, with its CLIPImageProcessor."""
    _save_transformers(out, encoder)
    _write_json(out / "preprocessor_config.json", clip_processor_config())


def save_siglip(out: Path, encoder: SiglipVisionModel) -> None:
    """A folder for SiglipVisionModel.from_pretrained, with its SiglipImageProcessor."""
    _save_transformers(out, encoder)
    _write_json(out / "preprocessor_config.json", siglip_processor_config())


def _save_diffusers(out: Path, model: Any, matrices: torch.dtype) -> None:
    _write_json(out / "config.json", json.loads(model.to_json_string()))
    save_weights(out / "diffusion_pytorch_model.safetensors", stored(model.state_dict(), matrices))


def _save_transformers(out: Path, model: PreTrainedModel) -> None:
    """dtype float32 in the config: what `dtype="auto"`, the default of transformers 5, computes in."""
    config = json.loads(model.config.to_json_string())
    _write_json(out / "config.json", config | {"architectures": [type(model).__name__], "dtype": "float32"})
    save_weights(out / "model.safetensors", stored(model.state_dict(), MATRIX_DTYPE))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    portable = {key: value for key, value in values.items() if key != "_name_or_path"}
    path.write_text(json.dumps(portable, indent=2, sort_keys=True) + "\n", encoding="utf-8")
