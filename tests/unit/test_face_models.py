"""Face models as ComfyUI-ReActor saves them: what goes out comes back, what ReActor wrote is read, and nothing else is."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from deployments.errors import InvalidRequest
from deployments.face_models import LARGEST_BYTES, FaceModel, read_face_model, write_face_model

_RNG = np.random.default_rng(5)
MODEL = FaceModel(
    embedding=_RNG.normal(size=512).astype(np.float32), bbox=np.array([10, 20, 90, 120.5], np.float32),
    kps=_RNG.uniform(0, 99, (5, 2)).astype(np.float32), det_score=0.875, pitch_yaw_roll=(0.0, -12.5, 0.0), male=False, age=34,
    recogniser="faces-mini",
)  # fmt: skip


def of_reactor(**changes: Any) -> dict[str, torch.Tensor]:
    """What its save_face_model makes of a face of insightface."""
    face: dict[str, Any] = {
        "bbox": np.array([10, 20, 90, 120.5], np.float32),
        "kps": np.zeros((5, 2), np.float32) + 7,
        "det_score": np.float32(0.9),
        "landmark_3d_68": np.ones((68, 3), np.float32),
        "pose": np.array([1, 2, 3], np.float32),
        "landmark_2d_106": np.ones((106, 2), np.float32),
        "embedding": MODEL.embedding * 20,
        "gender": np.int64(1),
        "age": 41,
    }
    return {name: torch.tensor(value) for name, value in (face | changes).items() if value is not None}


def test_what_is_written_comes_back() -> None:
    found = read_face_model(write_face_model(MODEL))
    for name in ("embedding", "bbox", "kps"):
        assert np.array_equal(getattr(found, name), getattr(MODEL, name)), name
    assert (found.det_score, found.pitch_yaw_roll, found.male, found.age, found.recogniser) == (
        0.875,
        (0, -12.5, 0),
        False,
        34,
        "faces-mini",
    )
    unknown = read_face_model(write_face_model(replace(MODEL, male=None, age=None, recogniser=None)))
    assert (unknown.male, unknown.age, unknown.recogniser) == (None, None, None)


def test_the_file_has_the_keys_shapes_and_kinds_that_reactor_saves() -> None:
    ours, theirs = load(write_face_model(MODEL)), of_reactor()
    assert {name: (tuple(value.shape), value.dtype) for name, value in ours.items()} == {
        name: (tuple(value.shape), value.dtype) for name, value in theirs.items()
    }
    assert float(ours["gender"]) == 0 and float(ours["age"]) == 34


def test_what_reactor_wrote_is_read() -> None:
    found = read_face_model(save(of_reactor()))
    assert np.allclose(found.embedding, MODEL.embedding * 20) and found.male is True and found.age == 41
    assert found.pitch_yaw_roll == (1, 2, 3) and found.recogniser is None
    doubles = read_face_model(save({name: value.double() for name, value in of_reactor().items()}))
    assert np.allclose(doubles.embedding, found.embedding) and doubles.age == 41
    blended = read_face_model(save(of_reactor(embedding=(MODEL.embedding * 20)[None], age=np.array([41]))))
    assert np.array_equal(blended.embedding, found.embedding) and blended.age == 41


def _damaged_header(data: bytes) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    header["embedding"]["data_offsets"][1] += 4
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "no whole safetensors"),
        (save(of_reactor())[:500], "no whole safetensors"),
        (_damaged_header(save(of_reactor())), "no whole safetensors"),
        (pickle.dumps({"embedding": [1.0]}), "no whole safetensors"),
        (b"\xff" * 9000, "no whole safetensors"),
        (bytes(LARGEST_BYTES + 1), "has 65537 bytes"),
        (save({"embedding": torch.ones(512)}), "lacks 'age', 'bbox'"),
        (save(of_reactor() | {"normed_embedding": torch.ones(512)}), "has 'normed_embedding'"),
        (save(of_reactor(age=None)), "lacks 'age'"),
        (save(of_reactor(embedding=np.ones(256, np.float32))), r"embedding of shape \[256\], where \[512\]"),
        (save(of_reactor(kps=np.ones((2, 5), np.float32))), r"kps of shape \[2, 5\]"),
        (save(of_reactor(embedding=np.ones(512, np.int64))), "embedding of int64"),
        (save(of_reactor(gender=True)), "gender of bool"),
        (save(of_reactor(embedding=np.full(512, np.nan, np.float32))), "something that is no number"),
        (save(of_reactor(embedding=np.full(512, 1e300))), "something that is no number"),
        (save(of_reactor(embedding=np.zeros(512, np.float32))), "of nobody"),
        (save({name: value.to(torch.bfloat16) for name, value in of_reactor().items()}), "The face model"),
    ],
)
def test_anything_else_is_refused_in_words(data: bytes, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says) as caught:
        read_face_model(data)
    assert caught.value.details == {"param": "file"} and "ReActor" in caught.value.remedy and len(caught.value.message) < 500


def test_a_damaged_file_never_crashes() -> None:
    data = write_face_model(MODEL)
    for _ in range(300):
        damaged = bytearray(data)
        for place in _RNG.integers(0, 1200, 3):
            damaged[place] = _RNG.integers(256)
        try:
            read_face_model(bytes(damaged))
        except InvalidRequest as error:
            assert error.remedy
