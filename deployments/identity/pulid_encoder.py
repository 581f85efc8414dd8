"""PuLID's encoder half at work: a person's faces -> identity tokens.

Grey aligned face -> EVA tower -> IDFormer, with the recogniser's raw embedding; several references are blended as tokens. Knows no
detector and no parser: crop, labels and embedding come with the face. The denoiser half stays on disk.

Where the order of steps was read: ToTheBeginning/PuLID at 1aa2fc7, pulid/pipeline_flux.py, get_id_embedding.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from deployments.contracts import RGB, Face, Floats, IdentityRequest, IdentityTokens, Person
from deployments.identity.blending import blended, of_one_person
from deployments.identity.eva_clip import load_eva
from deployments.identity.pulid import SCALES, IDFormer, PuLID, config_of, eva_pixels, face_to_grey, identity_condition
from deployments.identity.token_cache import TokenCache, content_key
from deployments.weights import check_state_dict, safetensors_header

_HALF = "pulid_encoder."


class PuLIDEncoder:
    """An IdentityEncoder. Faces need `embedding` and `aligned`."""

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
        """adapter: a PuLID safetensors file, of which only the encoder is loaded; image_encoder: an EVA
        tower's. model: the catalogue's id.
        torch_threads: of the process. Raises as `load_pulid` and `load_eva` do.
        """
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self._model, self._device, self._dtype = model, torch.device(device), dtype
        self._former = load_id_former(adapter, device, dtype)
        self._eva = load_eva(image_encoder, device, dtype)
        self._cache = TokenCache()
        self._nobody = self._unconditional()

    def encode(self, person: Person, request: IdentityRequest) -> IdentityTokens:
        """[1, queries, width], on the CPU in the encoder's type; blended with `concat`: queries times the references that are used.

        Raises InvalidRequest as `blended` and `of_one_person` do, ValueError if a face lacks a need.
        """
        kept, left_out = of_one_person(person)
        tokens = blended(torch.cat([self._tokens(face) for face in kept.faces]), kept.faces, request.blend)
        # Attention over nobody twice is attention over nobody.
        nobody = self._nobody.repeat(1, tokens.shape[1] // self._nobody.shape[1], 1)
        return IdentityTokens(self._model, tokens, nobody, left_out)

    def forget(self, older_than: float = 0.0) -> None:
        self._cache.forget(older_than)

    def _tokens(self, face: Face) -> Tensor:
        if face.embedding is None or face.aligned is None or face.labels is None:
            raise ValueError("PuLID reads a face's embedding, crop and labels: analyse it with the needs `embedding` and `aligned`.")
        embedding, aligned, labels = face.embedding, face.aligned, face.labels
        key = content_key(self._model, embedding, aligned, labels)
        return self._cache.get(key, lambda: self._encoded(embedding, aligned, labels))

    @torch.no_grad()
    def _encoded(self, embedding: Floats, aligned: RGB, labels: NDArray[np.uint8]) -> Tensor:
        """-> [1, queries, width]"""
        rgb = torch.tensor(aligned, device=self._device).permute(2, 0, 1)[None].float() / 255
        grey = face_to_grey(rgb, torch.tensor(labels, device=self._device).long()[None])
        vision, states = self._eva(eva_pixels(grey, self._eva.config.image_size).to(self._dtype))
        recognised = torch.tensor(embedding, device=self._device)[None].to(self._dtype)
        tokens: Tensor = self._former(identity_condition(recognised, vision), states)
        return tokens.cpu()

    @torch.no_grad()
    def _unconditional(self) -> Tensor:
        """[1, queries, width]: what the encoder makes of zeros, as PuLID.unconditional."""
        config, latents = self._former.config, self._former.latents
        states = [latents.new_zeros(1, config.vision_tokens, config.vision_width)] * SCALES
        tokens: Tensor = self._former(latents.new_zeros(1, config.face_dim + config.vision_dim), states)
        return tokens.cpu()


def load_id_former(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> IDFormer:
    """The encoder out of a PuLID file, in evaluation mode. The names and shapes of the whole file are checked, half of it is read.

    Raises UnsafeWeights, DamagedWeights, or CheckpointMismatch, which names the keys that are missing, left over or misshapen.
    """
    header = safetensors_header(path)
    with torch.device("meta"):
        whole = PuLID(config_of(header.metadata))
        found = {name: torch.empty(shape) for name, shape in header.shapes.items()}
    check_state_dict({name: tensor.shape for name, tensor in whole.state_dict().items()}, found, str(path))
    with safe_open(path, framework="pt", device=str(device)) as file:
        own = {name: file.get_tensor(name).to(dtype) for name in header.shapes if name.startswith(_HALF)}
    former = whole.pulid_encoder
    former.load_state_dict({name.removeprefix(_HALF): tensor for name, tensor in own.items()}, assign=True)
    return former.requires_grad_(False).eval()
