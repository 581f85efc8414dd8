"""Identity, the ceiling of photographs and the copy-paste score against closed forms; and the judge on pictures of the world."""

from __future__ import annotations

import math

import numpy as np
import pytest

from deployments.contracts import Floats
from deployments.errors import NoFaceDetected
from deployments.identity.blending import yaw
from deployments.images import encode
from tests.evaluation_subjects import FACES, flat, sample
from training.evaluation.cases import Subject
from training.evaluation.likeness import Look, copy_paste, known, leave_one_out, measured, real_copy_paste, unit
from training.evaluation.run import looking


@pytest.fixture(scope="module")
def look() -> Look:
    return looking(FACES)


def _alike(count: int, cosine: float) -> Floats:
    """[count, 512] unit rows, every two of which have this cosine."""
    rows = np.zeros((count, 512), np.float32)
    rows[:, 0] = math.sqrt(cosine)
    rows[np.arange(count), 1 + np.arange(count)] = math.sqrt(1 - cosine)
    return rows


def _turned(degrees: float) -> Floats:
    """A unit row in a plane."""
    row = np.zeros(512, np.float32)
    row[:2] = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return row


@pytest.mark.parametrize("count", [2, 3, 5, 10, 20])
def test_the_ceiling_of_photographs(count: int) -> None:
    """Of k - 1 pictures with the pair cosine c, the centroid's cosine to another: c sqrt(k - 1) / sqrt(1 + (k - 2) c)."""
    expected = 0.55 * math.sqrt(count - 1) / math.sqrt(1 + (count - 2) * 0.55)
    assert leave_one_out(_alike(count, 0.55)) == pytest.approx([expected] * count, abs=1e-5)


def test_one_photograph_has_no_ceiling() -> None:
    assert leave_one_out(_alike(1, 0.55)) == [] == real_copy_paste(_alike(2, 0.55))


def test_a_pasted_face_copies_and_a_face_of_the_person_does_not() -> None:
    shown, person = _turned(0)[None], _turned(40)
    assert copy_paste(_turned(0), shown, person) == pytest.approx(1, abs=1e-5)
    assert copy_paste(person, shown, person) == pytest.approx(-1, abs=1e-5)
    assert copy_paste(_turned(20), shown, person) == pytest.approx(0, abs=1e-5)
    assert copy_paste(_turned(10), shown, person) == pytest.approx(0.5, abs=1e-5)


def test_without_held_out_pictures_the_other_references_are_the_person() -> None:
    references = np.stack([_turned(0), _turned(40)])
    assert copy_paste(_turned(10), references, None) == pytest.approx(0.5, abs=1e-5)
    assert copy_paste(_turned(35), references, None) == pytest.approx(0.75, abs=1e-5)  # nearest to the second now
    assert copy_paste(_turned(10), references[:1], None) is None


def test_photographs_that_are_equally_alike_copy_nothing() -> None:
    """Each is as far from its nearest as from any other, and nearer to the centroid of them."""
    scores = real_copy_paste(_alike(6, 0.5))
    apart, centre = math.acos(0.5), math.acos(0.5 * 2 / math.sqrt(1 + 3 * 0.5))  # to one, and to the centroid of four
    assert scores == pytest.approx([(centre - apart) / centre] * 6, abs=1e-4)


def test_the_judge_knows_people_of_the_world(look: Look) -> None:
    ada = known(Subject(name="ada", references=[sample("ada", place) for place in (1, 2)], held_out=[sample("ada", 3)]), look)
    assert ada.sex == "F" and ada.faceless == 0 and ada.references.shape == (2, 512)
    same, other = (measured(look([sample(name, 4)])[0], ada) for name in ("ada", "bruno"))
    assert same.faces == other.faces == 1
    assert same.identity is not None and same.held_out is not None and other.identity is not None
    assert same.identity > 0.8 and same.held_out > 0.8 and other.identity < 0.3
    assert same.nearest == pytest.approx(max(ada.references @ _vector(look, sample("ada", 4))), abs=1e-5)
    assert known(Subject(name="ada", references=[sample("ada", 1)], sex="M"), look).sex == "M"  # who knows better is believed


def test_a_picture_of_nobody_is_measured_as_such(look: Look) -> None:
    ada = known(Subject(name="ada", references=[sample("ada", 1), encode(flat())]), look)
    assert ada.faceless == 1
    nobody = measured(look([encode(flat())])[0], ada)
    assert nobody.faces == 0 and nobody.identity is nobody.yaw is nobody.copy_paste is None


def test_references_without_any_face_are_refused(look: Look) -> None:
    with pytest.raises(NoFaceDetected, match="None of the 1 references of nobody"):
        known(Subject(name="nobody", references=[encode(flat())]), look)


def test_turns_have_a_side() -> None:
    for nose, degrees in ((50, 0), (70, 55), (30, -55)):
        landmarks = np.array([[30, 40], [70, 40], [nose, 60], [35, 80], [65, 80]], np.float32)
        assert yaw(landmarks) == pytest.approx(degrees, abs=0.1)


def _vector(look: Look, data: bytes) -> Floats:
    embedding = look([data])[0].faces[0].judge_embedding
    assert embedding is not None
    return unit(embedding)
