"""Face models as ComfyUI-ReActor keeps them: one face of insightface in a safetensors file. Read strictly, written in the same form.

Layout: Gourieff/ComfyUI-ReActor at 3d20eb1, reactor_utils.py, save_face_model: nine tensors by the names of insightface's Face. Only the
embedding is ever used by what loads such a file. It is of the recogniser of whoever saved it (buffalo_l in ReActor), which the file
does not say; ours do, in the metadata. Imports numpy and safetensors, no torch; never opens a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from deployments.contracts import Floats
from deployments.errors import InvalidRequest
from deployments.store.character_values import Character

LARGEST_BYTES: Final = 64 * 2**10
"""ReActor's own have about 6 KiB."""
_SHAPES: Final[Mapping[str, tuple[int, ...]]] = {
    "bbox": (4,),
    "kps": (5, 2),
    "det_score": (),
    "landmark_3d_68": (68, 3),
    "pose": (3,),
    "landmark_2d_106": (106, 2),
    "embedding": (512,),
    "gender": (),
    "age": (),
}
_COUNTED: Final = frozenset({"gender", "age"})
_UNKNOWN: Final = -1
# ArcFace's own, before they are brought to length 1, have 10 to 30.
_LONGEST: Final = 1e4
_RECOGNISER, _UNMEASURED = "recogniser", "unmeasured"
_REMEDY = "Send a face model as ComfyUI-ReActor saves it: a safetensors file of one face."


@dataclass(frozen=True, eq=False, kw_only=True)
class FaceModel:
    """embedding: [512], raw. bbox: [4] and kps: [5, 2], pixels of a picture that is not here; det_score: 0..1. pitch_yaw_roll: degrees.
    male, age: None where nobody can tell. recogniser: whose embedding it is, by the catalogue's id; None where the file does not say."""

    embedding: Floats
    bbox: Floats
    kps: Floats
    det_score: float
    pitch_yaw_roll: tuple[float, float, float] = (0.0, 0.0, 0.0)
    male: bool | None = None
    age: int | None = None
    recogniser: str | None = None

    @property
    def packed(self) -> bytes:
        """The embedding as the store keeps it."""
        return np.asarray(self.embedding, "<f4").tobytes()


def face_model_of(character: Character) -> bytes:
    """A character's file: the one it was imported from, or the mean embedding of its pictures with the face of the best of them. Raises
    InvalidRequest where no picture of it can be used."""
    if character.face_model is not None:
        return character.face_model
    best = next((picture.facts for picture in character.pictures if picture.id == character.best), None)
    if best is None or character.embedding is None:
        raise InvalidRequest(f"The character {character.id} has no picture that can be used.", "Add pictures to it.")
    return write_face_model(
        FaceModel(
            embedding=np.frombuffer(character.embedding, "<f4").astype(np.float32),
            bbox=np.array(best.box, np.float32),
            kps=np.array(best.landmarks, np.float32),
            det_score=best.score or 0.0,
            pitch_yaw_roll=(0.0, best.yaw or 0.0, 0.0),
            male=None if best.sex is None else best.sex == "M",
            age=best.age,
            recogniser=character.recogniser,
        )
    )


def write_face_model(model: FaceModel) -> bytes:
    """The file. The landmarks that none of our models finds are zeros, which the metadata says; nothing that swaps reads them."""
    values: dict[str, NDArray[Any]] = {
        "bbox": model.bbox,
        "kps": model.kps,
        "det_score": np.array(model.det_score),
        "landmark_3d_68": np.zeros(_SHAPES["landmark_3d_68"]),
        "pose": np.array(model.pitch_yaw_roll),
        "landmark_2d_106": np.zeros(_SHAPES["landmark_2d_106"]),
        "embedding": model.embedding,
        "gender": np.array(_UNKNOWN if model.male is None else int(model.male)),
        "age": np.array(_UNKNOWN if model.age is None else model.age),
    }
    typed = {name: np.array(value, "<i8" if name in _COUNTED else "<f4", order="C") for name, value in values.items()}
    metadata = {_UNMEASURED: "landmark_3d_68, landmark_2d_106"}
    if model.recogniser is not None:
        metadata[_RECOGNISER] = model.recogniser
    return save(typed, metadata)


def read_face_model(data: bytes) -> FaceModel:
    """The face of a file. Raises InvalidRequest, which names what is wrong: no safetensors file, too large, keys unknown or missing, other
    shapes or kinds of numbers, numbers that are none, an embedding of nobody."""
    if len(data) > LARGEST_BYTES:
        raise _wrong(f"has {len(data)} bytes, and none of its kind has more than {LARGEST_BYTES}")
    try:
        found = load(data)
    # What safetensors lets through, by damaging bytes at random: its own error, and numpy's about kinds that numpy has not.
    except (SafetensorError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _wrong("is no whole safetensors file") from error
    unknown, missing = sorted(found.keys() - _SHAPES.keys()), sorted(_SHAPES.keys() - found.keys())
    if unknown or missing:
        said = [
            f"{what} {', '.join(ascii(name[:40]) for name in names[:9])}" for what, names in (("has", unknown), ("lacks", missing)) if names
        ]
        raise _wrong(f"is no face model: it {' and '.join(said)}")
    values = {name: _checked(name, value) for name, value in found.items()}
    length = float(np.linalg.norm(values["embedding"].astype(np.float64)))
    if not 0 < length < _LONGEST:
        raise _wrong(f"holds an embedding of nobody, of length {length:g}")
    pitch, yaw, roll = (float(value) for value in values["pose"])
    sex, age = int(values["gender"]), int(values["age"])
    return FaceModel(
        embedding=values["embedding"],
        bbox=values["bbox"],
        kps=values["kps"],
        det_score=float(values["det_score"]),
        pitch_yaw_roll=(pitch, yaw, roll),
        male=None if sex < 0 else sex == 1,
        age=None if age < 0 else age,
        recogniser=_recogniser(data),
    )


def _checked(name: str, value: NDArray[Any]) -> Floats:
    shape = value.shape[1:] if value.shape == (1, *_SHAPES[name]) else value.shape
    if shape != _SHAPES[name]:
        raise _wrong(f"has {name} of shape {list(value.shape)}, where {list(_SHAPES[name])} is meant")
    if value.dtype.kind not in ("iuf" if name in _COUNTED or not shape else "f"):
        raise _wrong(f"has {name} of {value.dtype}, where {'numbers' if name in _COUNTED else 'fractions'} are meant")
    with np.errstate(over="ignore"):
        numbers = value.reshape(shape).astype(np.float32)
    if not np.isfinite(numbers).all():
        raise _wrong(f"has {name} with something that is no number")
    return numbers


def _recogniser(data: bytes) -> str | None:
    """From the header, which `load` has read before: its length in 8 bytes, then JSON."""
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    said = (header.get("__metadata__") or {}).get(_RECOGNISER)
    return said if isinstance(said, str) and said.isprintable() and 0 < len(said) <= 100 else None


def _wrong(what: str) -> InvalidRequest:
    return InvalidRequest(f"The face model {what}.", _REMEDY, {"param": "file"})
