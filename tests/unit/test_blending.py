"""How references become one, what a reference is worth, and whose picture is left out."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch

from deployments.contracts import RGB, Face, Floats, Person
from deployments.errors import InvalidRequest
from deployments.identity.blending import (
    AVERAGES,
    BLENDS,
    SAME_PERSON_FROM,
    blended,
    frontality,
    of_one_person,
    quality,
    sharpness,
    strangers,
)
from tests.named_weights import named_tensor

# Eyes, nose and corners of the mouth of an upright face that looks into the camera.
FRONTAL: Floats = np.array([[40, 50], [80, 50], [60, 72], [45, 92], [75, 92]], np.float32)


def _face(**changes: Any) -> Face:
    usual: dict[str, Any] = {"box": np.array([10, 10, 210, 250], np.float32), "score": 0.9, "landmarks": FRONTAL}
    return Face(**(usual | changes))


def _tokens(*names: str) -> torch.Tensor:
    """[n, 4 tokens, 6]"""
    return torch.cat([named_tensor(name, 1, 4, 6) for name in names])


def _checkers(cell: int) -> RGB:
    rows, columns = np.indices((512, 512)) // cell
    return np.repeat(((rows + columns) % 2 * 200 + 20).astype(np.uint8)[..., None], 3, axis=2)


# --- blending ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", list(BLENDS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_single_reference_is_itself_in_every_mode(mode: str, dtype: torch.dtype) -> None:
    tokens = _tokens("one").to(dtype)
    assert torch.equal(blended(tokens, [_face()], mode), tokens)
    twice = blended(tokens.repeat(2, 1, 1), [_face(), _face()], mode)
    assert twice.dtype == dtype and torch.allclose(twice[:, :4], tokens, atol=1e-6 if dtype == torch.float32 else 1e-2)


def test_the_modes_are_what_the_published_nodes_compute() -> None:
    tokens, faces = _tokens("a", "b", "c") * torch.tensor([1.0, 2.0, 0.5]).view(3, 1, 1), [_face()] * 3
    assert torch.allclose(blended(tokens, faces, "mean"), (tokens[:1] + tokens[1:2] + tokens[2:]) / 3, atol=1e-6)
    assert torch.equal(blended(tokens, faces, "concat")[0], torch.cat(list(tokens)))
    lengths = [float((reference**2).sum() ** 0.5) for reference in tokens]
    expected = sum(length / sum(lengths) * reference for length, reference in zip(lengths, tokens, strict=True))
    assert torch.allclose(blended(tokens, faces, "norm")[0], torch.as_tensor(expected), atol=1e-6)


def test_max_token_takes_each_token_whole_from_where_it_is_longest() -> None:
    tokens = _tokens("a", "b")
    tokens[0, :2] *= 100
    tokens[1, 2:] *= 100
    assert torch.equal(blended(tokens, [_face()] * 2, "max_token")[0], torch.cat([tokens[0, :2], tokens[1, 2:]]))


def test_quality_weighs_by_what_a_face_is_worth() -> None:
    tokens, good = _tokens("a", "b"), _face()
    assert torch.allclose(blended(tokens, [good, good], "quality"), blended(tokens, [good, good], "mean"), atol=1e-6)
    tiny = _face(box=np.array([0, 0, 14, 14], np.float32))
    share = quality(tiny) / (quality(tiny) + quality(good))
    assert share < 0.2
    expected = (1 - share) * tokens[0] + share * tokens[1]
    assert torch.allclose(blended(tokens, [good, tiny], "quality")[0], expected, atol=1e-6)


def test_averages_lie_among_the_references_and_do_not_depend_on_their_order() -> None:
    tokens, faces = _tokens("a", "b", "c"), [_face(), _face(score=0.6), _face(landmarks=FRONTAL * 2)]
    for mode in sorted(AVERAGES):
        one = blended(tokens, faces, mode)
        assert (one <= tokens.max(0).values + 1e-6).all() and (one >= tokens.min(0).values - 1e-6).all()
        assert torch.allclose(one, blended(tokens.flip(0), faces[::-1], mode), atol=1e-6)


def test_wrong_input_to_a_blend() -> None:
    with pytest.raises(InvalidRequest, match=r"'max'.*mean, quality, concat, norm, max_token"):
        blended(_tokens("a"), [_face()], "max")
    with pytest.raises(ValueError, match="2 sets of tokens came for 1 faces"):
        blended(_tokens("a", "b"), [_face()], "mean")


def test_the_names_of_the_modes_cost_no_torch() -> None:
    """Who speaks HTTP reads them, in a process without model libraries."""
    code = "import sys; from deployments.identity.blending import BLENDS; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- quality ----------------------------------------------------------------------------------------------------------------------


def test_a_better_face_is_worth_more_in_each_respect() -> None:
    best = _face(aligned=_checkers(32))
    worse = [
        _face(aligned=_checkers(32), score=0.5),
        _face(aligned=_checkers(32), box=np.array([0, 0, 50, 60], np.float32)),
        _face(aligned=_checkers(32), landmarks=FRONTAL + np.array([[0, 0], [0, 0], [12, 0], [0, 0], [0, 0]], np.float32)),
        _face(aligned=np.full((512, 512, 3), 90, np.uint8)),
    ]
    assert all(0 < quality(face) < quality(best) <= 1 for face in worse)
    assert quality(_face()) > quality(best), "where there is no crop nothing speaks against it"


def test_a_reference_that_is_bad_in_every_way_still_counts() -> None:
    hopeless = _face(score=0.0, box=np.zeros(4, np.float32), landmarks=FRONTAL[[0, 0, 0, 0, 0]], aligned=np.zeros((512, 512, 3), np.uint8))
    assert quality(hopeless) == pytest.approx(0.05**4)


@pytest.mark.parametrize("degrees", [0, 30, 90, 200])
def test_a_tilted_head_is_as_frontal_as_an_upright_one(degrees: float) -> None:
    turn = np.array(
        [[np.cos(np.radians(degrees)), -np.sin(np.radians(degrees))], [np.sin(np.radians(degrees)), np.cos(np.radians(degrees))]]
    )
    assert frontality((FRONTAL @ turn.T).astype(np.float32)) == pytest.approx(1, abs=1e-5)


def test_frontality_falls_as_the_nose_leaves_the_middle() -> None:
    noses = [60, 66, 72, 80, 90]
    values = [frontality(np.concatenate([FRONTAL[:2], [[nose, 72]], FRONTAL[3:]]).astype(np.float32)) for nose in noses]
    assert values == pytest.approx([1, 0.7, 0.4, 0, -0.5], abs=1e-5)
    mirrored = frontality(np.concatenate([FRONTAL[:2], [[48, 72]], FRONTAL[3:]]).astype(np.float32))
    assert mirrored == pytest.approx(values[2], abs=1e-5)


def test_sharpness_falls_with_blur_and_not_with_mere_enlargement() -> None:
    fine, coarse = sharpness(_checkers(16)), sharpness(_checkers(64))
    smooth = np.repeat((np.sin(np.arange(512) / 80) * 100 + 128).astype(np.uint8)[:, None, None], 3, axis=2).repeat(512, axis=1)
    assert fine > coarse > 50 * sharpness(smooth)
    assert sharpness(np.full((512, 512, 3), 200, np.uint8)) == pytest.approx(0, abs=1e-3)
    reduced = _checkers(16)[::4, ::4]
    assert sharpness(reduced) == pytest.approx(fine, rel=1e-4), "a crop of 128 px shows the same"


# --- agreement --------------------------------------------------------------------------------------------------------------------


def _of(*angles: float) -> list[Face]:
    """Faces whose embeddings lie in a plane, at these angles in degrees: the cosine of two is that of their difference."""
    units = [np.array([np.cos(np.radians(angle)), np.sin(np.radians(angle))], np.float32) for angle in angles]
    return [_face(embedding=(15 + number) * unit) for number, unit in enumerate(units)]


@pytest.mark.parametrize(
    ("angles", "left_out"),
    [
        ((0,), ()),
        ((0, 60), ()),
        ((0, 40, 90), ()),  # the two ends have the middle one in common
        ((0, 90, 10), (1,)),
        ((90, 0, 10), (0,)),
        ((0, 10, 20, 120), (3,)),
        ((0, 10, 150, 20, 140), (2, 4)),  # a pair of one stranger's against three
        ((0, 10, 20, 120, 240), (3, 4)),
    ],
)
def test_who_is_in_the_minority_is_left_out(angles: tuple[float, ...], left_out: tuple[int, ...]) -> None:
    assert strangers(_of(*angles)) == left_out


@pytest.mark.parametrize(("angles", "named"), [((0, 90), "0 and 1"), ((0, 120, 240), "0, 1 and 2"), ((0, 5, 120, 125), "0, 1, 2 and 3")])
def test_without_a_majority_nobody_can_say_who_is_meant(angles: tuple[float, ...], named: str) -> None:
    with pytest.raises(InvalidRequest, match=f"reference pictures {named} show different people") as caught:
        strangers(_of(*angles))
    assert caught.value.details["pictures"] == list(range(len(angles)))


def test_a_poor_picture_is_judged_by_what_the_others_have_in_common() -> None:
    """Four good pictures and one whose cosine to each of them is 0.284, and 0.306 to their centroid."""
    person, *chances = np.eye(6, dtype=np.float32)
    shares = (0.9, 0.9, 0.9, 0.9, 0.315)
    faces = [_face(embedding=a * person + (1 - a * a) ** 0.5 * own) for a, own in zip(shares, chances, strict=True)]
    assert strangers(faces) == ()
    assert strangers(faces, threshold=0.32) == (4,)
    assert strangers([faces[4], faces[0], faces[1]]) == (0,), "two have less in common"


def test_the_threshold_is_a_cosine() -> None:
    degrees = float(np.degrees(np.arccos(SAME_PERSON_FROM)))
    assert strangers(_of(0, degrees - 0.1)) == ()
    with pytest.raises(InvalidRequest):
        strangers(_of(0, degrees + 0.1))
    assert strangers(_of(0, 80), threshold=0.1) == ()


def test_faces_without_embeddings_are_not_compared() -> None:
    known, other = _of(0, 90)
    assert strangers([known, _face()]) == strangers([_face(), _face()]) == ()
    nothing = _face(embedding=np.zeros(2, np.float32))
    assert strangers([known, known, nothing]) == (2,), "and one that says nothing looks like nobody"
    with pytest.raises(InvalidRequest):
        strangers([known, other])


def test_a_person_keeps_faces_and_pictures_together() -> None:
    faces = tuple(_of(0, 120, 10))
    pictures = tuple(np.full((2, 2, 3), number, np.uint8) for number in range(3))
    kept, left_out = of_one_person(Person(faces, pictures))
    assert left_out == (1,) and kept.faces == (faces[0], faces[2])
    assert [int(picture[0, 0, 0]) for picture in kept.pictures] == [0, 2]
    whole = Person(faces[::2], pictures[::2])
    assert of_one_person(whole) == (whole, ())
