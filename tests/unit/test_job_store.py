"""Jobs: the same on SQLite and on PostgreSQL; every change of their state and each that is refused; several processes at them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import MetaData

from deployments.errors import (
    ArtifactNotFound,
    IdempotencyConflict,
    InvalidRequest,
    JobNotFound,
    LikenessError,
    QueueFull,
    QuotaExceeded,
    StoreUnavailable,
)
from deployments.store.artifacts import ArtifactStore
from deployments.store.engine import Database, open_engine, parsed
from deployments.store.job_queue import now
from deployments.store.job_tables import ArtifactRow, AttemptRow, DeliveryRow, EventRow
from deployments.store.jobs import JobStore, Lease
from deployments.store.migrate import migrate
from deployments.store.tables import NAMES, Base
from tests.job_work import (
    ANSWER,
    PNG,
    POOL,
    PROBLEM,
    database,
    files,
    finish,
    kinds,
    leased,
    new,
    rows,
    submitted,
)
from tests.store_places import postgres

OURS = {"jobs", "job_lanes", "job_attempts", "job_events", "artifacts", "outbox", "webhook_secrets"}


@pytest.fixture(scope="session")
def server() -> Iterator[str | None]:
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return database(request.param, request, tmp_path)


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
    assert store.reap() == 1 and store.reap() == 0
    _fenced(store, lost)
    assert store.held("dead") == set() and store.get(id, "ada").status == "queued" and kinds(store, id)[-1] == "requeued"
    again = leased(store, "two", for_s=0.05)
    assert again.job.id == id and again.job.attempt == 2
    time.sleep(0.1)
    assert store.reap() == 1
    ended = store.get(id, "ada")
    assert ended.status == "failed" and ended.error is not None and ended.error["code"] == "replica_lost"
    assert {row["outcome"] for row in rows(url, AttemptRow) if row["job_id"] == id} == {"lost", "failed"}
    assert finish(store, alive)


def test_a_lease_that_its_runner_does_not_know_of_runs_out(store: JobStore) -> None:
    unheard, known = submitted(store), submitted(store)
    assert {leased(store, for_s=0.05).job.id, leased(store, for_s=0.05).job.id} == {unheard, known}
    assert store.heartbeat("one", 60, known=[known]) == {known}
    time.sleep(0.1)
    assert store.reap() == 1 and store.get(unheard, "ada").status == "queued" and store.held("one") == {known}


def test_an_idempotency_key_stands_for_one_request_of_one_owner(store: JobStore, tmp_path: Path) -> None:
    said: dict[str, Any] = {"idempotency_key": "k", "pictures": {"face": PNG}, "input": {"a": 1, "b": [2]}}
    job, made = store.submit("ada", new(**said))
    assert made and store.submit("ada", new(**said | {"input": {"b": (2,), "a": 1}}), quota=0, room=0) == (job, False)
    assert store.submit("bruno", new(**said))[1]
    others = {"input": {"a": 2}, "pictures": {"face": b"another"}, "webhook_url": "https://example.org/", "priority": 1, "workflow": "x"}
    for field, value in others.items():
        with pytest.raises(IdempotencyConflict, match=job.id):
            store.submit("ada", new(**said | {field: value}))
    assert len(files(tmp_path)) == 2
    store.delete(job.id, "ada")
    assert store.submit("ada", new(**said))[1]


def test_a_quota_counts_an_owners_jobs_and_room_everybodys(store: JobStore, tmp_path: Path) -> None:
    submitted(store)
    leased(store)
    submitted(store, "bruno")
    with pytest.raises(QuotaExceeded):
        store.submit("ada", new(pictures={"face": PNG}), quota=1)
    with pytest.raises(QueueFull) as full:
        store.submit("ada", new(pictures={"face": PNG}), quota=2, room=1)
    assert full.value.details == {"pool": POOL, "room": 1} and files(tmp_path) == []
    assert store.submit("ada", new(), quota=2, room=2)[1] and store.submit("ada", new(pool="other"), quota=1, room=1)[1]


def test_a_pool_runs_no_more_than_its_limit_over_all_runners(store: JobStore) -> None:
    for _ in range(3):
        submitted(store)
    assert store.lease("one", [POOL], 60, {POOL: 2}) and store.lease("two", [POOL], 60, {POOL: 2})
    assert store.lease("three", [POOL], 60, {POOL: 2}) is None and store.lease("three", ["other"], 60) is None
    other = submitted(store, pool="other")
    lease = store.lease("three", [POOL, "other"], 60, {POOL: 2})
    assert lease is not None and lease.job.id == other


def test_higher_priorities_go_first(store: JobStore) -> None:
    low, normal, high = (submitted(store, priority=priority) for priority in (-1, 0, 1))
    assert [store.get(id, "ada").queue_position for id in (high, normal, low)] == [0, 1, 2]
    assert [leased(store).job.id for _ in range(3)] == [high, normal, low]


def test_the_same_database_with_artifacts_elsewhere(url: str) -> None:
    store = JobStore(url, ArtifactStore("memory://jobs-of-a-test"))
    id = submitted(store, pictures={"face": PNG})
    lease = leased(store)
    done = store.succeed(lease, ANSWER, [(PNG[:50], "image/png")], {})
    assert done is not None and done.result is not None and store.pictures(done) == {"face": PNG}
    artifact: str = done.result["data"][0]["artifact"]
    assert store.artifact(artifact, "ada")[1] == PNG[:50]
    store.delete(id, "ada")
    assert list(ArtifactStore("memory://jobs-of-a-test").keys()) == []
    store.close()


def test_deleting_takes_everything_of_a_job_whatever_its_state(url: str, store: JobStore, tmp_path: Path) -> None:
    said: dict[str, Any] = {"pictures": {"face": PNG}, "webhook_url": "https://example.org/"}
    done, running, waiting, kept = (submitted(store, **said) for _ in range(4))
    assert finish(store, leased(store))
    lease = leased(store)
    assert lease.job.id == running
    for id in (done, running, waiting):
        store.delete(id, "ada")
        with pytest.raises(JobNotFound):
            store.get(id, "ada")
    assert not finish(store, lease) and not store.progress(lease, picture=0, pictures=1, step=1, steps=2)
    with pytest.raises(JobNotFound):
        store.delete(done, "ada")
    with pytest.raises(JobNotFound):
        store.pictures(lease) or store.get(running, "ada")
    assert [path.parent.name for path in files(tmp_path)] == [kept] and [path.name for path in (tmp_path / "files/jobs").iterdir()] == [
        kept
    ]
    assert {row["job_id"] for table in (EventRow, ArtifactRow) for row in rows(url, table)} == {kept} and not rows(url, DeliveryRow)


def test_jobs_are_forgotten_some_time_after_their_end(store: JobStore, tmp_path: Path) -> None:
    submitted(store, pictures={"face": PNG})
    waiting = submitted(store)
    finish(store, leased(store))
    assert store.expire() == 0 and store.expire(60) == 0
    time.sleep(0.02)
    assert store.expire(0.01) == 1 and files(tmp_path) == []
    assert [job.id for job in store.list("ada")] == [waiting]


def test_lists_are_filtered_newest_first_and_read_in_pages(store: JobStore) -> None:
    ids = [submitted(store, kind="generate" if k % 2 else "train", workflow=f"w{k % 3}") for k in range(7)]
    submitted(store, "bruno")
    store.cancel(ids[0], "ada")
    everything = store.list("ada")
    assert [job.id for job in everything] == ids[::-1]
    pages = [store.list("ada", limit=3)]
    while pages[-1]:
        pages.append(store.list("ada", limit=3, before=pages[-1][-1].id))
    assert [job for page in pages for job in page] == list(everything)
    assert [job.id for job in store.list("ada", status="canceled")] == [ids[0]]
    assert [job.id for job in store.list("ada", status="queued", kind="train", workflow="w0")] == [ids[6]]
    assert store.list("ada", workflow="\0") == () == store.list("ada", workflow="\ud800")
    assert [job.queue_position for job in everything] == [6, 5, 4, 3, 2, 1, None], "the other owner's comes first"


def test_another_owners_job_does_not_exist(store: JobStore) -> None:
    id = submitted(store, pictures={"face": PNG})
    done = store.succeed(leased(store), ANSWER, [(PNG, "image/png")], {})
    assert done is not None and done.result is not None
    questions: list[Callable[[], object]] = [
        lambda: store.get(id, "bruno"),
        lambda: store.cancel(id, "bruno"),
        lambda: store.delete(id, "bruno"),
        lambda: store.events(id, "bruno"),
        lambda: store.list("bruno", before=id),
        lambda: store.artifact(done.result["data"][0]["artifact"] if done.result else "", "bruno"),
    ]
    for question in questions:
        with pytest.raises((JobNotFound, ArtifactNotFound)) as foreign:
            question()
        assert "There is no" in foreign.value.message
    assert store.get(id, "ada") == done and store.list("bruno") == ()


def test_what_cannot_be_an_id_is_not_found(store: JobStore) -> None:
    for id in ("", "job_", "job_" + "0" * 25, "\0", "\ud800", "../../etc/passwd", "' OR 1 = 1 --", "x" * 100_000):
        for question in (store.get, store.cancel, store.delete, store.events, store.artifact):
            with pytest.raises((JobNotFound, ArtifactNotFound)) as caught:
                question(id, "ada")
            assert len(caught.value.message) < 400


REFUSED: list[tuple[str, Any]] = [
    ("idempotency_key", "x" * 256),
    ("idempotency_key", "a\0b"),
    ("webhook_url", "https://x/" + "x" * 2000),
    ("webhook_url", ""),
    ("workflow", "\ud800"),
    ("priority", 2),
    ("max_attempts", 0),
    ("input", {"x": math.nan}),
    ("input", {"x": b"bytes"}),
    ("pictures", {"a\0b": PNG}),
]


def test_what_cannot_be_kept_is_refused(store: JobStore, tmp_path: Path) -> None:
    for field, value in REFUSED:
        with pytest.raises(InvalidRequest) as caught:
            store.submit("ada", new(**{"pictures": {"face": PNG}, field: value}))
        assert caught.value.details == {"param": field}
    assert store.list("ada") == () and files(tmp_path) == []


def test_any_text_of_a_request_comes_back(store: JobStore) -> None:
    said = {"prompt": "Ada 👩‍🎨 \0 \ud800 \u2028", "deep": [{"x": [1.5, None, True]}]}
    id = submitted(store, input=said)
    assert store.get(id, "ada").input == said
    again = store.fail(leased(store), {**PROBLEM, "detail": "\0\ud800"}, retryable=False)
    assert again is not None and again.error is not None and again.error["detail"] == "\0\ud800"


def test_an_answer_that_fits_not_its_pictures_is_the_runners_fault(store: JobStore, tmp_path: Path) -> None:
    submitted(store)
    lease = leased(store)
    wrong: list[dict[str, Any]] = [{"data": []}, {}, {"data": [{"cosine": math.inf}]}]
    for answer in wrong:
        with pytest.raises(ValueError):
            store.succeed(lease, answer, [(PNG, "image/png")], {})
    assert files(tmp_path) == [] and store.held("one") == {lease.job.id}
    assert store.succeed(lease, {"path": "adapter"}, [], {}) is not None


def test_depth_and_pace_say_how_it_goes(store: JobStore) -> None:
    assert store.depth() == {} and store.pace(POOL) is None
    for pool in (POOL, POOL, "other"):
        submitted(store, pool=pool)
    time.sleep(0.05)
    lease = leased(store)
    time.sleep(0.2)
    finish(store, lease)
    depth = store.depth()
    assert {pool: count for pool, (count, _) in depth.items()} == {POOL: 1, "other": 1} and all(0.2 < age < 60 for _, age in depth.values())
    pace = store.pace(POOL)
    assert pace is not None and 0.2 <= pace < 30 and store.pace("other") is None


def test_a_webhook_is_made_with_the_end_of_its_job_and_claimed_by_one_sender(url: str, store: JobStore) -> None:
    id, silent = submitted(store, webhook_url="https://example.org/hook"), submitted(store)
    assert store.outbox.due() == ()
    finish(store, leased(store))
    store.cancel(silent, "ada")
    at = time_of(url)
    (delivery,) = store.outbox.due(at, lease_s=30)
    assert (delivery.job_id, delivery.owner, delivery.url, delivery.attempt) == (id, "ada", "https://example.org/hook", 1)
    assert delivery.payload == {"job": id} and store.outbox.due(at + timedelta(seconds=29)) == ()
    (again,) = store.outbox.due(at + timedelta(seconds=31))
    assert again == replace(delivery, attempt=2), "its sender died: the same id once more"
    later = at + timedelta(hours=1)
    store.outbox.failed(delivery.id, later)
    assert store.outbox.due(later - timedelta(seconds=1)) == () and len(store.outbox.due(later + timedelta(seconds=1))) == 1
    store.outbox.delivered(delivery.id)
    store.outbox.failed(delivery.id, later)
    assert store.outbox.due(later + timedelta(days=9)) == ()
    (row,) = rows(url, DeliveryRow)
    assert row["attempt"] == 3 and row["delivered_at"] is not None


def test_a_webhook_that_was_given_up_is_not_due_again(url: str, store: JobStore) -> None:
    store.cancel(submitted(store, webhook_url="https://example.org/hook"), "ada")
    (delivery,) = store.outbox.due()
    store.outbox.failed(delivery.id, None)
    (row,) = rows(url, DeliveryRow)
    assert row["due_at"] is None and row["delivered_at"] is None and store.outbox.due(time_of(url) + timedelta(days=30)) == ()


def time_of(url: str) -> datetime:
    database = Database(url)
    with database.reading() as session:
        found = now(session)
    database.close()
    return found


def test_every_owner_has_a_secret_that_stays_until_it_is_changed(store: JobStore) -> None:
    secret = store.outbox.secret("ada")
    assert secret.startswith("whsec_") and len(secret) == len("whsec_") + 44 and store.outbox.secret("ada") == secret
    assert store.outbox.secret("bruno") != secret
    changed = store.outbox.rotate("ada")
    assert changed != secret and store.outbox.secret("ada") == changed and store.outbox.rotate("carla") == store.outbox.secret("carla")


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
