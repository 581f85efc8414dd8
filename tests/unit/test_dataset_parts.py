"""The rectangles, weights, words and looks of which curation is made, one by one."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from deployments.contracts import RGB
from deployments.errors import InvalidRequest
from training.dataset.caption import CAPTIONS_PATH, caption, captioner_of, style_of
from training.dataset.crop import head, plan
from training.dataset.duplicates import likeness, look
from training.dataset.masks import loss_weights, others_blurred
from training.dataset.select import select, state, subject_of
from training.dataset.settings import CurationSettings
from training.dataset.sources import from_bytes, from_folder
from training.dataset.values import Box, Crop, FaceFacts, PictureAnalysis, area, overlap

ANY = (0.5, 2.0)
SETTINGS = CurationSettings()


def face_at(x: float, y: float, side: float) -> Box:
    return x - side / 2, y - side / 2, x + side / 2, y + side / 2


def towards(direction: int, others: int = 0, amount: float = 0.0) -> bytes:
    """An embedding of somebody: one direction, and some of another."""
    vector = np.zeros(512, "<f4")
    vector[direction] = np.sqrt(1 - amount**2)
    vector[others] += amount
    return vector.tobytes()


def face(person: int, box: Box = (60.0, 60.0, 140.0, 140.0), **changes: object) -> FaceFacts:
    values: dict[str, object] = {
        "box": box, "score": 0.9, "landmarks": (), "size": box[2] - box[0], "sharpness": 200.0, "frontality": 0.9, "yaw": 0.0,
        "quality": 0.5, "embedding": towards(person), "judge_embedding": towards(person),
        "look": np.random.default_rng(len(str(changes)) + round(box[0] * 7)).integers(0, 255, 32 * 32 * 4, np.uint8).tobytes(),
    }  # fmt: skip
    return FaceFacts.model_validate(values | changes)


def picture(*faces: FaceFacts, side: int = 400) -> PictureAnalysis:
    return PictureAnalysis(sha256=f"{len(faces)}", width=side, height=side, faces=faces)


def test_alone_the_whole_picture_is_kept_within_the_aspect() -> None:
    assert plan(face_at(300, 100, 60), (), (600, 500), ANY) == Crop(box=(0, 0, 600, 500))
    wide = plan(face_at(900, 100, 60), (), (1000, 200), ANY)
    assert wide is not None and wide.box == (600, 0, 1000, 200)
    tall = plan(face_at(100, 1000, 80), (), (200, 2000), ANY)
    assert tall is not None and tall.box[3] - tall.box[1] == 400 and tall.box[1] < 960 < 1040 < tall.box[3]


def _anywhere(chance: np.random.Generator, size: tuple[int, int]) -> Box:
    x, y, side = chance.uniform((0.1 * size[0], 0.1 * size[1], 30), (0.9 * size[0], 0.9 * size[1], 110))
    return face_at(float(x), float(y), float(side))


@pytest.mark.parametrize("seed", range(40))
def test_a_crop_holds_the_head_and_no_other_face(seed: int) -> None:
    chance = np.random.default_rng(seed)
    size = (int(chance.integers(300, 1200)), int(chance.integers(300, 1200)))
    places = [_anywhere(chance, size) for _ in range(int(chance.integers(2, 9)))]
    subject, others = places[0], places[1:]
    crop = plan(subject, others, size, ANY)
    mine = head(subject, size)
    if crop is None:
        assert any(area(overlap(mine, other)) > 0 for other in others) or any(
            area(overlap(mine, head(other, size))) > 0 for other in others
        )
        return
    x0, y0, x1, y1 = crop.box
    assert 0 <= x0 < x1 <= size[0] and 0 <= y0 < y1 <= size[1]
    assert all(area(overlap(other, crop.box)) < 1e-6 for other in others) and crop.left_out == len(others)
    assert area(overlap(mine, crop.box)) > 0.97 * area(mine)
    assert 0.49 <= (x1 - x0) / (y1 - y0) <= 2.01 or x1 - x0 <= mine[2] - mine[0] + 2
    heads = [head(other, size) for other in others]
    assert all(area(overlap(other, crop.box)) < 1e-6 or other in crop.masked for other in heads)


def test_no_larger_rectangle_is_free() -> None:
    """Against every rectangle between the edges of the others."""
    subject, size = face_at(250, 200, 50), (600, 400)
    others = [face_at(80, 90, 40), face_at(480, 220, 60), face_at(300, 350, 30), face_at(420, 60, 40)]
    shut = [head(other, size) for other in others]
    edges_x = sorted({0.0, 600.0, *(side for box in shut for side in (box[0], box[2]))})
    edges_y = sorted({0.0, 400.0, *(side for box in shut for side in (box[1], box[3]))})
    need = head(subject, size)
    every = ((x0, y0, x1, y1) for x0, x1 in itertools.combinations(edges_x, 2) for y0, y1 in itertools.combinations(edges_y, 2))
    free = [box for box in every if not any(area(overlap(box, other)) > 0 for other in shut) and area(overlap(box, need)) == area(need)]
    crop = plan(subject, others, size, (0.01, 100.0))
    assert crop is not None and area(crop.box) >= max(map(area, free)) - 2 * sum(size)


def test_a_head_that_reaches_in_is_masked_and_a_face_that_does_is_refused() -> None:
    subject = face_at(150, 150, 80)
    close = plan(subject, [face_at(260, 150, 80)], (400, 400), ANY)
    assert close is not None and len(close.masked) == 1 and close.box[2] == 220 and close.left_out == 1
    assert plan(subject, [face_at(240, 150, 80)], (400, 400), ANY) is None


def test_weights_spare_the_subject_and_never_reach_nothing() -> None:
    subject, crop = face_at(150, 150, 80), plan(face_at(150, 150, 80), [face_at(260, 150, 80)], (400, 400), ANY)
    assert crop is not None
    weights = loss_weights(crop, subject, 0.1)
    assert weights is not None and weights.shape == (crop.box[3] - crop.box[1], crop.box[2] - crop.box[0])
    assert set(np.unique(weights)) == {np.float32(0.1), np.float32(1)}
    assert (weights[110:190, 110:190] == 1).all() and weights[150, 210] == np.float32(0.1) and weights[380, 210] == 1
    assert loss_weights(Crop(box=(0, 0, 9, 9)), subject, 0.1) is None
    with pytest.raises(ValidationError):
        CurationSettings(mask_weight=0)


def test_blurring_changes_only_the_others() -> None:
    noise = np.random.default_rng(1).integers(0, 255, (400, 400, 3), np.uint8)
    subject, crop = face_at(150, 150, 80), plan(face_at(150, 150, 80), [face_at(260, 150, 80)], (400, 400), ANY)
    assert crop is not None
    blurred, weights = others_blurred(noise, crop, subject), loss_weights(crop, subject, 0.1)
    changed = (blurred != noise[: crop.box[3], : crop.box[2]]).any(-1)
    assert weights is not None and not changed[weights == 1].any() and changed[weights < 1].mean() > 0.95


def _photograph(seed: int) -> RGB:
    coarse = np.random.default_rng(seed).integers(0, 255, (12, 12, 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((300, 300), Image.Resampling.BICUBIC))


def test_a_picture_looks_like_itself_cropped_brightened_and_resized_and_like_no_other() -> None:
    first, box = _photograph(1), face_at(150, 140, 60)
    brighter = np.clip(first * 0.8 + 30, 0, 255).astype(np.uint8)[20:, 15:]
    moved = tuple(side - shift for side, shift in zip(box, (15, 20, 15, 20), strict=True))
    half = np.array(Image.fromarray(first).resize((150, 150), Image.Resampling.BOX))
    assert likeness(look(first, box), look(brighter, moved)) > 0.97
    assert likeness(look(first, box), look(half, tuple(side / 2 for side in box))) > 0.97
    assert likeness(look(first, box), look(_photograph(2), box)) < 0.5
    flat = np.full((300, 300, 3), 90, np.uint8)
    assert likeness(look(flat, box), look(flat, box)) == 0
    assert likeness(look(first, box), look(first, (-900.0, -900.0, -840.0, -840.0))) == 0


def test_a_face_that_cannot_be_compared_is_not_another_persons() -> None:
    doubtful = towards(0, 9, 0.97)  # a cosine of 0.24 to the subject
    pictures = [picture(face(0)), picture(face(0, face_at(140, 90, 70))), picture(face(1, embedding=doubtful))]
    turned = picture(face(1, embedding=doubtful, yaw=-60.0))
    subject = subject_of(pictures, SETTINGS, 64)
    names = ["a", "b", "frontal", "turned"]
    verdicts = select(names, [*pictures, turned], subject, SETTINGS, 64)
    assert [verdict.reason for verdict in verdicts] == [None, None, "not_the_subject", None]
    assert verdicts[3].state == "extreme_pose" and verdicts[2].state == "scorable"


def test_states_and_sizes_go_by_pixels_not_by_the_share_of_the_picture() -> None:
    assert state(face(0, size=40.0), SETTINGS, 64) == "too_small" and state(face(0, score=0.3), SETTINGS, 64) == "low_det"
    whole = [picture(face(0, face_at(900 + 60 * n, 500, 140)), side=4000) for n in range(3)]
    far = picture(face(0, face_at(900, 500, 100)), side=4000)
    tiny = picture(face(0, face_at(900, 500, 50)), side=400)
    verdicts = select("abcde", [*whole, far, tiny], subject_of(whole, SETTINGS, 64), SETTINGS, 64)
    assert [verdict.reason for verdict in verdicts] == [None, None, None, "too_distant", "face_too_small"]


def test_the_nearest_of_the_people_who_come_often_decides() -> None:
    """A sister, as alike as 0.5, is in two pictures: she is herself, and not the subject."""
    sister = towards(5, 0, 0.5)
    sets = [picture(face(0, face_at(100 + 9 * n, 100, 80))) for n in range(3)]
    others = [picture(face(5, face_at(90 + 11 * n, 120, 80), embedding=towards(5, 0, 0.28))) for n in range(2)]
    probe = picture(face(5, face_at(200, 200, 90), embedding=sister))
    verdicts = select("abcdef", [*sets, *others, probe], subject_of([*sets, *others], SETTINGS, 64), SETTINGS, 64)
    assert [verdict.reason for verdict in verdicts] == [None] * 3 + ["not_the_subject"] * 3


def test_captions_by_composition_with_the_words_that_were_chosen() -> None:
    style = style_of(SETTINGS, "antelopev2")
    assert style.captioner is None and captioner_of(SETTINGS, style) is None
    named = [style.composition((0, 0, height, height), (0, 0, 800, 1000)).name for height in (400, 200, 90)]
    assert named == ["close-up", "portrait", "full body"]
    settings = CurationSettings(trigger="zxq", class_word="woman")
    assert caption(style, style.compositions[1], settings) == "a portrait photo of zxq woman"
    assert caption(style, style.compositions[1], settings, " in  a\npark ") == "a portrait photo of zxq woman, in a park"
    assert style_of(SETTINGS, "faces-mini").captioner is not None


@pytest.mark.parametrize("trigger", ["", " ohwx", "two\nlines", "x" * 65])
def test_a_trigger_that_would_break_a_caption_is_refused(trigger: str) -> None:
    with pytest.raises(ValidationError):
        CurationSettings(trigger=trigger)


def test_what_is_wrong_with_styles_captioners_and_folders_is_said(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no caption style 'haiku'.*photographs"):
        style_of(CurationSettings(captions="haiku"), "faces-mini")
    bad = tmp_path / "captions.yaml"
    bad.write_text(CAPTIONS_PATH.read_text().replace("from: 0.0", "from: 0.01"))
    with pytest.raises(InvalidRequest, match="to 0"):
        style_of(SETTINGS, "faces-mini", bad)
    with pytest.raises(InvalidRequest, match="nowhere:at_all cannot be imported"):
        captioner_of(CurationSettings(captioner="nowhere:at_all"), style_of(SETTINGS, "faces-mini"))
    with pytest.raises(InvalidRequest, match="holds no picture"):
        from_folder(tmp_path)
    with pytest.raises(InvalidRequest, match="Two pictures are called 'a'"):
        from_bytes([("a", b"1"), ("a", b"2")])
    (tmp_path / ".hidden").mkdir()
    for name in ("b.JPG", "a.png", ".hidden/c.png", "notes.txt"):
        (tmp_path / name).write_bytes(b"-")
    assert [source.name for source in from_folder(tmp_path)] == ["a.png", "b.JPG"]
