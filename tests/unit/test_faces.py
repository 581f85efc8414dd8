"""The face models at work on the samples: who is found, who is meant, what is handed on, and that the judge tells people apart."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, cast, get_args

import cv2
import numpy as np
import onnxruntime
import pytest
from PIL import Image

from deployments import sessions
from deployments.catalog import CATALOG_PATH, load_catalog
from deployments.contracts import RGB, Face, FaceIndex, Need, Person, PersonPictures, PictureFaces
from deployments.errors import (
    DamagedWeights,
    FaceTooSmall,
    InvalidImage,
    InvalidRequest,
    MissingWeights,
    MultipleFaces,
    NoFaceDetected,
    ProviderUnavailable,
)
from deployments.faces.alignment import FFHQ_TEMPLATE, ffhq_crop, reduced, usable
from deployments.faces.analysis import FaceAnalyser
from deployments.faces.choice import Reference, alone, choose
from deployments.faces.comparison import cosines, likenesses
from deployments.faces.parsing import FaceParser
from deployments.images import Limits, decode, encode
from training.mini.world.landmarks import FFHQ_512

ROOT = CATALOG_PATH.parents[1]
PACK, SAMPLES = ROOT / "models" / "mini", ROOT / "samples"
MODELS, JUDGE, PARSER = PACK / "insightface", PACK / "judge" / "arcface_judge.onnx", PACK / "parser" / "face_parser.onnx"
DET_SIZE = cast(tuple[int, int], tuple(cast(Any, load_catalog().entry("faces-mini").options["det_size"])))
EVERYTHING: tuple[Need, ...] = get_args(Need)
SMALLEST_PX = 16.0
SAME, STRANGERS = 0.4, 0.3
"""A cosine of one person is above, of two below: generously, since the pack is trained anew from time to time."""


def _bytes(name: str) -> bytes:
    folder = "groups" if "-" in name and not name[-1].isdigit() else "characters"
    return (SAMPLES / folder / f"{name}.png").read_bytes()


GROUP = _bytes("ada-bruno")


def _person(*names: str, index: FaceIndex = None) -> PersonPictures:
    return PersonPictures(tuple(_bytes(name) for name in names), index)


@pytest.fixture(scope="module")
def analyser() -> FaceAnalyser:
    return FaceAnalyser(MODELS, JUDGE, PARSER, det_size=DET_SIZE, smallest_px=SMALLEST_PX)


def test_every_sample_shows_as_many_faces_as_people(analyser: FaceAnalyser) -> None:
    paths = [*sorted((SAMPLES / "characters").glob("*.png")), *sorted((SAMPLES / "groups").glob("*.png"))]
    for path, found in zip(paths, analyser.analyse([path.read_bytes() for path in paths]), strict=True):
        people = 1 if path.parent.name == "characters" else len(path.stem.split("-"))
        assert found.size == decode(path.read_bytes()).shape[1::-1]
        assert len(found.faces) == people, path.name


def test_nothing_is_computed_that_was_not_asked_for(analyser: FaceAnalyser) -> None:
    fields = {
        "embedding": {"embedding"},
        "judge": {"judge_embedding"},
        "attributes": {"age", "sex"},
        "aligned": {"aligned", "labels"},
    }
    for need in ((), *((name,) for name in EVERYTHING)):
        (face,) = analyser.analyse([_bytes("ada-1")], need)[0].faces
        given = {name for names in fields.values() for name in names if getattr(face, name) is not None}
        assert given == {name for asked in need for name in fields[asked]}


def test_what_is_asked_for_has_the_shapes_of_the_contract(analyser: FaceAnalyser) -> None:
    (face,) = analyser.analyse([_bytes("bruno-1")], EVERYTHING)[0].faces
    assert face.box.shape == (4,) and face.landmarks.shape == (5, 2) and 0.4 < face.score <= 1
    assert face.embedding is not None and face.embedding.shape == (512,) and face.embedding.dtype == np.float32
    assert face.judge_embedding is not None and np.linalg.norm(face.judge_embedding) == pytest.approx(1, abs=1e-5)
    assert face.aligned is not None and face.aligned.shape == (512, 512, 3) and face.aligned.dtype == np.uint8
    assert face.labels is not None and face.labels.shape == (512, 512) and face.labels.dtype == np.uint8
    assert face.age is not None and 0 < face.age < 110 and face.sex in ("F", "M")


def test_the_crop_brings_the_landmarks_to_the_template_and_the_parser_sees_a_face_there(analyser: FaceAnalyser) -> None:
    (face,) = analyser.analyse([_bytes("bruno-1")], ("aligned",))[0].faces
    assert face.labels is not None
    skin, mouth, eyes = (np.isin(face.labels, classes) for classes in ((1,), (11, 12, 13), (4, 5)))
    assert 0.15 < skin.mean() < 0.8
    for classes, points in ((mouth, FFHQ_TEMPLATE[3:]), (eyes, FFHQ_TEMPLATE[:2])):
        where = np.argwhere(classes).mean(0)[::-1]
        assert np.linalg.norm(where - points.mean(0)) < 60


def test_the_judge_knows_one_person_from_another(analyser: FaceAnalyser) -> None:
    ada, bruno = analyser.people([_person("ada-1", "ada-2", "ada-3", "ada-4"), _person("bruno-1", "bruno-2")], ("judge",))
    assert cosines(ada.faces, ada.faces).min() > SAME
    assert cosines(ada.faces, bruno.faces).max() < STRANGERS


def test_faces_go_by_area_and_each_can_be_meant(analyser: FaceAnalyser) -> None:
    (found,) = analyser.analyse([GROUP])
    areas = [float((face.box[2] - face.box[0]) * (face.box[3] - face.box[1])) for face in found.faces]
    assert areas == sorted(areas, reverse=True)
    ada, bruno = analyser.people([_person("ada-1"), _person("bruno-1")], ("judge",))
    indices: tuple[FaceIndex, ...] = (0, 1, "largest")
    chosen = analyser.people([PersonPictures((GROUP,), index) for index in indices], ("judge",))
    table = cosines([person.faces[0] for person in chosen], [ada.faces[0], bruno.faces[0]])
    assert set(table[:2].argmax(1)) == {0, 1} and table[:2].max(1).min() > SAME and table[:2].min(1).max() < STRANGERS
    assert np.array_equal(table[2], table[0])


def test_a_picture_of_several_people_shows_only_the_chosen_one_to_methods_that_see_more(analyser: FaceAnalyser) -> None:
    for index in (0, 1):
        (person,) = analyser.people([PersonPictures((GROUP,), index)], ("judge",))
        (shown,), (face,) = person.pictures, person.faces
        (seen,) = analyser.analyse_pixels([shown], ("judge",))
        assert len(seen.faces) == 1
        assert float(cosines(seen.faces, [face]).item()) > SAME
        assert np.abs(seen.faces[0].landmarks - face.landmarks).mean() < 3, "the face's place is that in the picture handed on"
    (alone_already,) = analyser.people([_person("ada-1")], ())
    assert np.array_equal(alone_already.pictures[0], decode(_bytes("ada-1")))


def test_several_faces_and_none_named_is_refused_with_the_boxes(analyser: FaceAnalyser) -> None:
    with pytest.raises(MultipleFaces, match="Reference picture 1 of person 1 shows 2 faces") as caught:
        analyser.people([_person("ada-1"), PersonPictures((_bytes("bruno-1"), GROUP))], ())
    assert "face_index" in str(caught.value)
    boxes = cast(list[list[float]], caught.value.details["boxes"])
    assert (caught.value.details["person"], caught.value.details["picture"]) == (1, 1)
    assert np.allclose(boxes, [face.box for face in analyser.analyse([GROUP])[0].faces], atol=0.06)


@pytest.mark.parametrize("index", [2, -1])
def test_a_face_that_is_not_there_cannot_be_meant(analyser: FaceAnalyser, index: int) -> None:
    with pytest.raises(InvalidRequest, match=f"face_index is {index}"):
        analyser.people([PersonPictures((GROUP,), index)], ())


def test_a_picture_without_a_face_is_named(analyser: FaceAnalyser) -> None:
    empty = encode(np.full((192, 192, 3), 130, np.uint8))
    assert analyser.analyse([empty])[0].faces == ()
    with pytest.raises(NoFaceDetected, match="Reference picture 1 shows no face"):
        analyser.people([PersonPictures((_bytes("ada-1"), empty))], ())


def test_a_picture_that_cannot_be_opened_is_named_with_the_reason(analyser: FaceAnalyser) -> None:
    with pytest.raises(InvalidImage, match="Reference picture 1: The bytes are not a PNG") as caught:
        analyser.people([PersonPictures((_bytes("ada-1"), b"nothing"))], ())
    assert caught.value.details == {"person": 0, "picture": 1}
    with pytest.raises(InvalidImage, match="Picture 1: "):
        analyser.analyse([_bytes("ada-1"), b"nothing"])


def test_somebody_without_pictures_is_refused(analyser: FaceAnalyser) -> None:
    with pytest.raises(InvalidRequest, match="Person 0"):
        analyser.people([PersonPictures(())], ())


def test_a_face_below_the_minimum_is_refused(analyser: FaceAnalyser) -> None:
    strict = FaceAnalyser(MODELS, JUDGE, PARSER, det_size=DET_SIZE, smallest_px=150)
    with pytest.raises(FaceTooSmall, match="at least 150") as caught:
        strict.people([_person("ada-3")], ())
    assert cast(float, caught.value.details["width"]) < 150
    assert analyser.people([_person("ada-3")], ())


def test_a_line_of_pixels_shows_no_face_and_breaks_nothing(analyser: FaceAnalyser) -> None:
    lines = [np.zeros((2000, 1, 3), np.uint8), np.zeros((1, 2000, 3), np.uint8), np.zeros((1, 1, 3), np.uint8)]
    assert [found.faces for found in analyser.analyse_pixels(lines, EVERYTHING)] == [(), (), ()]


def test_a_turned_photograph_is_the_same_person_as_the_upright_one(analyser: FaceAnalyser) -> None:
    exif, stream = Image.Exif(), BytesIO()
    exif[0x0112] = 6  # the camera lay on its side
    Image.open(BytesIO(_bytes("ada-1"))).transpose(Image.Transpose.ROTATE_90).save(stream, "PNG", exif=exif)
    turned, upright = analyser.people([PersonPictures((stream.getvalue(),)), _person("ada-1")], EVERYTHING)
    assert np.array_equal(turned.pictures[0], upright.pictures[0])
    for name in ("box", "landmarks", "embedding", "judge_embedding", "aligned", "labels"):
        assert np.array_equal(getattr(turned.faces[0], name), getattr(upright.faces[0], name)), name


def test_nobody_depends_on_who_is_analysed_with_them(analyser: FaceAnalyser) -> None:
    together = analyser.people([_person("chiyo-1", "chiyo-2"), _person("dario-1")], EVERYTHING)
    (apart,) = analyser.people([_person("dario-1")], EVERYTHING)
    for name in ("box", "embedding", "judge_embedding", "aligned", "labels"):
        assert np.array_equal(getattr(together[1].faces[0], name), getattr(apart.faces[0], name)), name


def test_a_large_photograph_is_the_same_person_and_its_face_is_not_read_as_noise(analyser: FaceAnalyser) -> None:
    """Twelve times as large, with a sensor's grain: averaged by area half of the grain is gone, sampled it would stay."""
    small = decode(_bytes("ada-1"))
    large = cv2.resize(small, None, fx=12, fy=12, interpolation=cv2.INTER_CUBIC)
    grain = np.random.default_rng(0).integers(-30, 31, large.shape, dtype=np.int16)
    grainy = np.clip(large + grain, 0, 255).astype(np.uint8)
    (plain,), (noisy,) = (found.faces for found in analyser.analyse_pixels([small, grainy], ("judge", "aligned")))
    assert float(cosines([plain], [noisy]).item()) > SAME
    scale = np.linalg.norm(noisy.landmarks[0] - noisy.landmarks[1]) / np.linalg.norm(plain.landmarks[0] - plain.landmarks[1])
    assert scale == pytest.approx(12, rel=0.15), "landmarks stay in the picture's own pixels"
    assert noisy.aligned is not None
    assert _roughness(noisy.aligned) < 0.7 * _roughness(ffhq_crop(grainy, noisy.landmarks))


def _roughness(crop: RGB) -> float:
    return float(np.abs(np.diff(crop.astype(int), axis=0)).mean())


def test_ordinary_pictures_are_not_reduced() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), dtype=np.uint8)
    for scale in (0.3, 1.0, 1.9):
        assert reduced(picture, FFHQ_TEMPLATE * scale)[0] is picture
    smaller, points = reduced(picture, FFHQ_TEMPLATE * 2)
    assert smaller.shape == (512, 512, 3)
    # Pixel 0 has its centre at 0, hence half of it is not a plain division.
    assert np.allclose(points, (FFHQ_TEMPLATE * 2 + 0.5) / 2 - 0.5)


def test_the_template_is_the_one_the_pack_was_trained_with() -> None:
    assert np.array_equal(FFHQ_TEMPLATE, np.array(FFHQ_512, np.float32))


def test_the_crop_of_a_face_that_stands_on_the_template_is_the_picture_and_grey_lies_beyond() -> None:
    picture = np.random.default_rng(1).integers(0, 256, (512, 512, 3), dtype=np.uint8)
    assert np.abs(ffhq_crop(picture, FFHQ_TEMPLATE.copy()).astype(int) - picture).max() <= 1
    beside = ffhq_crop(picture, FFHQ_TEMPLATE - np.float32(200))
    assert (beside[:150, :150] == (132, 133, 135)).all()


def test_landmarks_in_one_point_are_not_usable() -> None:
    assert not usable(np.full((5, 2), 7, np.float32)) and not usable(np.full((5, 2), np.nan, np.float32))
    assert usable(FFHQ_TEMPLATE)


def _face(x0: float, y0: float, x1: float, y1: float, judge: int | None = None) -> Face:
    unit = None if judge is None else np.eye(512, dtype=np.float32)[judge]
    box = np.array([x0, y0, x1, y1], np.float32)
    return Face(box=box, score=0.9, landmarks=np.zeros((5, 2), np.float32), judge_embedding=unit)


def _found(*faces: Face) -> PictureFaces:
    return PictureFaces((200, 100), faces)


def test_one_person_is_scored_by_the_largest_face_several_by_the_best_assignment() -> None:
    big, small = _face(0, 0, 50, 50, judge=1), _face(60, 0, 80, 20, judge=0)
    first, second = Person((_face(0, 0, 9, 9, judge=0),), ()), Person((_face(0, 0, 9, 9, judge=1),) * 2, ())
    (lone,) = likenesses(_found(big, small), [first])
    assert (lone.face, lone.cosines) == (0, (0.0,))
    both = likenesses(_found(big, small), [first, second])
    assert [(each.face, each.cosines) for each in both] == [(1, (1.0,)), (0, (1.0, 1.0))]
    left_over = likenesses(_found(big), [first, second])
    assert [(each.face, each.cosines) for each in left_over] == [(None, (None,)), (0, (1.0, 1.0))]
    for persons in ([second], [first, second]):
        assert all(each.face is None and set(each.cosines) == {None} for each in likenesses(_found(), persons))
    assert likenesses(_found(big), []) == ()


def test_one_person_by_two_methods_is_one_person_with_one_face() -> None:
    big, small = _face(0, 0, 50, 50, judge=0), _face(60, 0, 80, 20, judge=1)
    first, second = Person((_face(0, 0, 9, 9, judge=0),), ()), Person((_face(0, 0, 9, 9, judge=1),), ())
    for found in (_found(big), _found(big, small)):
        assert [(each.face, each.cosines) for each in likenesses(found, [first, first])] == [(0, (1.0,))] * 2
    assert [each.face for each in likenesses(_found(big, small), [first, second, first])] == [0, 1, 0]


def test_who_is_given_twice_is_found_once(analyser: FaceAnalyser) -> None:
    ada = _person("ada-1")
    first, bruno, again = analyser.people([ada, _person("bruno-1"), ada], ("judge",))
    assert first is again is not bruno


def test_small_files_of_many_pixels_are_refused_together_before_one_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = Limits(pixels=256 * 256)
    small = FaceAnalyser(MODELS, JUDGE, PARSER, det_size=DET_SIZE, smallest_px=SMALLEST_PX, limits=limits)
    ada = _bytes("ada-1")
    allowed = 8 * limits.pixels // (decode(ada).shape[0] * decode(ada).shape[1])
    small.people([PersonPictures((ada,) * allowed)], ())
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("a picture was unpacked"))
    for persons in ([PersonPictures((ada,) * (allowed + 1))], [PersonPictures((ada,)) for _ in range(allowed + 1)]):
        with pytest.raises(InvalidImage, match="together") as caught:
            small.people(persons, ())
        assert caught.value.remedy


def test_scores_of_a_picture_name_the_right_face(analyser: FaceAnalyser) -> None:
    bruno, ada = analyser.people([_person("bruno-1", "bruno-2"), _person("ada-1")], ("judge",))
    group, nobody, single = analyser.scores([decode(GROUP), np.zeros((64, 64, 3), np.uint8), decode(_bytes("ada-2"))], [bruno, ada])
    assert {each.face for each in group} == {0, 1}
    assert min(value for each in group for value in each.cosines if value is not None) > SAME
    assert [each.face for each in nobody] == [None, None]
    assert [each.face for each in single] == [None, 0]


def test_faces_that_were_not_judged_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match="judge"):
        cosines([_face(0, 0, 1, 1)], [_face(0, 0, 1, 1, judge=0)])


def test_the_square_around_one_of_several_keeps_the_others_out_and_never_cuts_the_head() -> None:
    picture = np.zeros((100, 200, 3), np.uint8)
    far, near = _face(20, 30, 60, 70), _face(100, 30, 140, 70)
    shown, moved = alone(picture, _found(far, near), 0, replace(far, age=30))
    assert moved.age == 30 and np.array_equal(moved.box, far.box) and shown.shape == (100, 100, 3)
    close = _face(50, 30, 90, 70)
    shown, moved = alone(picture, _found(far, close), 1, close)
    assert shown.shape == (60, 60, 3) and np.array_equal(moved.box, [10, 10, 50, 50])


def test_the_choice_speaks_of_one_person_without_a_number() -> None:
    with pytest.raises(NoFaceDetected, match="^Reference picture 3 shows no face"):
        choose(_found(), None, 0, Reference(person=0, people=1, picture=3))


def test_cuda_where_there_is_none_is_an_error_and_not_a_cpu() -> None:
    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime has CUDA")
    with pytest.raises(ProviderUnavailable, match="cuda"):
        FaceAnalyser(MODELS, JUDGE, PARSER, det_size=DET_SIZE, provider="cuda")


def test_a_session_that_fell_back_is_found_out() -> None:
    session = sessions.open_session(PARSER, "cpu", 1)
    sessions.require("cpu", session, PARSER)
    with pytest.raises(ProviderUnavailable, match="did not start"):
        sessions.require("cuda", session, PARSER)


def test_the_threads_asked_for_are_the_sessions_own(analyser: FaceAnalyser) -> None:
    two = FaceAnalyser(MODELS, JUDGE, PARSER, det_size=DET_SIZE, threads=2)
    for each, threads in ((analyser, 1), (two, 2)):
        own = [each._parser._session, each._judge.session, *(model.session for model in each._models.values())]
        assert [session.get_session_options().intra_op_num_threads for session in own] == [threads] * len(own)


def test_models_that_are_not_there_or_not_themselves_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not an onnx file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(MissingWeights, match="nowhere"):
        FaceAnalyser(tmp_path / "nowhere", JUDGE, PARSER, det_size=DET_SIZE)
    with pytest.raises(MissingWeights, match="no face detector"):
        FaceAnalyser(tmp_path / "empty", JUDGE, PARSER, det_size=DET_SIZE)
    with pytest.raises(DamagedWeights, match="broken.onnx"):
        FaceParser(broken)
    with pytest.raises(DamagedWeights, match="19"):
        FaceParser(JUDGE)
    with pytest.raises(DamagedWeights, match="no face recogniser"):
        FaceAnalyser(MODELS, MODELS / "genderage.onnx", PARSER, det_size=DET_SIZE)


def test_a_detector_size_that_its_strides_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="multiples of 32"):
        FaceAnalyser(MODELS, JUDGE, PARSER, det_size=(200, 200))


def test_the_face_models_bring_no_torch_into_their_process() -> None:
    source = "import deployments.faces.analysis, sys; print(sorted({'torch', 'transformers', 'diffusers'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
