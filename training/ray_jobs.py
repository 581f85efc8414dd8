"""Trainings as Ray Jobs: submitted once, followed by whoever comes, stopped; one at a time for each job of ours.

Keeps nothing: what is under way Ray knows by the submission's id, what came of it lies in the folder (tasks.py). So whoever follows may die
at any line, and another follows on. Never touches the database.

A submission is called `<job>-<n>`; n is one more than those of the job that have ended, so that two that submit at once mean the same one.
Hence Ray's records of them stay until the job itself has ended (`forget`).
"""

from __future__ import annotations

import asyncio
import shlex
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from deployments.errors import Cancelled, ReplicaLost
from training.deaths import refuse_the_third
from training.placement import Placement, load_placements, placement_of
from training.tasks import (
    CANCEL,
    FAULT,
    PLACEMENT,
    PROGRESS,
    RESULT,
    STOPPED,
    TrainingFault,
    TrainingProgress,
    TrainingResult,
    put,
    read,
    task_of,
)

_OURS = "likeness-training"
"""Key of a submission's metadata; the value is the job."""
_ENDED = frozenset({"SUCCEEDED", "FAILED", "STOPPED"})
_STOP_WAIT_S = 15
"""From the signal to the kill, of a submission that anybody stops: long enough for a checkpoint. Ray's own are three."""
_ANSWER_S = 30.0
_TOLD_CHARACTERS = 300
_UNKNOWN = "status code 404"
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class Submission:
    """status: PENDING, RUNNING, SUCCEEDED, FAILED or STOPPED. message: what Ray says of it, with the end of its log where it failed.
    exit_code: of the driver, where it ended by itself."""

    name: str
    status: str
    message: str
    exit_code: int | None = None

    @property
    def ended(self) -> bool:
        return self.status in _ENDED

    @property
    def died(self) -> bool:
        """By its own doing: what never began, lost its node or was told to go may fare better elsewhere."""
        return self.ended and self.exit_code not in (None, STOPPED)


def next_name(job: str, ended: Submission | None) -> str:
    """Of the submission after the last one that has ended; of the first, where there was none."""
    number = 0 if ended is None else int(ended.name.rpartition("-")[2])
    return f"{job}-{number + 1}"


class RayTrainings:
    """Safe to be used from several tasks of one event loop, and by several processes at once."""

    def __init__(
        self,
        address: str | None = None,
        placements: Mapping[str, Placement] | None = None,
        *,
        poll_s: float = 0.5,
        stop_s: float = 20.0,
        patience_s: float = 60.0,
    ) -> None:
        """address: of Ray, or of its dashboard (`http://...`); None is the Ray that this process is in. placements: by class; None is
        configs/training/placement.yaml. stop_s: how long a training may take to write its checkpoint before it is killed. patience_s: how
        long Ray's dashboard may be away."""
        self._address, self._placements = address, load_placements() if placements is None else placements
        self._poll_s, self._stop_s, self._patience_s = poll_s, stop_s, patience_s
        self._client: Any = None

    async def follow(self, id: str, folder: Path, report: Callable[[TrainingProgress], None]) -> TrainingResult:
        """Has the training of a prepared folder run, and waits for its end. id: of the job. One that runs already is followed, one that was
        broken off goes on. Cancelled, it leaves the training alone.

        Raises what the training failed of; Cancelled where it was stopped for good; ReplicaLost where its processes died: the next call
        goes on from the last checkpoint; LikenessError where they died of themselves three times without a new one.
        """
        found = await asyncio.to_thread(_outcome, folder, lasting=True)
        if found is not None:
            return found
        newest = await self._newest(id)
        if newest is None or newest.ended:
            if newest is not None:  # perhaps nobody was there when it died
                await asyncio.to_thread(_counted, folder, newest)
            newest = await _settled(self._submitted(next_name(id, newest), id, folder))
        ended = await self._watched(newest, folder, report)
        found = await asyncio.to_thread(_outcome, folder)
        if found is None:
            await asyncio.to_thread(_counted, folder, ended)
            raise ReplicaLost(f"The training's driver ended without a result ({ended.status.lower()}): {_last_words(ended.message)}")
        return found

    async def stop(self, id: str, folder: Path) -> None:
        """Ends the training for good: by asking, so that it leaves a checkpoint, and after a while by killing. Returns when it has ended;
        of one whose driver has found no room yet, when it was asked: that ends as soon as it begins.

        Raises ReplicaLost where it does not end.
        """
        newest = await self._newest(id)
        if newest is None or newest.ended:
            return
        if await asyncio.to_thread(folder.is_dir):
            await asyncio.to_thread((folder / CANCEL).touch)
            if await self._ends(newest, self._stop_s):
                return
        await self._asked(lambda client: client.stop_job(newest.name))
        if await self._ends(newest, _STOP_WAIT_S + self._stop_s):
            return
        now = await self._told(newest.name)
        if now is not None and now.status != "PENDING":
            raise ReplicaLost(f"The training {newest.name} was stopped, and has not ended.")

    async def alive(self) -> frozenset[str]:
        """Ids of the jobs whose training has not ended, whoever follows them."""
        jobs = await self._asked(lambda client: client.list_jobs())
        return frozenset(str(job.metadata[_OURS]) for job in jobs if _OURS in (job.metadata or {}) and job.status.value not in _ENDED)

    async def forget(self, ids: Collection[str]) -> None:
        """Deletes Ray's records of the submissions of these jobs, which have ended or are gone; of one that runs still they stay."""
        for job in await self._asked(lambda client: client.list_jobs()):
            if (job.metadata or {}).get(_OURS) in ids and job.status.value in _ENDED and job.submission_id is not None:
                await self._asked(partial(_delete, name=job.submission_id))

    async def _newest(self, id: str) -> Submission | None:
        number, newest = 1, None
        while (found := await self._told(f"{id}-{number}")) is not None:
            number, newest = number + 1, found
        return newest

    async def _told(self, name: str) -> Submission | None:
        """None for one that was never submitted."""

        def ask(client: Any) -> Submission | None:
            try:
                job = client.get_job_info(name)
            except RuntimeError as error:
                if _UNKNOWN in str(error):
                    return None
                raise
            return Submission(name, job.status.value, job.message or "", job.driver_exit_code)

        return await self._asked(ask)

    async def _submitted(self, name: str, id: str, folder: Path) -> Submission:
        """Somebody else may have been quicker: it is the same submission."""
        task = await asyncio.to_thread(task_of, folder)
        placement = placement_of(task.placement, self._placements)
        await asyncio.to_thread(put, folder / PLACEMENT, placement)

        def submit(client: Any) -> None:
            try:
                client.submit_job(submission_id=name, metadata={_OURS: id}, **submission_of(folder, placement, self._joined()))
            except RuntimeError as error:
                if "already exists" not in str(error):
                    raise

        await self._asked(submit)
        return Submission(name, "PENDING", "")

    async def _watched(self, submission: Submission, folder: Path, report: Callable[[TrainingProgress], None]) -> Submission:
        """Tells what is new, until it has ended."""
        last: TrainingProgress | None = None
        while True:
            now = await self._told(submission.name)
            if now is None:
                raise ReplicaLost(f"Ray no longer knows the training {submission.name}: its head has begun anew.")
            progress = await asyncio.to_thread(read, folder / PROGRESS, TrainingProgress)
            if progress is not None and progress != last:
                last = progress
                report(progress)
            if now.ended:
                return now
            await asyncio.sleep(self._poll_s)

    async def _ends(self, submission: Submission, within_s: float) -> bool:
        until = time.monotonic() + within_s
        while time.monotonic() < until:
            now = await self._told(submission.name)
            if now is None or now.ended:
                return True
            await asyncio.sleep(self._poll_s)
        return False

    async def _asked(self, ask: Callable[[Any], _Answer]) -> _Answer:
        """What the Jobs API answers, tried again while it is away. Raises ReplicaLost where it stays away."""
        until = time.monotonic() + self._patience_s
        while True:
            try:
                return await asyncio.wait_for(asyncio.to_thread(self._ask, ask), _ANSWER_S)
            except (OSError, RuntimeError, ValueError) as error:  # requests' errors are OSErrors
                if time.monotonic() > until:
                    remedy = "Start Ray with its dashboard (`ray start --head --include-dashboard=true`): the Jobs API is part of it."
                    raise ReplicaLost(f"Ray's Jobs API does not answer: {_last_words(str(error))}", remedy) from error
                self._client = None
            await asyncio.sleep(self._poll_s)

    def _ask(self, ask: Callable[[Any], _Answer]) -> _Answer:
        if self._client is None:
            from ray.job_submission import JobSubmissionClient

            self._client = JobSubmissionClient(self._address or self._joined())
        return ask(self._client)

    def _joined(self) -> str | None:
        """Ray's address, where it is known: not of a dashboard."""
        import ray

        if self._address is None:
            return str(ray.get_runtime_context().gcs_address)
        return None if "://" in self._address else self._address


def submission_of(folder: Path, placement: Placement, ray: str | None = None) -> dict[str, Any]:
    """Arguments of `submit_job`. With neither CPUs nor labels of its own Ray puts a driver on the head node. ray: the address that the
    driver joins: of several Rays on one machine it would be told the one that was started last."""
    # exec: signals reach the driver, and no shell between.
    command = ["exec", sys.executable, "-m", "training.job", str(folder.resolve()), *(["--ray", ray] if ray is not None else [])]
    arguments: dict[str, Any] = {
        "entrypoint": shlex.join(command),
        "runtime_env": {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_WAIT_S)}},
    }
    if placement.driver_cpus:
        arguments["entrypoint_num_cpus"] = placement.driver_cpus
    if placement.driver_labels:
        arguments["entrypoint_label_selector"] = dict(placement.driver_labels)
    return arguments


def _outcome(folder: Path, *, lasting: bool = False) -> TrainingResult | None:
    """What a folder tells of the end; None where it tells nothing. lasting: only what another submission would not change.

    Raises the error that the training ended with.
    """
    result = read(folder / RESULT, TrainingResult)
    if result is not None:
        return result
    if (folder / CANCEL).exists():
        raise Cancelled("The training was stopped.")
    fault = read(folder / FAULT, TrainingFault)
    if fault is not None and not (lasting and fault.error.retryable):
        raise fault.error
    return None


def _counted(folder: Path, ended: Submission) -> None:
    """A death that the folder does not explain. Raises LikenessError where it has died like that too often."""
    if ended.died and not (folder / FAULT).exists():
        refuse_the_third(folder, ended.name, _last_words(ended.message))


def _delete(client: Any, name: str) -> None:
    try:
        client.delete_job(name)
    except RuntimeError as error:
        if _UNKNOWN not in str(error):  # somebody else was quicker
            raise


def _last_words(said: str) -> str:
    """Of a message that may end with a log."""
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[-1][:_TOLD_CHARACTERS] if lines else "it says nothing"


async def _settled(work: Any) -> Any:
    """The work's result; cancelled meanwhile, it is brought to its end first: what was half submitted nobody could stop."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise
