"""ControlServer: what becomes of every source that a request may give, in the size that is drawn, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any, cast

import cv2
import numpy as np
import pytest
import torch

from deployments.catalog import CATALOG_PATH, load_catalog
from deployments.contracts import RGB, ControlSource
from deployments.control_server import ControlServer, ControlSettings
from deployments.controls.canny import canny
from deployments.controls.conditions import CONDITIONS
from deployments.controls.placing import covering, on_black, placed
from deployments.controls.pose_bank import edit_of, load_pose_bank
from deployments.controls.skeleton import JOINTS, Skeleton, arm_angle, arm_at, crown, mirrored
from deployments.controls.skeleton_picture import draw
from deployments.errors import InvalidImage, InvalidRequest, LicenseRefused, MissingWeights, UnknownModel
from deployments.images import Limits, decode, encode
from training.mini.heldout import held_out_people
from training.mini.world.render import render
from training.mini.world.scene import FULL_BODY, sample_scenes
from training.mini.world.skeleton import keypoints

SAMPLES = CATALOG_PATH.parents[1] / "samples"
ADA = (SAMPLES / "characters" / "ada-1.png").read_bytes()
DRAWN = (SAMPLES / "poses" / "left-arm-raised.png").read_bytes()
BANK = load_pose_bank()
WIDTH, HEIGHT = 128, 192


@pytest.fixture(scope="module")
def server() -> ControlServer:
    return ControlServer(ControlSettings(keypoints="body-keypoints-mini"))


def _one(server: ControlServer, size: tuple[int, int] = (WIDTH, HEIGHT), **source: Any) -> RGB:
    guides = server.prepare([ControlSource(**({"mode": "pose"} | source))], None, *size)
    (picture,) = guides.controls
    assert picture.shape == (size[1], size[0], 3) and picture.dtype == np.uint8
    return picture


def _line(width: int, height: int) -> bytes:
    """A white column in the middle of black."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, width // 2 - 2 : width // 2 + 2] = 255
    return encode(picture)


# --- what comes out -----------------------------------------------------------------------------------------------------------------


def test_sources_come_back_in_their_order_with_the_beginning_and_the_seconds(server: ControlServer) -> None:
    sources = [
        ControlSource(mode="canny", picture=ADA),
        ControlSource(mode="pose", pose="full-standing"),
        ControlSource(mode="gray", picture=ADA),
    ]
    guides = server.prepare(sources, ADA, WIDTH, HEIGHT)
    for source, picture in zip(sources, guides.controls, strict=True):
        assert np.array_equal(picture, server.prepare([source], None, WIDTH, HEIGHT).controls[0])
    assert guides.begin is not None and np.array_equal(guides.begin, covering(decode(ADA), WIDTH, HEIGHT))
    assert guides.seconds.keys() == {"controls"} and guides.seconds["controls"] > 0
    nothing = server.prepare([], None, WIDTH, HEIGHT)
    assert nothing.controls == () and nothing.begin is None


@pytest.mark.parametrize("mode", ["canny", "tile", "blur", "gray", "low_quality"])
def test_a_picture_is_brought_to_size_and_then_made_the_condition(server: ControlServer, mode: str) -> None:
    """First the size: edges are a pixel wide in the picture that is drawn, whatever the photograph's size."""
    fitting = covering(decode(ADA), WIDTH, HEIGHT)
    assert np.array_equal(_one(server, mode=mode, picture=ADA), CONDITIONS[mode](fitting))


@pytest.mark.parametrize("mode", ["canny", "depth", "soft_edge", "gray"])
def test_a_finished_condition_passes_untouched(server: ControlServer, mode: str) -> None:
    finished = canny(covering(decode(ADA), WIDTH, HEIGHT))
    assert np.array_equal(_one(server, mode=mode, picture=encode(finished), prepared=True), finished)


@pytest.mark.parametrize("prepared", [True, False])
def test_a_drawn_skeleton_is_not_searched_for_people_and_stays_whole(server: ControlServer, prepared: bool) -> None:
    size = (192, 320)
    picture = _one(server, size, picture=DRAWN, prepared=prepared)
    assert np.array_equal(picture, on_black(decode(DRAWN), *size))
    assert not picture[:64].any() and not picture[256:].any() and picture[64:256].any()


def test_a_pose_of_the_bank_is_drawn_in_its_figure(server: ControlServer) -> None:
    human, drawn = (_one(server, pose="full-standing", figure=figure) for figure in ("human", "character-world"))
    assert np.array_equal(human, draw([BANK.skeleton("full-standing", "human")], WIDTH, HEIGHT))
    assert np.array_equal(drawn, draw([BANK.skeleton("full-standing", "character-world")], WIDTH, HEIGHT))
    assert not np.array_equal(human, drawn)


def test_edits_of_a_pose_are_made_in_order(server: ControlServer) -> None:
    edits = ('{"arm": "left", "angle": 160, "bend": 15}', '{"mirror": true}', '{"head_room": 0.18}')
    picture = _one(server, pose="full-standing", edits=edits)
    skeleton = mirrored(arm_at(BANK.skeleton("full-standing"), "left", 160, 15))
    assert arm_angle(skeleton, "right") == pytest.approx(160, abs=0.1) and crown(skeleton)[1] < 0.18
    expected = edit_of(edits[2]).of(skeleton)
    assert crown(expected)[1] == pytest.approx(0.18, abs=1e-3)
    assert np.array_equal(picture, draw([expected], WIDTH, HEIGHT))
    assert not np.array_equal(picture, _one(server, pose="full-standing", edits=edits[:2]))


def test_a_person_of_a_picture_is_drawn_where_they_stand_and_can_be_edited(server: ControlServer) -> None:
    people, scenes = held_out_people(2), sample_scenes(2, 8, framing=FULL_BODY)
    points, _ = keypoints(people, scenes)
    pictures = ((render(people, scenes).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for picture, at in zip(pictures, points, strict=True):
        found = _one(server, (192, 192), picture=encode(picture))
        true = draw([Skeleton(((at + 1) / 2).numpy(), 1.0)], 192, 192)
        spread = np.asarray(cv2.dilate(true, np.ones((17, 17), np.uint8))).max(-1) > 0
        assert spread[found.max(-1) > 0].mean() > 0.95
        raised = _one(server, (192, 192), picture=encode(picture), edits=('{"arm": "left", "angle": 150, "bend": 0}',))
        assert np.abs(raised.astype(int) - found).max(-1).any(0).nonzero()[0].min() > 80  # only at the side of the left arm


# --- placing ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (128, 64), (64, 128), (200, 100)])
def test_nothing_is_stretched_and_the_middle_stays_the_middle(size: tuple[int, int]) -> None:
    circle = np.asarray(cv2.circle(np.zeros((120, 160, 3), np.uint8), (80, 60), 40, (255, 255, 255), -1), np.uint8)
    for placing, factor in ((covering, max(size[0] / 160, size[1] / 120)), (on_black, min(size[0] / 160, size[1] / 120))):
        picture = placing(circle, *size)
        assert picture.shape == (size[1], size[0], 3)
        middle = picture[size[1] // 2, :, 0] > 127, picture[:, size[0] // 2, 0] > 127
        for line, length in zip(middle, size, strict=True):
            assert line.sum() == pytest.approx(min(80 * factor, length), abs=3)
            assert line.nonzero()[0].mean() == pytest.approx((length - 1) / 2, abs=1.5)


def test_what_is_thin_is_not_lost_where_it_shrinks(server: ControlServer) -> None:
    picture = _one(server, (64, 64), mode="canny", picture=_line(2000, 2000), prepared=True)
    assert picture[32, :, 0].sum() == pytest.approx(4 * 64 / 2000 * 255, abs=3)


def _at(*joints: tuple[str, float, float], aspect: float) -> Skeleton:
    points = np.full((len(JOINTS), 2), np.nan, np.float32)
    for name, x, y in joints:
        points[JOINTS.index(name)] = x, y
    return Skeleton(points, aspect)


def test_a_skeleton_is_where_the_picture_is_unless_that_would_cut_somebody() -> None:
    """A wide picture, a high drawing: of its width the middle half stays."""
    person = _at(("neck", 0.5, 0.3), ("left_wrist", 0.625, 0.6), aspect=2.0)
    (moved,) = placed([person], 1.0)
    assert moved.aspect == pytest.approx(1.0)
    np.testing.assert_allclose(moved.points[[JOINTS.index("neck"), JOINTS.index("left_wrist")]], [[0.5, 0.3], [0.75, 0.6]], atol=1e-6)
    outside = _at(("neck", 0.1, 0.3), ("left_wrist", 0.3, 0.6), aspect=2.0)
    assert placed([person, outside], 1.0) == (person, outside)


# --- what is refused ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ({}, "either a picture or a pose"),
        ({"picture": ADA, "pose": "full-standing"}, "either a picture or a pose"),
        ({"mode": "canny", "pose": "full-standing"}, "canny control has no pose"),
        ({"mode": "canny", "picture": ADA, "edits": ('{"mirror": true}',)}, "canny control has no pose"),
        ({"mode": "sketch", "picture": ADA}, "no condition 'sketch'"),
        ({"pose": "full-standng"}, "Did you mean full-standing"),
        ({"pose": "auto"}, "names none"),
        ({"pose": "full-standing", "figure": "giraffe"}, "giraffe"),
        ({"picture": DRAWN, "edits": ('{"mirror": true}',)}, "drawn skeleton cannot be edited"),
        ({"pose": "full-standing", "edits": ('{"crop": [0.0, 0.0, 0.05, 0.05]}',)}, "nothing of the pose"),
    ],
)
def test_a_source_that_contradicts_itself_or_names_nothing_is_refused(server: ControlServer, source: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        _one(server, **source)


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        ("", "is no edit"),
        ("raise the left arm", "is no edit"),
        ("[]", "is no edit"),
        ("3", "is no edit"),
        ('{"angle": 3}', "is no edit"),
        ('{"arm": "left", "mirror": true, "angle": 3}', "is no edit"),
        ('{"arm": "left"}', "angle"),
        ('{"arm": "third", "angle": 3}', "arm"),
        ('{"arm": "left", "angle": NaN}', "angle"),
        ('{"head_room": 1.5}', "head_room"),
        ('{"crop": [0.6, 0, 0.4, 1]}', "no inside"),
        ('{"crop": [0, 0, 1e-300, 1]}', "no inside"),
        ('{"crop": [-1e308, 0, 1e308, 1]}', "crop"),
        ('{"move": {"neck": [1e39, 0]}}', "move"),
        ('{"arm": "left", "angle": 20, "reach": 1e39}', "reach"),
        ('{"mirror": true, "again": true}', "again"),
        ('{"move": {"tail": [0, 0]}}', "no joint tail"),
    ],
)
def test_an_edit_that_is_none_is_refused_and_what_is_wrong_with_it_named(server: ControlServer, edit: str, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        _one(server, pose="full-standing", edits=(edit,))


def test_a_pose_picture_without_a_person_and_bytes_without_a_picture_are_refused(server: ControlServer) -> None:
    with pytest.raises(InvalidImage, match="shows no person"):
        _one(server, picture=encode(np.full((96, 96, 3), 200, np.uint8)))
    with pytest.raises(InvalidImage):
        _one(server, picture=ADA[:200])
    with pytest.raises(InvalidImage):
        server.prepare([], b"no picture", WIDTH, HEIGHT)
    assert _one(server, pose="full-standing").any()


@pytest.mark.parametrize("mode", ["depth", "soft_edge"])
def test_a_mode_whose_model_is_not_installed_says_so(server: ControlServer, mode: str) -> None:
    with pytest.raises(MissingWeights, match="installed"):
        _one(server, mode=mode, picture=ADA)


def test_without_a_detector_only_pictures_of_people_are_refused() -> None:
    server = ControlServer(ControlSettings())
    assert _one(server, pose="full-standing").any() and _one(server, picture=DRAWN).any() and _one(server, mode="canny", picture=ADA).any()
    with pytest.raises(MissingWeights, match="No pose detector"):
        _one(server, picture=ADA)


def test_limits_hold_here_too() -> None:
    server = ControlServer(ControlSettings(), Limits(pixels=100))
    with pytest.raises(InvalidImage, match="100 are allowed"):
        _one(server, mode="canny", picture=ADA)


# --- the server's own ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("detector", ["body-keypoints-mini", "dwpose"])
def test_an_entrys_networks_have_the_names_that_its_detector_takes(detector: str) -> None:
    entry = load_catalog().entry(detector)
    assert entry.role == "keypoints"
    assert list(signature(cast(Callable[..., object], load_catalog().resolve(entry))).parameters) == list(entry.weights)


def test_a_detector_that_is_not_there_or_not_allowed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UnknownModel, match="no-such"):
        ControlServer(ControlSettings(keypoints="no-such"))
    with pytest.raises(MissingWeights, match=r"yolox_l\.onnx of yzd-v/DWPose"):
        ControlServer(ControlSettings(keypoints="dwpose"))
    monkeypatch.setenv("LICENSE_POLICY", "commercial")
    with pytest.raises(LicenseRefused):
        ControlServer(ControlSettings(keypoints="face-judge-buffalo-l"))


def test_no_torch_in_its_process() -> None:
    script = f"""
import json, sys
from pathlib import Path
from deployments.contracts import ControlSource
from deployments.control_server import ControlServer, ControlSettings
server = ControlServer(ControlSettings(keypoints="body-keypoints-mini"))
server.prepare([ControlSource(mode="pose", picture=Path({str(SAMPLES / "characters" / "ada-1.png")!r}).read_bytes())], None, 64, 64)
print(json.dumps([name for name in ("torch", "diffusers", "ray") if name in sys.modules]))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    assert json.loads(run.stdout) == []
