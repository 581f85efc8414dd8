"""What a picture shows, in words: everything but who it shows.

`caption` says it in one canonical sentence; `varied_captions` says it as people write prompts: other words, another order, things
left out. Both are made of the same phrases, and VOCABULARY holds every word that either can use. Knows no pixels.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import chain
from typing import Final, NamedTuple, TypeVar

import torch

from training.mini.world.scene import ARMS, CLOSE_UP, CLOTHES, COLOURS, EXPRESSIONS, FRAMINGS, LIGHTS, SCENES, Scene

NULL_CAPTION: Final = ""
"""The caption of no condition at all."""

_Options = tuple[str, ...]
_T = TypeVar("_T")

# Other words for each phrase of scene.py, in its order.
_SCENE_SYNONYMS: Final[tuple[_Options, ...]] = (
    ("at the office", "in a bright office"), ("in a coffee shop", "at a cafe"),
    ("at the beach at sunset", "by the sea at sunset", "on the beach in the evening"), ("in the woods", "among the trees of a forest"),
    ("in the snowy mountains", "in the mountains in the snow"), ("in the desert", "among desert dunes"),
    ("in the city at night", "on a city street at night"), ("in a studio", "in the photo studio"),
    ("in the library", "in a library full of books"), ("in the park", "at the park"),
)  # fmt: skip
_EXPRESSION_SYNONYMS: Final[tuple[_Options, ...]] = (
    ("calm", "serious"), ("happy", "friendly"), ("joyful", "happily laughing"), ("astonished", "amazed"), ("unhappy", "sorrowful"),
)  # fmt: skip
_CLOTHES_SYNONYMS: Final[tuple[_Options, ...]] = (
    ("tee", "short sleeved t-shirt"), ("suit and tie", "business suit"), ("hooded sweatshirt",),
    ("sweater with stripes", "striped jumper"), ("turtleneck sweater", "roll neck sweater"),
)  # fmt: skip
_COLOUR_SYNONYMS: Final[tuple[_Options, ...]] = (("bright red",), (), (), (), (), (), ("violet",), ())
_LIGHT_SYNONYMS: Final[tuple[_Options, ...]] = (
    ("daylight", "natural light"), ("warm golden light",), ("blue light", "cold blue light"), ("dramatic light", "side light"),
)  # fmt: skip
_FRAMING_SYNONYMS: Final[tuple[_Options, ...]] = (
    ("close-up", "close-up photo", "headshot"),
    ("photo", "picture", "half body photo"),
    ("full body picture", "full body shot", "full length photo"),
)
_ARMS_SYNONYMS: Final[tuple[_Options, ...]] = (
    ("with arms down", "standing relaxed"),
    ("with the left arm raised", "raising the left arm"),
    ("with the right arm raised", "raising the right arm"),
    ("with both arms raised", "with arms up", "cheering"),
    ("with hands on hips", "with both hands on the hips"),
)


def _with_synonyms(canonical: tuple[str, ...], synonyms: tuple[_Options, ...]) -> tuple[_Options, ...]:
    return tuple((phrase, *others) for phrase, others in zip(canonical, synonyms, strict=True))


PHRASES: Final = {
    "scene": _with_synonyms(SCENES, _SCENE_SYNONYMS),
    "clothes": _with_synonyms(CLOTHES, _CLOTHES_SYNONYMS),
    "colour": _with_synonyms(COLOURS, _COLOUR_SYNONYMS),
    "expression": _with_synonyms(EXPRESSIONS, _EXPRESSION_SYNONYMS),
    "light": _with_synonyms(LIGHTS, _LIGHT_SYNONYMS),
    "framing": _with_synonyms(FRAMINGS, _FRAMING_SYNONYMS),
    "arms": _with_synonyms(ARMS, _ARMS_SYNONYMS),
}
"""Per field of Scene and per value of it, all phrases that say it, the canonical one first."""

MEANINGS: Final = {
    phrase: (field, value) for field, values in PHRASES.items() for value, options in enumerate(values) for phrase in options
}
"""Every phrase -> the field of Scene and the value that it says (no phrase says two things)."""

_PERSON: Final = ("person", "character", "someone")
_WEARING: Final = ("wearing", "in", "dressed in")
_LIT: Final = ("with", "in", "under")
_FILLER: Final = ("beautiful", "detailed", "high quality", "stylized", "flat vector", "colorful")
_CLOSING: Final = ("high quality", "detailed", "illustration", "flat vector art", "sharp")
_FUNCTION_WORDS: Final = ("a", "an", "of")

_CANONICAL_SHARE = 0.5
_DROP_LIGHT, _DROP_ARMS, _DROP_EXPRESSION, _DROP_OTHER = 0.30, 0.50, 0.20, 0.05
_FILLER_SHARE = 0.15
_DRAWS = 24

# What a caption is put together from, in which order: pieces in a group are joined by spaces, groups by commas.
_SENTENCES: Final = (
    (("framing of", "person", "wearing", "scene", "lit"), ("arms",)),
    (("framing of", "person", "scene", "wearing"), ("arms",), ("lit",)),
    (("framing of", "person", "wearing", "arms", "scene", "lit"),),
    (("person", "wearing", "scene", "lit"), ("arms",), ("framing",)),
    (("person", "arms", "scene"), ("wearing", "lit"), ("framing",)),
    (("scene",), ("framing of", "person", "wearing"), ("arms",), ("lit",)),
    (("framing",), ("person",), ("garment",), ("scene",), ("light",), ("arms",)),
    (("person",), ("scene",), ("garment",), ("arms",), ("light",), ("framing",)),
)


class _Facts(NamedTuple):
    """One picture: indices into the tuples of scene.py."""

    scene: int
    clothes: int
    colour: int
    expression: int
    light: int
    framing: int
    arms: int


def caption(scene: Scene) -> list[str]:
    """One canonical sentence a picture, e.g. "a portrait of a smiling person wearing a red hoodie in a forest with soft daylight,
    left arm raised". Close-ups say nothing of the arms, which they do not show."""
    return [_canonical(facts) for facts in _facts_of(scene)]


def varied_captions(scene: Scene, rng: torch.Generator) -> list[str]:
    """One random caption a picture, true in all it says. rng: a generator on the CPU."""
    chances = torch.rand(len(scene), _DRAWS, generator=rng).tolist()
    return [_varied(facts, iter(row).__next__) for facts, row in zip(_facts_of(scene), chances, strict=True)]


def words_of(text: str) -> list[str]:
    """The words of a caption or a prompt in lower case, hyphenated ones whole, without punctuation."""
    return re.findall(r"[a-z]+(?:-[a-z]+)*", text.lower())


def _facts_of(scene: Scene) -> list[_Facts]:
    columns = torch.stack([getattr(scene, name) for name in _Facts._fields], dim=1)
    return [_Facts(*row) for row in columns.tolist()]


def _canonical(facts: _Facts) -> str:
    framing, garment = FRAMINGS[facts.framing], f"{COLOURS[facts.colour]} {CLOTHES[facts.clothes]}"
    arms = "" if facts.framing == CLOSE_UP else f", {ARMS[facts.arms]}"
    person = _a(f"{EXPRESSIONS[facts.expression]} person")
    return f"{_a(framing)} of {person} wearing {_a(garment)} {SCENES[facts.scene]} with {LIGHTS[facts.light]}{arms}"


def _varied(facts: _Facts, chance: Callable[[], float]) -> str:
    """chance: the next random number in 0..1; at most _DRAWS of them are asked for."""
    framing = _drop(_pick(PHRASES["framing"][facts.framing], chance()), _DROP_OTHER, chance())
    if framing and chance() < _FILLER_SHARE:
        framing = f"{_any(_FILLER, chance())} {framing}"
    garment = _garment(facts, chance)
    light = _drop(_pick(PHRASES["light"][facts.light], chance()), _DROP_LIGHT, chance())
    arms = _drop(_pick(PHRASES["arms"][facts.arms], chance()), _DROP_ARMS if facts.framing != CLOSE_UP else 1.0, chance())
    pieces = {
        "framing": framing,
        "framing of": framing and f"{_a(framing)} of",
        "person": _person(facts, chance),
        "garment": garment,
        "wearing": garment and f"{_pick(_WEARING, chance())} {_a(garment)}",
        "scene": _drop(_pick(PHRASES["scene"][facts.scene], chance()), _DROP_OTHER, chance()),
        "light": light,
        "lit": light and f"{_pick(_LIT, chance())} {light}",
        "arms": arms,
    }
    groups = (" ".join(filter(None, map(pieces.__getitem__, group))) for group in _any(_SENTENCES, chance()))
    closing = _any(_CLOSING, chance()) if chance() < _FILLER_SHARE else ""
    return ", ".join(filter(None, (*groups, closing)))


def _person(facts: _Facts, chance: Callable[[], float]) -> str:
    """With or without the expression: "a smiling person", "someone smiling", "a person"."""
    expression = _drop(_pick(PHRASES["expression"][facts.expression], chance()), _DROP_EXPRESSION, chance())
    person = _pick(_PERSON, chance())
    if person == "someone":
        return f"someone {expression}".rstrip()
    return _a(f"{expression} {person}".lstrip())


def _garment(facts: _Facts, chance: Callable[[], float]) -> str:
    """The top and its colour ("red hoodie"), sometimes without the colour, sometimes nothing."""
    colour = _drop(_pick(PHRASES["colour"][facts.colour], chance()), _DROP_OTHER, chance())
    clothes = _pick(PHRASES["clothes"][facts.clothes], chance())
    return _drop(f"{colour} {clothes}".lstrip(), _DROP_OTHER, chance())


def _a(phrase: str) -> str:
    """The phrase with its article (all of ours that start with a vowel letter start with a vowel)."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _drop(phrase: str, share: float, chance: float) -> str:
    return "" if chance < share else phrase


def _any(options: tuple[_T, ...], chance: float) -> _T:
    return options[int(chance * len(options))]


def _pick(options: _Options, chance: float) -> str:
    """The canonical phrase (the first) half of the time, else any of them."""
    return options[0] if chance < _CANONICAL_SHARE else _any(options, (chance - _CANONICAL_SHARE) / (1 - _CANONICAL_SHARE))


def _vocabulary() -> tuple[str, ...]:
    phrases = chain(_FUNCTION_WORDS, _PERSON, _WEARING, _LIT, _FILLER, _CLOSING, MEANINGS)
    return tuple(sorted({word for phrase in phrases for word in words_of(phrase)}))


VOCABULARY: Final = _vocabulary()
"""Every word that a caption can hold, sorted."""
