"""The content gate on true pictures of the world: what is refused, what passes, what a setting that cannot be meant says; and that a
published classifier is fed as its own library would feed it."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from pydantic import ValidationError

from deployments.catalog import load_catalog
from deployments.contracts import RGB
from deployments.errors import DamagedWeights, InvalidCatalog, InvalidImage, InvalidRequest, ModeratedInput, ModeratedOutput
from deployments.gate_server import GateServer
from deployments.images import encode
from deployments.safety.classifier import OnnxClassifier
from deployments.safety.gate import Finding, GateSettings, ThresholdGate
from training.mini.heldout import held_out_people
from training.mini.world.render import render
from training.mini.world.scene import SCENES, sample_scenes

BEACH = "on a beach at sunset"
MODEL = "content-gate-mini"
EACH = 8


@cache
def pictures() -> dict[str, list[RGB]]:
    """Eight people whom no model was trained on, in every place."""
    drawn = {}
    for number, place in enumerate(SCENES):
        scene = sample_scenes(EACH, 500 + number, scene=number)
        planes = (render(held_out_people(EACH), scene) + 1) / 2
        drawn[place] = list((planes * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    return drawn


@pytest.fixture(scope="module")
def server() -> GateServer:
    return GateServer(GateSettings(model=MODEL, refuse={BEACH: 0.5}))


def test_one_place_is_refused_and_no_other(server: GateServer) -> None:
    findings = {place: server.check(drawn) for place, drawn in pictures().items()}
    assert all(finding is not None and finding.label == BEACH and finding.score >= 0.5 for finding in findings.pop(BEACH))
    assert len(findings) == len(SCENES) - 1 and all(finding is None for found in findings.values() for finding in found)


def test_a_picture_of_another_shape_is_judged_too(server: GateServer) -> None:
    wide = np.concatenate([pictures()[BEACH][0]] * 2, axis=1)[:120]
    assert len(server.check([wide, wide[:, :50]])) == 2
    assert server.check([]) == ()


def test_what_comes_in_is_refused_with_its_place_and_its_label(server: GateServer) -> None:
    fine, beach = (encode(pictures()[place][0], source=None) for place in ("in a library", BEACH))
    server.admit([fine, fine])
    with pytest.raises(ModeratedInput) as caught:
        server.admit([fine, beach])
    assert caught.value.details == {"picture": 1, "label": BEACH}
    assert (caught.value.code, caught.value.status, caught.value.retryable) == ("moderated_input", 422, False)
    with pytest.raises(InvalidImage):
        server.admit([b"no picture"])


def test_what_was_drawn_is_refused_and_is_no_black_picture(server: GateServer) -> None:
    fine, beach = pictures()["in a library"][0], pictures()[BEACH][0]
    server.release([fine])
    with pytest.raises(ModeratedOutput) as caught:
        server.release([fine, beach])
    assert caught.value.code == "moderated_output" and caught.value.details == {"picture": 1, "label": BEACH}


def test_the_sides_that_are_not_judged_pass() -> None:
    beach = pictures()[BEACH][0]
    lets_in = GateServer(GateSettings(model=MODEL, refuse={BEACH: 0.5}, input=False))
    lets_in.admit([encode(beach), b"not even opened"])
    with pytest.raises(ModeratedOutput):
        lets_in.release([beach])
    lets_out = GateServer(GateSettings(model=MODEL, refuse={BEACH: 0.5}, output=False))
    lets_out.release([beach])
    with pytest.raises(ModeratedInput):
        lets_out.admit([encode(beach)])
    nothing = GateServer(GateSettings())
    nothing.admit([b"not even opened"])
    nothing.release([beach])
    assert nothing.check([beach]) == (None,)


def test_the_threshold_decides_and_the_likeliest_label_is_named() -> None:
    beach = pictures()[BEACH]
    (finding,) = GateServer(GateSettings(model=MODEL, refuse={BEACH: 0.01, "in an office": 0.000001})).check(beach[:1])
    assert finding is not None and finding.label == BEACH
    scores = _classifier().scores(beach[:1])[0]
    assert finding.score == pytest.approx(scores[BEACH])
    assert GateServer(GateSettings(model=MODEL, refuse={"in an office": 0.9})).check(beach) == (None,) * EACH


def test_the_gate_in_the_catalogue_says_what_the_world_says() -> None:
    from training.mini.faces.attributes import LABELS

    assert load_catalog().entry(MODEL).options["labels"] == {name: list(labels) for name, labels in LABELS.items()}
    scores = _classifier().scores(pictures()[BEACH][:2])
    for labels in LABELS.values():
        assert sum(scores[0][label] for label in labels) == pytest.approx(1)


def _classifier() -> OnnxClassifier:
    entry = load_catalog().entry(MODEL)
    return OnnxClassifier({"model": entry.located("model")}, entry.options)


class Numb:
    """A classifier that answers no number."""

    labels: tuple[str, ...] = ("bad",)

    def __init__(self, files: Any = None, options: Any = None, provider: Any = "cpu", threads: int = 1) -> None: ...

    def scores(self, pictures: Any) -> list[dict[str, float]]:
        return [{"bad": float("nan")} for _ in pictures]


def test_a_score_that_is_no_number_lets_nothing_through() -> None:
    (finding,) = ThresholdGate(Numb(), {"bad": 0.5}).check([pictures()[BEACH][0]])
    assert isinstance(finding, Finding) and finding.label == "bad"


def test_settings_that_cannot_be_meant_are_refused() -> None:
    for fields in (
        {"model": MODEL},
        {"refuse": {BEACH: 0.5}},
        {"forced": True},
        {"model": MODEL, "refuse": {BEACH: 0.5}, "input": False, "output": False},
    ):
        with pytest.raises(ValidationError):
            GateSettings.model_validate(fields)
    for threshold in (0, 1.5, -1):
        with pytest.raises(ValidationError):
            GateSettings(model=MODEL, refuse={BEACH: threshold})
    with pytest.raises(InvalidCatalog, match=r"'nsfw'.*says: in an office"):
        GateServer(GateSettings(model=MODEL, refuse={"nsfw": 0.5}))
    with pytest.raises(InvalidCatalog, match="role is judge"):
        GateServer(GateSettings(model="face-judge-mini", refuse={"nsfw": 0.5}))


def test_who_decides_whether_a_request_is_judged() -> None:
    off, on = GateSettings(), GateSettings(model=MODEL, refuse={BEACH: 0.5})
    forced = on.model_copy(update={"forced": True})
    assert [off.applies(asked) for asked in (None, False)] == [False, False]
    assert [on.applies(asked) for asked in (None, True, False)] == [True, True, False]
    assert [forced.applies(asked) for asked in (None, True, False)] == [True, True, True]
    with pytest.raises(InvalidRequest) as caught:
        off.applies(True)
    assert caught.value.details == {"param": "enable_safety_checker"}


# A published classifier: an ONNX file with two JSON files beside it, as transformers writes them.


def _published(folder: Path, labels: int = 2, size: tuple[int, int] = (24, 24)) -> tuple[dict[str, Path], np.ndarray[Any, Any]]:
    """A linear classifier over the pixels, so that every pixel counts; its matrix [3 * height * width, labels]."""
    matrix = np.random.default_rng(3).normal(0, 0.05, (3 * size[0] * size[1], labels)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("Flatten", ["pixel_values"], ["flat"]), helper.make_node("MatMul", ["flat", "matrix"], ["logits"])],
        "classifier",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", "channels", "height", "width"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", labels])],
        [numpy_helper.from_array(matrix, "matrix")],
    )
    files = {name: folder / name for name in ("model", "config", "preprocessor")}
    files["model"].write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9).SerializeToString())
    files["config"].write_text(json.dumps({"id2label": {"0": "sfw", "1": "nsfw"}}))
    processor = {"size": {"height": size[1], "width": size[0]}, "image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2}
    files["preprocessor"].write_text(json.dumps(processor))
    return files, matrix


def test_a_published_classifier_is_fed_as_its_own_library_feeds_it(tmp_path: Path) -> None:
    from transformers import ViTImageProcessor

    files, matrix = _published(tmp_path)
    classifier = OnnxClassifier(files, {})
    assert classifier.labels == ("sfw", "nsfw")
    processor = ViTImageProcessor(**json.loads(files["preprocessor"].read_text()))
    drawn = [pictures()[place][0][:170] for place in SCENES[:4]]
    fed = np.asarray(processor(images=drawn, return_tensors="np")["pixel_values"])
    logits = fed.reshape(len(drawn), -1) @ matrix
    expected = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    found = np.array([[scores["sfw"], scores["nsfw"]] for scores in classifier.scores(drawn)])
    assert np.abs(found - expected).max() < 0.01 and expected.std() > 0.05


def test_what_a_published_classifier_leaves_open_is_asked_for(tmp_path: Path) -> None:
    files, _ = _published(tmp_path)
    model = {"model": files["model"]}
    with pytest.raises(InvalidCatalog, match=r"options\.labels.*logits"):
        OnnxClassifier(model, {"size": [24, 24]})
    with pytest.raises(InvalidCatalog, match=r"options\.size"):
        OnnxClassifier(model, {"labels": {"logits": ["sfw", "nsfw"]}})
    with pytest.raises(InvalidCatalog, match="or said of outputs that it has not"):
        OnnxClassifier(model, {"labels": {"scores": ["sfw", "nsfw"]}, "size": [24, 24]})
    with pytest.raises(DamagedWeights, match="3 labels"):
        OnnxClassifier(model, {"labels": {"logits": ["sfw", "nsfw", "else"]}, "size": [24, 24]})
    assert OnnxClassifier(model, {"labels": {"logits": ["a", "b"]}, "size": [24, 24]}).labels == ("a", "b")
    files["config"].write_text("{")
    with pytest.raises(DamagedWeights, match="JSON"):
        OnnxClassifier(files, {})
    assert onnx.load(files["model"]).graph.name == "classifier", "nothing was written over"


def test_the_gate_brings_no_torch() -> None:
    source = "import deployments.gate_server, deployments.safety.classifier, sys; print(sorted({'torch', 'ray', 'cv2'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
