"""Whether the text encoders can tell a trigger word from other words. Knows no model and no weights, only tokenisers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_PIECES = 3
"""A word in more pieces is spelt rather than named; the pieces mean something in thousands of other words."""


def trigger_warnings(trigger_word: str, captions: Sequence[str], tokenisers: Mapping[str, Any]) -> list[str]:
    """What is wrong with a trigger word, in sentences for people; empty where nothing is. tokenisers: of the base's text encoders, of the
    transformers library, by the names that people know."""
    if not trigger_word:
        return ["There is no trigger word: the LoRA will show its person in every picture with one."]
    found = []
    without = sum(trigger_word not in caption for caption in captions)
    if without:
        found.append(f"{without} of {len(captions)} captions do not hold the trigger word {trigger_word!r}.")
    for name, tokeniser in tokenisers.items():
        for word in trigger_word.split():
            found += _of_word(word, name, tokeniser)
    return found


def _of_word(word: str, name: str, tokeniser: Any) -> list[str]:
    ids = tokeniser(word, add_special_tokens=False).input_ids
    # CLIP's own end token is also its unknown one; it does not occur in a word that can be spelt.
    if tokeniser.unk_token_id in ids:
        return [f"{name} cannot read {word!r}: all words that it cannot read are the same to it. Choose letters that it knows."]
    pieces = [piece for piece in tokeniser.convert_ids_to_tokens(ids) if piece.strip("▁")]
    if len(pieces) > _PIECES:
        return [
            f"{name} reads {word!r} in {len(pieces)} pieces ({' '.join(pieces)}). A short made-up word, such as ohwx, is learned better."
        ]
    return []
