"""SigLIP's vision tower, as InstantX and Redux read it: one picture in, its patches and their pooled sum out.

Preprocessing is our own, so that the same picture gives the same numbers whether torchvision is installed or not. Knows no person: the
whole picture is seen, squeezed into a square as its published processor does it, so nothing is cut off and nobody is chosen.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import SiglipVisionModel

from deployments.contracts import RGB
from deployments.pretrained import load_pretrained

# What a whole SigLIP (google/siglip-so400m-patch14-384) holds beside its vision tower.
_SPARE: Final = ("text_model.", "logit_scale", "logit_bias")


class Siglip:
    """A tower of any size, used by one thread at a time."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """folder: of a SiglipVisionModel or of a whole SigLIP. Raises MissingWeights and CheckpointMismatch."""
        self._device, self._dtype = torch.device(device), dtype
        self._model = load_pretrained(SiglipVisionModel, folder, device, dtype, _SPARE)

    @property
    def width(self) -> int:
        return int(self._model.config.hidden_size)

    def pooled(self, picture: RGB) -> Tensor:
        """[1, width], on the tower's device."""
        pooled: Tensor = self._seen(picture).pooler_output
        return pooled

    def patches(self, picture: RGB) -> Tensor:
        """[1, patches, width], rows from the top, after the tower's last norm, on the tower's device."""
        patches: Tensor = self._seen(picture).last_hidden_state
        return patches

    @torch.no_grad()
    def _seen(self, picture: RGB) -> Any:
        return self._model(siglip_pixels(picture, int(self._model.config.image_size)).to(self._device, self._dtype))


def siglip_pixels(picture: RGB, size: int) -> Tensor:
    """RGB [H, W, 3] -> [1, 3, size, size] in -1..1, resized by Pillow's bicubic filter without regard to its proportions.

    (google/siglip-so400m-patch14-384, preprocessor_config.json: resample 3, mean and deviation 0.5.)
    """
    resized = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
    normal = (np.asarray(resized, np.float32) / 255 - 0.5) / 0.5
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))[None]
