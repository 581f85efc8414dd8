"""What a job may cost, and may not: which of its changes wait for the disk, how much is told on the way, and nobody's turn."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from sqlalchemy import Connection, event, text
from sqlalchemy.engine import Engine

from benchmarks.job_races import shares, unfairness
from deployments.contracts import PictureProgress
from deployments.store.artifacts import ArtifactStore
from deployments.store.engine import Database
from deployments.store.job_values import JobInfo
from deployments.store.jobs import JobStore
from deployments.store.migrate import migrate
from deployments.store.settings import EVERYBODY
from serve.workflows import Thinned
from tests.job_serving import desk_of, new, opened, routes, running

NORMAL, FULL = 1, 2
"""SQLite's `synchronous`: whether a commit waits for the disk."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = opened(tmp_path)
    yield store
    store.close()


@contextmanager
def waits() -> Iterator[list[int]]:
    """Of every commit meanwhile, in this process: NORMAL or FULL."""
    found: list[int] = []

    def committed(connection: Connection) -> None:
        if connection.get_execution_options().get("likeness_writing"):
            found.append(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())

    event.listen(Engine, "commit", committed)
    try:
        yield found
    finally:
        event.remove(Engine, "commit", committed)


@contextmanager
def counts() -> Iterator[list[str]]:
    """Statements meanwhile that count jobs, in this process."""
    found: list[str] = []

    def asked(_: object, cursor: object, statement: str, *rest: object) -> None:
        if "count(*)" in statement:
            found.append(statement)

    event.listen(Engine, "before_cursor_execute", asked)
    try:
        yield found
    finally:
        event.remove(Engine, "before_cursor_execute", asked)


def submitted(store: JobStore) -> JobInfo:
    return store.submit(EVERYBODY, new(pictures={"reference_image": b"ada"}))[0]


def test_what_was_promised_waits_for_the_disk_and_what_may_be_done_again_does_not(store: JobStore) -> None:
    with waits() as found:
        job = submitted(store)
    assert found == [FULL]
    with waits() as found:
        lease = store.lease("one", ["draw"], 60, {"draw": 2}, told=True)
        assert lease is not None and lease.job.id == job.id
        assert store.progress(lease, picture=0, pictures=1, step=1, steps=3) and store.heartbeat("one", 60) == {job.id}
    assert found == [NORMAL] * 3
    with waits() as found:
        assert store.succeed(lease, {"data": [{}]}, [(b"a picture", "image/png")], {}) is not None
    assert found == [FULL]
    with waits() as found:
        store.cancel(submitted(store).id, EVERYBODY)
    assert found == [FULL, FULL]


@pytest.mark.parametrize(("pictures", "times"), (({"reference_image": b"ada"}, 2), ({}, 1)))
def test_whether_there_is_room_is_asked_before_a_file_is_written_and_else_once(
    store: JobStore, pictures: dict[str, bytes], times: int
) -> None:
    with counts() as found:
        store.submit(EVERYBODY, new(pictures=pictures), room=10)
    assert len(found) == times


def test_connections_are_shared_by_both_and_each_gets_what_it_asked_for(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    database = Database(url)
    for lasting in (True, False, False, True, False, True):
        with database.writing(lasting=lasting) as session:
            assert session.scalar(text("PRAGMA synchronous")) == (FULL if lasting else NORMAL)
        with database.reading() as session:
            assert session.scalar(text("SELECT 1")) == 1
    database.close()


def test_a_file_that_cannot_be_placed_leaves_nothing(tmp_path: Path) -> None:
    store = ArtifactStore(str(tmp_path))
    store.put("jobs/a/one.png", b"one")
    store.put("jobs/a/one.png", b"two")
    assert store.get("jobs/a/one.png") == b"two"
    (tmp_path / "jobs" / "b").mkdir()
    (tmp_path / "jobs" / "b" / "one.png").mkdir()  # in the way
    with pytest.raises(Exception, match="cannot be written"):
        store.put("jobs/b/one.png", b"three")
    assert sorted(store.keys()) == ["jobs/a/one.png"]


def test_steps_are_told_no_faster_than_asked_but_every_small_picture_is() -> None:
    told: list[PictureProgress] = []
    began = time.monotonic()
    tell = Thinned(told.append, 0.1)
    for step in range(1, 61):
        time.sleep(0.005)
        tell(PictureProgress(0, 1, step, 60, b"small" if step % 45 == 0 else None))
    spent = time.monotonic() - began
    assert [event.step for event in told if event.preview] == [45]
    assert 1 <= len([event for event in told if not event.preview]) <= spent / 0.1
    every: list[PictureProgress] = []
    for event_ in told:
        Thinned(every.append, 0.0)(event_)
    assert every == told


def test_what_is_soon_done_is_told_once_it_is_done() -> None:
    told: list[PictureProgress] = []
    tell = Thinned(told.append, 0.2)
    for step in range(1, 16):
        time.sleep(0.02)
        tell(PictureProgress(0, 1, step, 15))
    assert told == []


def test_two_callers_are_served_in_turns_over_http(store: JobStore) -> None:
    async def main() -> list[str]:
        async with running(store) as runner:
            transport = httpx.ASGITransport(routes(desk_of(store, wake=runner.wake)))
            first, second = (
                httpx.AsyncClient(transport=transport, base_url="http://likeness", headers={"x-owner": name}, timeout=60) for name in "ab"
            )
            async with first, second:
                return await shares(first, second, 30)

    order = asyncio.run(main())
    assert sorted(order) == ["first"] * 30 + ["second"] * 30 and order[0] == "first"
    for width in (10, 20):
        apart = unfairness(order, width)
        assert apart is not None and apart <= 0.1, (apart, order)
    assert unfairness(["first"] * 20 + ["second"] * 20, 20) is None
    assert unfairness(["first", "second", "first", "first", "second"] * 10, 10) == pytest.approx(0.2)
