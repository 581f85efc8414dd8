"""What a training is told, and what it tells: the files of its folder, by which the process that trains and the one that follows it speak.

    FOLDER/task.json                what is wanted: a TrainingTask. There once the folder is prepared
    FOLDER/pictures/0000 ...        as they came; pictures.json has their names; reference.png says who of them, where it is there
    FOLDER/dataset/                 what curation made of them (training/dataset)
    FOLDER/cache/                   latents and captions: of this training alone, and gone with it
    FOLDER/settings.yaml, checkpoints/, samples/, lora.safetensors      see character_lora.py
    FOLDER/placement.json           where it runs, as the one who submitted it was told (placement.py)
    FOLDER/progress.json            a TrainingProgress, twice a second at most
    FOLDER/result.json, error.json  the end: a TrainingResult, or a TrainingFault
    FOLDER/deaths.json              how often it died in a row, as those who follow it count (deaths.py)
    FOLDER/cancel                   whoever makes it wants no more: a checkpoint is written, and it ends for good
    FOLDER/stopping                 the process that trains was told to go: a checkpoint is written, and the next one goes on from it

Every file is there whole or not at all. Knows no Ray, no database and no torch.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.errors import InvalidRequest, LikenessError
from deployments.face_server import FaceSettings
from deployments.store.durable import placed
from training.dataset.settings import CurationSettings, Word
from training.dataset.sources import PictureSource
from training.settings import TrainingSettings

TASK, PROGRESS, RESULT, FAULT, CANCEL = "task.json", "progress.json", "result.json", "error.json", "cancel"
PLACEMENT, STOPPING = "placement.json", "stopping"
STOPPED = 3
"""With what the process that curates ends where it was stopped in order."""
REFERENCE, PICTURES, NAMES, DATASET, CACHE = "reference.png", "pictures", "pictures.json", "dataset", "cache"
MINI_FACES = FaceSettings(faces="faces-mini", judge="face-judge-mini", parser="face-parser-mini")
NAMED = 20
"""Rejected pictures that are named one by one in a result; all of them stand in the dataset's report."""
_TELL_EVERY_S = 0.5

Stage = Literal["waiting", "curating", "encoding", "training", "done"]


class _Value(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingTask(_Value):
    """trigger_word, class_word: what calls the subject up, and what it is. placement: a class of configs/training/placement.yaml.

    dataset: absolute path of a curated dataset; None: the folder's pictures are curated first, by `curate` (whose trigger and class word
    are those of the task) with the models `faces`.
    """

    trigger_word: Word
    class_word: Word = "person"
    settings: TrainingSettings
    placement: str = "local"
    dataset: str | None = None
    curate: CurationSettings = CurationSettings()
    faces: FaceSettings = MINI_FACES

    @property
    def curation(self) -> CurationSettings:
        return self.curate.model_copy(update={"trigger": self.trigger_word, "class_word": self.class_word})


class TrainingProgress(_Value):
    """Where a training is. done, of: pictures of the stage, while curating and encoding. step, steps: done, and to be done at most. loss:
    of the last step; held_out: of the last checkpoint that has one. checkpoint: the step of the last one. accepted: pictures that are
    trained on, once that is known. step_s: seconds that a step takes."""

    stage: Stage = "waiting"
    done: int = Field(default=0, ge=0)
    of: int = Field(default=0, ge=0)
    step: int = Field(default=0, ge=0)
    steps: int = Field(default=0, ge=0)
    loss: float | None = None
    held_out: float | None = None
    checkpoint: int | None = None
    accepted: int | None = None
    step_s: float | None = None


class RejectedPicture(_Value):
    """reason: one of training.dataset.values.REASONS; says: in words."""

    name: str
    reason: str
    says: str = ""


class TrainingPictures(_Value):
    """accepted: how many are trained on. reasons: how many were rejected for what. rejected: the first of them."""

    accepted: int
    reasons: Mapping[str, int] = {}
    rejected: tuple[RejectedPicture, ...] = Field(default=(), max_length=NAMED)


class TrainingResult(_Value):
    """lora, checkpoints: paths below the folder, checkpoints by their step; the LoRA is that of the last one. held_out: losses by step,
    where they were measured. dataset_sha256: of all contents and captions. warnings: sentences for people. seconds: of the process that
    ended it, which may have gone on from another's checkpoint."""

    base: str
    lora: str
    steps: int
    checkpoints: Mapping[int, str]
    held_out: Mapping[int, float] = {}
    pictures: TrainingPictures
    dataset_sha256: str
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0


class TrainingFault(_Value):
    """Why a training failed: a LikenessError, written down."""

    code: str
    message: str
    remedy: str
    details: Mapping[str, Any] = {}

    @staticmethod
    def of(error: LikenessError) -> TrainingFault:
        details = json.loads(json.dumps(error.details, default=str))
        return TrainingFault(code=error.code, message=error.message, remedy=error.remedy, details=details)

    @property
    def error(self) -> LikenessError:
        """The same error, of the class that has its code."""
        kind = next((kind for kind in _kinds(LikenessError) if kind.code == self.code), LikenessError)
        return kind(self.message, self.remedy, dict(self.details))


class ProgressFile:
    """What is told last, written no faster than it is read. It goes on from what the process before told, whose steps were done."""

    def __init__(self, folder: Path, every_s: float = _TELL_EVERY_S, **known: Any) -> None:
        """known: fields of TrainingProgress."""
        self._path, self._every_s, self._last = folder / PROGRESS, every_s, -math.inf
        self._now = (read(self._path, TrainingProgress) or TrainingProgress()).model_copy(update=known)

    def tell(self, *, weighty: bool = False, **said: Any) -> None:
        """said: fields of TrainingProgress that changed. What comes too soon after another is left out, unless it is weighty.

        Raises OSError.
        """
        self._now = self._now.model_copy(update=said)
        if not weighty and time.monotonic() - self._last < self._every_s:
            return
        self._last = time.monotonic()
        # A power cut may take it: the next one tells more.
        part = _beside(self._path)
        part.write_bytes(self._now.model_dump_json().encode())
        os.replace(part, self._path)


def wanted(folder: Path) -> bool:
    """Whether nobody has asked the training to end."""
    return not (folder / CANCEL).exists() and not (folder / STOPPING).exists()


_Kind = TypeVar("_Kind", bound=BaseModel)


def prepared(folder: Path, task: TrainingTask, pictures: Mapping[str, bytes], reference: bytes | None = None) -> None:
    """Writes what the training reads. A folder that is prepared stays as it is: the first word stands. Raises OSError."""
    if (folder / TASK).is_file():
        return
    for number, content in enumerate(pictures.values()):
        _put(folder / PICTURES / f"{number:04d}", content)
    _put(folder / NAMES, json.dumps(list(pictures)).encode())
    if reference is not None:
        _put(folder / REFERENCE, reference)
    put(folder / TASK, task)


def task_of(folder: Path) -> TrainingTask:
    """Raises InvalidRequest where the folder was not prepared, or by a version that wrote something else."""
    try:
        return TrainingTask.model_validate_json((folder / TASK).read_bytes())
    except (OSError, ValidationError) as error:
        raise InvalidRequest(f"{folder} holds no training that can be read: {error}", "Submit the training anew.") from error


def pictures_of(folder: Path) -> Sequence[PictureSource]:
    """As they came, by the names that they came by."""
    names: list[str] = json.loads((folder / NAMES).read_bytes())
    return tuple(PictureSource(name, (folder / PICTURES / f"{number:04d}").read_bytes) for number, name in enumerate(names))


def put(path: Path, value: BaseModel) -> None:
    """Whole or not at all, over what is there; it lasts. Raises OSError."""
    _put(path, f"{value.model_dump_json()}\n".encode())


def read(path: Path, kind: type[_Kind]) -> _Kind | None:
    """None where it is not there, or is no such value."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def _put(path: Path, content: bytes) -> None:
    placed(_beside(path), content, path)


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")


def _kinds(kind: type[LikenessError]) -> Iterator[type[LikenessError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)
