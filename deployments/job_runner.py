"""Runner: takes jobs from the store and has them done, by their kind. The store is the truth; what dies here is taken up by the next.

    lease -> execute -> finish          every write is fenced by its lease: a lost one changes nothing any more

Plain asyncio over a JobStore, for any number of processes on one store. Knows no kind of job, neither Ray nor HTTP, and not how an error
is spelt on the wire.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field

from deployments.contracts import PictureProgress, WorkProgress
from deployments.errors import (
    Cancelled,
    LikenessError,
    ModeratedInput,
    ModeratedOutput,
    QueueFull,
    ReplicaLost,
    StoreUnavailable,
    unwrapped,
)
from deployments.store.job_values import JobInfo, Lease
from deployments.store.jobs import KEEP_S, JobStore, Within
from deployments.webhooks import WebhookSettings

_LOG = logging.getLogger("likeness.jobs")
# A call of the store may wait half a minute for other writers; a loop that has not come round for longer is stuck.
_STUCK_AFTER_S = 120.0
_FINISH_PAUSES_S = 0.2, 5.0
_Result = TypeVar("_Result")

Report = Callable[[PictureProgress | WorkProgress], None]
"""Takes every step; of those that come too fast for the store the last is written."""
Problems = Callable[[LikenessError], Mapping[str, Any]]
"""An error as it is kept and shown: RFC 9457 as JSON."""


@dataclass(frozen=True, eq=False)
class Finished:
    """What a job leaves. answer: JSON, whose `data` has an item for each of pictures: (bytes, media type). timings: seconds by stage.
    within: what is done in the transaction in which the job succeeds, hence exactly if it does."""

    answer: Mapping[str, Any]
    pictures: Sequence[tuple[bytes, str]] = ()
    timings: Mapping[str, float] = field(default_factory=dict)
    within: Within | None = None


Execute = Callable[[Lease, Report], Awaitable[Finished]]
"""Does a job. Cancelled, it stops its work before it returns. Raises LikenessError; anything else counts as a process that died."""


class JobSettings(BaseModel):
    """slots: by pool, how many of its jobs run at once, over all runners: for `draw` one more than there are denoisers, so that the next
    is prepared while one is drawn. lease_s: after so long without a heartbeat a job is taken up by another runner: longer than the
    database may be away. finish_s: how long a result whose files cannot be written is tried before the attempt is given up.
    keep_s: how long a job and its pictures are kept after it ended. quota, room: how many jobs of one owner, and of all, may wait in a
    pool."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    slots: Mapping[str, int] = {"draw": 2}
    lease_s: float = Field(default=15.0, gt=0)
    heartbeat_s: float = Field(default=2.0, gt=0)
    check_s: float = Field(default=0.25, gt=0)
    poll_s: float = Field(default=0.5, gt=0)
    progress_s: float = Field(default=0.5, ge=0)
    busy_s: float = Field(default=1.0, ge=0)
    finish_s: float = Field(default=60.0, ge=0)
    reap_s: float = Field(default=3.0, gt=0)
    expire_s: float = Field(default=60.0, gt=0)
    keep_s: float = Field(default=KEEP_S, gt=0)
    quota: int | None = Field(default=None, ge=1)
    room: int = Field(default=10_000, ge=1)
    webhooks: WebhookSettings = WebhookSettings()


class Loop:
    """Something that is done again and again: every so many seconds, and at once when woken. What it raises is told and ends nothing."""

    def __init__(self, name: str, turn: Callable[[], Awaitable[object]], every_s: float) -> None:
        self._name, self._turn, self._every_s = name, turn, every_s
        self._woken, self._stopped = asyncio.Event(), False
        self._turned, self._trouble = time.monotonic(), ""

    async def run(self) -> None:
        while not self._stopped:
            self._woken.clear()
            self._tell(await self._trouble_of_a_turn())
            self._turned = time.monotonic()
            with suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), self._every_s)

    def wake(self) -> None:
        self._woken.set()

    def stop(self) -> None:
        self._stopped = True
        self._woken.set()

    @property
    def turning(self) -> bool:
        return time.monotonic() - self._turned < _STUCK_AFTER_S + self._every_s

    async def _trouble_of_a_turn(self) -> str:
        try:
            await self._turn()
        except LikenessError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 (whatever it is, the next turn may do better)
            _LOG.error("%s failed", self._name, exc_info=error)
            return repr(error)
        return ""

    def _tell(self, trouble: str) -> None:
        """Once when it begins, once when it is over: a database that is away would fill the log."""
        if trouble != self._trouble:
            _LOG.warning("%s: %s", self._name, trouble or "all is well again")
        self._trouble = trouble


class _Telling:
    """Progress on its way into the store, no faster than it may be written."""

    def __init__(self, write: Callable[[PictureProgress | WorkProgress], Awaitable[None]], every_s: float) -> None:
        self._write, self._every_s = write, every_s
        self._next: PictureProgress | WorkProgress | None = None
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._run())

    def tell(self, event: PictureProgress | WorkProgress) -> None:
        before = self._next
        if isinstance(event, PictureProgress) and isinstance(before, PictureProgress) and event.preview is None:
            event = replace(event, preview=before.preview)
        self._next = event
        self._news.set()

    def close(self) -> None:
        self._task.cancel()

    async def _run(self) -> None:
        # What is done at once needs no progress, and writing it would only be in the way.
        await asyncio.sleep(self._every_s)
        while True:
            await self._news.wait()
            self._news.clear()
            event, self._next = self._next, None
            if event is not None:
                await self._write(event)
            await asyncio.sleep(self._every_s)


@dataclass(eq=False)
class _Held:
    """A job that is being done here. lost: it was cancelled, or taken away: whatever comes of the work, nobody wants it."""

    lease: Lease
    work: asyncio.Task[Finished]
    telling: _Telling
    lost: bool = False

    def lose(self) -> None:
        """Once: what the work does to end in order is not broken off by the next look at the store, a moment later."""
        if not self.lost:
            self.lost = True
            self.work.cancel()


class Runner:
    """Does jobs, until it is stopped. Made and used within one event loop. ended: called
    after each attempt here, with the job where it was written down."""

    def __init__(
        self,
        store: JobStore,
        executors: Mapping[str, Execute],
        settings: JobSettings,
        problems: Problems,
        ended: Callable[[JobInfo | None], object] = lambda job: None,
    ) -> None:
        self.name = f"runner_{secrets.token_hex(12)}"
        self._store, self._executors, self._settings, self._problems, self._ended = store, executors, settings, problems, ended
        self._held: dict[str, _Held] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._rests_until: dict[str, float] = {}
        self._stopping = False
        self._beaten, self._told = time.monotonic(), False
        # Of its own: a database that does not answer holds every thread that asks it.
        self._threads = ThreadPoolExecutor(4 + 2 * sum(settings.slots.values()), "jobs")
        self._taking = Loop("taking jobs", self._take, settings.poll_s)
        self._checking = Loop("looking for cancelled jobs", self._check, settings.check_s)
        self._beating = Loop("the heartbeat", self._beat, settings.heartbeat_s)

    async def run(self) -> None:
        """Returns after `stop`."""
        await asyncio.gather(self._tell_of_others(), self._taking.run(), self._checking.run(), self._beating.run())
        while self._endings:
            await asyncio.wait(self._endings)
        self._threads.shutdown(wait=False)

    def wake(self) -> None:
        """There may be something to take, or to stop."""
        self._told = True
        self._taking.wake()
        self._checking.wake()

    def healthy(self) -> bool:
        """Whether it goes on. A database that is away does not make it ill."""
        return self._taking.turning and self._checking.turning and self._beating.turning

    def stop(self) -> None:
        """Takes no more; what is being done is stopped and goes back into the queue, without counting as an attempt."""
        self._stopping = True
        for held in self._held.values():
            held.work.cancel()
        for loop in (self._taking, self._checking, self._beating):
            loop.stop()

    @property
    def running(self) -> frozenset[str]:
        """Ids of the jobs that are being done here."""
        return frozenset(self._held)

    async def _tell_of_others(self) -> None:
        """Jobs that wait for other runners than this one. Settings that were changed since may have left them without any."""
        with suppress(StoreUnavailable):
            for pool, (count, oldest_s) in (await self._call(self._store.depth)).items():
                if pool not in self._settings.slots:
                    said = "%d jobs wait in the pool %s (%.0f s the first), which this server does not serve: another one does, or nobody"
                    _LOG.warning(said, count, pool, oldest_s)

    async def _take(self) -> None:
        settings = self._settings
        while pools := self._with_room():
            told, self._told = self._told, False
            lease = await self._call(self._store.lease, self.name, pools, settings.lease_s, settings.slots, told=told)
            if lease is None:
                return
            self._begin(lease)

    def _with_room(self) -> list[str]:
        if self._stopping:
            return []
        now, busy = time.monotonic(), Counter(held.lease.job.pool for held in self._held.values())
        return [pool for pool, slots in self._settings.slots.items() if busy[pool] < slots and now >= self._rests_until.get(pool, 0.0)]

    def _begin(self, lease: Lease) -> None:
        telling = _Telling(partial(self._progress, lease), self._settings.progress_s)
        held = _Held(lease, asyncio.create_task(self._executed(lease, telling.tell)), telling)
        self._held[lease.job.id] = held
        if self._stopping:  # while the database was asked
            held.work.cancel()
        ending = asyncio.create_task(self._end(held))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _executed(self, lease: Lease, report: Report) -> Finished:
        return await self._executors[lease.job.kind](lease, report)

    async def _end(self, held: _Held) -> None:
        """From the end of the work to the end of the job; the slot is free then."""
        await asyncio.wait({held.work})
        held.telling.close()
        job: JobInfo | None = None
        try:
            conclude = self._conclusion(held)
            if not held.lost:
                job = await self._concluded(held, conclude)
        finally:
            del self._held[held.lease.job.id]
            self._ended(job)
            self._taking.wake()

    def _conclusion(self, held: _Held) -> Callable[[], object]:
        """What is to be done in the store now that the work is over."""
        lease, work = held.lease, held.work
        error = Cancelled("The runner stops.") if work.cancelled() else work.exception()
        if error is None:
            done = work.result()
            return partial(self._store.succeed, lease, done.answer, done.pictures, done.timings, done.within)
        if self._stopping or held.lost:
            return partial(self._store.release, lease)
        problem, again = told(error)
        if isinstance(problem, QueueFull):
            self._rests_until[lease.job.pool] = time.monotonic() + self._settings.busy_s
            return partial(self._store.release, lease)
        moderated = isinstance(problem, ModeratedInput | ModeratedOutput)
        return partial(self._store.fail, lease, self._problems(problem), retryable=again, moderated=moderated)

    async def _concluded(self, held: _Held, conclude: Callable[[], object]) -> JobInfo | None:
        """Tries until the store has taken it, or has told that the lease is lost. The job as it is then, where it was ours until then."""
        began, (pause, longest) = time.monotonic(), _FINISH_PAUSES_S
        while not held.lost:
            try:
                found = await self._call(conclude)
                return found if isinstance(found, JobInfo) else None
            except StoreUnavailable as error:
                # The database answers heartbeats, so it is the files: a disk that stays full must not hold the slot for ever.
                if time.monotonic() - began > self._settings.finish_s and self._beaten > began:
                    conclude = partial(self._store.fail, held.lease, self._problems(error), retryable=True)
                if self._stopping:
                    return None
            except Exception as error:  # noqa: BLE001 (an answer that cannot be kept, say: the job must end all the same)
                _LOG.error("%s cannot be concluded", held.lease.job.id, exc_info=error)
                if time.monotonic() - began > self._settings.finish_s:
                    return None  # the lease runs out
                conclude = partial(self._store.fail, held.lease, self._problems(_unexpected(error)), retryable=False)
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
        return None

    async def _progress(self, lease: Lease, event: PictureProgress | WorkProgress) -> None:
        # Of progress that is lost the next tells more.
        with suppress(StoreUnavailable):
            if not await self._call(self._store.progress, lease, **_noted(event)) and (held := self._held.get(lease.job.id)) is not None:
                held.lose()

    async def _check(self) -> None:
        """A cheap read, often: whoever cancels frees the slot."""
        if asked := list(self._held.values()):
            self._lose_all_but(await self._call(self._store.held, self.name), asked)

    async def _beat(self) -> None:
        if asked := list(self._held.values()):
            self._lose_all_but(await self._call(self._store.heartbeat, self.name, self._settings.lease_s), asked)
        self._beaten = time.monotonic()

    def _lose_all_but(self, ours: set[str], asked: Sequence[_Held]) -> None:
        """asked: those that were held before the store was asked; one that was begun since is not among its answer."""
        for held in asked:
            if held.lease.job.id not in ours:
                held.lose()

    async def _call(self, method: Callable[..., _Result], *args: Any, **named: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._threads, partial(method, *args, **named))


def _noted(event: PictureProgress | WorkProgress) -> dict[str, Any]:
    """As the store takes it."""
    if isinstance(event, WorkProgress):
        return {"step": event.step, "steps": event.steps, "facts": {"stage": event.stage, **event.facts}}
    step, steps = event.picture * event.total + event.step, event.pictures * event.total
    return {"picture": event.picture, "pictures": event.pictures, "step": step, "steps": steps, "preview": event.preview}


def told(error: BaseException) -> tuple[LikenessError, bool]:
    """What went wrong, and whether another attempt may do better. Ray's own errors are told by name, so that this file needs no Ray."""
    error = unwrapped(error)
    if isinstance(error, LikenessError) and not isinstance(error, Cancelled):
        return error, error.retryable
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "BackPressureError" in kinds:
        return QueueFull("As many requests wait as may wait."), True
    if kinds & {"RayError", "CancelledError", "RequestCancelledError", "RayServeException", "Cancelled"}:
        return ReplicaLost(f"A process that worked on this job died ({type(error).__name__})."), True
    _LOG.error("an unexpected error", exc_info=error)
    return _unexpected(error), True


def _unexpected(error: BaseException) -> LikenessError:
    return LikenessError(f"An unexpected {type(error).__name__}.")
