"""The tokenisers of the mini FLUX folder: transformers' own CLIPTokenizer and T5Tokenizer, holding the words of the character world.

Every word that a caption can hold is one token (CLIP splits at a hyphen, as it always does); other English falls back to fragments,
letters and, for CLIP, bytes. Constructed, not trained on a corpus: the same words give the same ids everywhere.
Case means nothing to either. Knows no embeddings: vocabulary sizes are what the text encoders must have.
"""

from __future__ import annotations

import re
import string
import struct
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Final, NamedTuple

from tokenizers import normalizers
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTokenizer, T5TokenizerFast

from training.mini.heldout import SAMPLE_CHARACTERS
from training.mini.words import COMMON_WORDS, WORD_ENDINGS
from training.mini.world.captions import VOCABULARY

PROMPT_TOKENS: Final = 48
"""Length of every tokenised prompt: what CLIP has positions for and T5's tokens are padded to (`max_sequence_length`)."""
T5_PAD_ID: Final = 0
T5_EOS_ID: Final = 1

_WORD_END = "</w>"
_CLIP_BOS, _CLIP_EOS = "<|startoftext|>", "<|endoftext|>"
_T5_SPECIALS = ("<pad>", "</s>", "<unk>")
_T5_SPACE = "▁"
_T5_CHARACTERS = tuple(c for c in string.printable if not (c.isspace() or c.isupper()))
# Log-probabilities, of which only the order of sums matters: a word beats any way to spell it, an ending beats its letters.
_WORD_SCORE, _ENDING_SCORE, _CHARACTER_SCORE = -8.0, -9.0, -10.0


class TokeniserFacts(NamedTuple):
    """What the configs of the text encoders must say of the tokenisers."""

    clip_vocabulary: int
    clip_bos_id: int
    clip_eos_id: int
    t5_vocabulary: int


def world_words() -> tuple[str, ...]:
    """Every word that gets a token of its own, each once, lower case: the captions' first, then common English, then names."""
    names = tuple(name.lower() for name in SAMPLE_CHARACTERS)
    return tuple(dict.fromkeys((*VOCABULARY, *COMMON_WORDS, *names)))


def build_tokenisers(words: Sequence[str] | None = None) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """(CLIP's, T5's), as folders `tokenizer` and `tokenizer_2` of a FLUX pipeline hold them. words: lower case; None for world_words()."""
    chosen = world_words() if words is None else tuple(words)
    return _clip_tokeniser(chosen), _t5_tokeniser(chosen)


@cache
def tokeniser_facts() -> TokeniserFacts:
    """Of the tokenisers that build_tokenisers() makes."""
    clip, t5 = build_tokenisers()
    return TokeniserFacts(len(clip), clip.bos_token_id, clip.eos_token_id, len(t5))


def _clip_tokeniser(words: Iterable[str]) -> CLIPTokenizer:
    """Ids as in OpenAI's vocabulary: 256 bytes, 256 bytes that end a word, merges, <|startoftext|>, <|endoftext|>.

    The end token pads, as in FLUX.1-dev; its id is the largest and not 2, so that CLIPTextModel pools at the first of them.
    """
    alphabet = sorted(ByteLevel.alphabet())
    parts = dict.fromkeys(part for word in words for part in re.findall(r"[a-z]+", word))
    merges = _merges_for(parts)
    symbols = [*alphabet, *(c + _WORD_END for c in alphabet), *(a + b for a, b in merges), _CLIP_BOS, _CLIP_EOS]
    vocabulary = {symbol: i for i, symbol in enumerate(symbols)}
    return CLIPTokenizer(
        vocab=vocabulary, merges=merges, bos_token=_CLIP_BOS, eos_token=_CLIP_EOS, pad_token=_CLIP_EOS, unk_token=_CLIP_EOS,
        model_max_length=PROMPT_TOKENS,
    )  # fmt: skip


def _merges_for(words: Iterable[str]) -> list[tuple[str, str]]:
    """Byte-pair merges, in order of rank, under which every word becomes one symbol.

    Each word is taken as far as the merges so far go, and the rest is added from its left. A merge that comes later ranks
    lower, so it cannot change what an earlier word becomes: one of that word's own merges always applies before it.
    """
    ranks: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + _WORD_END]
        while len(symbols) > 1:
            pair = min(pairwise(symbols), key=lambda p: ranks.get(p, len(ranks)))
            ranks.setdefault(pair, len(ranks))
            symbols = _merged(symbols, pair)
    return list(ranks)


def _merged(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Every occurrence of the pair joined, from the left."""
    joined: list[str] = []
    i = 0
    while i < len(symbols):
        step = 2 if tuple(symbols[i : i + 2]) == pair else 1
        joined.append("".join(symbols[i : i + step]))
        i += step
    return joined


def _t5_tokeniser(words: Iterable[str]) -> T5TokenizerFast:
    """Unigram pieces: <pad>, </s>, <unk>, characters, endings, words."""
    pieces = dict.fromkeys(_T5_SPECIALS, 0.0)
    pieces |= dict.fromkeys((_T5_SPACE, *_T5_CHARACTERS), _CHARACTER_SCORE)
    pieces |= {ending: _ENDING_SCORE for ending in WORD_ENDINGS if ending not in pieces}
    pieces |= {_T5_SPACE + word: _WORD_SCORE for word in words}
    tokeniser = T5TokenizerFast(vocab=list(pieces.items()), extra_ids=0, model_max_length=512)
    tokeniser.backend_tokenizer.normalizer = normalizers.Precompiled(_lower_casing())
    return tokeniser


def _lower_casing() -> bytes:
    """A SentencePiece character map that makes A-Z small.

    T5Tokenizer rebuilds itself when it is loaded, and of a stored normaliser it keeps this kind alone. Layout (sentencepiece,
    src/normalizer.cc, and darts-clone's DoubleArrayUnit): byte length of a trie, the trie as 32-bit units, the replacements,
    each ended by a zero byte. From the root at unit 0 with offset 0, byte c leads to unit c; its offset (bits 10 on) leads, by
    exclusive or with c, to a leaf (bit 31) that holds the replacement's position.
    """
    has_leaf, leaf, first_leaf = 1 << 8, 1 << 31, 256
    units = [0] * (first_leaf + len(string.ascii_uppercase))
    for i, capital in enumerate(string.ascii_uppercase.encode()):
        units[capital] = ((first_leaf + i) ^ capital) << 10 | has_leaf | capital
        units[first_leaf + i] = leaf | 2 * i
    replacements = b"".join(bytes((c, 0)) for c in string.ascii_lowercase.encode())
    return struct.pack(f"<{1 + len(units)}I", 4 * len(units), *units) + replacements
