"""`python -m training.job FOLDER`: a training from its pictures to its LoRA, as one Ray Job. See tasks.py for the folder.

Curates the pictures in this process, then has Ray Train place and watch the processes that train. Never touches the database: whoever
submitted it reads the folder and alone writes down what became of it. Ends with 0 where result.json is written, 1 where it failed, 3 where
it was stopped in order; begun again in the same folder it goes on.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from deployments.errors import Cancelled, LikenessError
from training.dataset.report import REPORT, read_report
from training.placement import Placement, load_placements, placement_of
from training.tasks import (
    DATASET,
    FAULT,
    NAMED,
    PLACEMENT,
    PROGRESS,
    REFERENCE,
    RESULT,
    STOPPED,
    STOPPING,
    ProgressFile,
    RejectedPicture,
    TrainingFault,
    TrainingPictures,
    TrainingProgress,
    TrainingResult,
    TrainingTask,
    pictures_of,
    put,
    read,
    task_of,
    wanted,
)

_DONE, _FAILED = 0, 1
_ASK_EVERY_S = 0.5
_RAY = {
    # The controller looks after its processes twice a second in place of every other second: a death is found sooner, and a report, of
    # which it takes one a turn, holds a step up less.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # Paths of the configuration mean the same everywhere.
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    # One process less: our checkpoints need no warning.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m training.job", description="One training, as a Ray Job: see training/tasks.py.")
    parser.add_argument("folder", type=Path, help="of the training, absolute, on storage that every node reaches")
    parser.add_argument("--ray", help="address of the Ray to join; by default the one that this process was started by")
    given = parser.parse_args(arguments)
    folder: Path = given.folder.resolve()
    if not folder.is_dir():
        print(f"{folder} is gone: the training is not wanted any more.", file=sys.stderr)
        return STOPPED
    try:
        return _DONE if run(folder, given.ray) else STOPPED
    except LikenessError as error:
        if folder.is_dir():
            put(folder / FAULT, TrainingFault.of(error))
        print(error, file=sys.stderr)
        return _FAILED


def run(folder: Path, address: str | None = None) -> bool:
    """Whether it came to its end; False where it was stopped. address: of Ray.

    Raises LikenessError, and what Ray Train raises where processes go on dying.
    """
    began = time.monotonic()
    for last in (FAULT, STOPPING):  # of the submission before
        (folder / last).unlink(missing_ok=True)
    task = task_of(folder)
    placement = read(folder / PLACEMENT, Placement) or placement_of(task.placement, load_placements())
    _heed_termination(folder)
    _be_nice(placement)
    told = ProgressFile(folder, steps=task.settings.steps)
    try:
        dataset = _curated(folder, task, told)
    except Cancelled:
        return False
    pictures = _pictures(dataset)
    told.tell(weighty=True, stage="waiting", done=0, of=0, accepted=pictures.accepted)
    said = _fitted(folder, dataset, placement, address)
    if said is None:
        return False
    seconds = round(time.monotonic() - began, 3)
    put(folder / RESULT, TrainingResult(base=task.settings.base, pictures=pictures, seconds=seconds, **said))
    ProgressFile(folder).tell(weighty=True, stage="done", step=said["steps"])
    return True


def _heed_termination(folder: Path) -> None:
    """Told to go, this process leaves word for those that train, and waits for them. Of a folder that is gone it dies at once."""
    signal.signal(signal.SIGTERM, lambda *_: (folder / STOPPING).touch())


def _be_nice(placement: Placement) -> None:
    os.nice(max(placement.nice - os.nice(0), 0))


def _curated(folder: Path, task: TrainingTask, told: ProgressFile) -> Path:
    """The folder of the dataset. What an earlier submission looked at is not looked at again."""
    if task.dataset is not None:
        return Path(task.dataset)
    from training.dataset.curate import curate
    from training.dataset.search import FaceFinder

    def progress(stage: str, done: int, of: int) -> None:
        if not wanted(folder):
            raise Cancelled("The training was stopped while its pictures were looked at.")
        told.tell(stage="curating", done=done, of=of)

    sources = pictures_of(folder)
    progress("looking", 0, len(sources))
    # The GPUs are those of the processes that train.
    finder = FaceFinder.of(task.faces.model_copy(update={"provider": "cpu"}))
    reference = (folder / REFERENCE).read_bytes() if (folder / REFERENCE).is_file() else None
    curate(sources, folder / DATASET, finder, task.curation, reference, progress)
    return folder / DATASET


def _pictures(dataset: Path) -> TrainingPictures:
    from training.dataset.dataset import read_dataset

    accepted = len(read_dataset(dataset).pictures)
    if not (dataset / REPORT).is_file():
        return TrainingPictures(accepted=accepted)
    report = read_report(dataset)
    rejected = [
        RejectedPicture(name=picture.name, reason=picture.verdict.reason, says=picture.verdict.says)
        for picture in report.pictures
        if picture.verdict.reason is not None
    ]
    reasons = {str(reason): count for reason, count in report.reasons.items()}
    return TrainingPictures(accepted=accepted, reasons=reasons, rejected=tuple(rejected[:NAMED]))


def _fitted(folder: Path, dataset: Path, placement: Placement, address: str | None) -> dict[str, Any] | None:
    """What the first process says of the LoRA; None where it was stopped. Raises the error that the folder tells of, or Ray Train's."""
    for name, value in _RAY.items():
        os.environ.setdefault(name, value)
    if address is not None:
        os.environ["RAY_ADDRESS"] = address
    import ray
    import ray.train

    ray.init(log_to_driver=False, configure_logging=False)
    _heed_termination(folder)  # Ray takes the signal for itself when it is joined.
    try:
        with _heeded_while_it_waits(folder):
            said: dict[str, Any] | None = _trainer(folder, dataset, placement).fit().return_value
    except KeyboardInterrupt:
        return None
    except ray.train.TrainingFailedError:
        if not (folder / FAULT).is_file():
            raise
    if (fault := read(folder / FAULT, TrainingFault)) is not None:
        raise fault.error
    return said


@contextmanager
def _heeded_while_it_waits(folder: Path) -> Iterator[None]:
    """Ray Train waits for room as long as need be, and listens to nobody. Whoever wants no more meanwhile is heard here, by a
    KeyboardInterrupt; the processes that train, once there are any, look for themselves."""
    over, here = threading.Event(), threading.get_ident()
    # No other exception of a handler gets out of a `ray.get` that waits; SIGINT itself Ray Train would answer by waiting on.
    signal.signal(signal.SIGUSR1, signal.default_int_handler)

    def look() -> None:
        while not over.wait(_ASK_EVERY_S):
            if not wanted(folder) and _waits(folder):
                signal.pthread_kill(here, signal.SIGUSR1)
                return

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    try:
        yield
    finally:
        over.set()
        looking.join()


def _waits(folder: Path) -> bool:
    """Whether none of the processes that train has told anything yet: no step is lost."""
    told = read(folder / PROGRESS, TrainingProgress)
    return told is not None and told.stage == "waiting"


def _trainer(folder: Path, dataset: Path, placement: Placement) -> Any:
    """Ray Train's. Whatever outlives a process lies in the folder, so its own storage holds next to nothing."""
    import ray.train
    import ray.train.torch

    from training.worker import work

    train: Any = ray.train  # Its types are still those of version 1.
    return train.torch.TorchTrainer(
        work,
        train_loop_config={"folder": str(folder), "dataset": str(dataset), "placement": placement.model_dump_json()},
        torch_config=train.torch.TorchConfig(backend=placement.joined_by),
        scaling_config=train.ScalingConfig(
            num_workers=placement.workers,
            use_gpu=placement.gpus_of_a_worker > 0,
            resources_per_worker=placement.resources,
            placement_strategy=placement.strategy,
            label_selector=dict(placement.labels) or None,
        ),
        run_config=train.RunConfig(
            name="run", storage_path=str(folder / "ray"), failure_config=train.FailureConfig(max_failures=placement.max_failures)
        ),
    )


if __name__ == "__main__":
    sys.exit(main())
