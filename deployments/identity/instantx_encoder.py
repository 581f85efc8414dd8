"""The InstantX IP-Adapter's encoder half at work: a person's pictures -> SigLIP -> tokens.

It sees the picture, not the aligned face: hair, clothes and light come along. Several references are averaged as SigLIP embeddings, as
those of XLabs are as CLIP embeddings, unless the request asks for a choice among their tokens: a hundred pictures then cost a denoiser no
more than one (90 MB of keys and values on FLUX.1-dev), and the adapter reads one set of tokens, as in its training. (Published code takes
one picture only.)
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deployments.contracts import RGB, IdentityRequest, IdentityTokens, Person
from deployments.errors import CheckpointMismatch
from deployments.identity.blending import blended_through, of_one_person
from deployments.identity.instantx_ip_adapter import load_projection
from deployments.identity.siglip import Siglip
from deployments.identity.token_cache import TokenCache, content_key


class InstantXEncoder:
    """An IdentityEncoder. Of a single face it needs nothing; of several the `embedding`, to see that all are one person's."""

    def __init__(
        self,
        adapter: Path,
        image_encoder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        model: str,
        torch_threads: int | None = None,
    ) -> None:
        """adapter: the converted file; image_encoder: a folder with a SigLIP vision tower. model: the catalogue's id.
        torch_threads: of the process. Raises MissingWeights, UnsafeWeights, DamagedWeights, CheckpointMismatch.
        """
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self._model, self._device, self._dtype = model, torch.device(device), dtype
        self._siglip = Siglip(image_encoder, device, dtype)
        self._projection = load_projection(adapter, device, dtype)
        gives, reads = self._siglip.width, self._projection.config.image_dim
        if gives != reads:
            raise CheckpointMismatch(f"{adapter} reads embeddings of {reads} numbers, the SigLIP in {image_encoder} gives {gives}.")
        self._cache = TokenCache()

    def encode(self, person: Person, request: IdentityRequest) -> IdentityTokens:
        """[1, tokens, width], on the CPU in the encoder's type; blended with `concat`: tokens times the references that are used.

        unconditional: no tokens at all, [1, 0, width]. The adapter was trained without anybody who says nothing, and InstantX's pipeline
        has no negative pass; a pass without the adapter is what such a one would be. Raises InvalidRequest as `blended` and
        `of_one_person` do.
        """
        kept, left_out = of_one_person(person)
        seen = torch.stack([self._embedding(picture) for picture in kept.pictures])
        tokens = blended_through(seen, kept.faces, request.blend, self._projected)
        return IdentityTokens(self._model, tokens, tokens[:, :0], left_out)

    def forget(self, older_than: float = 0.0) -> None:
        self._cache.forget(older_than)

    @torch.no_grad()
    def _projected(self, embeds: Tensor) -> Tensor:
        return self._projection.tokens(embeds.to(self._device, self._dtype)).cpu()

    def _embedding(self, picture: RGB) -> Tensor:
        """[1, width]"""
        return self._cache.get(content_key(self._model, picture), lambda: self._siglip.pooled(picture).cpu())
