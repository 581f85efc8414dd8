"""The runner over a true store, with work that truly takes its time: what is done, stopped, done again, and never lost."""

from __future__ import annotations

import asyncio
import base64
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from deployments.errors import InvalidImage
from deployments.images import encode
from deployments.job_runner import Finished, Loop, Report, Runner
from deployments.job_server import joined
from deployments.store.job_values import JobInfo, Lease, NewJob
from deployments.store.jobs import JobStore
from deployments.store.settings import EVERYBODY
from serve.job_answers import JobItem, JobResult, problem_json
from serve.job_desk import parted
from tests.job_serving import QUICK, STEP_S, Painter, ended, history, kinds, new, opened, painted, running, until
from tests.store_places import postgres_server

LONG = 10_000
"""Steps that nobody waits for."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = opened(tmp_path)
    yield store
    store.close()


def submitted(store: JobStore, *prompts: str, **fields: object) -> list[JobInfo]:
    return [store.submit(EVERYBODY, new(prompt, **fields))[0] for prompt in prompts]  # type: ignore[arg-type]


def get(store: JobStore, job: JobInfo) -> JobInfo:
    return store.get(job.id, job.owner)


def test_jobs_are_done_as_many_at_once_as_there_are_slots_and_keep_their_pictures(store: JobStore) -> None:
    jobs = submitted(store, *["a portrait"] * 7, n=2)

    async def main() -> Painter:
        painter = Painter(store)
        async with running(store, painter=painter):
            await until(lambda: ended(store, *(job.id for job in jobs)))
        return painter

    painter = asyncio.run(main())
    assert painter.at_once == QUICK.slots["draw"] and set(painter.begun.values()) == {1}
    for job in jobs:
        done = get(store, job)
        assert done.status == "succeeded" and done.attempt == 1 and (done.step, done.steps) == (6, 6)
        assert done.timings["denoise"] == 0.1 and done.timings["total"] >= done.timings["queued"] >= 0
        item = JobItem.of(done)
        assert isinstance(item.result, JobResult) and [picture.seed for picture in item.result.data] == [1, 2]
        kept = [store.artifact(str(picture.artifact), EVERYBODY)[1] for picture in item.result.data]
        assert kept == [content for content, _ in painted({"n": 2}).pictures]
        told = kinds(store, job)
        assert told[:2] == ["queued", "started"] and told[-1] == "succeeded" and "progress" in told


def test_a_runner_tells_of_jobs_that_wait_for_another(store: JobStore, caplog: pytest.LogCaptureFixture) -> None:
    (job,) = submitted(store, "a portrait")
    store.submit(EVERYBODY, NewJob(kind="training", pool="train-a6000"))

    async def main() -> None:
        async with running(store):
            await until(lambda: ended(store, job.id) and "train-a6000" in caplog.text)

    asyncio.run(main())
    assert "1 jobs wait in the pool train-a6000" in caplog.text and "pool draw" not in caplog.text


def test_progress_is_written_no_faster_than_it_may_and_the_last_preview_is_not_lost(store: JobStore) -> None:
    settings = QUICK.model_copy(update={"progress_s": 0.3})
    (job,) = submitted(store, "a portrait", steps=50, previews=True)

    async def main() -> None:
        async with running(store, settings):
            await until(lambda: "preview" in kinds(store, job))
            await until(lambda: ended(store, job.id))

    asyncio.run(main())
    told = [event for event in history(store, job) if event.kind == "progress"]
    took = get(store, job).timings["total"]
    assert took >= 50 * STEP_S and 2 <= len(told) <= took / 0.3 + 2
    assert [event.data["step"] for event in told] == sorted(event.data["step"] for event in told)


def test_what_is_cancelled_stops_at_once_and_its_slot_is_free(store: JobStore) -> None:
    first, second = submitted(store, "one", "two", steps=LONG)
    (third,) = submitted(store, "three")

    async def main() -> tuple[float, float]:
        painter = Painter(store)
        async with running(store, painter=painter) as runner:
            await until(lambda: painter.now == 2)
            began = time.monotonic()
            await asyncio.to_thread(store.cancel, first.id, first.owner)
            await until(lambda: first.id in painter.stopped)
            by_itself = painter.stopped[first.id] - began
            await until(lambda: ended(store, third.id))
            began = time.monotonic()
            await asyncio.to_thread(store.delete, second.id, second.owner)
            runner.wake()
            await until(lambda: second.id in painter.stopped)
            await until(lambda: not runner.running)
            return by_itself, painter.stopped[second.id] - began

    by_itself, woken = asyncio.run(main())
    assert by_itself < 2 and woken < 1, (by_itself, woken)
    assert get(store, first).status == "canceled" and kinds(store, first)[-1] == "canceled"
    assert get(store, third).status == "succeeded"


def test_what_stops_in_order_is_told_once_to_stop(store: JobStore) -> None:
    """Work that is somewhere else (a training) takes its time to end; nobody breaks that off, and its slot is its own until then."""
    (job,) = submitted(store, "one")
    told: list[str] = []

    async def slow(lease: Lease, report: Report) -> Finished:
        told.append("begun")
        try:
            await asyncio.sleep(3600)
        except asyncio.CancelledError:
            await asyncio.sleep(4 * QUICK.check_s)
            told.append("ended in order")
            raise
        raise AssertionError("nobody waits for an hour")

    async def main() -> None:
        runner = Runner(store, {"generate": slow}, QUICK, problem_json)
        task = asyncio.create_task(runner.run())
        await until(lambda: told == ["begun"])
        await asyncio.to_thread(store.cancel, job.id, job.owner)
        await until(lambda: not runner.running)
        runner.stop()
        await task

    asyncio.run(main())
    assert told == ["begun", "ended in order"] and get(store, job).status == "canceled"


@pytest.mark.parametrize(
    ("prompt", "status", "attempts", "code"),
    [
        ("busy", "succeeded", 1, None),
        ("lost once", "succeeded", 2, None),
        ("impossible", "failed", 1, "invalid_request"),
        ("naked", "moderated", 1, "moderated_output"),
        ("always broken", "failed", 2, "internal_error"),
    ],
)
def test_what_goes_wrong_is_tried_again_only_where_that_may_help(
    store: JobStore, prompt: str, status: str, attempts: int, code: str | None
) -> None:
    (job,) = submitted(store, prompt, max_attempts=2)

    async def main() -> int:
        painter = Painter(store)
        async with running(store, painter=painter):
            await until(lambda: ended(store, job.id))
        return painter.begun[job.id]

    begun = asyncio.run(main())
    found = get(store, job)
    assert (found.status, found.attempt) == (status, attempts)
    assert begun == (2 if prompt == "busy" else attempts)  # a full queue costs no attempt
    item = JobItem.of(found)
    assert (item.error.code if item.error else None) == code
    if item.error is not None:
        assert item.error.remedy and "secret" not in item.model_dump_json()


def test_a_kind_that_nobody_here_knows_fails_and_the_runner_goes_on(store: JobStore) -> None:
    from dataclasses import replace

    strange, _ = store.submit(EVERYBODY, replace(new(), kind="dance", max_attempts=1))
    (job,) = submitted(store, "a portrait")

    async def main() -> None:
        async with running(store):
            await until(lambda: ended(store, strange.id, job.id))

    asyncio.run(main())
    assert (get(store, strange).status, get(store, job).status) == ("failed", "succeeded")


def test_a_runner_that_stops_in_order_gives_its_jobs_back(store: JobStore) -> None:
    (job,) = submitted(store, "a portrait", steps=LONG)

    async def main() -> None:
        painter = Painter(store)
        async with running(store, painter=painter):
            await until(lambda: painter.now == 1)
        assert job.id in painter.stopped

    asyncio.run(main())
    found = get(store, job)
    assert (found.status, found.attempt) == ("queued", 0)


def run_until_killed(folder: Path) -> None:
    store = opened(folder)

    async def main() -> None:
        async with running(store):
            await asyncio.sleep(3600)

    asyncio.run(main())


def test_what_a_killed_runner_held_is_done_by_another_once(store: JobStore, tmp_path: Path) -> None:
    (job,) = submitted(store, "a portrait", steps=100, webhook_url="https://example.org/hook")
    context = multiprocessing.get_context("spawn")
    victim = context.Process(target=run_until_killed, args=(tmp_path,), daemon=True)
    victim.start()

    async def main() -> float:
        await until(lambda: get(store, job).step > 3)
        assert victim.pid is not None
        os.kill(victim.pid, signal.SIGKILL)
        killed = time.monotonic()
        victim.join()
        reaping = Loop("reaping", lambda: asyncio.to_thread(store.reap), QUICK.reap_s)
        task = asyncio.create_task(reaping.run())
        async with running(store):
            await until(lambda: ended(store, job.id))
        reaping.stop()
        await task
        return time.monotonic() - killed

    took = asyncio.run(main())
    found = get(store, job)
    assert (found.status, found.attempt) == ("succeeded", 2) and took < QUICK.lease_s + QUICK.reap_s + 100 * STEP_S + 5
    told = kinds(store, job)
    assert told.count("started") == 2 and told.count("requeued") == 1 and told.count("succeeded") == 1
    assert len(store.outbox.due()) == 1


def test_two_runners_share_the_jobs_and_do_none_twice(store: JobStore, tmp_path: Path) -> None:
    jobs = submitted(store, *["a portrait"] * 20)
    wide = QUICK.model_copy(update={"slots": {"draw": 4}})

    async def main() -> tuple[Painter, Painter]:
        painters = Painter(store), Painter(store)
        async with running(store, wide, painters[0]), running(store, wide, painters[1]):
            await until(lambda: ended(store, *(job.id for job in jobs)))
        return painters

    one, two = asyncio.run(main())
    assert not set(one.begun) & set(two.begun) and len(one.begun) + len(two.begun) == 20
    assert all(get(store, job).attempt == 1 for job in jobs)


def test_a_result_whose_files_cannot_be_written_is_tried_again_until_it_can(store: JobStore, tmp_path: Path) -> None:
    """The folder of artifacts is in the way of itself: what a full disk does, without one."""
    place = tmp_path / "files" / "artifacts" / "jobs"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text("in the way")
    (job,) = submitted(store, "a portrait")

    async def main() -> None:
        async with running(store):
            await until(lambda: "requeued" in kinds(store, job))
            place.unlink()
            await until(lambda: ended(store, job.id))

    asyncio.run(main())
    assert (get(store, job).status, get(store, job).attempt) == ("succeeded", 2)
    (again,) = (event for event in history(store, job) if event.kind == "requeued")
    assert again.data["error"]["code"] == "store_unavailable"


def test_a_locked_sqlite_file_delays_and_loses_nothing(store: JobStore, tmp_path: Path) -> None:
    """Nobody can write for longer than a lease lasts; what was being drawn is not drawn again."""
    jobs = submitted(store, "one", "two", "three", steps=20)

    async def main() -> Painter:
        painter = Painter(store)
        async with running(store, painter=painter) as runner:
            await until(lambda: painter.now == 2)
            with closing(sqlite3.connect(tmp_path / "likeness.db", isolation_level=None)) as other:
                other.execute("BEGIN IMMEDIATE")
                await asyncio.sleep(QUICK.lease_s + 1)
                assert runner.healthy()
                other.execute("ROLLBACK")
            await until(lambda: ended(store, *(job.id for job in jobs)))
        return painter

    painter = asyncio.run(main())
    assert [get(store, job).status for job in jobs] == ["succeeded"] * 3 and set(painter.begun.values()) == {1}


def test_ten_seconds_without_postgresql_lose_nothing(tmp_path: Path) -> None:
    with postgres_server() as server:
        if server is None:
            pytest.skip("PostgreSQL, or its driver psycopg, is not installed")
        store = opened(tmp_path, server.url)
        jobs = submitted(store, "one", "two", "three", steps=20)
        patient = QUICK.model_copy(update={"lease_s": 15.0})

        async def main() -> Painter:
            painter = Painter(store)
            async with running(store, patient, painter) as runner:
                await until(lambda: painter.now == 2)
                await asyncio.to_thread(server.away, 10)
                assert runner.healthy()
                await until(lambda: ended(store, *(job.id for job in jobs)))
            return painter

        painter = asyncio.run(main())
        assert [get(store, job).status for job in jobs] == ["succeeded"] * 3
        assert set(painter.begun.values()) == {1} and [kinds(store, job).count("succeeded") for job in jobs] == [1] * 3
        store.close()


def test_a_loop_survives_what_its_turn_raises() -> None:
    turns: list[int] = []

    async def turn() -> None:
        turns.append(1)
        raise RuntimeError("what nobody thought of")

    async def main() -> None:
        loop = Loop("a test", turn, 0.01)
        task = asyncio.create_task(loop.run())
        await until(lambda: len(turns) > 5)
        assert loop.turning and not task.done()
        loop.stop()
        await task

    asyncio.run(main())


def test_pictures_are_parted_from_a_body_and_come_back_to_their_places() -> None:
    abc, other, third, fourth = (encode(np.full((8, 8, 3), shade, np.uint8)) for shade in range(4))
    one, two, three, four = (base64.b64encode(content).decode() for content in (abc, other, third, fourth))
    body = {
        "prompt": "x", "reference_image": f"data:image/png;base64,{one}", "init_image": None,
        "identities": [{"method": "pulid", "images": [one, two]}, {"mask": three, "weight": 0.5}],
        "controls": [{"type": "pose", "image": four}], "a/b": {"image": one},
    }  # fmt: skip
    input, pictures = parted(body)
    assert pictures == {
        "reference_image": abc, "identities/0/images/0": abc, "identities/0/images/1": other, "identities/1/mask": third,
        "controls/0/image": fourth,
    }  # fmt: skip
    assert one not in str(input | {"a/b": None}) and input["reference_image"] == input["identities"][0]["images"][0]
    assert joined(input, pictures) == {**body, "reference_image": one}
    assert parted(joined(input, pictures)) == (input, pictures)
    with pytest.raises(InvalidImage):
        parted({"reference_image": "QUJD"})
