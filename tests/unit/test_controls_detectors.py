"""Pose detectors: the embedded one finds the renderer's people again, DWPose's decoding what networks of its outside were made to say.

DWPose's published networks are not here: those below are small ONNX files whose answers are known, or follow from the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import cv2
import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from deployments.catalog import CATALOG_PATH
from deployments.contracts import RGB, Floats
from deployments.controls.canny import canny
from deployments.controls.dwpose import DWPose, body_of, crop_of, decoded_boxes, decoded_simcc, distinct
from deployments.controls.pose_bank import load_pose_bank
from deployments.controls.pose_detector import HeatmapDetector, people_of
from deployments.controls.skeleton import JOINTS, Skeleton
from deployments.controls.skeleton_picture import draw, is_drawn
from deployments.errors import DamagedWeights, InvalidImage
from deployments.images import decode, encode
from deployments.sessions import open_session
from deployments.weights import models_root
from training.mini.heldout import held_out_people
from training.mini.world.backgrounds import paint_background
from training.mini.world.canvas import Grid
from training.mini.world.render import render
from training.mini.world.scene import FULL_BODY, SCENES, sample_scenes
from training.mini.world.skeleton import keypoints

SAMPLES = CATALOG_PATH.parents[1] / "samples"
NEAR = 0.08
"""Of the picture: the distance within which the pack's own card counts a pose as obeyed."""


@pytest.fixture(scope="module")
def detector() -> HeatmapDetector:
    return HeatmapDetector(open_session(models_root() / "mini" / "keypoints" / "body_keypoints.onnx", "cpu", 1))


def _bytes(pictures: Tensor) -> RGB:
    """[n, 3, h, w] in -1..1 -> [n, h, w, 3]"""
    return np.asarray(((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())


def _found(detector: HeatmapDetector, picture: RGB, points: Floats) -> tuple[int, int]:
    """How many of the joints inside the picture (points in 0..1) are found where they are, and how many there are."""
    inside = ((points >= 0) & (points <= 1)).all(1)
    people = detector.detect(picture)
    if not people:
        return 0, int(inside.sum())
    assert people[0].aspect == pytest.approx(picture.shape[1] / picture.shape[0])
    distance = np.linalg.norm(people[0].points - points, axis=1)
    return int((distance[inside] <= NEAR).sum()), int(inside.sum())


@pytest.mark.parametrize("size", [96, 192, 320])
def test_a_person_drawn_by_the_renderer_is_found_again_at_any_size(detector: HeatmapDetector, size: int) -> None:
    people, scenes = held_out_people(12), sample_scenes(12, 5)
    points, _ = keypoints(people, scenes)
    pictures = _bytes(render(people, scenes, size))
    counts = [_found(detector, picture, ((at + 1) / 2).numpy()) for picture, at in zip(pictures, points, strict=True)]
    found, all_joints = np.sum(counts, axis=0)
    assert found / all_joints > 0.97


@pytest.mark.parametrize(("width", "height"), [(192, 256), (256, 200)])
def test_a_person_is_found_in_a_picture_of_another_shape(detector: HeatmapDetector, width: int, height: int) -> None:
    people, scenes = held_out_people(8), sample_scenes(8, 6, framing=FULL_BODY)
    points, _ = keypoints(people, scenes)
    left, top = (256 - width) // 2, (256 - height) // 2
    counts = []
    for picture, at in zip(_bytes(render(people, scenes, 256)), points, strict=True):
        cut = ((at + 1) * 128 - torch.tensor([left, top])) / torch.tensor([width, height])
        counts.append(_found(detector, picture[top : top + height, left : left + width], cut.numpy()))
    found, all_joints = np.sum(counts, axis=0)
    assert found / all_joints > 0.9


def test_the_skeleton_of_a_picture_is_the_one_that_the_renderer_knows(detector: HeatmapDetector) -> None:
    """Drawn, the found pose covers what the true one does: the way from a pose picture to a control."""
    people, scenes = held_out_people(6), sample_scenes(6, 8, framing=FULL_BODY)
    points, _ = keypoints(people, scenes)
    for picture, at in zip(_bytes(render(people, scenes)), points, strict=True):
        found = draw(detector.detect(picture), 96, 96)
        true = draw([Skeleton(((at + 1) / 2).numpy(), 1.0)], 96, 96)
        spread = np.asarray(cv2.dilate(true, np.ones((9, 9), np.uint8))).max(-1) > 0
        assert spread[found.max(-1) > 0].mean() > 0.95


def test_where_nobody_is_nobody_is_found(detector: HeatmapDetector) -> None:
    empty = _bytes(paint_background(sample_scenes(24, 9), Grid.whole(24, 192)) * 2 - 1)
    assert sum(bool(detector.detect(picture)) for picture in empty) <= 1
    for plain in (np.zeros((64, 64, 3), np.uint8), np.full((30, 200, 3), 255, np.uint8)):
        assert detector.detect(plain) == ()
        with pytest.raises(InvalidImage, match="no person"):
            people_of(detector, plain)


@pytest.mark.parametrize("quality", [None, 75])
def test_a_drawn_skeleton_is_told_from_a_picture_of_somebody(quality: int | None) -> None:
    def read(picture: RGB) -> RGB:
        return picture if quality is None else decode(encode(picture, "jpeg", quality=quality))

    drawn = [decode(path.read_bytes()) for path in sorted((SAMPLES / "poses").glob("*.png"))]
    bank = load_pose_bank()
    drawn += [draw([bank.skeleton(name)], 448, 608) for name in bank.names()]
    assert len(drawn) >= 14 and all(is_drawn(read(picture)) for picture in drawn)
    seen = [decode(path.read_bytes()) for path in sorted((SAMPLES / "characters").glob("*.png"))]
    at_night = sample_scenes(8, 4, scene=SCENES.index("in a city at night"))
    seen += [*_bytes(render(held_out_people(8), at_night)), np.zeros((64, 64, 3), np.uint8), canny(seen[0])]
    assert not any(is_drawn(read(picture)) for picture in seen)


def test_a_sample_character_is_found(detector: HeatmapDetector) -> None:
    (person,) = people_of(detector, decode((SAMPLES / "characters" / "ada-1.png").read_bytes()))
    assert {"nose", "neck", "left_eye", "right_eye"} <= {name for name, seen in zip(JOINTS, person.visible, strict=True) if seen}


def test_a_network_with_another_outside_is_refused() -> None:
    with pytest.raises(DamagedWeights, match="keypoint model"):
        HeatmapDetector(open_session(models_root() / "mini" / "parser" / "face_parser.onnx", "cpu", 1))
    sound = np.zeros((1, 8400, 85), np.float32)
    for boxes, pose in ((sound[..., :6], _dots()), (sound[0], _dots()), (sound, _says({"output": sound}))):
        with pytest.raises(DamagedWeights, match="DWPose"):
            DWPose(_says({"output": boxes}), pose)


# DWPose


def _network(nodes: list[Any], outputs: Mapping[str, tuple[int, ...]], size: tuple[int, int], constants: Mapping[str, Any]) -> Any:
    """An onnxruntime session with one input [1, 3, *size]."""
    graph = helper.make_graph(
        nodes,
        "known",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, (1, 3, *size))],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in outputs.items()],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def _says(answers: Mapping[str, Floats], size: tuple[int, int] = (640, 640)) -> Any:
    """A network that answers the same to every picture."""
    nodes = [helper.make_node("Identity", [f"the {name}"], [name]) for name in answers]
    return _network(nodes, {name: value.shape for name, value in answers.items()}, size, {f"the {name}": v for name, v in answers.items()})


def _dots() -> Any:
    """A pose network all of whose points are the brightest place of its input: across the brightest column, down the brightest row."""
    nodes = []
    for name, axes in (("x", [1, 2]), ("y", [1, 3])):
        nodes += [
            helper.make_node("ReduceMax", ["input"], [f"{name}1"], axes=axes, keepdims=0),
            helper.make_node("Unsqueeze", [f"{name}1", "one"], [f"{name}2"]),
            helper.make_node("Unsqueeze", [f"{name}2", "one"], [f"{name}3"]),
            helper.make_node("Resize", [f"{name}3", "", "twice"], [f"{name}4"], mode="nearest"),
            helper.make_node("Squeeze", [f"{name}4", "one"], [f"{name}5"]),
            helper.make_node("Expand", [f"{name}5", f"{name}_shape"], [f"simcc_{name}"]),
        ]
    constants = {
        "one": np.array([1]),
        "twice": np.array([1, 1, 1, 2], np.float32),
        "x_shape": np.array([1, 133, 576]),
        "y_shape": np.array([1, 133, 768]),
    }
    return _network(nodes, {"simcc_x": (1, 133, 576), "simcc_y": (1, 133, 768)}, (384, 288), constants)


def _cell(row: int, column: int, stride: int) -> int:
    """The number of a cell among the 8400."""
    before = sum((640 // finer) ** 2 for finer in (8, 16, 32) if finer < stride)
    return before + row * (640 // stride) + column


def _detections(*people: tuple[float, float, float, float, float], class_of: int = 0) -> Floats:
    """What YOLOX says of boxes x0, y0, x1, y1 in its 640 pixels, with their scores."""
    cells = np.zeros((1, 8400, 85), np.float32)
    for number, (x0, y0, x1, y1, score) in enumerate(people):
        stride = (8, 16, 32)[number % 3]
        x, y = (x0 + x1) / 2 / stride, (y0 + y1) / 2 / stride
        row, column = int(y), int(x)
        size = np.log([(x1 - x0) / stride, (y1 - y0) / stride])
        cells[0, _cell(row, column, stride)] = [x - column, y - row, *size, score, *(float(k == class_of) for k in range(80))]
    return cells


def test_boxes_come_out_as_they_were_written() -> None:
    wanted = [(10.0, 20.0, 110.0, 320.0, 0.9), (300.0, 40.0, 420.0, 600.0, 0.8), (500.0, 500.0, 630.0, 639.0, 0.5)]
    boxes, scores = decoded_boxes(_detections(*wanted)[0])
    kept = distinct(boxes, scores)
    assert np.allclose(boxes[kept], [box[:4] for box in wanted], atol=1e-2) and scores[kept].tolist() == pytest.approx([0.9, 0.8, 0.5])


def test_boxes_of_one_person_become_one_and_doubtful_ones_none() -> None:
    same = [(10.0, 20.0, 110.0, 320.0, 0.7), (12.0, 22.0, 112.0, 322.0, 0.9), (400.0, 20.0, 500.0, 320.0, 0.2)]
    boxes, scores = decoded_boxes(_detections(*same)[0])
    assert distinct(boxes, scores) == [int(scores.argmax())]
    boxes, scores = decoded_boxes(_detections(same[1], class_of=16)[0])
    assert distinct(boxes, scores) == []


def test_simcc_is_read_in_half_pixels_and_scored_by_the_lower_peak() -> None:
    across, down = np.zeros((2, 576), np.float32), np.zeros((2, 768), np.float32)
    across[0, 101], down[0, 700], across[1, 0], down[1, 5] = 0.9, 0.4, 0.2, 0.8
    points, scores = decoded_simcc(across, down)
    assert points.tolist() == [[50.5, 350.0], [0.0, 2.5]] and scores.tolist() == pytest.approx([0.4, 0.2])


def test_the_crop_holds_the_box_a_quarter_larger_and_unstretched() -> None:
    corner, scale = crop_of(np.array([100, 50, 200, 450], np.float32))
    assert 400 * 1.25 * scale == pytest.approx(384) and corner.tolist() == pytest.approx([150 - 144 / scale, 250 - 192 / scale])
    corner, scale = crop_of(np.array([0, 0, 400, 100], np.float32))
    assert 400 * 1.25 * scale == pytest.approx(288)


def test_the_whole_bodys_points_become_openposes_joints() -> None:
    names = "nose left_eye right_eye left_ear right_ear left_shoulder right_shoulder left_elbow right_elbow left_wrist right_wrist left_hip"
    names += " right_hip left_knee right_knee left_ankle right_ankle"
    points, scores = np.stack([np.arange(133) / 200] * 2, -1).astype(np.float32), np.ones(133, np.float32)
    scores[6] = 0.3
    body = body_of(points, scores, 0.75)
    for number, name in enumerate(names.split()):
        assert body.knows(name) == (number != 6), name
        if number != 6:
            assert body.points[JOINTS.index(name)][0] == pytest.approx(number / 200), name
    assert not body.knows("neck")
    scores[6] = 0.31
    assert body_of(points, scores, 0.75).points[JOINTS.index("neck")][0] == pytest.approx(5.5 / 200)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (300, 900), (1280, 1000)])
def test_dwpose_finds_a_light_where_it_is_through_box_crop_and_decoding(width: int, height: int) -> None:
    """The whole way, with a pose network that sees: in pictures of any shape the point comes back to where the light is."""
    ratio = min(640 / width, 640 / height)
    box = np.array([0.2 * width, 0.3 * height, 0.7 * width, 0.8 * height])
    dwpose = DWPose(_says({"output": _detections(cast(Any, (*(box * ratio), 0.9)))}), _dots())
    for x, y in ((0.4, 0.5), (0.65, 0.75), (0.25, 0.32)):
        picture = np.zeros((height, width, 3), np.uint8)
        radius = max(3, height // 100)
        cv2.circle(picture, (round(x * width), round(y * height)), radius, (255, 255, 255), -1)
        light = np.asarray(cv2.GaussianBlur(picture, (0, 0), radius / 2), np.uint8)
        (person,) = dwpose.detect(light)
        off = (person.points - (x, y)) * (width, height)
        assert person.visible.all() and np.abs(off).max() <= 2


def test_dwpose_tells_people_by_size_and_answers_nobody_for_nobody() -> None:
    across, down = np.zeros((1, 133, 576), np.float32), np.zeros((1, 133, 768), np.float32)
    across[0, np.arange(133), 250 + np.arange(133)] = down[0, np.arange(133), 200 + np.arange(133)] = 0.9
    pose = _says({"simcc_x": across, "simcc_y": down}, (384, 288))
    crowd = _detections((10.0, 20.0, 110.0, 320.0, 0.95), (300.0, 20.0, 600.0, 620.0, 0.5))
    small, large = np.zeros((640, 640, 3), np.uint8), DWPose(_says({"output": crowd}), pose)
    people = large.detect(small)
    assert len(people) == 2 and people[0].points[0, 0] > 0.4 > people[1].points[0, 0]
    assert DWPose(_says({"output": _detections()}), pose).detect(small) == ()


def _watches(channel: int, answer: Floats, bright: float) -> Any:
    """A detector that gives its answer, scores and all, in the measure in which a channel of its input is bright."""
    nodes = [
        helper.make_node("ReduceMax", ["input"], ["peaks"], axes=[2, 3], keepdims=0),
        helper.make_node("Gather", ["peaks", "channel"], ["peak"], axis=1),
        helper.make_node("Div", ["peak", "bright"], ["measure"]),
        helper.make_node("Where", ["is_score", "measure", "full"], ["factor"]),
        helper.make_node("Mul", ["answer", "factor"], ["output"]),
    ]
    constants = {
        "channel": np.array([channel]),
        "bright": np.array([bright], np.float32),
        "is_score": np.arange(85) == 4,
        "full": np.ones(1, np.float32),
        "answer": answer,
    }
    return _network(nodes, {"output": (1, 8400, 85)}, (640, 640), constants)


@pytest.mark.parametrize(("channel", "colour"), [(0, (0, 0, 255)), (1, (0, 255, 0)), (2, (255, 0, 0))])
def test_yolox_is_shown_blue_first_and_bytes_as_they_are(channel: int, colour: tuple[int, int, int]) -> None:
    dwpose = DWPose(_watches(channel, _detections((100.0, 100.0, 500.0, 600.0, 0.9)), 255), _dots())
    picture = np.full((640, 640, 3), colour, np.uint8)
    assert len(dwpose.detect(picture)) == 1 and dwpose.detect(255 - picture) == ()
