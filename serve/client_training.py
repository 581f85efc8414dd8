"""Trainings and evaluations in the SDK: `job = client.training.submit(trigger_word="ohwx", images=[...])`, then `job.wait()`,
`job.events()`, `job.cancel()` as of every job, and `job.lora()`; `client.evaluations.submit(...)`; the same awaited on `AsyncClient`.

    train = client.training.function
    result = train.remote(job_id="42", image_urls=[...], trigger_word="ohwx", character_id="ada", webhook_url="https://...")
    lora = result.get().lora_id
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from deployments.errors import LikenessError
from serve.client_jobs import AsyncJob, AsyncJobs, Job, Jobs, at, key_header
from serve.job_answers import JobItem, JobsResponse
from serve.picture_forms import sent
from serve.problem import error_of
from serve.training_answers import EVALUATION, EVALUATIONS, TRAINING, TRAININGS, EvaluationFound, TrainedLora

_Result = TypeVar("_Result", TrainedLora, EvaluationFound)


class Trainings:
    """Over the jobs of a `Client`."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self.function = TrainFunction(self)

    def submit(self, *, idempotency_key: str | None = None, **fields: Any) -> Training:
        """A LoRA of a person, to be trained. fields: those of `POST /v1/training/jobs`; pictures may be paths, bytes, PIL pictures or
        arrays, and go up as files. Raises as the server does for a request that cannot be done, IdempotencyConflict, QuotaExceeded."""
        with _request(fields, idempotency_key) as content:
            return Training(self._jobs, self._jobs.ask("POST", TRAININGS, JobItem, **content))

    def list(self, *, status: str | None = None, limit: int | None = None, before: str | None = None) -> JobsResponse:
        """Yours, the newest first."""
        return self._jobs.ask("GET", TRAININGS, JobsResponse, params=_asked(status, limit, before))

    def get(self, id: str) -> Training:
        """Raises JobNotFound."""
        return Training(self._jobs, self._jobs.ask("GET", at(TRAINING, id), JobItem))


class Evaluations:
    """Over the jobs of a `Client`."""

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs

    def submit(self, *, idempotency_key: str | None = None, **fields: Any) -> EvaluationJob:
        """How like a person the pictures are. fields: those of `POST /v1/evaluations`. Raises as Trainings.submit."""
        with _request(fields, idempotency_key) as content:
            return EvaluationJob(self._jobs, self._jobs.ask("POST", EVALUATIONS, JobItem, **content))

    def list(self, *, status: str | None = None, limit: int | None = None, before: str | None = None) -> JobsResponse:
        """Yours, the newest first."""
        return self._jobs.ask("GET", EVALUATIONS, JobsResponse, params=_asked(status, limit, before))

    def get(self, id: str) -> EvaluationJob:
        """Raises JobNotFound."""
        return EvaluationJob(self._jobs, self._jobs.ask("GET", at(EVALUATION, id), JobItem))


class Training(Job):
    """One training."""

    def lora(self, timeout: float | None = None) -> TrainedLora:
        """What came of it, when it has ended. Raises the error that it failed with, TimeoutError."""
        return _result(self.wait(timeout), TrainedLora)

    get = lora
    """As `ray.get` of what the seed's `train_fn.remote(...)` returned."""


class EvaluationJob(Job):
    """One evaluation."""

    def summary(self, timeout: float | None = None) -> dict[str, Any]:
        """The figures, when it has ended. Raises the error that it failed with, TimeoutError."""
        return _result(self.wait(timeout), EvaluationFound).summary

    def files(self) -> dict[str, bytes]:
        """What it left, by name, when it has ended: table.md, summary.json, scores.csv, the grids and the plot."""
        found = _result(self.wait(), EvaluationFound)
        return {file.name: self._jobs.artifact(file.artifact) for file in found.data if file.artifact is not None}


class TrainFunction:
    """A training as a call of Ray's: `.remote(...)` begins it and returns at once. No Ray is needed here."""

    def __init__(self, trainings: Trainings) -> None:
        self._trainings = trainings

    def remote(self, **fields: Any) -> Training:
        """As Trainings.submit."""
        return self._trainings.submit(**fields)


class AsyncTrainings:
    """Over the jobs of an `AsyncClient`."""

    def __init__(self, jobs: AsyncJobs) -> None:
        self._jobs = jobs

    async def submit(self, *, idempotency_key: str | None = None, **fields: Any) -> AsyncTraining:
        """As Trainings.submit."""
        with _request(fields, idempotency_key) as content:
            return AsyncTraining(self._jobs, await self._jobs.ask("POST", TRAININGS, JobItem, **content))

    async def list(self, *, status: str | None = None, limit: int | None = None, before: str | None = None) -> JobsResponse:
        return await self._jobs.ask("GET", TRAININGS, JobsResponse, params=_asked(status, limit, before))

    async def get(self, id: str) -> AsyncTraining:
        return AsyncTraining(self._jobs, await self._jobs.ask("GET", at(TRAINING, id), JobItem))


class AsyncEvaluations:
    """Over the jobs of an `AsyncClient`."""

    def __init__(self, jobs: AsyncJobs) -> None:
        self._jobs = jobs

    async def submit(self, *, idempotency_key: str | None = None, **fields: Any) -> AsyncEvaluationJob:
        """As Evaluations.submit."""
        with _request(fields, idempotency_key) as content:
            return AsyncEvaluationJob(self._jobs, await self._jobs.ask("POST", EVALUATIONS, JobItem, **content))

    async def list(self, *, status: str | None = None, limit: int | None = None, before: str | None = None) -> JobsResponse:
        return await self._jobs.ask("GET", EVALUATIONS, JobsResponse, params=_asked(status, limit, before))

    async def get(self, id: str) -> AsyncEvaluationJob:
        return AsyncEvaluationJob(self._jobs, await self._jobs.ask("GET", at(EVALUATION, id), JobItem))


class AsyncTraining(AsyncJob):
    """One training."""

    async def lora(self, timeout: float | None = None) -> TrainedLora:
        """As Training.lora."""
        return _result(await self.wait(timeout), TrainedLora)


class AsyncEvaluationJob(AsyncJob):
    """One evaluation."""

    async def summary(self, timeout: float | None = None) -> dict[str, Any]:
        """As EvaluationJob.summary."""
        return _result(await self.wait(timeout), EvaluationFound).summary

    async def files(self) -> dict[str, bytes]:
        """As EvaluationJob.files."""
        found = _result(await self.wait(), EvaluationFound)
        return {file.name: await self._jobs.artifact(file.artifact) for file in found.data if file.artifact is not None}


@contextmanager
def _request(fields: Mapping[str, Any], key: str | None) -> Iterator[dict[str, Any]]:
    """What `ask` is given for a submission."""
    with sent(fields) as content:
        yield {**content, "headers": key_header(key)}


def _asked(status: str | None, limit: int | None, before: str | None) -> dict[str, Any]:
    said = {"status": status, "limit": limit, "before": before}
    return {name: value for name, value in said.items() if value is not None}


def _result(item: JobItem, kind: type[_Result]) -> _Result:
    if isinstance(item.result, kind):
        return item.result
    if item.error is not None:
        raise error_of(item.error)
    raise LikenessError(f"The job {item.id} has no result: it is {item.status}.", "Submit it again if it is wanted after all.")
