"""What is kept of jobs, the same on SQLite and on PostgreSQL: keys, quotas, order, lists, whose they are, webhooks, and when they go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import (
    ArtifactNotFound,
    IdempotencyConflict,
    InvalidRequest,
    JobNotFound,
    QueueFull,
    QuotaExceeded,
)
from deployments.store.artifacts import ArtifactStore
from deployments.store.engine import Database
from deployments.store.job_queue import now
from deployments.store.job_tables import ArtifactRow, DeliveryRow, EventRow
from deployments.store.jobs import JobStore
from tests.job_work import (
    ANSWER,
    PNG,
    POOL,
    PROBLEM,
    files,
    finish,
    leased,
    new,
    rows,
    submitted,
)


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(url, ArtifactStore(str(tmp_path / "files")))
    yield store
    store.close()


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
