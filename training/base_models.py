"""The parts of a base model that a training needs, out of the catalogue's entry, each opened when it is asked for and no sooner.

Knows no adapter, data or loss.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel

from deployments.catalog import Catalog, Entry
from deployments.denoisers.folders import open_part
from deployments.denoisers.single_file import open_transformer, open_vae
from deployments.errors import UnsupportedCombination
from deployments.prompts.flux import content_of

_LONGEST = 512
"""Tokens of a caption where the catalogue is silent: FLUX.1-dev's own (FluxPipeline, max_sequence_length)."""


class FluxBase:
    """FLUX of any size. device: where models are put; dtype: of their weights."""

    def __init__(self, catalog: Catalog, entry: Entry, device: torch.device, dtype: torch.dtype) -> None:
        """Raises UnsupportedCombination for another family, and as `Entry.located`."""
        if entry.family != "flux1":
            raise UnsupportedCombination(f"The weights of {entry.id} cannot be opened for training.", "Use a FLUX.1 base model.")
        self._catalog, self.entry, self._device, self._dtype = catalog, entry, device, dtype
        self._folder: Path = entry.located("pipeline")
        self._files = entry.single_files("transformer", "vae", "text_encoder", "text_encoder_2")
        self.text_tokens = int(str(entry.defaults.get("max_sequence_length", _LONGEST)))
        self.vae_config: Any = AutoencoderKL.from_config(AutoencoderKL.load_config(self._folder / "vae", local_files_only=True)).config

    def prompts(self) -> Any:
        """What encodes captions; see deployments/prompts/flux.py."""
        texts = {name: path for name, path in self._files.items() if name.startswith("text_encoder")}
        return self._catalog.part(self.entry, "prompts")(self._folder, self._device, self._dtype, files=texts)

    def vae(self) -> Any:
        """In fp32: once per picture, and a picture's latent is a target."""
        config = self._folder / "vae"
        if "vae" in self._files:
            return open_vae(self._files["vae"], config, torch.float32).to(self._device)
        return open_part(AutoencoderKL, self._folder, "vae", torch.float32).to(self._device)

    def vae_revision(self) -> str:
        """Names the VAE's weights by their content."""
        return str(self._files["vae"].resolve().name) if "vae" in self._files else content_of(self._folder, ("vae",))

    def outline(self) -> Any:
        """The transformer on the meta device: shapes without numbers."""
        with torch.device("meta"):
            return FluxTransformer2DModel.from_config(
                FluxTransformer2DModel.load_config(self._folder / "transformer", local_files_only=True)
            )

    def transformer(self) -> Any:
        config = self._folder / "transformer"
        if "transformer" in self._files:
            return open_transformer(self._files["transformer"], config, self._dtype).to(self._device)
        return open_part(FluxTransformer2DModel, self._folder, "transformer", self._dtype).to(self._device)

    @property
    def scheduler_folder(self) -> Path:
        return self._folder / "scheduler"

    @property
    def tokenisers(self) -> tuple[Path, Path]:
        """Folders of CLIP's and T5's."""
        return self._folder / "tokenizer", self._folder / "tokenizer_2"
