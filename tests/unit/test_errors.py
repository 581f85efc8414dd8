"""The exception tree: the drawing is the truth, codes are unique, and an error survives the way between two processes."""

from __future__ import annotations

import pickle
import re

import pytest

from deployments import errors
from deployments.errors import LikenessError, MultipleFaces, RequestRefused


def _tree(root: type[LikenessError]) -> list[type[LikenessError]]:
    return [root, *(below for child in root.__subclasses__() if child.__module__ == errors.__name__ for below in _tree(child))]


ALL = _tree(LikenessError)


def test_the_drawing_shows_every_leaf_with_its_code_and_status() -> None:
    assert errors.__doc__ is not None
    drawn = set(re.findall(r"─ (\w+) +(\w+) +(\d{3})$", errors.__doc__, re.MULTILINE))
    leaves = {(kind.__name__, kind.code, str(kind.status)) for kind in ALL if not kind.__subclasses__()}
    assert drawn == leaves


def test_codes_are_unique() -> None:
    assert len({kind.code for kind in ALL}) == len(ALL)


@pytest.mark.parametrize("kind", ALL)
def test_every_class_has_one_sentence_advice_and_an_error_status(kind: type[LikenessError]) -> None:
    assert kind.__doc__ is not None and kind.__doc__.split("\n\n")[0].rstrip().endswith(".")
    assert kind.advice.endswith(".")
    assert 400 <= kind.status < 600
    assert (kind.status < 500) == (
        issubclass(kind, RequestRefused) or kind.code in ("queue_full", "rate_limited", "quota_exceeded", "canceled")
    )


@pytest.mark.parametrize("kind", ALL)
def test_pickling_keeps_everything(kind: type[LikenessError]) -> None:
    error = kind("It broke.", "Mend it.", {"boxes": [[0, 1, 2, 3]]})
    copy = pickle.loads(pickle.dumps(error))  # noqa: S301 - made two words to the left
    assert type(copy) is kind
    assert (copy.message, copy.remedy, copy.details) == ("It broke.", "Mend it.", {"boxes": [[0, 1, 2, 3]]})
    assert str(copy) == str(error) == "It broke. Mend it."


def test_without_a_remedy_the_class_advises() -> None:
    error = MultipleFaces("group.png shows 3 faces.")
    assert "face_index" in str(error) and error.remedy == MultipleFaces.advice
    assert pickle.loads(pickle.dumps(error)).remedy == MultipleFaces.advice  # noqa: S301
