"""What `/v1/characters` answers. Read by the client as well: imports no torch, no numpy and no Ray.

Every cosine is the judge recogniser's, which conditions no picture.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from deployments.store.character_values import Character, CharacterPicture, CharacterSummary

REASONS = {
    "no_face": "It shows no face to the detector.",
    "several_faces": "It shows several people: crop it to one.",
    "too_small": "The face has too few pixels.",
    "blurred": "The face is blurred.",
    "other_person": "It shows somebody else than the pictures that are kept.",
    "duplicate": "It is there already.",
}
"""Why a picture is set aside, in words."""


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class PictureQuality(_Answer):
    """How good the face is to be recognised by."""

    sharpness: float = Field(description="Variance of the Laplacian of the aligned face; below 25 is blurred, from 200 sharp.")
    size: float = Field(description="Shorter side of the face's box, pixels; from 112 nothing of it is invented.")
    frontality: float = Field(description="1 from the front, 0 turned by some 55 degrees.")
    yaw: float = Field(description="Degrees, above 0 where the nose points to the picture's right; an estimate from five points.")
    compression: float = Field(description="0 none to 1: 1 - quality / 100 of a JPEG, or what its blocks have left in a PNG.")
    overall: float = Field(description="All of these as one number, 0 to 1; the best picture has the most.")


class CharacterPictureItem(_Answer):
    """One picture of a character."""

    id: str
    kept: bool = Field(description="Whether it is used.")
    reason: str | None = Field(default=None, description="Why it is set aside: no_face, several_faces, too_small, blurred, ...")
    says: str | None = Field(default=None, description="The reason in words.")
    rank: int | None = Field(default=None, description="Of those kept, which is used first: 0 is the best.")
    box: tuple[float, float, float, float] | None = Field(default=None, description="Of the face: x0, y0, x1, y1, pixels.")
    quality: PictureQuality | None = Field(default=None, description="Of the face, where there is one.")
    cosine: float | None = Field(default=None, description="Of its face to the centroid of those kept, -1 to 1.")
    faces: int
    format: Literal["png", "jpeg", "webp"]
    width: int
    height: int
    bytes: int
    created: int = Field(description="Seconds since 1970.")

    @classmethod
    def of(cls, picture: CharacterPicture) -> CharacterPictureItem:
        facts, verdict = picture.facts, picture.verdict
        return cls(
            id=picture.id, kept=verdict.rank is not None, reason=verdict.reason, says=REASONS.get(verdict.reason or ""), rank=verdict.rank,
            box=facts.box, quality=_quality(picture), cosine=verdict.cosine, faces=facts.faces, format=facts.format, width=facts.width,
            height=facts.height, bytes=picture.bytes, created=int(picture.created_at.timestamp()),
        )  # fmt: skip


class Spread(_Answer):
    """How much the pictures that are kept are alike: cosines to their centroid."""

    mean: float
    least: float


class CharacterWarning(_Answer):
    """Something to be known of the set. `two_people`, `low_quality`, `one_angle`, `too_few`, `unknown_recogniser`."""

    code: str
    message: str
    pictures: list[list[str]] = Field(default_factory=list, description="Ids, in groups: of `two_people` one group a person.")


class CharacterLora(_Answer):
    """The newest LoRA that was trained on it."""

    id: str
    trigger_word: str | None = None


class CharacterItem(_Answer):
    """One character of yours. Requests name it by `id`, wherever reference pictures may stand."""

    id: str
    name: str
    pictures: list[CharacterPictureItem]
    best: str | None = Field(default=None, description="The picture to be used where only one can be.")
    best_by_hand: bool = False
    spread: Spread | None = None
    warnings: list[CharacterWarning] = Field(default_factory=list)
    lora: CharacterLora | None = None
    from_face_model: bool = Field(default=False, description="It was imported, and has an embedding but no picture.")
    recogniser: str | None = Field(default=None, description="Whose embedding it has.")
    judge: str | None = Field(default=None, description="Whose cosines these are.")
    centroid: list[float] | None = Field(default=None, description="512 numbers of the judge, unit length; where `?centroid=true` asks.")
    created: int = Field(description="Seconds since 1970.")

    @classmethod
    def of(cls, character: Character, centroid: bool = False) -> CharacterItem:
        packed = character.centroid if centroid else None
        warnings = [CharacterWarning(code=w.code, message=w.message, pictures=[list(g) for g in w.groups]) for w in character.warnings]
        return cls(
            id=character.id, name=character.name, pictures=[CharacterPictureItem.of(picture) for picture in character.pictures],
            best=character.best, best_by_hand=character.best_by_hand, warnings=warnings,
            spread=None if character.spread is None else Spread(mean=character.spread[0], least=character.spread[1]),
            lora=None if character.lora is None else CharacterLora(id=character.lora[0], trigger_word=character.lora[1]),
            from_face_model=character.face_model is not None, recogniser=character.recogniser, judge=character.judge,
            centroid=None if packed is None else list(struct.unpack(f"<{len(packed) // 4}f", packed)),
            created=int(character.created_at.timestamp()),
        )  # fmt: skip


class CharacterEntry(_Answer):
    """One of the list."""

    id: str
    name: str
    pictures: int
    kept: int = Field(description="How many of the pictures are used.")
    best: str | None = None
    from_face_model: bool = False
    created: int = Field(description="Seconds since 1970.")

    @classmethod
    def of(cls, summary: CharacterSummary) -> CharacterEntry:
        own = {name: getattr(summary, name) for name in cls.model_fields if name != "created"}
        return cls(**own, created=int(summary.created_at.timestamp()))


class CharactersResponse(_Answer):
    """Your characters, the newest first."""

    data: list[CharacterEntry]


class CharacterDeleted(_Answer):
    """It is gone: its pictures, everything that was measured of them, and its ties to LoRAs. The LoRAs themselves are still there."""

    id: str
    deleted: Literal[True] = True


def _quality(picture: CharacterPicture) -> PictureQuality | None:
    facts = picture.facts
    if facts.sharpness is None or facts.size is None or facts.frontality is None or facts.yaw is None:
        return None
    return PictureQuality(
        sharpness=facts.sharpness, size=facts.size, frontality=facts.frontality, yaw=facts.yaw, compression=facts.compression,
        overall=facts.quality,
    )  # fmt: skip
