"""Jobs with many at them at once: each is done once, of two changes one wins, owners share, and who is killed leaves nothing behind."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from deployments.store.artifacts import ArtifactStore
from deployments.store.job_tables import ArtifactRow, AttemptRow, DeliveryRow, JobRow
from deployments.store.jobs import JobStore
from tests.job_work import (
    PNG,
    die_while_finishing,
    end_each,
    execute_all,
    files,
    finish,
    kinds,
    leased,
    reap_once,
    rows,
    submit_the_same,
    submitted,
)
from tests.store_places import at_once


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[JobStore]:
    store = JobStore(url, ArtifactStore(str(tmp_path / "files")))
    yield store
    store.close()


@pytest.mark.parametrize(("jobs", "running"), [(40, 0), (60, 20), pytest.param(250, 0, marks=pytest.mark.slow)])
def test_two_owners_share_a_pool_whoever_came_first(store: JobStore, jobs: int, running: int) -> None:
    """jobs: of each owner. running: how many of the first's were served before the second came."""
    for _ in range(jobs):
        submitted(store)
    for _ in range(running):
        leased(store)
    ids = [submitted(store, "bruno") for _ in range(jobs)]
    places = [store.get(id, "bruno").queue_position for id in ids[:3]]
    served = [leased(store).job.owner for _ in range(2 * (jobs - running))]
    assert places == [served[:20].index("bruno") + 2 * k for k in range(3)], "positions say what then happens"
    for width in (20, 50, 200):
        for begin in range(len(served) - width + 1):
            counts = Counter(served[begin : begin + width])
            assert abs(counts["ada"] - counts["bruno"]) <= 0.1 * width


def test_who_was_away_gains_nothing_by_it(store: JobStore) -> None:
    for _ in range(30):
        submitted(store)
    assert [leased(store).job.owner for _ in range(20)] == ["ada"] * 20
    for _ in range(10):
        submitted(store, "bruno")
    assert Counter(leased(store).job.owner for _ in range(10)) == {"ada": 5, "bruno": 5}


def test_two_runners_in_two_processes_do_each_job_once(url: str, store: JobStore, tmp_path: Path) -> None:
    ids = [submitted(store) for _ in range(200)]
    notes = [tmp_path / name for name in ("one", "two")]
    at_once(execute_all, *((url, tmp_path / "files", path.name, path) for path in notes))
    done = [path.read_text().split() for path in notes]
    assert sorted(done[0] + done[1]) == sorted(ids) and all(len(part) >= 20 for part in done)
    assert {row["status"] for row in rows(url, JobRow)} == {"succeeded"} and len(files(tmp_path)) == 200
    assert {row["attempt"] for row in rows(url, AttemptRow)} == {1}


def test_eight_processes_with_one_key_make_one_job(url: str, store: JobStore, tmp_path: Path) -> None:
    prompts = ["another"] + ["same"] * 7
    notes = [tmp_path / str(k) for k in range(8)]
    at_once(submit_the_same, *((url, tmp_path / "files", prompt, path) for prompt, path in zip(prompts, notes, strict=True)))
    (job,) = store.list("ada")
    said = [path.read_text() for path in notes]
    first = said.index(f"{job.id} True")
    assert job.input == {"prompt": prompts[first]} and len(files(tmp_path)) == 1
    others = [f"{job.id} False" if prompt == prompts[first] else "conflict" for prompt in prompts]
    assert said == [*others[:first], f"{job.id} True", *others[first + 1 :]]


def test_of_a_cancel_and_a_success_at_once_exactly_one_wins(url: str, store: JobStore, tmp_path: Path) -> None:
    for _ in range(24):
        submitted(store, webhook_url="https://example.org/")
    leases = [leased(store, for_s=600) for _ in range(24)]
    ids = [lease.job.id for lease in leases]
    notes, together = [tmp_path / "succeeded", tmp_path / "canceled"], multiprocessing.get_context("spawn").Barrier(2)
    at_once(
        end_each, *((url, tmp_path / "files", leases, path, together, cancel) for cancel, path in zip((False, True), notes, strict=True))
    )
    succeeded, canceled = (path.read_text().split() for path in notes)
    assert all({a, b} == {"True", "False"} for a, b in zip(succeeded, canceled, strict=True)) and len(set(succeeded)) == 2
    states = [store.get(id, "ada").status for id in ids]
    assert states == ["succeeded" if won == "True" else "canceled" for won in succeeded]
    assert len(files(tmp_path)) == states.count("succeeded") == len(rows(url, ArtifactRow))
    assert Counter(row["job_id"] for row in rows(url, DeliveryRow)) == Counter(ids), "one webhook each"
    assert all(len({"succeeded", "canceled"} & set(kinds(store, id))) == 1 for id in ids)


def test_several_reapers_take_up_a_job_once(url: str, store: JobStore, tmp_path: Path) -> None:
    ids = [submitted(store) for _ in range(20)]
    for _ in ids:
        leased(store, for_s=0.01)
    time.sleep(0.05)
    notes = [tmp_path / str(k) for k in range(3)]
    at_once(reap_once, *((url, tmp_path / "files", path) for path in notes))
    assert sum(int(path.read_text()) for path in notes) == 20
    assert all(kinds(store, id) == ["queued", "started", "requeued"] for id in ids)


def test_a_runner_killed_between_file_and_row_leaves_no_row_and_the_sweep_takes_the_file(url: str, store: JobStore, tmp_path: Path) -> None:
    id = submitted(store, pictures={"face": PNG})
    (given,) = files(tmp_path)
    lease = leased(store, for_s=0.5)
    process = multiprocessing.get_context("spawn").Process(target=die_while_finishing, args=(url, tmp_path / "files", lease))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    (orphan,) = [path for path in files(tmp_path) if path != given]
    assert orphan.read_bytes() == PNG and len(rows(url, ArtifactRow)) == 1
    assert store.expire() == 0 and orphan.exists(), "it could still be somebody's who is about to write the row"
    for path in (given, orphan):
        os.utime(path, (0, 0))
    other = JobStore(url, ArtifactStore(str(tmp_path / "files")))
    other.expire()
    other.close()
    assert files(tmp_path) == [given]
    time.sleep(max(0.0, (lease.until - store.get(id, "ada").created_at).total_seconds()))
    assert len(store.reap()) == 1 and finish(store, leased(store, "two")) and store.get(id, "ada").status == "succeeded"
