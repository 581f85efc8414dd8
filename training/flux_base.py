"""FLUX for a training, of any size: out of its pipeline's folder, or out of single files beside it. Knows no adapter, data or loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL.Image import Image
from torch import Tensor

from deployments.catalog import Catalog, Entry
from deployments.contracts import PromptEmbeds
from deployments.denoisers.folders import open_part
from deployments.denoisers.latents import PATCH
from deployments.denoisers.single_file import open_transformer, open_vae
from deployments.prompts.flux import content_of
from training.latent_cache import Moments

_LONGEST = 512
"""Tokens of a caption where the catalogue is silent: FLUX.1-dev's own (FluxPipeline, max_sequence_length)."""


class FluxBase:
    """See training/base_models.py: Base."""

    def __init__(self, catalog: Catalog, entry: Entry, device: torch.device, dtype: torch.dtype) -> None:
        """Raises as `Entry.located`."""
        self._catalog, self.entry, self._device, self._dtype = catalog, entry, device, dtype
        self._folder: Path = entry.located("pipeline")
        self._files = entry.single_files("transformer", "vae", "text_encoder", "text_encoder_2")
        self.text_tokens = int(str(entry.defaults.get("max_sequence_length", _LONGEST)))
        with torch.device("meta"):
            vae: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(self._folder / "vae", local_files_only=True))
        self.pixels_of_a_token = 2 ** (len(vae.config.block_out_channels) - 1) * PATCH

    def prompts(self) -> Any:
        """See deployments/prompts/flux.py."""
        texts = {name: path for name, path in self._files.items() if name.startswith("text_encoder")}
        return self._catalog.part(self.entry, "prompts")(self._folder, self._device, self._dtype, files=texts)

    def moments(self) -> Moments:
        """Normalised by shift and scale (FluxPipeline's decoding, backwards)."""
        vae = self._vae()
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor

        def of(pixels: Tensor) -> tuple[Tensor, Tensor]:
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            return ((posterior.mean.float() - shift) * scale)[0], (posterior.std.float() * scale)[0]

        return of

    def vae_revision(self) -> str:
        return str(self._files["vae"].resolve().name) if "vae" in self._files else content_of(self._folder, ("vae",))

    def outline(self) -> Any:
        with torch.device("meta"):
            return FluxTransformer2DModel.from_config(
                FluxTransformer2DModel.load_config(self._folder / "transformer", local_files_only=True)
            )

    def transformer(self) -> Any:
        config = self._folder / "transformer"
        if "transformer" in self._files:
            return open_transformer(self._files["transformer"], config, self._dtype).to(self._device)
        return open_part(FluxTransformer2DModel, self._folder, "transformer", self._dtype).to(self._device)

    def tokenisers(self) -> dict[str, Any]:
        from transformers import CLIPTokenizer, T5TokenizerFast

        return {
            "CLIP": CLIPTokenizer.from_pretrained(self._folder / "tokenizer", local_files_only=True),
            "T5": T5TokenizerFast.from_pretrained(self._folder / "tokenizer_2", local_files_only=True),
        }

    def drawing(self, transformer: Any) -> Callable[[PromptEmbeds, PromptEmbeds, int, int], Image]:
        """Without a negative pass, which FLUX.1-dev was distilled to do without: the empty text is not read."""
        scheduler = FlowMatchEulerDiscreteScheduler.from_pretrained(self._folder / "scheduler", local_files_only=True)
        none = {"text_encoder": None, "tokenizer": None, "text_encoder_2": None, "tokenizer_2": None}
        pipe: Any = FluxPipeline(scheduler=scheduler, vae=self._vae(), transformer=transformer, **none)
        pipe.set_progress_bar_config(disable=True)
        usual = self.entry.defaults

        def draw(prompt: PromptEmbeds, empty: PromptEmbeds, side: int, seed: int) -> Image:
            drawn: Image = pipe(
                prompt_embeds=prompt.states.to(transformer.device), pooled_prompt_embeds=prompt.pooled.to(transformer.device),
                width=side, height=side, num_inference_steps=int(str(usual.get("num_inference_steps", 28))),
                guidance_scale=float(str(usual.get("guidance_scale", 3.5))), generator=torch.Generator().manual_seed(seed),
            ).images[0]  # fmt: skip
            return drawn

        return draw

    def _vae(self) -> Any:
        config = self._folder / "vae"
        if "vae" in self._files:
            return open_vae(self._files["vae"], config, torch.float32).to(self._device)
        return open_part(AutoencoderKL, self._folder, "vae", torch.float32).to(self._device)
