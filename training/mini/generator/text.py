"""Captions as tokens, and tokens as the two encoders' outputs: T5's states and CLIP's pooled vector, as FluxPipeline computes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTextModel, T5EncoderModel

from training.mini.flux_folder import clip_text_config, t5_config
from training.mini.generator.forward import Prompt
from training.mini.tokenisers import PROMPT_TOKENS, build_tokenisers

TEXT_TOKENS = PROMPT_TOKENS
"""The length to which T5's tokens are padded, in training and in use (`max_sequence_length`): FLUX attends to padding too."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """t5, clip: int16 [..., 48] token ids, padded."""

    t5: Tensor
    clip: Tensor

    @staticmethod
    def stack(variants: Sequence[Tokens]) -> Tokens:
        """Several [N, 48] -> one [N, variants, 48]."""
        return Tokens(torch.stack([v.t5 for v in variants], 1), torch.stack([v.clip for v in variants], 1))

    def to(self, device: torch.device | str) -> Tokens:
        return Tokens(self.t5.to(device), self.clip.to(device))

    def pick(self, index: Tensor) -> Tokens:
        """One variant at random for each indexed picture -> [n, 48]."""
        variant = torch.randint(0, self.t5.shape[1], index.shape, device=index.device)
        return Tokens(self.t5[index, variant], self.clip[index, variant])

    def emptied(self, share: float) -> Tokens:
        """A share of the captions replaced by the empty one (for guidance)."""
        empty = empty_caption().to(self.t5.device)
        drop = torch.rand(self.t5.shape[0], 1, device=self.t5.device) < share
        return Tokens(torch.where(drop, empty.t5, self.t5), torch.where(drop, empty.clip, self.clip))

    def expand(self, n: int) -> Tokens:
        return Tokens(self.t5.expand(n, -1), self.clip.expand(n, -1))


@cache
def _tokenisers() -> tuple[Any, Any]:
    return build_tokenisers()


def tokenised(captions: Sequence[str]) -> Tokens:
    """[n] captions -> tokens [n, 48]."""
    clip, t5 = _tokenisers()
    ids = [
        tokeniser(list(captions), padding="max_length", max_length=TEXT_TOKENS, truncation=True, return_tensors="pt").input_ids.to(
            torch.int16
        )
        for tokeniser in (t5, clip)
    ]
    return Tokens(*ids)


@cache
def empty_caption() -> Tokens:
    """[1, 48]: what an empty prompt is."""
    return tokenised([""])


class TextEncoders(nn.Module):
    """Both encoders together, since they are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.t5 = T5EncoderModel(t5_config())
        self.clip = CLIPTextModel(clip_text_config())

    def forward(self, tokens: Tokens) -> Prompt:
        states = self.t5(tokens.t5.long())[0]
        return Prompt(states, self.clip(tokens.clip.long()).pooler_output)
