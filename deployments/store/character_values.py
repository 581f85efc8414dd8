"""What the store keeps of a character: values that curation makes and routes show. Plain numbers and bytes; no array, no row, no file.

Embeddings are 512 float32, little-endian.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

MOST_PICTURES = 50
"""Of one character, those set aside included."""
Reason = Literal["no_face", "several_faces", "too_small", "blurred", "other_person", "duplicate"]
"""Why a picture is set aside."""
PictureFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True, kw_only=True)
class PictureFacts:
    """What was measured of one picture, once.

    sha256: of the file. width, height: upright, pixels. faces: how many there are; what follows is of the only or largest one, None
    without any. box, score, landmarks: as in contracts.Face. age (years), sex: None where nobody can tell. size: shorter side of the box,
    pixels. sharpness: see deployments/identity/blending.py. frontality: at most 1, from the front. yaw: degrees, above 0 where the nose
    points to the picture's right. compression: 0 (none) to 1, see deployments/curation.py. quality: all of these as one number, 0..1.
    embedding, judge_embedding: 512 float32, little-endian, the former raw, the latter of length 1.
    """

    sha256: str
    format: PictureFormat
    width: int
    height: int
    faces: int = 0
    box: tuple[float, float, float, float] | None = None
    score: float | None = None
    landmarks: tuple[tuple[float, float], ...] = ()
    age: int | None = None
    sex: Literal["F", "M"] | None = None
    size: float | None = None
    sharpness: float | None = None
    frontality: float | None = None
    yaw: float | None = None
    compression: float = 0.0
    quality: float = 0.0
    embedding: bytes | None = None
    judge_embedding: bytes | None = None


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What becomes of one picture. reason: why it is set aside, None for one that is kept. rank: of those kept, 0 is to be used first.
    cosine: its face against the centroid, by the judge; None without a face or a centroid."""

    reason: Reason | None = None
    rank: int | None = None
    cosine: float | None = None


@dataclass(frozen=True, kw_only=True)
class Notice:
    """Something to be known of a set. groups: the places of the pictures that it is about; of `two_people` one group a person."""

    code: str
    message: str
    groups: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """What is to be known of a set of pictures. verdicts: one a picture. best: its place. embedding: the mean of those kept, raw, of the
    recogniser; centroid: the judge's, of length 1. spread: mean and least cosine of those kept to the centroid."""

    verdicts: tuple[Verdict, ...]
    best: int | None = None
    embedding: bytes | None = None
    centroid: bytes | None = None
    spread: tuple[float, float] | None = None
    notices: tuple[Notice, ...] = ()
    recogniser: str | None = None
    judge: str | None = None


@dataclass(frozen=True, kw_only=True)
class NewPicture:
    """A picture to be kept: its file, and what was measured of it."""

    content: bytes
    facts: PictureFacts


@dataclass(frozen=True, kw_only=True)
class CharacterPicture:
    """A picture that is kept or set aside. bytes: of its file."""

    id: str
    facts: PictureFacts
    verdict: Verdict
    bytes: int
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class CharacterNotice:
    """A Notice with the ids of its pictures."""

    code: str
    message: str
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Character:
    """A character as it was at `revision`. face_model: the file that it was imported from; then it has an embedding and no picture. lora:
    id and trigger word of its newest LoRA."""

    id: str
    name: str
    revision: int
    pictures: tuple[CharacterPicture, ...]
    best: str | None
    best_by_hand: bool
    embedding: bytes | None
    centroid: bytes | None
    spread: tuple[float, float] | None
    warnings: tuple[CharacterNotice, ...]
    recogniser: str | None
    judge: str | None
    face_model: bytes | None
    lora: tuple[str, str | None] | None
    created_at: datetime


@dataclass(frozen=True, kw_only=True)
class CharacterSummary:
    """One of a list. pictures: how many; kept: how many of them are used."""

    id: str
    name: str
    pictures: int
    kept: int
    best: str | None
    from_face_model: bool
    created_at: datetime
