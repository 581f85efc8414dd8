"""Texts as FLUX reads them: T5's states and CLIP's pooled vector, out of the folder of a FLUX pipeline.

Equal to FluxPipeline.encode_prompt (diffusers 0.42). Each text is encoded by itself, so that its numbers do not depend on what else
is asked for at the same time. Knows no transformer and remembers nothing: see cache.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

from deployments.contracts import PromptEmbeds
from deployments.errors import InvalidRequest, MissingWeights
from deployments.pretrained import load_pretrained
from deployments.prompts.single_file import open_clip, open_t5
from deployments.weights import sha256_of

_FOLDERS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_LONGEST = 512
"""FluxPipeline.check_inputs refuses more."""
# What older checkpoints hold beside the weights: a table that is computed, and the second name of a shared one.
_CLIP_SPARE, _T5_SPARE = ("text_model.embeddings.position_ids",), ("encoder.embed_tokens.weight",)
# The Hugging Face cache links to files that are named after their content.
_SHA256 = re.compile(r"[0-9a-f]{64}")


class FluxPrompts:
    """The text encoders and tokenisers of one FLUX folder. Safe to call from several threads."""

    def __init__(
        self,
        folder: Path,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        files: Mapping[str, Path] | None = None,
        revision: str | None = None,
        torch_threads: int | None = None,
    ) -> None:
        """files: single files to read in place of the folder's weights, `text_encoder` and `text_encoder_2`. revision: what names these
        weights for ever (default: computed from the content of the files). torch_threads: of the process.

        Raises MissingWeights, CheckpointMismatch.
        """
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        for name in _FOLDERS:
            if not (folder / name).is_dir():
                raise MissingWeights(f"{folder} has no folder {name}, as a FLUX pipeline has.", "Fetch the folder again.")
        self._clip_tokens: Any = CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._t5_tokens: Any = T5TokenizerFast.from_pretrained(folder / "tokenizer_2", local_files_only=True)
        files = files or {}
        clip, t5 = folder / "text_encoder", folder / "text_encoder_2"
        self._clip = (
            open_clip(files["text_encoder"], clip, device, dtype)
            if "text_encoder" in files
            else load_pretrained(CLIPTextModel, clip, device, dtype, _CLIP_SPARE)
        )
        self._t5 = (
            open_t5(files["text_encoder_2"], t5, device, dtype)
            if "text_encoder_2" in files
            else load_pretrained(T5EncoderModel, t5, device, dtype, _T5_SPARE)
        )
        self._device = torch.device(device)
        self._lock = Lock()  # a fast tokeniser's padding is set and used in two steps
        self.longest = min(_LONGEST, int(self._t5_tokens.model_max_length))
        # The same weights in another type give other numbers.
        self.revision = f"{revision if revision is not None else _content(folder, files)}-{str(dtype).removeprefix('torch.')}"

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_length: int) -> PromptEmbeds:
        """states [n, max_length, width] and pooled [n, width], on the CPU, in the encoders' type. What lies beyond max_length tokens
        is not read: `unread` tells. CLIP reads as much as it can (77 tokens). Raises InvalidRequest for a length out of range.
        """
        self._refuse_length(max_length)
        if not texts:
            raise ValueError("There is no text to encode.")
        rows = [self._row(text, max_length) for text in texts]
        return PromptEmbeds(torch.cat([states for states, _ in rows]), torch.cat([pooled for _, pooled in rows]))

    def unread(self, text: str, max_length: int) -> str:
        """The end of the text that max_length tokens leave no room for; empty where all of it is read."""
        self._refuse_length(max_length)
        with self._lock:
            places = self._t5_tokens(text, return_offsets_mapping=True, verbose=False)["offset_mapping"]
        # The last token is the end of the text, and it is always kept.
        return text[places[max_length - 1][0] :] if len(places) > max_length else ""

    def _row(self, text: str, max_length: int) -> tuple[Tensor, Tensor]:
        with self._lock:
            t5, clip = (
                tokens(text, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids
                for tokens, length in ((self._t5_tokens, max_length), (self._clip_tokens, self._clip_tokens.model_max_length))
            )
        # The padding is attended to, in FLUX and here: no mask.
        states = self._t5(t5.to(self._device))[0]
        pooled = self._clip(clip.to(self._device)).pooler_output
        return states.cpu(), pooled.cpu()

    def _refuse_length(self, max_length: int) -> None:
        if not 1 <= max_length <= self.longest:
            raise InvalidRequest(f"max_sequence_length is {max_length}.", f"Choose 1 to {self.longest}.")


def content_of(folder: Path, below: Sequence[str]) -> str:
    """A name, 16 hex digits, for what the files in these subfolders hold."""
    digest = hashlib.sha256()
    for path in sorted(path for name in below for path in (folder / name).rglob("*") if path.is_file()):
        stored = path.resolve().name
        digest.update(f"{path.relative_to(folder).as_posix()} {stored if _SHA256.fullmatch(stored) else sha256_of(path)}\n".encode())
    return digest.hexdigest()[:16]


def _content(folder: Path, files: Mapping[str, Path]) -> str:
    """As `content_of`, and of the single files that stand in for some of them."""
    own = content_of(folder, _FOLDERS)
    return "-".join([own, *(sha256_of(files[name])[:16] for name in sorted(files))])
