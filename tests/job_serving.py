"""Jobs that are truly done, by an executor that draws a small picture step by step; their routes, and receivers of webhooks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from fastapi import FastAPI, Request

from deployments.contracts import PictureProgress
from deployments.errors import InvalidRequest, ModeratedOutput, QueueFull
from deployments.images import encode
from deployments.job_runner import Execute, Finished, JobSettings, Report, Runner
from deployments.job_server import joined, open_jobs
from deployments.store.job_values import Event, JobInfo, Lease, NewJob
from deployments.store.jobs import JobStore
from deployments.store.settings import EVERYBODY, StoreSettings
from deployments.urls import UrlGuard, UrlPolicy
from deployments.webhooks import Guard
from serve.callers import SCOPES, Caller
from serve.ingress import Calls, api
from serve.job_answers import problem_json
from serve.job_desk import JobDesk
from serve.jobs import add_job_routes
from serve.normalise import parse

QUICK = JobSettings(lease_s=2.0, heartbeat_s=0.3, poll_s=0.1, progress_s=0.05, busy_s=0.2, finish_s=1.0, reap_s=0.3)
"""So short that a test need not wait; a machine that is busy with something else must not lose a lease by it."""
PUBLIC = UrlGuard(UrlPolicy(fetch="public"))
STEP_S = 0.02


def new(prompt: str = "a portrait", steps: int = 3, **fields: Any) -> NewJob:
    own = {name: fields.pop(name) for name in list(fields) if name not in NewJob.__dataclass_fields__}
    return NewJob(kind="generate", pool="draw", input={"prompt": prompt, "num_inference_steps": steps, "seed": 1, **own}, **fields)


def opened(folder: Path, url: str | None = None) -> JobStore:
    url = url if url is not None else f"sqlite:///{folder / 'likeness.db'}"
    return open_jobs(StoreSettings(url=url, folder=folder / "files"), QUICK.keep_s)


class Painter:
    """The executor: a picture of one colour, `n` times, `num_inference_steps` steps each. A prompt may ask for trouble.

    at_once: how many it has worked on at the same time; stopped: when each job was cancelled in its midst; begun: how often each was.
    """

    def __init__(self, store: JobStore) -> None:
        self._store = store
        self.now, self.at_once = 0, 0
        self.stopped: dict[str, float] = {}
        self.begun: dict[str, int] = {}

    async def __call__(self, lease: Lease, report: Report) -> Finished:
        job = lease.job
        self.now += 1
        self.at_once = max(self.now, self.at_once)
        self.begun[job.id] = self.begun.get(job.id, 0) + 1
        try:
            return await self._painted(lease, report)
        except asyncio.CancelledError:
            self.stopped[job.id] = time.monotonic()
            raise
        finally:
            self.now -= 1

    async def _painted(self, lease: Lease, report: Report) -> Finished:
        body = joined(lease.job.input, await asyncio.to_thread(self._store.pictures, lease))
        self._trouble(body["prompt"], self.begun[lease.job.id])
        count, steps = body.get("n", 1), body.get("num_inference_steps", 3)
        for picture in range(count):
            for step in range(1, steps + 1):
                await asyncio.sleep(STEP_S)
                report(PictureProgress(picture, count, step, steps, b"\xff\xd8 small" if lease.job.previews else None))
        return painted(body)

    @staticmethod
    def _trouble(prompt: str, time: int) -> None:
        if prompt == "busy" and time == 1:
            raise QueueFull("As many wait as may wait.")
        if prompt == "lost once" and time == 1:
            raise RuntimeError("The actor died.")
        if prompt == "always broken":
            raise RuntimeError("a secret of the server")
        if prompt == "impossible":
            raise InvalidRequest("`prompt`: impossible.")
        if prompt == "naked":
            raise ModeratedOutput("The picture is not let out.")


def painted(body: Mapping[str, Any]) -> Finished:
    """What the painter makes of a body: what `GenerateResponse` says without its pictures, and these."""
    count, seed = body.get("n", 1), body.get("seed", 1)
    pictures = [encode(np.full((8, 8, 3), (seed + k) % 256, np.uint8)) for k in range(count)]
    data = [{"path": None, "seed": seed + k, "width": 8, "height": 8, "format": "png", "scores": []} for k in range(count)]
    answer = {
        "created": 0, "model": "painter", "data": data, "timings": {"denoise": 0.1}, "models": [], "licences": [],
        "request": {name: value for name, value in body.items() if name != "reference_image"}, "warnings": [],
    }  # fmt: skip
    return Finished(answer, [(picture, "image/png") for picture in pictures], {"denoise": 0.1})


@asynccontextmanager
async def running(store: JobStore, settings: JobSettings = QUICK, painter: Painter | None = None) -> AsyncIterator[Runner]:
    """A runner with a painter, stopped in order at the end."""
    async with running_with(store, {"generate": painter or Painter(store)}, settings) as runner:
        yield runner


@asynccontextmanager
async def running_with(store: JobStore, executors: Mapping[str, Execute], settings: JobSettings) -> AsyncIterator[Runner]:
    """A runner, stopped in order at the end."""
    runner = Runner(store, executors, settings, problem_json)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        runner.stop()
        await task


async def until(true: Callable[[], object], seconds: float = 20.0) -> None:
    """Returns when it is true, whatever may be asked of a store in a thread."""
    end = time.monotonic() + seconds
    while not await asyncio.to_thread(true):
        assert time.monotonic() < end, "it does not become true"
        await asyncio.sleep(0.02)


def ended(store: JobStore, *ids: str, owner: str = EVERYBODY) -> bool:
    return all(store.get(id, owner).terminal for id in ids)


def kinds(store: JobStore, job: JobInfo) -> list[str]:
    return [event.kind for event in history(store, job)]


def history(store: JobStore, job: JobInfo) -> tuple[Event, ...]:
    return store.events(job.id, job.owner, limit=1000)


def desk_of(store: JobStore, wake: Callable[[], object] = lambda: None, settings: JobSettings = QUICK, guard: Guard = PUBLIC) -> JobDesk:
    async def check(workflow: str | None, body: Mapping[str, Any], owner: str) -> None:
        parse(workflow, body)

    return JobDesk(store, settings, check=check, wake=wake, guard=guard)


def routes(desk: JobDesk) -> FastAPI:
    """The routes of jobs, with every error as it is told. Whose a request is, and what for, its headers say."""
    app = api(cast(Calls, None), 2**20)

    @app.middleware("http")
    async def by_header(request: Request, call_next: Any) -> Any:
        scopes = request.headers.get("x-scopes", " ".join(SCOPES)).split()
        request.state.caller = Caller(owner=request.headers.get("x-owner", EVERYBODY), scopes=frozenset(scopes))
        if (quota := request.headers.get("x-quota")) is not None:
            request.state.queued_jobs = int(quota)
        return await call_next(request)

    async def body_of(request: Request) -> dict[str, Any]:
        return cast(dict[str, Any], await request.json())

    add_job_routes(app, desk, body_of)
    return app
