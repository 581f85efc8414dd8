"""Redux's encoder half at work: a person's pictures -> SigLIP's patches -> words for FLUX.

It sees the whole picture, and what it says is about all of it: composition, clothes and light before the face. Several references stay
apart and are read one after the other; a mean over patches would mix what lies in different places.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from deployments.contracts import RGB, IdentityRequest, IdentityTokens, Person
from deployments.errors import CheckpointMismatch, InvalidRequest
from deployments.identity.blending import of_one_person
from deployments.identity.redux import load_projection
from deployments.identity.siglip import Siglip
from deployments.identity.token_cache import TokenCache, content_key

_ENTRIES = 32
"""The words of one picture, 729 of 4096, are 6 MB in bf16."""
_IN_A_ROW = ("mean", "concat")
"""The default, for which there is no mean, and what is done."""


class ReduxEncoder:
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
        """adapter: the projection's file; image_encoder: a folder with a SigLIP vision tower. model: the catalogue's id.
        torch_threads: of the process. Raises MissingWeights, UnsafeWeights, DamagedWeights, CheckpointMismatch.
        """
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self._model = model
        self._siglip = Siglip(image_encoder, device, dtype)
        self._projection = load_projection(adapter, device, dtype)
        gives, reads = self._siglip.width, self._projection.config.image_dim
        if gives != reads:
            raise CheckpointMismatch(f"{adapter} reads patches of {reads} numbers, the SigLIP in {image_encoder} gives {gives}.")
        self._cache = TokenCache(_ENTRIES)

    def encode(self, person: Person, request: IdentityRequest) -> IdentityTokens:
        """[pictures, words, width], on the CPU in the encoder's type, as many words as patches. unconditional: none, [1, 0, width].

        Raises InvalidRequest for a blend that weighs or chooses, and as `of_one_person` does.
        """
        if request.blend not in _IN_A_ROW:
            raise InvalidRequest(
                f"Redux reads its references one after the other; it has no blend {request.blend!r}.", "Leave `blend` out."
            )
        kept, left_out = of_one_person(person)
        words = torch.cat([self._words(picture) for picture in kept.pictures])
        return IdentityTokens(self._model, words, words[:1, :0], left_out)

    def forget(self, older_than: float = 0.0) -> None:
        self._cache.forget(older_than)

    def _words(self, picture: RGB) -> Tensor:
        return self._cache.get(content_key(self._model, picture), lambda: self._made(picture))

    @torch.no_grad()
    def _made(self, picture: RGB) -> Tensor:
        return self._projection.tokens(self._siglip.patches(picture)).cpu()
