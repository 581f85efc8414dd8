"""What trainings and evaluations leave, as `result` of their jobs. Built by the ingress, read by the client; asks nothing.

The jobs themselves are jobs like any other: their addresses, events and ends are those of /v1/jobs.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

TRAININGS, TRAINING = "/v1/training/jobs", "/v1/training/jobs/{id}"
EVALUATIONS, EVALUATION = "/v1/evaluations", "/v1/evaluations/{id}"


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ResultFile(_Answer):
    """A file that a job left."""

    name: str
    media_type: str
    url: str | None = Field(default=None, description="Where it is, until the job expires.")
    artifact: str | None = Field(default=None, description="Its id.")


class RejectedPicture(_Answer):
    """A picture that was not trained on. name: its place among those that were sent, or the id of a character's picture."""

    name: str
    reason: str
    says: str = ""


class TrainedPictures(_Answer):
    """What became of the pictures. rejected: the first twenty of them."""

    accepted: int
    reasons: dict[str, int] = Field(default_factory=dict, description="How many were rejected for what.")
    rejected: list[RejectedPicture] = Field(default_factory=list)


class CheckpointScore(_Answer):
    """A checkpoint that was compared with the others, by what it draws with the same prompts and seeds."""

    step: int
    identity: float = Field(description="Mean cosine of the judge to the pictures that were trained on; no face counts as 0.")
    told_apart: bool = Field(description="Whether it is surely worse than the one that was taken.")
    held_out_loss: float | None = None


class TrainedLora(_Answer):
    """What a training leaves: a LoRA of yours, which every request may name from now on."""

    lora_id: str
    character_id: str | None = Field(default=None, description="The character that it was attached to.")
    trigger_word: str = Field(description="What calls the person up in a prompt.")
    base: str
    sha256: str
    step: int = Field(description="The step of the checkpoint that was taken.")
    steps: int = Field(description="How many were trained.")
    scores: dict[str, float] = Field(
        default_factory=dict, description="`identity`: with prompts and seeds that had no part in the choice. Also in the file's header."
    )
    candidates: list[CheckpointScore] = Field(default_factory=list)
    pictures: TrainedPictures
    dataset_sha256: str
    warnings: list[str] = Field(default_factory=list)
    data: list[ResultFile] = Field(default_factory=list, description="A grid of what the candidates drew.")


class EvaluationFound(_Answer):
    """What an evaluation leaves: the figures, and files with a row a picture, grids and a plot."""

    summary: dict[str, Any] = Field(description="As `likeness evaluate` writes it: figures by configuration, with intervals.")
    pictures: int = Field(description="How many were drawn.")
    warnings: list[str] = Field(default_factory=list)
    data: list[ResultFile] = Field(default_factory=list)
