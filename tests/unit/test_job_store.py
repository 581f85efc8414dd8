"""Jobs: the same on SQLite and on PostgreSQL; every change of their state and each that is refused; several processes at them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData

from deployments.errors import (
    LikenessError,
    StoreUnavailable,
)
from deployments.store.artifacts import ArtifactStore
from deployments.store.engine import open_engine, parsed
from deployments.store.job_tables import AttemptRow
from deployments.store.jobs import JobStore, Lease
from deployments.store.migrate import migrate
from deployments.store.tables import NAMES, Base
from tests.job_work import (
    ANSWER,
    PNG,
    POOL,
    PROBLEM,
    files,
    finish,
    kinds,
    leased,
    new,
    rows,
    submitted,
)

OURS = {"jobs", "job_lanes", "job_attempts", "job_events", "artifacts", "outbox", "webhook_secrets"}


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(url, ArtifactStore(str(tmp_path / "files")))
    yield store
    store.close()


def test_migrations_make_what_the_tables_say(url: str) -> None:
    engine = open_engine(parsed(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_name": lambda name, kind, _: kind != "table" or name in OURS})
        said = MetaData(naming_convention=NAMES)
        assert len(compare_metadata(context, said)) >= len(OURS), "the migration made them"
        for table in Base.metadata.sorted_tables:
            if table.name in OURS:
                table.to_metadata(said)
        assert len(said.tables) == len(OURS) and compare_metadata(context, said) == []
    engine.dispose()


def test_a_job_from_its_submission_to_its_answer(store: JobStore, tmp_path: Path) -> None:
    job, made = store.submit("ada", new(pictures={"face/0": PNG}, priority=1, previews=True, webhook_url="https://example.org/hook"))
    assert made and (job.status, job.queue_position, job.attempt, job.priority, job.terminal) == ("queued", 0, 0, 1, False)
    assert store.get(job.id, "ada") == job and store.pictures(job) == {"face/0": PNG}
    lease = leased(store)
    assert (lease.job.id, lease.job.status, lease.job.attempt, lease.attempt, lease.runner) == (job.id, "running", 1, 1, "one")
    assert timedelta(seconds=55) < lease.until - job.created_at < timedelta(seconds=90) and lease.job.queue_position is None
    assert store.pictures(lease) == {"face/0": PNG} and store.held("one") == {job.id}
    assert store.progress(lease, picture=0, pictures=1, step=3, steps=8, preview=b"jpeg")
    seen = store.get(job.id, "ada")
    assert (seen.step, seen.steps, seen.picture, seen.pictures) == (3, 8, 0, 1)
    done = store.succeed(lease, ANSWER, [(PNG, "image/png")], {"denoise": 1.5})
    assert done is not None and done == store.get(job.id, "ada") and done.terminal and done.error is None
    assert (done.status, done.step, done.timings["denoise"]) == ("succeeded", 8, 1.5)
    assert 0 <= done.timings["queued"] <= done.timings["total"] < 60
    assert done.result is not None and done.result["data"][0]["seed"] == 7
    info, content = store.artifact(done.result["data"][0]["artifact"], "ada")
    assert content == PNG and (info.job_id, info.name, info.media_type, info.bytes) == (job.id, "0", "image/png", len(PNG))
    assert info.expires_at == done.expires_at and len(files(tmp_path)) == 2
    assert kinds(store, job.id) == ["queued", "started", "progress", "succeeded"] and store.held("one") == set()


def test_events_are_numbered_and_resumed_and_only_the_newest_preview_is_kept(store: JobStore) -> None:
    id = submitted(store, previews=True)
    lease = leased(store)
    for step in (1, 2):
        store.progress(lease, picture=0, pictures=1, step=step, steps=8, preview=b"\xff\xd8" + bytes([step]))
    events = store.events(id, "ada")
    assert [event.seq for event in events] == [1, 2, 3, 5, 6]
    assert [event.kind for event in events] == ["queued", "started", "progress", "progress", "preview"]
    assert events[-1].data == {"picture": 0, "step": 2, "jpeg": "/9gC"}
    assert store.events(id, "ada", after=3, limit=1) == events[3:4] and store.events(id, "ada", after=6) == ()
    assert [event.at for event in events] == sorted(event.at for event in events)
    unwanted = submitted(store)
    store.progress(leased(store), picture=0, pictures=1, step=1, steps=8, preview=b"jpeg")
    assert "preview" not in kinds(store, unwanted)


def test_a_failure_that_may_pass_is_tried_again_after_a_pause_and_then_no_more(store: JobStore, url: str) -> None:
    id = submitted(store, max_attempts=2)
    again = store.fail(leased(store), PROBLEM, retryable=True)
    assert again is not None and (again.status, again.attempt, again.started_at, again.error) == ("queued", 1, None, None)
    requeued = store.events(id, "ada")[-1]
    not_before = datetime.fromisoformat(requeued.data["not_before"])
    assert not_before - requeued.at == timedelta(seconds=1)
    second = store.lease("two", [POOL], 60)
    while second is None:
        time.sleep(0.1)
        second = store.lease("two", [POOL], 60)
    assert second.job.started_at is not None and second.job.started_at >= not_before
    last = store.fail(second, PROBLEM, retryable=True)
    assert last is not None and (last.status, last.attempt, last.error) == ("failed", 2, PROBLEM)
    assert kinds(store, id) == ["queued", "started", "requeued", "started", "failed"]
    assert store.events(id, "ada")[-1].data == {"error": PROBLEM}
    assert [(row["runner"], row["outcome"], row["error"]) for row in rows(url, AttemptRow)] == [
        ("one", "requeued", PROBLEM),
        ("two", "failed", PROBLEM),
    ]


@pytest.mark.parametrize(("moderated", "status"), [(False, "failed"), (True, "moderated")])
def test_a_failure_that_stays_ends_the_job_at_once(store: JobStore, moderated: bool, status: str) -> None:
    id = submitted(store)
    ended = store.fail(leased(store), PROBLEM, retryable=moderated, moderated=moderated)
    assert ended is not None and ended.status == status and kinds(store, id)[-1] == status and ended.result is None


def test_a_released_job_goes_back_to_its_place_with_no_attempt_counted(store: JobStore) -> None:
    first, second = submitted(store), submitted(store)
    lease = leased(store)
    assert store.release(lease) and not store.release(lease)
    assert (store.get(first, "ada").attempt, store.get(first, "ada").queue_position, store.get(second, "ada").queue_position) == (0, 0, 1)
    later = leased(store)
    assert later.job.id == first and later.job.attempt == 1 and later.attempt == 2
    assert not finish(store, lease), "the same runner's earlier lease is over"
    assert finish(store, later)


def _fenced(store: JobStore, lease: Lease) -> None:
    """Every write under a lease that is over is refused, and changes nothing."""
    before, events = store.get(lease.job.id, "ada"), store.events(lease.job.id, "ada")
    assert not store.progress(lease, picture=0, pictures=1, step=1, steps=8)
    assert not finish(store, lease) and not store.release(lease)
    assert store.fail(lease, PROBLEM, retryable=True) is None and store.fail(lease, PROBLEM, retryable=False) is None
    assert (store.get(lease.job.id, "ada"), store.events(lease.job.id, "ada")) == (before, events)


ENDS: dict[str, Callable[[JobStore, Lease], object]] = {
    "canceled": lambda store, lease: store.cancel(lease.job.id, "ada"),
    "failed": lambda store, lease: store.fail(lease, PROBLEM, retryable=False),
    "moderated": lambda store, lease: store.fail(lease, PROBLEM, retryable=False, moderated=True),
    "queued": lambda store, lease: store.release(lease),
}


@pytest.mark.parametrize("status", ENDS)
def test_after_its_end_nothing_changes_a_job(store: JobStore, status: str, tmp_path: Path) -> None:
    submitted(store)
    lease = leased(store)
    ENDS[status](store, lease)
    assert store.get(lease.job.id, "ada").status == status
    _fenced(store, lease)
    _fenced(store, replace(lease, runner="two"))
    assert files(tmp_path) == []


def test_what_succeeded_stays_so_and_says_so_to_whoever_did_not_hear_it(store: JobStore, tmp_path: Path) -> None:
    id = submitted(store)
    lease = leased(store)
    done = store.succeed(lease, ANSWER, [(PNG, "image/png")], {})
    assert store.succeed(lease, ANSWER, [(b"other", "image/png")], {}) == done and len(files(tmp_path)) == 1
    assert store.succeed(replace(lease, runner="two"), ANSWER, [(PNG, "image/png")], {}) is None
    assert store.cancel(id, "ada") == (done, False)
    assert store.fail(lease, PROBLEM, retryable=True) is None and not store.release(lease)


def test_cancelling_is_for_ever_and_may_be_asked_again(store: JobStore) -> None:
    waiting, running = submitted(store), submitted(store)
    assert leased(store).job.id == waiting
    for id in (waiting, running):
        job, ours = store.cancel(id, "ada")
        assert ours and job.status == "canceled" and job.finished_at is not None
        assert store.cancel(id, "ada") == (job, False) and kinds(store, id)[-1] == "canceled"
    assert store.held("one") == set() and store.lease("one", [POOL], 60) is None


def test_a_runner_that_gives_no_sign_of_life_loses_its_jobs_to_another(store: JobStore, url: str) -> None:
    id = submitted(store, max_attempts=2)
    lost, kept = leased(store, "dead", for_s=0.05), submitted(store)
    alive = leased(store, "alive", for_s=0.05)
    assert store.heartbeat("alive", 60) == {kept} and store.heartbeat("nobody", 60) == set()
    time.sleep(0.1)
    assert [job.id for job in store.reap()] == [id] and not store.reap()
    _fenced(store, lost)
    assert store.held("dead") == set() and store.get(id, "ada").status == "queued" and kinds(store, id)[-1] == "requeued"
    again = leased(store, "two", for_s=0.05)
    assert again.job.id == id and again.job.attempt == 2
    time.sleep(0.1)
    assert [(job.id, job.status) for job in store.reap()] == [(id, "failed")]
    ended = store.get(id, "ada")
    assert ended.status == "failed" and ended.error is not None and ended.error["code"] == "replica_lost"
    assert {row["outcome"] for row in rows(url, AttemptRow) if row["job_id"] == id} == {"lost", "failed"}
    assert finish(store, alive)


def test_a_lease_that_its_runner_does_not_know_of_runs_out(store: JobStore) -> None:
    unheard, known = submitted(store), submitted(store)
    assert {leased(store, for_s=0.05).job.id, leased(store, for_s=0.05).job.id} == {unheard, known}
    assert store.heartbeat("one", 60, known=[known]) == {known}
    time.sleep(0.1)
    assert [(job.id, job.status) for job in store.reap()] == [(unheard, "queued")] and store.held("one") == {known}


def test_a_database_that_is_away_is_told_and_a_job_is_done_when_it_is_back(tmp_path: Path) -> None:
    path = tmp_path / "likeness.db"
    migrate(f"sqlite:///{path}")
    store = JobStore(f"sqlite:///{path}", ArtifactStore(str(tmp_path / "files")))
    submitted(store)
    lease = leased(store)
    store.close()
    path.rename(tmp_path / "away")
    path.mkdir()
    for attempt in (lambda: finish(store, lease), lambda: store.submit("ada", new()), store.reap):
        with pytest.raises(StoreUnavailable) as caught:
            attempt()
        assert isinstance(caught.value, LikenessError) and caught.value.retryable
    path.rmdir()
    (tmp_path / "away").rename(path)
    assert finish(store, lease) and len(files(tmp_path)) == 1
    store.close()
