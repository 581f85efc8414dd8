"""`/v1/jobs`, `/v1/artifacts` and `/v1/webhooks`: routes of a few lines each over a JobDesk. Knows no store and no runner.

Events are Server-Sent Events: `id` is the event's number, with which a reader that was cut off goes on (`Last-Event-ID`, or `?after=`).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.errors import InvalidRequest
from deployments.store.job_values import Status
from serve.access import quota_of, require
from serve.callers import caller_of
from serve.file_answers import is_known
from serve.job_answers import (
    ARTIFACT,
    CANCEL,
    EVENTS,
    JOB,
    JOBS,
    ROTATE,
    SECRET,
    JobCancelled,
    JobDeleted,
    JobEvent,
    JobItem,
    JobsResponse,
    WebhookSecret,
)
from serve.job_desk import SCOPES, JobDesk, JobRequest
from serve.problem import MEDIA_TYPE, Problem, given_twice, invalid
from serve.waiting import awaited, idempotency_key, job_answer, preference

_GONE: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": "You have no such job."}}
_DONE: dict[int | str, dict[str, Any]] = {
    200: {"model": JobItem, "description": "The key is known, or the job has ended while it was awaited."},
    409: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": "The key was used with another body."},
    422: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": "The request cannot be done; `code` says why."},
    429: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": "As many of yours wait as may wait."},
}
_STREAM: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}, "description": "Until the job ends."}, **_GONE}
_FILE: dict[int | str, dict[str, Any]] = {200: {"content": {"image/*": {}}, "description": "The file."}, 404: _GONE[404]}
# A proxy that gathers what it is sent would hold events back.
_UNBUFFERED = {"cache-control": "no-cache, no-transform", "x-accel-buffering": "no"}
_MOST_DIGITS = 18
_Query = TypeVar("_Query", bound=BaseModel)

BodyReader = Callable[[Request], Awaitable[dict[str, Any]]]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JobsQuery(Strict):
    """Which jobs."""

    status: Status | None = None
    kind: str | None = Field(default=None, max_length=64)
    workflow: str | None = Field(default=None, max_length=100)
    limit: int = Field(default=50, ge=1, le=200)
    before: str | None = Field(default=None, max_length=64, description="An id: jobs that are older.")


class EventsQuery(Strict):
    """Which events."""

    after: int | None = Field(default=None, ge=0, lt=10**_MOST_DIGITS, description="A number: events that came later.")
    previews: bool = Field(default=False, description="Whether small pictures come along, where the job makes them.")


def owner_by_caller(request: Request) -> str:
    return caller_of(request).owner


def add_job_routes(app: FastAPI, desk: JobDesk, body_of: BodyReader, owner_of: Callable[[Request], str] = owner_by_caller) -> None:
    """body_of: the JSON object that a request brings; raises InvalidRequest. owner_of: whose request it is; raises where nobody's."""

    async def submit(request: Request) -> Response:
        """Do a workflow when there is room for it. With an `Idempotency-Key` the same request, sent again, is the same job. With
        `Prefer: wait=N` the answer comes when the job has ended, or after N seconds."""
        owner, key, wait = owner_of(request), idempotency_key(request), preference(request)
        try:
            wanted = JobRequest.model_validate(await body_of(request))
        except ValidationError as error:
            raise invalid(error) from error
        require(caller_of(request), SCOPES[wanted.kind])
        if wanted.priority == "high":  # before everybody's jobs, which is not for everybody to say
            require(caller_of(request), "admin")
        item, made = await desk.submit(wanted, owner, key, quota_of(request))
        return await awaited(desk, item, owner, wait) if wait is not None else job_answer(item, 202 if made else 200)

    async def listed(request: Request) -> JobsResponse:
        """Your jobs, the newest first."""
        asked = query_of(request, JobsQuery)
        # One more than was asked for tells whether there are others.
        found = await desk.list(owner_of(request), asked.status, asked.kind, asked.workflow, asked.limit + 1, asked.before)
        shown = found[: asked.limit]
        return JobsResponse(data=shown, next=shown[-1].id if len(found) > asked.limit else None)

    async def show(id: str, request: Request) -> Response:
        """One of your jobs: its state, its place in the queue, its steps, and in the end its pictures' addresses."""
        return job_answer(await desk.get(id, owner_of(request)), 200)

    async def events(id: str, request: Request) -> Response:
        """What happens to a job, as it happens. Ends after the job's last event."""
        asked = query_of(request, EventsQuery)
        after = asked.after if asked.after is not None else _last_seen(request)
        found = desk.events(id, owner_of(request), after, asked.previews)
        await desk.get(id, owner_of(request))  # before the answer begins, while it can still be a 404
        return StreamingResponse(_sent(found), media_type="text/event-stream", headers=_UNBUFFERED)

    async def cancel(id: str, request: Request) -> JobCancelled:
        """End a job that waits or runs. Whatever its state, asking again changes nothing."""
        item, cancelled = await desk.cancel(id, owner_of(request))
        return JobCancelled(id=item.id, cancelled=cancelled, status=item.status)

    async def delete(id: str, request: Request) -> JobDeleted:
        """Forget a job, with its pictures. One that waits or runs is cancelled first."""
        await desk.delete(id, owner_of(request))
        return JobDeleted(id=id)

    async def artifact(id: str, request: Request) -> Response:
        """A file of one of your jobs."""
        info, content = await desk.artifact(id, owner_of(request))
        headers = {"etag": f'"{info.sha256}"', "cache-control": "private, max-age=3600, immutable", "x-content-type-options": "nosniff"}
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=info.media_type)

    async def secret(request: Request) -> WebhookSecret:
        """With what your webhooks are signed; see https://www.standardwebhooks.com."""
        return WebhookSecret(secret=await desk.secret(owner_of(request)))

    async def rotate(request: Request) -> WebhookSecret:
        """A new secret; the old one signs nothing any more."""
        return WebhookSecret(secret=await desk.rotate(owner_of(request)))

    body = {"required": True, "content": {"application/json": {"schema": JobRequest.model_json_schema()}}}
    app.post(JOBS, status_code=202, response_model=JobItem, summary="Submit a job", responses=_DONE, openapi_extra={"requestBody": body})(
        submit
    )
    app.get(JOBS, summary="Your jobs", openapi_extra=documented(JobsQuery))(listed)
    app.get(JOB, response_model=JobItem, summary="One of your jobs", responses=_GONE)(show)
    app.get(EVENTS, response_class=StreamingResponse, summary="Its events", responses=_STREAM, openapi_extra=documented(EventsQuery))(
        events
    )
    app.post(CANCEL, summary="Cancel a job", responses=_GONE)(cancel)
    app.delete(JOB, summary="Delete a job", responses=_GONE)(delete)
    app.get(ARTIFACT, response_class=Response, summary="A picture of a job", responses=_FILE)(artifact)
    app.get(SECRET, summary="The secret of your webhooks")(secret)
    app.post(ROTATE, summary="A new secret for your webhooks")(rotate)


async def _sent(events: AsyncIterator[JobEvent | None]) -> AsyncIterator[str]:
    async for event in events:
        # JSON has no line breaks of its own, so one `data` line holds it.
        yield f"id: {event.seq}\nevent: {event.kind}\ndata: {event.model_dump_json()}\n\n" if event is not None else ": still here\n\n"


def _last_seen(request: Request) -> int:
    text = request.headers.get("last-event-id", "0") or "0"
    if not (text.isascii() and text.isdecimal() and len(text) <= _MOST_DIGITS):
        raise InvalidRequest("The header Last-Event-ID is no number of an event.", "Send the `id` of the last event that came.")
    return int(text)


def query_of(request: Request, kind: type[_Query]) -> _Query:
    """What stands behind the `?`. Raises InvalidRequest for what is unknown, given twice or out of its range."""
    fields: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in fields:
            raise given_twice(name)
        fields[name] = value
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from error


def documented(kind: type[BaseModel]) -> dict[str, Any]:
    properties = kind.model_json_schema()["properties"]
    return {"parameters": [{"name": name, "in": "query", "required": False, "schema": schema} for name, schema in properties.items()]}
