"""JobDesk: what the routes about jobs do, over the store. A job is a row before its answer leaves, so no runner need be alive.

Holds no handle: whoever makes it gives what wakes the runners and what checks a request. Calls of the store run in threads of its own.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import math
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from deployments import metrics
from deployments.errors import JobNotFound, LikenessError, StoreUnavailable
from deployments.images import DEFAULT_LIMITS, Limits, from_text, refuse_by_header
from deployments.job_runner import JobSettings
from deployments.job_server import count_ended
from deployments.store.job_values import PRIORITIES, TERMINAL, URL_CHARACTERS, ArtifactInfo, JobInfo, NewJob, Status
from deployments.store.jobs import JobStore
from deployments.webhooks import Guard
from serve.attachments import PICTURE_FIELDS
from serve.job_answers import JobEvent, JobItem, Priority
from serve.picture_urls import addressed

_LOG = logging.getLogger("likeness.jobs")

POOLS: Mapping[str, str] = {"generate": "draw"}
"""Whose slots a kind of job needs."""
SCOPES: Mapping[str, str] = {"generate": "generate"}
"""What a caller must be allowed, beside jobs, to submit one of a kind."""
_THREADS = 16
# Somebody waits: soon at first, then a tenth of what has passed already, so that nobody notices and the store is left alone.
_SOONEST_S, _LATEST_S, _SHARE = 0.02, 0.25, 0.1
_KEEP_ALIVE_S = 15.0
_PACE_KEPT_S = 5.0
_EVENTS_AT_ONCE = 200
_Result = TypeVar("_Result")

Check = Callable[[str | None, Mapping[str, Any], str], Awaitable[object]]
"""(workflow, body, owner): refuses what can be known without a model; the method of Workflows."""
Fetch = Callable[..., Awaitable[Mapping[str, Any]]]
"""(body, **options): the body with its pictures in it, where they were given by address. options: see serve.picture_urls.fetched."""
Filled = tuple[dict[str, Any], dict[str, bytes]]
"""A job's input without its pictures, and these by their places."""
Picture = str | bytes
"""As text, or as a form brought it."""


class JobRequest(BaseModel):
    """A job: what a workflow takes, to be done when there is room for it."""

    model_config = ConfigDict(
        extra="forbid",
        json_schema_extra={"examples": [{"workflow": "flux-pulid", "input": {"prompt": "a portrait in a library", "seed": 7}}]},
    )

    kind: Literal["generate"] = Field(default="generate", description="What is to be done.")
    workflow: str | None = Field(default=None, description="Which workflow; without one `input` is a body of `POST /v1/generate`.")
    input: dict[str, Any] = Field(description="The body that the workflow's own address takes.")
    webhook_url: str | None = Field(
        default=None, max_length=URL_CHARACTERS, description="Where the job is posted to, signed, once it has ended."
    )
    priority: Priority = Field(
        default="normal", description="`low` goes after all others; `high`, before everybody's, needs a key with the scope admin."
    )
    previews: bool = Field(default=False, description="Whether the events bring small pictures along.")


class JobDesk:
    """For any number of requests at once, in one event loop."""

    def __init__(
        self,
        store: JobStore,
        settings: JobSettings,
        *,
        check: Check,
        wake: Callable[[], object],
        guard: Guard,
        fetch: Fetch | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """wake: tells a runner that something was submitted or cancelled; it may fail to, runners look by themselves. guard: of webhooks'
        addresses. limits: of pictures."""
        self._store, self._settings, self._check, self._wake, self._guard = store, settings, check, wake, guard
        self._fetch, self._limits = fetch, limits
        self._threads = ThreadPoolExecutor(_THREADS, "desk")
        self._paces: dict[str, tuple[float, float]] = {}

    async def submit(self, wanted: JobRequest, owner: str, key: str | None = None, quota: int | None = None) -> tuple[JobItem, bool]:
        """The job, and whether it was made now: with a key that is known it is the one of then. quota: how many of the owner's may wait or
        run; None: what the settings say. Raises what the workflow would raise for its input, UrlNotAllowed, IdempotencyConflict, QueueFull
        and QuotaExceeded."""

        async def filled() -> Filled:
            body = await self.fetched(wanted.input)
            await self._check(wanted.workflow, body, owner)
            return await self._call(parted, body, self._limits)

        new = NewJob(
            kind=wanted.kind, pool=POOLS[wanted.kind], workflow=_workflow(wanted), priority=PRIORITIES[wanted.priority],
            webhook_url=wanted.webhook_url, idempotency_key=key, previews=wanted.previews,
        )  # fmt: skip
        return await self.place(new, wanted.input, filled, owner, quota, costly=addressed(wanted.input))

    async def fetched(self, body: Mapping[str, Any], **options: int | bool) -> Mapping[str, Any]:
        """The body with the pictures in it that it gives by address. options: see Fetch. Raises UrlNotAllowed, InvalidImage."""
        return body if self._fetch is None else await self._fetch(body, **options)

    async def place(
        self,
        new: NewJob,
        said: Mapping[str, Any],
        filled: Callable[[], Awaitable[Filled]],
        owner: str,
        quota: int | None = None,
        *,
        costly: bool = True,
    ) -> tuple[JobItem, bool]:
        """As submit, for a job of any kind. new: without its input; said: the body as it was sent; filled: its input and pictures, or a
        refusal. costly: whether filling it fetches something or takes long."""
        if new.webhook_url is not None:
            self._guard.check(new.webhook_url)
        if new.idempotency_key is not None:
            new = replace(new, asked=await self._call(asked, said, self._limits))
        allowed = quota if quota is not None else self._settings.quota
        # Before anything is looked at: of what it names, some may be gone, and an address may hold another picture by now. Nor is anything
        # fetched for whoever has as many jobs as they may; the answer counts once more when the job is kept.
        if costly or new.idempotency_key is not None:
            known = await self._call(self._store.known, owner, new, allowed, self._settings.room)
            if known is not None:
                return await self._item(known), False
        input, pictures = await filled()
        new = replace(new, input=input, pictures=pictures)
        info, made = await self._call(self._store.submit, owner, new, allowed, self._settings.room)
        if made:
            self._woken()
        return await self._item(info), made

    async def get(self, id: str, owner: str) -> JobItem:
        """Raises JobNotFound."""
        return await self._item(await self._call(self._store.get, id, owner))

    async def list(
        self, owner: str, status: Status | None, kind: str | None, workflow: str | None, limit: int, before: str | None
    ) -> list[JobItem]:
        """The newest first."""
        ask = partial(self._store.list, owner, status=status, kind=kind, workflow=workflow, limit=limit, before=before)
        return [await self._item(info) for info in await self._call(ask)]

    async def cancel(self, id: str, owner: str) -> tuple[JobItem, bool]:
        """The job, and whether it was this call that ended it. Raises JobNotFound."""
        info, cancelled = await self._call(self._store.cancel, id, owner)
        if cancelled:
            metrics.cancelled("job")
            count_ended(info)
            self._woken()
        return await self._item(info), cancelled

    async def delete(self, id: str, owner: str) -> None:
        """Raises JobNotFound."""
        await self._call(self._store.delete, id, owner)
        self._woken()

    async def artifact(self, id: str, owner: str) -> tuple[ArtifactInfo, bytes]:
        """Raises ArtifactNotFound."""
        return await self._call(self._store.artifact, id, owner)

    def depth(self) -> Mapping[str, tuple[int, float]]:
        """By pool: how many wait, and for how many seconds the first of them has. Blocks."""
        return self._store.depth()

    async def secret(self, owner: str) -> str:
        return await self._call(self._store.outbox.secret, owner)

    async def rotate(self, owner: str) -> str:
        return await self._call(self._store.outbox.rotate, owner)

    async def ended(self, id: str, owner: str, within_s: float) -> JobItem:
        """The job as soon as it has ended, or as it stands after so long. Raises JobNotFound."""
        began = time.monotonic()
        while True:
            info = await self._call(self._store.get, id, owner)
            passed = time.monotonic() - began
            if info.status in TERMINAL or passed >= within_s:
                return await self._item(info)
            await asyncio.sleep(min(_pause(passed), within_s - passed))

    async def events(self, id: str, owner: str, after: int, previews: bool) -> AsyncIterator[JobEvent | None]:
        """Every event after that number, up to the job's last; None where nothing happened for a while. Ends where the job is
        not there (any more), goes on while the store is away."""
        told = time.monotonic()
        while True:
            try:
                # Read before the events: an event that ends the job is there when its status is.
                over = (await self._call(self._store.get, id, owner)).status in TERMINAL
                found = await self._call(self._store.events, id, owner, after, _EVENTS_AT_ONCE)
            except StoreUnavailable:
                over, found = False, ()
            except JobNotFound:
                return
            for event in found:
                after = event.seq
                if event.kind != "preview" or previews:
                    yield JobEvent.of(event)
                    told = time.monotonic()
            if over and len(found) < _EVENTS_AT_ONCE:
                return
            if time.monotonic() - told > _KEEP_ALIVE_S:
                yield None
                told = time.monotonic()
            await asyncio.sleep(_pause(time.monotonic() - told))

    def close(self) -> None:
        self._threads.shutdown(wait=False)

    def _woken(self) -> None:
        """The row is there already: whatever is wrong with the runners, it must not look as if it were not."""
        try:
            self._wake()
        except Exception as error:  # noqa: BLE001 (Ray's own, whichever)
            _LOG.warning("the runners could not be woken: %s", error)

    async def _item(self, info: JobInfo) -> JobItem:
        if info.status == "queued" and info.pool not in self._settings.slots:
            return JobItem.of(info, waiting_for=info.pool)  # how many work there, and whether anybody does, is not known here
        return JobItem.of(info, await self._eta_s(info))

    async def _eta_s(self, info: JobInfo) -> float | None:
        """From how long the pool's jobs took lately, and from the steps of one that runs. None where that is not known."""
        if info.status in TERMINAL:
            return None
        elapsed = 0.0 if info.started_at is None else (datetime.now(UTC) - info.started_at).total_seconds()
        if info.status == "running" and info.step:
            return max(0.0, elapsed * (info.steps - info.step) / info.step)
        pace = await self._pace(info.pool)
        if pace is None:
            return None
        if info.queue_position is None:
            return max(0.0, pace - elapsed)
        rounds = math.ceil((info.queue_position + 1) / max(1, self._settings.slots.get(info.pool, 1)))
        return pace * (rounds + 1)

    async def _pace(self, pool: str) -> float | None:
        at, known = self._paces.get(pool, (-math.inf, None))
        pace: float | None = known
        if time.monotonic() - at > _PACE_KEPT_S:
            pace = await self._call(self._store.pace, pool)
            if pace is not None:
                self._paces[pool] = time.monotonic(), pace
        return pace

    async def _call(self, method: Callable[..., _Result], *args: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(method, *args))


def parted(body: Mapping[str, Any], limits: Limits = DEFAULT_LIMITS) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A body without its pictures, and these by their places (`identities/0/images/1`), where their sha256 is left: two bodies are equal
    exactly if what is left of them is. Raises InvalidImage. `deployments.job_server.joined` puts them back."""
    pictures: dict[str, bytes] = {}

    def taken(picture: Picture, place: str) -> str:
        pictures[place] = picture if isinstance(picture, bytes) else from_text(picture, limits)
        refuse_by_header(pictures[place], limits)  # or what is no picture at all would lie in the store until its job fails
        return f"sha256:{hashlib.sha256(pictures[place]).hexdigest()}"

    return _swapped(body, taken), pictures


def asked(body: Mapping[str, Any], limits: Limits = DEFAULT_LIMITS) -> dict[str, Any]:
    """A body as it was sent, the sha256 in place of each picture, however that was spelt. Addresses of pictures stay."""

    def told(picture: Picture, place: str) -> str:
        if isinstance(picture, bytes):
            return f"sha256:{hashlib.sha256(picture).hexdigest()}"
        try:
            return f"sha256:{hashlib.sha256(from_text(picture, limits)).hexdigest()}"
        except LikenessError:  # an address, or what the check will refuse
            return picture

    return _swapped(body, told)


def _swapped(body: Mapping[str, Any], swap: Callable[[Picture, str], str]) -> dict[str, Any]:
    """swap: (picture, its place) -> what stands there instead."""

    def left(value: Any, place: str, picture: bool) -> Any:
        if isinstance(value, str | bytes) and picture:
            return swap(value, place)
        if isinstance(value, list):
            return [left(item, f"{place}/{index}", picture) for index, item in enumerate(value)]
        if isinstance(value, dict):
            # A name with a slash is no field of any request, and would lead elsewhere.
            return {
                name: left(item, f"{place}/{name}" if place else name, name in PICTURE_FIELDS) if name.isidentifier() else item
                for name, item in value.items()
            }
        return value

    found: dict[str, Any] = left(dict(body), "", False)
    return found


def _workflow(wanted: JobRequest) -> str | None:
    """By which a job is found again; a body of `POST /v1/generate` names it inside."""
    named = wanted.workflow if wanted.workflow is not None else wanted.input.get("workflow")
    return named if isinstance(named, str) else None


def _pause(passed_s: float) -> float:
    return min(_LATEST_S, max(_SOONEST_S, passed_s * _SHARE))
