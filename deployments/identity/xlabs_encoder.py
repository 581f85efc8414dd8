"""The XLabs IP-Adapter's encoder half at work: a person's pictures -> CLIP -> tokens.

It sees the picture, not the aligned face: hair, clothes and light come along, and so would everybody else on it (which is why a
Person's pictures show one person each). Several references are averaged as CLIP embeddings, like ApplyAdvancedFluxIPAdapter of
x-flux-comfyui does, unless the request asks for tokens side by side. Preprocessing is our own, so that the same picture gives the same
tokens whether torchvision is installed or not.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPVisionModelWithProjection

from deployments.contracts import RGB, Floats, IdentityRequest, IdentityTokens, Person
from deployments.errors import CheckpointMismatch
from deployments.identity.blending import blended_through, of_one_person
from deployments.identity.token_cache import TokenCache, content_key
from deployments.identity.xlabs_ip_adapter import load_projection
from deployments.pretrained import load_pretrained

# openai/CLIP, clip/clip.py: the normalisation of its pictures, RGB.
_MEAN: Final = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
_DEVIATION: Final = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_BLACK: Final = np.zeros((224, 224, 3), np.uint8)
_NO_FACE: Final = np.zeros(4, np.float32)
# What a whole CLIP (openai/clip-vit-large-patch14) holds beside its vision tower.
_SPARE: Final = ("text_model.", "text_projection.", "logit_scale", "vision_model.embeddings.position_ids")


class XLabsEncoder:
    """An IdentityEncoder. Of a single face it needs the box; of several the `embedding`, too, to see that all are one person's."""

    def __init__(
        self,
        adapter: Path,
        image_encoder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        model: str,
        nobody: Literal["black_picture", "zero_embedding"] = "black_picture",
        torch_threads: int | None = None,
    ) -> None:
        """adapter: an XLabs safetensors file; image_encoder: a folder with a CLIP vision tower. model: the catalogue's id.
        nobody: what stands for no reference in the negative pass: a black picture, as for the published files (x-flux at 4749542,
        src/flux/xflux_pipeline.py), or an embedding of zeros. torch_threads: of the process.
        Raises MissingWeights, UnsafeWeights, DamagedWeights, CheckpointMismatch.
        """
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self._model, self._device, self._dtype = model, torch.device(device), dtype
        self._clip = load_pretrained(CLIPVisionModelWithProjection, image_encoder, device, dtype, _SPARE)
        self._projection = load_projection(adapter, device, dtype)
        gives, reads = int(self._clip.config.projection_dim), self._projection.config.image_dim
        if gives != reads:
            raise CheckpointMismatch(f"{adapter} reads embeddings of {reads} numbers, the CLIP in {image_encoder} gives {gives}.")
        self._cache = TokenCache()
        nothing = self._encoded(_BLACK, _NO_FACE) if nobody == "black_picture" else torch.zeros(1, reads)
        self._nobody = self._projected(nothing)

    def encode(self, person: Person, request: IdentityRequest) -> IdentityTokens:
        """[1, tokens, width], on the CPU in the encoder's type; blended with `concat`: tokens times the references that are used.

        unconditional: see `nobody`. Raises InvalidRequest as `blended` and `of_one_person` do.
        """
        kept, left_out = of_one_person(person)
        seen = torch.stack([self._embedding(picture, face.box) for picture, face in zip(kept.pictures, kept.faces, strict=True)])
        tokens = blended_through(seen, kept.faces, request.blend, self._projected)
        nobody = self._nobody.repeat(1, tokens.shape[1] // self._nobody.shape[1], 1)
        return IdentityTokens(self._model, tokens, nobody, left_out)

    def forget(self, older_than: float = 0.0) -> None:
        self._cache.forget(older_than)

    def _embedding(self, picture: RGB, box: Floats) -> Tensor:
        """[1, width], not normalised."""
        return self._cache.get(content_key(self._model, picture, box), lambda: self._encoded(picture, box))

    @torch.no_grad()
    def _encoded(self, picture: RGB, box: Floats) -> Tensor:
        pixels = clip_pixels(picture, box, int(self._clip.config.image_size)).to(self._device, self._dtype)
        embeds: Tensor = self._clip(pixels).image_embeds
        return embeds.cpu()

    @torch.no_grad()
    def _projected(self, embeds: Tensor) -> Tensor:
        return self._projection.tokens(embeds.to(self._device, self._dtype)).cpu()


def clip_pixels(picture: RGB, box: Floats, size: int) -> Tensor:
    """RGB [H, W, 3] -> [1, 3, size, size] as CLIP reads it: the shorter side resized to `size` (bicubic), a square of that, normalised.

    box [4]: x0, y0, x1, y1 of the face. The square is the middle one, as CLIPImageProcessor cuts it, unless the face reaches beyond
    it; then it moves along the picture as far as the face asks.
    """
    height, width = picture.shape[:2]
    short = min(height, width)
    longer = int(size * max(height, width) / short)
    tall = height > width
    resized = Image.fromarray(picture).resize((size, longer) if tall else (longer, size), Image.Resampling.BICUBIC)
    low, high = (float(box[edge + tall]) * size / short for edge in (0, 2))
    middle = (longer - size) // 2
    start = int(np.clip(min(max(middle, high - size), low), 0, longer - size))
    cut = resized.crop((0, start, size, start + size) if tall else (start, 0, start + size, size))
    normal = (np.asarray(cut, np.float32) / 255 - _MEAN) / _DEVIATION
    return torch.from_numpy(np.ascontiguousarray(normal.transpose(2, 0, 1)))[None]
