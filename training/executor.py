"""The executor of trainings: has them run as Ray Jobs, follows them, and makes a LoRA of its owner out of what comes of them.

    lease -> folder prepared -> Ray Job submitted or found -> followed -> checkpoint chosen -> LoRA in the making -> the job succeeds

Holds nothing that the next one could not find again: whoever executes a training may die at any line. The Ray Job goes on meanwhile, and
whoever leases the job next follows it on. Alone this side writes to the store, under its lease; the Ray Job knows no database.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from deployments.contracts import WorkProgress
from deployments.errors import InvalidRequest, JobNotFound, LikenessError, StoreUnavailable
from deployments.face_server import FaceSettings
from deployments.job_runner import Finished, Report
from deployments.store.characters import CharacterStore
from deployments.store.job_values import JobInfo, Lease
from deployments.store.jobs import JobStore
from deployments.store.provisional import Provisional
from deployments.weights import models_root
from training.orders import TrainingOrder, dataset_folder, given
from training.pathless import for_callers, pathless
from training.registry import Choice, Registered, Registry
from training.tasks import DATASET as CURATED
from training.tasks import TrainingProgress, TrainingResult, TrainingTask, prepared

_LOG = logging.getLogger("likeness.jobs")
FOLDER = "trainings"
_MOST_REFERENCES = 50
# Somebody may just be preparing one, under a lease that is a moment old.
_ABANDONED_AFTER_S = 120.0


class Trainings(Protocol):
    """Where trainings run; training.ray_jobs.RayTrainings, which says what each method does."""

    async def follow(self, id: str, folder: Path, report: Callable[[TrainingProgress], None]) -> TrainingResult: ...
    async def stop(self, id: str, folder: Path) -> None: ...
    async def alive(self) -> frozenset[str]: ...
    async def forget(self, ids: Collection[str]) -> None: ...


@dataclass(frozen=True, eq=False)
class TrainingExecutor:
    """root: the folder of all trainings, on storage that every node shares. datasets: the operator's folder of curated ones. faces: the
    models that curate."""

    store: JobStore
    trainings: Trainings
    registry: Registry
    provisional: Provisional
    root: Path
    faces: FaceSettings
    datasets: Path | None = None

    async def __call__(self, lease: Lease, report: Report) -> Finished:
        job = lease.job
        order = TrainingOrder.model_validate(job.input)
        folder = self.root / job.id
        try:
            with for_callers(job.id, self._roots):
                pictures = await asyncio.to_thread(self._prepared, lease, order, folder)
                result = await self.trainings.follow(job.id, folder, lambda progress: report(_told(progress)))
                return await self._finished(job, order, folder, pictures, result, report)
        except asyncio.CancelledError:
            await self._left(job, folder)
            raise
        except Exception:
            await self._forgotten(job)
            raise

    async def sweep(self) -> None:
        """Stops trainings whose jobs have ended or are gone, and removes what is left of such: their folders, Ray's records, and what they
        had in the making. For any number of processes at once. Raises what Ray and the store raise."""
        folders = await asyncio.to_thread(self._folders)
        making = await asyncio.to_thread(self.provisional.jobs)
        if not (folders or making):
            return
        live = await asyncio.to_thread(self.store.live, folders.keys() | making)
        for id in sorted(making - live):
            await asyncio.to_thread(self.provisional.remove, id)
        if not folders.keys() - live:
            return
        alive = await self.trainings.alive() & folders.keys()
        unwanted = sorted(alive - live)
        ends = await asyncio.gather(*(self.trainings.stop(id, self.root / id) for id in unwanted), return_exceptions=True)
        failed = {id: end for id, end in zip(unwanted, ends, strict=True) if isinstance(end, BaseException)}
        now = time.time()
        left = [id for id, changed in folders.items() if id not in live and id not in failed and now - changed > _ABANDONED_AFTER_S]
        try:
            if left:
                await self.trainings.forget(left)
        finally:
            for id in left:
                await asyncio.to_thread(shutil.rmtree, self.root / id, ignore_errors=True)
        for failure in failed.values():
            raise failure  # one that does not end keeps nobody else's pictures here

    def _prepared(self, lease: Lease, order: TrainingOrder, folder: Path) -> Mapping[str, bytes]:
        """The folder, with all that the training reads. Returns the pictures that came."""
        given_pictures = self.store.pictures(lease)
        if order.pictures_of is not None:
            pictures = _of_character(self.provisional.characters, order.pictures_of, lease.job.owner)
        else:
            pictures = given(given_pictures, "images") | given(given_pictures, "image_urls")
        task = TrainingTask(
            trigger_word=order.trigger_word,
            class_word=order.class_word,
            settings=order.settings,
            placement=order.placement,
            dataset=str(self._dataset(order.dataset)) if order.dataset is not None else None,
            curate=order.curate,
            faces=self.faces,
        )
        try:
            prepared(folder, task, pictures, given_pictures.get("reference_image"))
        except OSError as error:
            raise StoreUnavailable(f"The folder {folder} of the training cannot be written: {error.strerror}.") from error
        return pictures

    def _dataset(self, name: str) -> Path:
        return dataset_folder(self.datasets, name)

    async def _finished(
        self, job: JobInfo, order: TrainingOrder, folder: Path, pictures: Mapping[str, bytes], result: TrainingResult, report: Report
    ) -> Finished:
        dataset = self._dataset(order.dataset) if order.dataset is not None else folder / CURATED
        began, steps = time.monotonic(), result.steps

        def drawn(done: int, of: int) -> None:
            report(WorkProgress("selecting", steps, steps, {"done": done, "of": of}))

        choice = await self.registry.chosen(job.id, order, folder, dataset, result, drawn)
        selected = time.monotonic() - began
        kept = await self.registry.registered(job.id, job.owner, order, folder, dataset, result, choice, pictures)
        files = [(choice.grid, "image/png")] if choice.grid is not None else []
        timings = {"training": result.seconds} | ({"selecting": selected} if order.select else {})
        warnings = [pathless(warning, self._roots) for warning in (*result.warnings, *choice.warnings, *kept.warnings)]
        return Finished(_answer(order, result, choice, kept) | {"warnings": warnings}, files, timings, kept.within)

    async def _left(self, job: JobInfo, folder: Path) -> None:
        """This executor stops. The training does where nobody wants it any more; else the next one follows it."""
        try:
            live = await asyncio.to_thread(self.store.live, [job.id])
            if not live:
                await self.trainings.stop(job.id, folder)
                await self._forgotten(job)
        except (LikenessError, JobNotFound) as error:
            _LOG.warning("%s: the sweep will see to what is left of it: %s", job.id, error)

    @property
    def _roots(self) -> tuple[Path, ...]:
        """The store's folder, around ours, and what else errors may name."""
        roots = self.root.parent, models_root()
        return roots if self.datasets is None else (*roots, self.datasets)

    async def _forgotten(self, job: JobInfo) -> None:
        try:
            await self.registry.forgotten(job.id)
        except StoreUnavailable as error:
            _LOG.warning("%s: the sweep will see to what it had in the making: %s", job.id, error)

    def _folders(self) -> dict[str, float]:
        """Ids of jobs, and when their folders were changed."""
        found = {}
        for path in self.root.glob("job_*"):
            with suppress(FileNotFoundError):  # who sweeps beside this one may be quicker
                found[path.name] = path.stat().st_mtime
        return found


def _told(progress: TrainingProgress) -> WorkProgress:
    facts = progress.model_dump(mode="json", exclude={"stage", "step", "steps"}, exclude_none=True)
    counted = facts if progress.of else {name: value for name, value in facts.items() if name not in ("done", "of")}
    return WorkProgress(progress.stage, progress.step, progress.steps, counted)


def _of_character(characters: CharacterStore, id: str, owner: str) -> dict[str, bytes]:
    """Its pictures, the best first, by their ids. Raises CharacterNotFound, InvalidRequest for one without pictures."""
    character = characters.get(id, owner)
    kept = sorted((item for item in character.pictures if item.verdict.rank is not None), key=lambda item: item.verdict.rank or 0)
    if not kept:
        raise InvalidRequest(f"The character {id} has no picture that can be used.", "Add pictures to it.", {"param": "character_id"})
    return {item.id: characters.picture(id, item.id, owner)[0] for item in kept[:_MOST_REFERENCES]}


def _answer(order: TrainingOrder, result: TrainingResult, choice: Choice, kept: Registered) -> dict[str, Any]:
    """See serve.training_answers.TrainedLora; without its warnings."""
    pictures = result.pictures
    return {
        "lora_id": kept.lora.id,
        "character_id": kept.character,
        "trigger_word": order.trigger_word,
        "base": result.base,
        "sha256": kept.lora.sha256,
        "step": choice.step,
        "steps": result.steps,
        "scores": dict(choice.scores),
        "candidates": [dict(candidate) for candidate in choice.candidates],
        "pictures": {"accepted": pictures.accepted, "reasons": dict(pictures.reasons)}
        | {"rejected": [rejected.model_dump(mode="json") for rejected in pictures.rejected]},
        "dataset_sha256": result.dataset_sha256,
        "data": [{"name": "candidates.png", "media_type": "image/png"}] if choice.grid is not None else [],
    }
