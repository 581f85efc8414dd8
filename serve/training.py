"""`/v1/training/jobs` and `/v1/evaluations`: routes of a few lines each over a TrainingDesk. What becomes of a job is at `/v1/jobs/{id}`,
its events, its end and its deletion too. Knows no store and no model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import Field

from deployments.store.job_values import Status
from serve.access import quota_of
from serve.job_answers import JobItem, JobsResponse
from serve.jobs import BodyReader, Strict, documented, query_of
from serve.openapi import body_schema
from serve.problem import MEDIA_TYPE, Problem
from serve.training_answers import EVALUATION as ONE_EVALUATION
from serve.training_answers import EVALUATIONS, TRAININGS
from serve.training_answers import TRAINING as ONE_TRAINING
from serve.training_bodies import EvaluationRequest, TrainingRequest
from serve.training_desk import TrainingDesk
from serve.waiting import awaited, idempotency_key, job_answer, preference
from training.orders import EVALUATION, TRAINING

_PROBLEM: dict[str, Any] = {"model": Problem, "content": {MEDIA_TYPE: {}}}
_GONE: dict[int | str, dict[str, Any]] = {404: {**_PROBLEM, "description": "You have none with this id."}}
_DONE: dict[int | str, dict[str, Any]] = {
    200: {"model": JobItem, "description": "The same request was sent before, or the job has ended while it was awaited."},
    404: {**_PROBLEM, "description": "You have no such character or LoRA, or there is no such base model."},
    409: {**_PROBLEM, "description": "The key was used with another request."},
    413: {**_PROBLEM, "description": "A form is larger than `max_set_bytes`, or JSON than `max_body_bytes`."},
    422: {**_PROBLEM, "description": "The request cannot be done; `code` says why."},
    429: {**_PROBLEM, "description": "As many of yours wait as may wait, or as many requests are being taken in as may be at once."},
}


class TrainingsQuery(Strict):
    """Which of them."""

    status: Status | None = None
    limit: int = Field(default=50, ge=1, le=200)
    before: str | None = Field(default=None, max_length=64, description="An id: those that are older.")


def add_training_routes(app: FastAPI, desk: TrainingDesk, body_of: BodyReader, owner_of: Callable[[Request], str]) -> None:
    """body_of: the JSON object or form that a request brings, files as bytes; raises InvalidRequest, TooLarge. owner_of: whose it is."""

    async def train(request: Request) -> Response:
        """Train a LoRA of a person: on pictures, by address or as files, on a curated dataset, or on a character's own. The job's `result`
        names the LoRA; it can be drawn with at once. With a `job_id` (or an `Idempotency-Key`) the same request is the same job."""
        return await _submitted(request, desk, desk.train, ONE_TRAINING, body_of, owner_of)

    async def evaluate(request: Request) -> Response:
        """Measure how like a person the pictures are: the base model, their LoRA, their pictures, a pose, each with the same prompts and
        seeds, by a recogniser that conditions none of them."""
        return await _submitted(request, desk, desk.evaluate, ONE_EVALUATION, body_of, owner_of)

    def listed(kind: str) -> Any:
        async def some(request: Request) -> JobsResponse:
            asked = query_of(request, TrainingsQuery)
            found = await desk.jobs.list(owner_of(request), asked.status, kind, None, asked.limit + 1, asked.before)
            shown = found[: asked.limit]
            return JobsResponse(data=shown, next=shown[-1].id if len(found) > asked.limit else None)

        return some

    def one(kind: str) -> Any:
        async def show(id: str, request: Request) -> Response:
            return job_answer(await desk.get(id, owner_of(request), kind), 200)

        return show

    routes = (
        (TRAINING, TRAININGS, ONE_TRAINING, train, TrainingRequest, "Train a LoRA", "trainings"),
        (EVALUATION, EVALUATIONS, ONE_EVALUATION, evaluate, EvaluationRequest, "Measure likeness", "evaluations"),
    )
    query = documented(TrainingsQuery)
    for kind, all_of, one_of, submit, body, summary, plural in routes:
        extra = {"requestBody": body_schema(body)}
        app.post(all_of, status_code=202, response_model=JobItem, summary=summary, responses=_DONE, openapi_extra=extra)(submit)
        app.get(all_of, response_model=JobsResponse, summary=f"Your {plural}", openapi_extra=query, name=plural)(listed(kind))
        app.get(one_of, response_model=JobItem, summary=f"One of your {plural}", responses=_GONE, name=kind)(one(kind))


async def _submitted(
    request: Request, desk: TrainingDesk, submit: Any, address: str, body_of: BodyReader, owner_of: Callable[[Request], str]
) -> Response:
    owner, key, wait = owner_of(request), idempotency_key(request), preference(request)
    # Before the body is read. How many jobs the owner has is asked after it: the same request sent again is answered whatever the quota
    # says, and its key may stand in the body.
    with desk.sets.one(owner):
        item, made = await submit(await body_of(request), owner, key, quota_of(request))
    if wait is not None:
        return await awaited(desk.jobs, item, owner, wait)
    answer = job_answer(item, 202 if made else 200)
    if made:
        answer.headers["location"] = address.format(id=item.id)  # where a key for trainings alone may look
    return answer
