"""JobServer: a Runner that draws through the handle of Workflows, and what else the store of jobs needs done. See job_runner.py.

Knows neither Ray (the handle is given to it) nor HTTP. Several replicas are safe: they share the jobs between them.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

from deployments import metrics
from deployments.contracts import PictureProgress
from deployments.errors import JobNotFound, ReplicaLost, StoreUnavailable
from deployments.job_runner import Execute, Finished, JobSettings, Loop, Problems, Report, Runner
from deployments.store.artifacts import ArtifactStore
from deployments.store.job_values import JobInfo, Lease
from deployments.store.jobs import JobStore
from deployments.store.migrate import migrate
from deployments.store.settings import StoreSettings
from deployments.webhooks import Guard, Sender

_PREVIEWS = 4
"""Small pictures on the way of each picture, where a job asks for them."""
_BEATS = 3

Crew = Callable[[JobStore, Any], tuple[Mapping[str, Execute], Sequence[Loop]]]
"""(store, handle of Workflows) -> executors by kind, and what else is to be seen to now and then. Called in the event loop."""


class JobServer:
    """A Runner, and who sees to leases that ran out, to what expires and to webhooks. Made within a running event loop, as Serve does."""

    def __init__(
        self,
        settings: JobSettings,
        store: StoreSettings,
        workflows: Any,
        guard: Guard,
        problems: Problems,
        body: Callable[[JobInfo], bytes],
        crew: Crew | None = None,
    ) -> None:
        """workflows: the handle of Workflows. body: of a webhook, what the address of the job answers. crew: who does other kinds."""
        self._store = open_jobs(store, settings.keep_s)
        self._body = body
        self._sender = Sender(self._store.outbox, self._body_of, guard, settings.webhooks)
        self._posting = Loop("webhooks", self._sender.turn, settings.poll_s)
        # Half as often as progress is written down: what is told is never much older than that.
        own = {"generate": partial(generate, workflows, self._store, every_s=settings.progress_s / 2)}
        further, chores = ({}, ()) if crew is None else crew(self._store, workflows)
        executors: dict[str, Execute] = {**own, **further}
        self._runner = Runner(self._store, executors, settings, problems, ended=self._ended)
        self._patient_until, self._patience_s = time.monotonic(), _BEATS * settings.heartbeat_s
        expire = partial(asyncio.to_thread, self._store.expire)
        reaping, expiring = Loop("leases that ran out", self._reap, settings.reap_s), Loop("what expires", expire, settings.expire_s)
        self._loops = reaping, expiring, self._posting, *chores
        running = [self._runner.run(), *(loop.run() for loop in self._loops)]
        self._running = [asyncio.get_running_loop().create_task(one) for one in running]
        # Serve calls it by this name when the replica goes. On the class, Python's collector would call it too, and await nothing.
        self.__del__ = self.drain

    async def wake(self) -> None:
        """Something was submitted or cancelled."""
        self._runner.wake()
        self._posting.wake()

    async def check_health(self) -> None:
        """Raises where a loop has ended or is stuck: Serve then starts another in its place."""
        if not (self._runner.healthy() and all(loop.turning for loop in self._loops)) or any(task.done() for task in self._running):
            raise ReplicaLost("The runner of jobs is stuck.")

    async def ready(self) -> bool:
        return True

    async def drain(self) -> None:
        """Stops in order: what is being done goes back into the queue."""
        self._runner.stop()
        for loop in self._loops:
            loop.stop()
        await asyncio.wait(self._running)
        await self._sender.close()
        self._store.close()

    def _ended(self, job: JobInfo | None) -> None:
        if job is not None and job.terminal:
            count_ended(job)
            self._posting.wake()

    async def _reap(self) -> None:
        """After the database was away nobody has beaten for a while: those that are alive are given the time to do so first."""
        if time.monotonic() < self._patient_until:
            return
        try:
            found = await asyncio.to_thread(self._store.reap)
        except StoreUnavailable:
            self._patient_until = time.monotonic() + self._patience_s
            raise
        for job in found:
            self._ended(job)
        if found:
            self._runner.wake()

    def _body_of(self, job: str, owner: str) -> bytes | None:
        try:
            return self._body(self._store.get(job, owner))
        except JobNotFound:
            return None


def count_ended(job: JobInfo) -> None:
    """Counts a job that has ended."""
    metrics.job_ended(job.kind, job.workflow or "", job.status, job.timings.get("total", 0.0))


async def generate(workflows: Any, store: JobStore, lease: Lease, report: Report, *, every_s: float = 0.0) -> Finished:
    """The executor of `generate`: the pictures of a workflow. workflows: the handle of serve.workflows.Workflows. every_s: between two
    steps that are reported; each is a message through the cluster, while the picture is being drawn."""
    job = lease.job
    # A body of `POST /v1/generate` names its workflow itself.
    workflow = job.workflow if "workflow" not in job.input else None
    body = joined(job.input, await asyncio.to_thread(store.pictures, lease))
    stream = workflows.options(stream=True).watched.remote(workflow, body, job.owner, _PREVIEWS if job.previews else 0, every_s)
    answer: Any = None
    try:
        async for event in stream:
            if isinstance(event, PictureProgress):
                report(event)
            else:
                answer = event
                break  # what follows is the end, one more way through the cluster
    finally:
        if answer is None:
            stream.cancel()
    if answer is None:
        raise ReplicaLost("The drawing ended without a picture.")
    return await asyncio.to_thread(_finished, answer)


def joined(input: Mapping[str, Any], pictures: Mapping[str, bytes]) -> dict[str, Any]:
    """The input of a job with its pictures in their places again, as base64. Their names are paths: `identities/0/images/1`."""
    body = deepcopy(dict(input))
    for name, content in pictures.items():
        *way, last = (int(part) if part.isdecimal() else part for part in name.split("/"))
        place: Any = body
        for part in way:
            place = place[part]
        place[last] = base64.b64encode(content).decode()
    return body


def _finished(answer: Any) -> Finished:
    """answer: a serve.answers.GenerateResponse."""
    said: dict[str, Any] = answer.model_dump(mode="json")
    texts = [(item.pop("b64_json"), item["format"]) for item in said["data"]]
    pictures = [(base64.b64decode(text), f"image/{kind}") for text, kind in texts if text is not None]
    return Finished(said, pictures, said["timings"])


def open_jobs(settings: StoreSettings, keep_s: float) -> JobStore:
    """The store of jobs, brought up to date. Raises StoreUnavailable."""
    migrate(settings.database)
    return JobStore(settings.database, ArtifactStore(settings.artifacts_url), keep_s)
