"""What is known of a picture that may be trained on, and what becomes of it. Plain values that are written as JSON; embeddings as base64.

Boxes are x0, y0, x1, y1 in pixels of the upright picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

from deployments.contracts import Floats

Box = tuple[float, float, float, float]
Reason = Literal[
    "corrupt", "no_face", "not_the_subject", "face_too_small", "too_distant", "several_faces", "blurred", "near_duplicate"
]  # fmt: skip
"""Why a picture is rejected; a picture has one reason, the first of these that holds in the order of select.py."""
REASONS: Final[dict[Reason, str]] = {
    "corrupt": "the file cannot be opened",
    "no_face": "no face is found",
    "not_the_subject": "somebody else",
    "face_too_small": "the face has too few pixels",
    "too_distant": "the person is far away",
    "several_faces": "another face is too close to be cropped away",
    "blurred": "the face is out of focus or moved",
    "near_duplicate": "the same picture as another",
}
State = Literal["scorable", "too_small", "low_det", "extreme_pose", "none"]
"""Whether a face can be compared at all. One that cannot is not another person's because its cosine is low."""


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, ser_json_bytes="base64", val_json_bytes="base64")


class FaceFacts(_Value):
    """One face. score: of the detector. size: shorter side of the box, pixels. sharpness: at the face's own size. yaw: degrees, above 0
    where the nose points to the picture's right. quality: 0..1, see deployments/identity/blending.py. embedding, judge_embedding: 512
    float32, little-endian: the conditioning recogniser's, raw, and the judge's, of length 1. look: see duplicates.py."""

    box: Box
    score: float
    landmarks: tuple[tuple[float, float], ...]
    size: float
    sharpness: float
    frontality: float
    yaw: float
    quality: float
    embedding: bytes
    judge_embedding: bytes
    look: bytes


class PictureAnalysis(_Value):
    """What one file shows. sha256: of its bytes. width, height: upright. fault: why it cannot be opened; then nothing else is known.
    compression: 0 (none) to 1. faces: by area, largest first. thumbnail: a small JPEG for the report."""

    sha256: str
    width: int = 0
    height: int = 0
    fault: str | None = None
    compression: float = 0.0
    faces: tuple[FaceFacts, ...] = ()
    thumbnail: bytes = b""


class Crop(_Value):
    """box: what is kept, whole pixels. masked: head boxes of others that reach into it, in the whole picture's pixels. left_out: how many
    faces are outside."""

    box: tuple[int, int, int, int]
    masked: tuple[Box, ...] = ()
    left_out: int = 0


class Verdict(_Value):
    """What becomes of a picture. reason: None where it is accepted. state: of the face that was judged; `face` is its place, None without
    one. cosine: of the judge, to the mean of the subject's other faces, None where there is none. duplicate_of: the name of the picture
    that is kept in its place. crop: of an accepted one. says: in words."""

    reason: Reason | None = None
    state: State = "none"
    face: int | None = None
    cosine: float | None = None
    duplicate_of: str | None = None
    crop: Crop | None = None
    says: str = ""


class Notice(_Value):
    """A warning about the set. pictures: the names of those that it is about."""

    code: str
    message: str
    pictures: tuple[str, ...] = ()


def vectors(packed: Sequence[bytes]) -> Floats:
    """[n, 512], each of length 1; [0, 512] of none."""
    if not packed:
        return np.zeros((0, 512), np.float32)
    rows = np.stack([np.frombuffer(row, "<f4") for row in packed]).astype(np.float32)
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6), np.float32)


def area(box: Sequence[float]) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)


def overlap(first: Sequence[float], second: Sequence[float]) -> Box:
    """What two boxes share; of no area where they do not meet."""
    x0, y0 = max(first[0], second[0]), max(first[1], second[1])
    return x0, y0, max(min(first[2], second[2]), x0), max(min(first[3], second[3]), y0)
