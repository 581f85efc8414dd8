"""The jobs of the SDK: `job = client.submit(workflow="flux-pulid", prompt=..., reference_image="me.jpg")`, then `job.wait()`,
`job.events()`, `job.cancel()`, `job.answer()`; `client.jobs` for all of yours; the same awaited on `AsyncClient`.

A stream of events that is cut off is taken up where it stopped. Keeps nothing of a job that the server does not.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any
from urllib.parse import quote

import httpx

from deployments.errors import InvalidRequest, LikenessError, ServerUnreachable
from serve.answers import GenerateResponse
from serve.attachments import with_pictures
from serve.client_answers import Answer, read, unreachable
from serve.job_answers import (
    ARTIFACT,
    CANCEL,
    EVENTS,
    JOB,
    JOBS,
    JobCancelled,
    JobDeleted,
    JobEvent,
    JobItem,
    JobPicture,
    JobResult,
    JobsResponse,
)
from serve.problem import error_of

# Nothing is heard of a job that waits but a comment now and then; the server sends one every 15 s.
_EVENTS_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
_SOONEST_S, _LATEST_S, _SHARE = 0.05, 1.0, 0.1
_ATTEMPTS = 8
"""How often in a row a stream that brings nothing is taken up again."""
_BETWEEN_ATTEMPTS_S = 0.5


class Jobs:
    """Over the connection of a `Client`."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def submit(
        self,
        *,
        workflow: str | None = None,
        webhook_url: str | None = None,
        idempotency_key: str | None = None,
        priority: str | None = None,
        previews: bool = False,
        **fields: Any,
    ) -> Job:
        """A job of a workflow. fields: those of the workflow, as `Client.generate` takes them. idempotency_key: the same request sent
        again with it is the same job. Raises as `generate` does for a request that cannot be done, IdempotencyConflict, QuotaExceeded."""
        body = _body(workflow, webhook_url, priority, previews, fields)
        return Job(self, self.ask("POST", JOBS, JobItem, json=body, headers=key_header(idempotency_key)))

    def list(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        workflow: str | None = None,
        limit: int | None = None,
        before: str | None = None,
    ) -> JobsResponse:
        """Yours, the newest first. before: an id, for those that are older (`next` of the answer)."""
        return self.ask("GET", JOBS, JobsResponse, params=_asked(status, kind, workflow, limit, before))

    def get(self, id: str) -> JobItem:
        """Raises JobNotFound."""
        return self.ask("GET", at(JOB, id), JobItem)

    def cancel(self, id: str) -> JobCancelled:
        """Raises JobNotFound; in whatever state the job is, nothing else."""
        return self.ask("POST", at(CANCEL, id), JobCancelled)

    def delete(self, id: str) -> JobDeleted:
        """Raises JobNotFound."""
        return self.ask("DELETE", at(JOB, id), JobDeleted)

    def wait(self, id: str, timeout: float | None = None) -> JobItem:
        """The job as soon as it has ended, however it did. Raises TimeoutError after so many seconds, and JobNotFound."""
        began = time.monotonic()
        while not (item := self.get(id)).ended:
            time.sleep(_pause(time.monotonic() - began, timeout, id))
        return item

    def events(self, id: str, *, after: int = 0, previews: bool = False) -> Iterator[JobEvent]:
        """What happens to a job, up to its end. after: the `seq` of an event that is known. Raises JobNotFound, and ServerUnreachable
        where the server stays away."""
        silent = 0
        while True:
            seen = after
            try:
                with self._http.stream(
                    "GET", at(EVENTS, id), params=_previews(previews), headers=_from(after), timeout=_EVENTS_TIMEOUT
                ) as answer:
                    if not answer.is_success:
                        answer.read()
                        read(answer, JobItem)  # raises the error that it is
                    lines = _Lines()
                    for line in answer.iter_lines():
                        if (event := lines.add(line)) is not None:
                            after = event.seq
                            yield event
                            if event.ends:
                                return
            except httpx.TransportError as error:
                broken: httpx.TransportError | None = error
            else:
                broken = None
            silent = 0 if after > seen else silent + 1
            if silent > _ATTEMPTS:
                raise _cut_off(self._http, broken)
            if broken is None and self.get(id).ended and after == seen:
                return  # it ended before `after`
            time.sleep(_BETWEEN_ATTEMPTS_S if silent else 0)

    def artifact(self, id: str) -> bytes:
        """The bytes of a file. Raises ArtifactNotFound."""
        try:
            answer = self._http.get(at(ARTIFACT, id))
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error
        if not answer.is_success:
            read(answer, JobItem)  # raises the error that it is
        return answer.content

    def ask(self, method: str, path: str, kind: type[Answer], **content: Any) -> Answer:
        try:
            return read(self._http.request(method, path, **content), kind)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error


class Job:
    """One job. item: what was last heard of it."""

    def __init__(self, jobs: Jobs, item: JobItem) -> None:
        self._jobs, self.item = jobs, item

    @property
    def id(self) -> str:
        return self.item.id

    def refresh(self) -> JobItem:
        self.item = self._jobs.get(self.id)
        return self.item

    def wait(self, timeout: float | None = None) -> JobItem:
        """As Jobs.wait."""
        self.item = self._jobs.wait(self.id, timeout)
        return self.item

    def events(self, *, after: int = 0, previews: bool = False) -> Iterator[JobEvent]:
        """As Jobs.events."""
        return self._jobs.events(self.id, after=after, previews=previews)

    def cancel(self) -> bool:
        """Whether it was this call that ended it."""
        return self._jobs.cancel(self.id).cancelled

    def pictures(self) -> list[bytes]:
        """The picture files, when it has ended. Raises the error that it failed with."""
        return [self._jobs.artifact(picture) for picture in _artifacts(self.wait())]

    def answer(self) -> GenerateResponse:
        """What `generate` would have answered, when it has ended. Raises the error that it failed with."""
        contents = self.pictures()
        return answered(self.item, contents)


class AsyncJobs:
    """Over the connection of an `AsyncClient`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def submit(
        self,
        *,
        workflow: str | None = None,
        webhook_url: str | None = None,
        idempotency_key: str | None = None,
        priority: str | None = None,
        previews: bool = False,
        **fields: Any,
    ) -> AsyncJob:
        """As Jobs.submit."""
        body = _body(workflow, webhook_url, priority, previews, fields)
        return AsyncJob(self, await self.ask("POST", JOBS, JobItem, json=body, headers=key_header(idempotency_key)))

    async def list(
        self,
        *,
        status: str | None = None,
        kind: str | None = None,
        workflow: str | None = None,
        limit: int | None = None,
        before: str | None = None,
    ) -> JobsResponse:
        return await self.ask("GET", JOBS, JobsResponse, params=_asked(status, kind, workflow, limit, before))

    async def get(self, id: str) -> JobItem:
        return await self.ask("GET", at(JOB, id), JobItem)

    async def cancel(self, id: str) -> JobCancelled:
        return await self.ask("POST", at(CANCEL, id), JobCancelled)

    async def delete(self, id: str) -> JobDeleted:
        return await self.ask("DELETE", at(JOB, id), JobDeleted)

    async def wait(self, id: str, timeout: float | None = None) -> JobItem:
        """As Jobs.wait."""
        began = time.monotonic()
        while not (item := await self.get(id)).ended:
            await asyncio.sleep(_pause(time.monotonic() - began, timeout, id))
        return item

    async def events(self, id: str, *, after: int = 0, previews: bool = False) -> AsyncIterator[JobEvent]:
        """As Jobs.events."""
        silent = 0
        while True:
            seen = after
            try:
                asked = self._http.stream("GET", at(EVENTS, id), params=_previews(previews), headers=_from(after), timeout=_EVENTS_TIMEOUT)
                async with asked as answer:
                    if not answer.is_success:
                        await answer.aread()
                        read(answer, JobItem)  # raises the error that it is
                    lines = _Lines()
                    async for line in answer.aiter_lines():
                        if (event := lines.add(line)) is not None:
                            after = event.seq
                            yield event
                            if event.ends:
                                return
            except httpx.TransportError as error:
                broken: httpx.TransportError | None = error
            else:
                broken = None
            silent = 0 if after > seen else silent + 1
            if silent > _ATTEMPTS:
                raise _cut_off(self._http, broken)
            if broken is None and (await self.get(id)).ended and after == seen:
                return
            await asyncio.sleep(_BETWEEN_ATTEMPTS_S if silent else 0)

    async def artifact(self, id: str) -> bytes:
        """As Jobs.artifact."""
        try:
            answer = await self._http.get(at(ARTIFACT, id))
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error
        if not answer.is_success:
            read(answer, JobItem)  # raises the error that it is
        return answer.content

    async def ask(self, method: str, path: str, kind: type[Answer], **content: Any) -> Answer:
        try:
            return read(await self._http.request(method, path, **content), kind)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error


class AsyncJob:
    """One job. item: what was last heard of it."""

    def __init__(self, jobs: AsyncJobs, item: JobItem) -> None:
        self._jobs, self.item = jobs, item

    @property
    def id(self) -> str:
        return self.item.id

    async def refresh(self) -> JobItem:
        self.item = await self._jobs.get(self.id)
        return self.item

    async def wait(self, timeout: float | None = None) -> JobItem:
        self.item = await self._jobs.wait(self.id, timeout)
        return self.item

    def events(self, *, after: int = 0, previews: bool = False) -> AsyncIterator[JobEvent]:
        return self._jobs.events(self.id, after=after, previews=previews)

    async def cancel(self) -> bool:
        return (await self._jobs.cancel(self.id)).cancelled

    async def pictures(self) -> list[bytes]:
        """As Job.pictures."""
        return [await self._jobs.artifact(picture) for picture in _artifacts(await self.wait())]

    async def answer(self) -> GenerateResponse:
        """As Job.answer."""
        contents = await self.pictures()
        return answered(self.item, contents)


class _Lines:
    """Lines of a stream of events (https://html.spec.whatwg.org/multipage/server-sent-events.html), one event a block."""

    def __init__(self) -> None:
        self._data: list[str] = []

    def add(self, line: str) -> JobEvent | None:
        """The event that this line ends, if it ends one. Everything about it is in its data."""
        if line:
            if line.startswith("data:"):
                self._data.append(line.removeprefix("data:").removeprefix(" "))
            return None
        data, self._data = "\n".join(self._data), []
        return JobEvent.model_validate_json(data) if data else None


def answered(item: JobItem, contents: list[bytes]) -> GenerateResponse:
    """The answer of a job that drew and succeeded, with its picture files (in their order) inside."""
    result = _succeeded(item)
    if not isinstance(result, JobResult):
        raise InvalidRequest(f"The job {item.id} is a {item.kind}, and drew nothing.", "Read its `result`.")
    facts = result.model_dump()
    files = iter(contents)
    for picture in facts["data"]:
        picture.pop("url")
        if picture.pop("artifact") is not None:
            picture["b64_json"] = base64.b64encode(next(files)).decode()
    return GenerateResponse.model_validate(facts)


def _succeeded(item: JobItem) -> Any:
    if item.result is not None:
        return item.result
    if item.error is not None:
        raise error_of(item.error)
    raise LikenessError(f"The job {item.id} has no pictures: it is {item.status}.", "Submit it again if they are wanted after all.")


def _artifacts(item: JobItem) -> list[str]:
    pictures: list[JobPicture] = _succeeded(item).data
    return [picture.artifact for picture in pictures if picture.artifact is not None]


def _body(workflow: str | None, webhook_url: str | None, priority: str | None, previews: bool, fields: Mapping[str, Any]) -> dict[str, Any]:
    said = {"workflow": workflow, "webhook_url": webhook_url, "priority": priority, "previews": previews or None}
    return {"input": with_pictures(fields), **{name: value for name, value in said.items() if value is not None}}


def _asked(status: str | None, kind: str | None, workflow: str | None, limit: int | None, before: str | None) -> dict[str, Any]:
    said = {"status": status, "kind": kind, "workflow": workflow, "limit": limit, "before": before}
    return {name: value for name, value in said.items() if value is not None}


def key_header(idempotency_key: str | None) -> dict[str, str]:
    return {"idempotency-key": idempotency_key} if idempotency_key is not None else {}


def _from(after: int) -> dict[str, str]:
    return {"accept": "text/event-stream", "last-event-id": str(after)}


def _previews(previews: bool) -> dict[str, str]:
    return {"previews": "true"} if previews else {}


def at(path: str, id: str) -> str:
    return path.format(id=quote(id, safe=""))


def _pause(passed: float, timeout: float | None, id: str) -> float:
    if timeout is not None and passed >= timeout:
        raise TimeoutError(f"The job {id} has not ended within {timeout:g} s.")
    pause = min(_LATEST_S, max(_SOONEST_S, passed * _SHARE))
    return pause if timeout is None else min(pause, timeout - passed)


def _cut_off(http: httpx.Client | httpx.AsyncClient, broken: httpx.TransportError | None) -> ServerUnreachable:
    if broken is not None:
        return unreachable(http.base_url, broken)
    return ServerUnreachable(f"{http.base_url} ends the events of a job again and again before the job ends.")
