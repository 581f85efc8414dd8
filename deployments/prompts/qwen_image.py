"""Texts as Qwen-Image reads them: Qwen2.5-VL's states of a text in the pipeline's template, out of the folder of a Qwen-Image pipeline.

Equal to QwenImagePipeline.encode_prompt (diffusers 0.42). Each text is encoded by itself, without padding, so that its numbers depend on
nothing else; the rows are then filled up to one length with zeros, as the pipeline fills the shorter texts of a batch. The zeros say where
a text ends (`PromptEmbeds.lengths`) and are never to be read: Qwen-Image was not trained to attend to them. Knows no transformer and no
pictures, and remembers nothing: see cache.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

from deployments.contracts import PromptEmbeds
from deployments.errors import InvalidRequest, MissingWeights
from deployments.pretrained import load_pretrained
from deployments.prompts.flux import content_of

_FOLDERS = ("text_encoder", "tokenizer")
# QwenImagePipeline.__init__: prompt_template_encode, prompt_template_encode_start_idx, tokenizer_max_length.
_TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial relationships of the "
    "objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
_BEFORE = 34
"""Tokens of the template before the text, whose states the transformer does not get."""
_LONGEST = 1024


class QwenPrompts:
    """The text encoder and the tokeniser of one Qwen-Image folder. Safe to call from several threads."""

    def __init__(self, folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        """Raises MissingWeights, and CheckpointMismatch, which names the keys."""
        for name in _FOLDERS:
            if not (folder / name).is_dir():
                raise MissingWeights(f"{folder} has no folder {name}, as a Qwen-Image pipeline has.", "Fetch the folder again.")
        self._tokens: Any = Qwen2Tokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        self._text = load_pretrained(Qwen2_5_VLForConditionalGeneration, folder / "text_encoder", device, dtype)
        self._device = torch.device(device)
        self._lock = Lock()  # a fast tokeniser's truncation is set and used in two steps
        # The same weights in another type give other numbers.
        self.revision = f"qwen-{content_of(folder, _FOLDERS)}-{str(dtype).removeprefix('torch.')}"

    @torch.no_grad()
    def encode(self, texts: Sequence[str], max_length: int) -> PromptEmbeds:
        """states [n, max_length, width], zeros behind each text, and pooled [n, 0], on the CPU, in the encoder's type. What lies beyond
        max_length tokens is cut off, as the pipeline cuts at its max_sequence_length. Raises InvalidRequest for a length out of range.
        """
        if not 1 <= max_length <= _LONGEST:
            raise InvalidRequest(f"max_sequence_length is {max_length}.", f"Choose 1 to {_LONGEST}.")
        if not texts:
            raise ValueError("There is no text to encode.")
        return PromptEmbeds(torch.stack([self._row(text, max_length) for text in texts]), torch.zeros(len(texts), 0))

    def _row(self, text: str, max_length: int) -> Tensor:
        with self._lock:
            read = self._tokens(_TEMPLATE.format(text), max_length=_LONGEST + _BEFORE, truncation=True, return_tensors="pt")
        read = read.to(self._device)
        found = self._text(input_ids=read.input_ids, attention_mask=read.attention_mask, output_hidden_states=True)
        states: Tensor = found.hidden_states[-1][0, _BEFORE:][:max_length].cpu()
        row = states.new_zeros(max_length, states.shape[1])
        row[: len(states)] = states
        return row
