"""Trainings in this process, in place of Ray's: the same folders, the same curation, the same trainer, a thread each. And runners of jobs
that do them, over a true store and the whole application."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from deployments.errors import LikenessError, ReplicaLost
from deployments.job_runner import Execute, JobSettings
from deployments.store.jobs import JobStore
from deployments.store.provisional import Provisional
from serve.settings import AppSettings
from tests.job_serving import QUICK
from training.character_lora import curated, train_lora
from training.dataset.curate import curate
from training.dataset.search import FaceFinder
from training.evaluation.executor import EvaluationExecutor
from training.evaluation.plan import load_plan
from training.executor import FOLDER, TrainingExecutor
from training.orders import EVALUATION, TRAINING
from training.registry import Registry
from training.tasks import (
    DATASET,
    FAULT,
    RESULT,
    TrainingFault,
    TrainingPictures,
    TrainingProgress,
    TrainingResult,
    pictures_of,
    put,
    read,
    task_of,
)

SLOTS: JobSettings = QUICK.model_copy(update={"slots": {"train-local": 1, "evaluate": 1}, "lease_s": 15.0})

_WHOLE = load_plan("selection")
PLAN = _WHOLE.but(prompts=_WHOLE.prompts[:1], seeds=_WHOLE.seeds[:1], fields={"scores": False, "steps": 2, "width": 128, "height": 128})
"""The plan by which checkpoints are compared, as small as it can be."""


class TrainingsHere:
    """training.executor.Trainings. One that is cancelled while it is followed goes on, and the next one finds it.

    begun: how often each was; a training that ends badly `break_first` times dies without a word in its place.
    """

    def __init__(self, break_first: int = 0) -> None:
        self.begun: dict[str, int] = {}
        self.stopped: list[str] = []
        self._break_first = break_first
        self._threads: dict[str, threading.Thread] = {}

    async def follow(self, id: str, folder: Path, report: Callable[[TrainingProgress], None]) -> TrainingResult:
        while (found := read(folder / RESULT, TrainingResult)) is None:
            if (fault := read(folder / FAULT, TrainingFault)) is not None:
                raise fault.error
            if id not in self._threads:
                self.begun[id] = self.begun.get(id, 0) + 1
                loop = asyncio.get_running_loop()
                self._threads[id] = threading.Thread(target=self._work, args=(id, folder, loop, report), daemon=True)
                self._threads[id].start()
            elif not self._threads[id].is_alive() and not (folder / RESULT).exists() and not (folder / FAULT).exists():
                del self._threads[id]
                raise ReplicaLost("The training died.")
            await asyncio.sleep(0.05)
        return found

    async def stop(self, id: str, folder: Path) -> None:
        self.stopped.append(id)
        if folder.is_dir():
            (folder / "cancel").touch()
        if (thread := self._threads.get(id)) is not None:
            await asyncio.to_thread(thread.join)

    async def alive(self) -> frozenset[str]:
        return frozenset(id for id, thread in self._threads.items() if thread.is_alive())

    async def forget(self, ids: Collection[str]) -> None:
        for id in ids:
            self._threads.pop(id, None)

    def _work(self, id: str, folder: Path, loop: Any, report: Callable[[TrainingProgress], None]) -> None:
        if self.begun[id] <= self._break_first:
            return

        def tell(progress: TrainingProgress) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(report, progress)

        try:
            result = _trained(folder, tell)
            if result is not None:
                put(folder / RESULT, result)
        except LikenessError as error:
            put(folder / FAULT, TrainingFault.of(error))


def _trained(folder: Path, tell: Callable[[TrainingProgress], None]) -> TrainingResult | None:
    task = task_of(folder)
    torch.set_num_threads(1)
    dataset = folder / DATASET if task.dataset is None else Path(task.dataset)
    steps, held_out = task.settings.steps, {}
    if task.dataset is None:
        tell(TrainingProgress(stage="curating", of=len(pictures_of(folder)), steps=steps))
        curate(pictures_of(folder), dataset, FaceFinder.of(task.faces), task.curation)
    examples, word = curated(dataset)

    def step(progress: Any) -> None:
        if progress.held_out is not None:
            held_out[progress.step] = progress.held_out
        tell(TrainingProgress(stage="training", step=progress.step, steps=steps, loss=progress.loss))

    cancelled = (folder / "cancel").exists
    made = train_lora(task.settings, examples, word, folder, folder / "cache", torch.device("cpu"), report=step, cancelled=cancelled)
    if made.outcome.stopped:
        return None
    paths = {step: str(path.relative_to(folder)) for step, path in made.checkpoints.items()}
    return TrainingResult(
        base=task.settings.base, lora=str(made.lora.relative_to(folder)), steps=steps, checkpoints=paths, held_out=held_out,
        pictures=TrainingPictures(accepted=len(examples)), dataset_sha256=made.dataset, warnings=made.warnings, seconds=1.0,
    )  # fmt: skip


def crew(handle: Any, settings: AppSettings, store: JobStore, trainings: TrainingsHere) -> tuple[TrainingExecutor, Mapping[str, Execute]]:
    """As serve.training_crew, but for where trainings run."""
    files, faces = settings.store.files, settings.faces.models
    provisional = Provisional(settings.store.database, files)
    registry = Registry(handle, provisional, faces, 2, PLAN)
    training = TrainingExecutor(store, trainings, registry, provisional, files / FOLDER, faces, settings.training.datasets)
    evaluation = EvaluationExecutor(store, handle, provisional.characters, files / "evaluations", faces)
    return training, {TRAINING: training, EVALUATION: evaluation}
