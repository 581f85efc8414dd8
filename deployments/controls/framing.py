"""How much of a person a prompt asks for, read from the words that photographers use. Knows no pose and no picture."""

from __future__ import annotations

import re
from typing import Final, Literal

Framing = Literal["headshot", "half", "full"]

# The first that fits decides: "a full body portrait" shows the whole body, "a close-up portrait" the head.
_WORDS: Final[tuple[tuple[Framing, str], ...]] = (
    ("full", r"(full|whole|entire)[ -](body|length|figure|shot)|head[ -]to[ -](toe|foot|feet)|(wide|long|establishing)[ -]shot"),
    (
        "headshot",
        r"(extreme )?close[ -]?ups?|head[ -]?shots?|(face|bust|id|passport)[ -](shot|photo|picture)|head[ -]and[ -]shoulders|selfies?",
    ),
    (
        "half",
        r"(half|upper|three[ -]quarter)[ -](body|length|figure)|(waist|chest|thigh|knees?)[ -]up|(medium|mid|cowboy|american)[ -]shot",
    ),
    # Not of the paper or the camera.
    ("half", r"portraits?(?! (orientation|mode|format|lens))"),
)
_PATTERNS: Final = tuple((framing, re.compile(rf"\b(?:{words})\b", re.IGNORECASE)) for framing, words in _WORDS)


def framing_of(prompt: str) -> Framing | None:
    """headshot: head and shoulders. half: to the waist or hips. full: to the feet. None: the prompt does not say."""
    return next((framing for framing, words in _PATTERNS if words.search(prompt)), None)
