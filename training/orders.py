"""What a job of this kind asks for, as its row holds it: written by the routes, read by the executors. Names pictures, holds none.

Everything that a preset or the server decides is decided when the order is made: an order means the same after a new release.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import InvalidRequest
from training.dataset.settings import CurationSettings, Word
from training.evaluation.plan import Plan
from training.settings import TrainingSettings

TRAINING: Final = "training"
EVALUATION: Final = "evaluation"
EVALUATE: Final = "evaluate"
"""The pool of evaluations; that of trainings depends on where they run (training.placement.pool_of)."""

DatasetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
"""A folder in the operator's folder of datasets; no path."""


# As training.dataset.dataset calls it, which needs OpenCV.
_DATASET: Final = "dataset.json"


class _Order(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class TrainingOrder(_Order):
    """A training. Of images, dataset and pictures_of exactly one says what is trained on.

    images, reference_image: hashes; the pictures came with the job, under `images/0` (or `image_urls/0`) ... and `reference_image`.
    dataset: a curated one, by name. pictures_of: a character's id. placement: a class of configs/training/placement.yaml. character: the
    id of the owner's that receives the LoRA; character_name: what a new one is called that does. name: the LoRA's. select: whether the
    checkpoint is chosen by what it draws; else it is the last.
    """

    trigger_word: Word
    class_word: Word = "person"
    settings: TrainingSettings
    placement: str
    images: tuple[str, ...] = ()
    reference_image: str | None = None
    dataset: DatasetName | None = None
    pictures_of: str | None = None
    curate: CurationSettings = CurationSettings()
    character: str | None = None
    character_name: str | None = None
    name: str
    select: bool = True


class EvaluationOrder(_Order):
    """An evaluation. plan: whole, as it was chosen. images, held_out: hashes, of pictures under `images/0` ...; else the person is a
    character, by id. lora, trigger_word, noun, sex: see training.evaluation.cases.Subject."""

    plan: Plan
    name: str
    images: tuple[str, ...] = ()
    held_out: tuple[str, ...] = ()
    character: str | None = None
    lora: str | None = None
    trigger_word: str | None = None
    noun: str = "person"
    sex: Literal["F", "M"] | None = None


def refuse_other_word(dataset: Path, trigger_word: str) -> None:
    """dataset: a folder of `dataset_folder`. Raises InvalidRequest where its captions call the person up by another word."""
    try:
        said = json.loads((dataset / _DATASET).read_bytes()).get("trigger")
    except (OSError, ValueError):
        said = None  # that it cannot be read, whoever reads all of it tells
    if said is not None and said != trigger_word:
        message = f"The captions of the dataset {dataset.name} say {said!r}, not {trigger_word!r}."
        raise InvalidRequest(message, f"Use the trigger word {said!r}.", {"param": "trigger_word"})


def given(pictures: Mapping[str, bytes], field: str) -> dict[str, bytes]:
    """Those of a field that is a list, in its order, by the name that a caller knows them by: `images[3]`."""
    places = sorted(int(name.rpartition("/")[2]) for name in pictures if name.rpartition("/")[0] == field)
    return {f"{field}[{place}]": pictures[f"{field}/{place}"] for place in places}


def dataset_folder(datasets: Path | None, name: str) -> Path:
    """Of a curated dataset, by its name. Raises InvalidRequest where there is none of it."""
    known = sorted(path.parent.name for path in datasets.glob(f"*/{_DATASET}")) if datasets is not None else []
    if datasets is None or name not in known:
        remedy = f"There are: {', '.join(known)}." if known else "The operator says where they lie: `training: {datasets: /a/folder}`."
        raise InvalidRequest(f"There is no dataset {name!r}.", remedy, {"param": "dataset"})
    return datasets.resolve() / name
