"""Qwen-Image for a training, of any size, out of the folder that QwenImagePipeline opens. Knows no adapter, data or loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
from PIL.Image import Image
from torch import Tensor

from deployments.catalog import Catalog, Entry
from deployments.contracts import PromptEmbeds
from deployments.denoisers.folders import open_part
from deployments.denoisers.latents import PATCH
from deployments.prompts.flux import content_of
from training.latent_cache import Moments

_LONGEST, _STEPS, _TRUE_CFG = 512, 50, 4.0
"""Where the catalogue is silent, QwenImagePipeline's own (max_sequence_length, num_inference_steps, true_cfg_scale)."""


class QwenBase:
    """See training/base_models.py: Base."""

    def __init__(self, catalog: Catalog, entry: Entry, device: torch.device, dtype: torch.dtype) -> None:
        """Raises as `Entry.located`."""
        self._catalog, self.entry, self._device, self._dtype = catalog, entry, device, dtype
        self._folder: Path = entry.located("pipeline")
        self.text_tokens = int(str(entry.defaults.get("max_sequence_length", _LONGEST)))
        with torch.device("meta"):
            vae: Any = AutoencoderKLQwenImage.from_config(AutoencoderKLQwenImage.load_config(self._folder / "vae", local_files_only=True))
        self.pixels_of_a_token = 2 ** len(vae.temperal_downsample) * PATCH

    def prompts(self) -> Any:
        """See deployments/prompts/qwen_image.py."""
        return self._catalog.part(self.entry, "prompts")(self._folder, self._device, self._dtype)

    def moments(self) -> Moments:
        """Normalised by each channel's own mean and deviation (QwenImageImg2ImgPipeline._encode_vae_image). The VAE is one of videos, of
        which a picture is one frame: an axis that comes before the VAE and goes behind it."""
        vae = self._vae()
        means, deviations = (
            torch.tensor(values, device=vae.device).view(-1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )

        def of(pixels: Tensor) -> tuple[Tensor, Tensor]:
            posterior = vae.encode(pixels.to(vae.device, vae.dtype).unsqueeze(2)).latent_dist
            mean, std = posterior.mean[0, :, 0].float(), posterior.std[0, :, 0].float()
            # Times the inverse, as the pipeline has it: a division rounds otherwise.
            return (mean - means) * (1.0 / deviations), std * (1.0 / deviations)

        return of

    def vae_revision(self) -> str:
        return content_of(self._folder, ("vae",))

    def outline(self) -> Any:
        config = QwenImageTransformer2DModel.load_config(self._folder / "transformer", local_files_only=True)
        with torch.device("meta"):
            return QwenImageTransformer2DModel.from_config(config)

    def transformer(self) -> Any:
        return open_part(QwenImageTransformer2DModel, self._folder, "transformer", self._dtype).to(self._device)

    def tokenisers(self) -> dict[str, Any]:
        from transformers import Qwen2Tokenizer

        return {"Qwen2.5-VL": Qwen2Tokenizer.from_pretrained(self._folder / "tokenizer", local_files_only=True)}

    def drawing(self, transformer: Any) -> Callable[[PromptEmbeds, PromptEmbeds, int, int], Image]:
        """With a negative pass under the empty text, which is what dropped captions were trained as."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self._folder / "scheduler", local_files_only=True)
        pipe: Any = QwenImagePipeline(scheduler=scheduler, vae=self._vae(), text_encoder=None, tokenizer=None, transformer=transformer)
        pipe.set_progress_bar_config(disable=True)
        usual = self.entry.defaults

        def text(prompt: PromptEmbeds) -> Tensor:
            """Without what fills it up, hence without a mask."""
            return prompt.states[:, : prompt.lengths[0]].to(transformer.device)

        def draw(prompt: PromptEmbeds, empty: PromptEmbeds, side: int, seed: int) -> Image:
            drawn: Image = pipe(
                prompt_embeds=text(prompt), negative_prompt_embeds=text(empty), width=side, height=side,
                num_inference_steps=int(str(usual.get("num_inference_steps", _STEPS))),
                true_cfg_scale=float(str(usual.get("true_cfg_scale", _TRUE_CFG))), generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip
            return drawn

        return draw

    def _vae(self) -> Any:
        return open_part(AutoencoderKLQwenImage, self._folder, "vae", torch.float32).to(self._device)
