"""What Likeness answers: pictures with their scores and everything that made them, faces, comparisons, and what there is to ask for.

Built by the ingress, read by the client. Pictures are base64 of an encoded file; every cosine is the judge recogniser's, which
conditions no picture.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from deployments.catalog import Entry
    from deployments.store.loras import LoraInfo

Verdict = Literal["same", "different", "no_face"]


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class LicenceInfo(_Answer):
    """What some weights may be used for."""

    model: str
    name: str
    commercial: bool
    url: str | None = None

    @classmethod
    def of(cls, entry: Entry) -> LicenceInfo:
        return cls(model=entry.id, name=entry.licence.name, commercial=entry.licence.commercial, url=entry.licence.url)


class Score(_Answer):
    """How much one drawn face is one reference. person: index of the person; reference: of their picture."""

    person: int
    reference: int
    cosine: float | None = Field(description="-1 to 1; null where the picture shows no face for this person.")
    verdict: Verdict


class ImageItem(_Answer):
    """One picture. Exactly one of b64_json and path is set."""

    b64_json: str | None = Field(default=None, description="The picture file, base64.")
    path: str | None = Field(default=None, description="Where the server wrote it (response_format: file).")
    seed: int
    width: int
    height: int
    format: Literal["png", "jpeg", "webp"]
    scores: list[Score] = Field(default_factory=list)

    @property
    def content(self) -> bytes:
        """The picture file. Raises ValueError where the answer holds a path only."""
        if self.b64_json is None:
            raise ValueError(f"The server kept this picture ({self.path}); ask for response_format b64_json to receive it.")
        return base64.b64decode(self.b64_json)

    def save(self, path: str | Path) -> Path:
        """Writes the picture file as it is; returns its path."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(self.content)
        return target


class GenerateResponse(_Answer):
    """The pictures, and what is needed to make each again: `request` with the picture's own seed."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "created": 1767225600,
                    "model": "flux1-mini",
                    "data": [
                        {
                            "b64_json": "iVBORw0KGgo...",
                            "seed": 7,
                            "width": 192,
                            "height": 192,
                            "format": "png",
                            "scores": [{"person": 0, "reference": 0, "cosine": 0.61, "verdict": "same"}],
                        }
                    ],
                    "timings": {"faces": 0.05, "denoise": 1.9},
                    "peak_bytes": 734003200,
                    "models": ["flux1-mini", "pulid-mini", "faces-mini"],
                    "licences": [{"model": "flux1-mini", "name": "Apache-2.0", "commercial": True}],
                    "request": {"prompt": "a portrait in a library", "seed": 7, "steps": 20},
                }
            ]
        }
    )

    created: int = Field(description="Unix time, seconds.")
    model: str = Field(description="The base model, by its id in the catalogue.")
    data: list[ImageItem]
    timings: dict[str, float] = Field(default_factory=dict, description="Seconds by stage.")
    peak_bytes: int | None = Field(
        default=None, description="The most memory that the denoiser held while it drew: of its GPU, or of its process where it has none."
    )
    models: list[str] = Field(default_factory=list, description="Every model that took part, by its id.")
    licences: list[LicenceInfo] = Field(default_factory=list, description="The licences that these pixels fall under.")
    request: dict[str, Any] = Field(default_factory=dict, description="Every value that changes pixels, as it was used.")
    warnings: list[str] = Field(default_factory=list, description="What was done otherwise than asked: a prompt that was cut.")


class FaceInfo(_Answer):
    """One face of a picture."""

    index: int = Field(description="What `face_index` calls it.")
    box: tuple[float, float, float, float] = Field(description="x0, y0, x1, y1 in pixels of the upright picture.")
    score: float = Field(description="How sure the detector is, 0 to 1.")
    landmarks: list[tuple[float, float]] = Field(description="Eyes, nose, corners of the mouth; left of the picture first.")
    age: int | None = None
    sex: Literal["F", "M"] | None = None
    embedding: list[float] | None = Field(default=None, description="512 numbers of the judge recogniser, unit length.")


class AnalyzeResponse(_Answer):
    """The faces of a picture, largest first, then from left to right."""

    width: int
    height: int
    faces: list[FaceInfo]
    models: list[str] = Field(default_factory=list)
    licences: list[LicenceInfo] = Field(default_factory=list)


class CompareResponse(_Answer):
    """Whether two faces are the same person's, by the judge recogniser."""

    cosine: float
    threshold: float
    verdict: Literal["same", "different"]
    model: str = Field(description="The judge, by its id.")


class WorkflowInfo(_Answer):
    """One workflow: where it is, what it takes, what it assumes where nothing is said."""

    name: str
    description: str
    advice: str = Field(default="", description="Which field to change when.")
    endpoint: str
    family: str
    method: str | None
    bases: list[str] = Field(description="Base models of the family that it runs on.")
    defaults: dict[str, Any]
    request_schema: dict[str, Any]


class CombinationInfo(_Answer):
    """Whether two things may stand in one request. Each is a method of identity, or loras, controls, image, true_cfg, people, masks."""

    first: str
    second: str
    works: bool
    note: str = Field(description="What is to be known of it; where it does not work, why.")
    instead: str | None = None


class WorkflowsResponse(_Answer):
    """Every workflow; `methods`: for each base model, the identity methods that fit it; `controls`: the types of control that are
    deployed; `combinations`: what goes together on this base model, and what does not."""

    workflows: list[WorkflowInfo]
    methods: dict[str, list[str]]
    controls: list[str] = Field(default_factory=list)
    combinations: list[CombinationInfo] = Field(default_factory=list)


class ModelInfo(_Answer):
    """One entry of the catalogue. serving: whether this server has it deployed."""

    id: str
    role: str
    family: str
    fits: list[str]
    defaults: dict[str, Any]
    licence: LicenceInfo
    serving: bool = False

    @classmethod
    def of(cls, entry: Entry, serving: bool = False) -> ModelInfo:
        licence = LicenceInfo.of(entry)
        defaults = dict(entry.defaults)
        return cls(
            id=entry.id, role=entry.role, family=entry.family, fits=list(entry.fits), defaults=defaults, licence=licence, serving=serving
        )


class ModelsResponse(_Answer):
    data: list[ModelInfo]


class LoraItem(_Answer):
    """One LoRA of yours. Requests name it by `id`."""

    id: str
    name: str
    trigger_word: str | None = Field(default=None, description="What calls it up in a prompt, where anything does.")
    description: str = ""
    base: str = Field(description="The base model that it was checked against.")
    family: str
    sha256: str = Field(description="Of the file.")
    bytes: int
    format: str = Field(description="Whose spelling its keys have: diffusers, kohya, comfyui, ...")
    keys: int = Field(description="How many the file has; each of them is applied.")
    rank_low: int
    rank_high: int
    error: float = Field(description="Largest relative error of a change that had to be brought to a low rank (LoKr, LoHa); 0 for others.")
    metadata: dict[str, str] = Field(default_factory=dict, description="What its trainer wrote into the file, without what is long.")
    created: int = Field(description="Seconds since 1970.")

    @classmethod
    def of(cls, info: LoraInfo) -> LoraItem:
        own = {name: getattr(info, name) for name in cls.model_fields if name != "created"}
        return cls(**own, created=int(info.created_at.timestamp()))


class LorasResponse(_Answer):
    """Your LoRAs, the newest first."""

    data: list[LoraItem]


class LoraDeleted(_Answer):
    """It is gone, and so is its file unless somebody else uploaded the same."""

    id: str
    deleted: Literal[True] = True
