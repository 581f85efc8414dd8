"""JobServer behind a handle of Serve's local testing mode: what it draws through the handle of another deployment, and what it stops."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray.serve
from prometheus_client import REGISTRY

from deployments.contracts import PictureProgress
from deployments.errors import InvalidRequest
from deployments.job_runner import JobSettings
from deployments.job_server import JobServer
from deployments.store.job_values import JobInfo, NewJob
from deployments.store.jobs import JobStore
from deployments.store.settings import EVERYBODY, StoreSettings
from serve.answers import GenerateResponse, ImageItem
from serve.job_answers import JobItem, JobResult, body_of, problem_json
from tests.job_serving import PUBLIC, QUICK, kinds, opened

PICTURE = b"\x89PNG, as far as this goes"
NEW = NewJob(
    kind="generate",
    pool="draw",
    workflow="flux-pulid",
    input={"prompt": "x", "n": 2, "reference_image": "sha256:0"},
    pictures={"reference_image": b"ada"},
)
LEFT: list[float] = []
"""When a drawing was left in its midst. (Everything runs in this process.)"""


class Drawing:
    """A deployment that streams as Workflows does: progress of every step, then the answer, which says what it was asked."""

    async def watched(
        self, workflow: str | None, body: Mapping[str, Any], owner: str, previews: int, every_s: float
    ) -> AsyncIterator[PictureProgress | GenerateResponse]:
        if body["prompt"] == "impossible":
            raise InvalidRequest("`prompt`: impossible.")
        whole = False
        try:
            for step in range(1, body.get("steps", 5) + 1):
                await asyncio.sleep(0.02)
                yield PictureProgress(0, 1, step, body.get("steps", 5), b"small" if previews else None)
            whole = True
        finally:
            if not whole:
                LEFT.append(time.monotonic())
        item = ImageItem(b64_json=base64.b64encode(PICTURE).decode(), seed=7, width=8, height=8, format="png")
        asked = {"workflow": workflow, "owner": owner, "reference": body.get("reference_image")}
        yield GenerateResponse(created=1, model="drawing", data=[item] * body.get("n", 1), timings={"denoise": 0.5}, request=asked)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = opened(tmp_path)
    yield store
    store.close()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Any]:
    """The handle of a JobServer over the same store."""
    place = StoreSettings(url=f"sqlite:///{tmp_path / 'likeness.db'}", folder=tmp_path / "files")
    handle = _serving(place, QUICK)
    yield handle
    handle.drain.remote().result(timeout_s=20)


def _serving(place: StoreSettings, settings: JobSettings) -> Any:
    deployed: Any = ray.serve.deployment
    drawing, jobs = deployed(Drawing).bind(), deployed(JobServer)
    return ray.serve.run(jobs.bind(settings, place, drawing, PUBLIC, problem_json, body_of), _local_testing_mode=True)


def ended(store: JobStore, id: str, seconds: float = 20.0) -> JobInfo:
    end = time.monotonic() + seconds
    while not (job := store.get(id, EVERYBODY)).terminal:
        assert time.monotonic() < end, job
        time.sleep(0.02)
    return job


def until_running(store: JobStore, id: str) -> None:
    while store.get(id, EVERYBODY).step < 2:
        time.sleep(0.02)


def submitted(store: JobStore, **input: Any) -> str:
    return store.submit(EVERYBODY, NewJob(kind="generate", pool="draw", input={"prompt": "x", **input}))[0].id


def test_a_job_is_drawn_by_its_workflow_with_its_pictures_for_its_owner(store: JobStore, server: Any) -> None:
    id = store.submit(EVERYBODY, NEW)[0].id
    server.wake.remote().result()
    job = ended(store, id)
    result = JobItem.of(job).result
    assert isinstance(result, JobResult) and job.timings["denoise"] == 0.5
    assert result.request == {"workflow": "flux-pulid", "owner": EVERYBODY, "reference": base64.b64encode(b"ada").decode()}
    assert [store.artifact(str(item.artifact), EVERYBODY)[1] for item in result.data] == [PICTURE, PICTURE]
    server.check_health.remote().result()
    assert server.ready.remote().result()


def test_what_the_workflow_refuses_the_job_has_as_its_error(store: JobStore, server: Any) -> None:
    job = ended(store, submitted(store, prompt="impossible"))
    assert (job.status, job.attempt) == ("failed", 1)
    error = JobItem.of(job).error
    assert error is not None and error.code == "invalid_request" and error.detail == "`prompt`: impossible."


def test_cancelling_leaves_the_drawing_in_its_midst(store: JobStore, server: Any) -> None:
    LEFT.clear()
    id = submitted(store, steps=2000)
    until_running(store, id)
    began = time.monotonic()
    store.cancel(id, EVERYBODY)
    server.wake.remote().result()
    while not LEFT:
        assert time.monotonic() - began < 5
        time.sleep(0.01)
    assert LEFT[0] - began < 2
    assert ended(store, submitted(store)).status == "succeeded"  # the slot is free


def test_a_replica_that_goes_gives_its_jobs_back_and_is_not_well_afterwards(store: JobStore, tmp_path: Path) -> None:
    LEFT.clear()
    place = StoreSettings(url=f"sqlite:///{tmp_path / 'likeness.db'}", folder=tmp_path / "files")
    handle = _serving(place, QUICK)
    id = submitted(store, steps=2000)
    until_running(store, id)
    handle.drain.remote().result(timeout_s=20)
    job = store.get(id, EVERYBODY)
    assert (job.status, job.attempt) == ("queued", 0) and LEFT
    with pytest.raises(Exception, match="stuck"):
        handle.check_health.remote().result()
    store.cancel(id, EVERYBODY)


def test_a_job_that_is_given_up_with_its_runner_is_counted(store: JobStore, tmp_path: Path) -> None:
    def counted() -> float:
        return REGISTRY.get_sample_value("likeness_jobs_total", {"kind": "generate", "workflow": "", "status": "failed"}) or 0.0

    before = counted()
    once = NewJob(kind="generate", pool="draw", input={"prompt": "x"}, max_attempts=1)
    id = store.submit(EVERYBODY, once)[0].id
    assert store.lease("a runner that died", ["draw"], 0.1, {"draw": 2}) is not None
    handle = _serving(StoreSettings(url=f"sqlite:///{tmp_path / 'likeness.db'}", folder=tmp_path / "files"), QUICK)
    try:
        assert ended(store, id).status == "failed"
        end = time.monotonic() + 10
        while counted() == before:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert counted() == before + 1
    finally:
        handle.drain.remote().result(timeout_s=20)


def test_jobs_of_a_dead_runner_are_reaped_and_ended_ones_expire(store: JobStore, tmp_path: Path) -> None:
    place = StoreSettings(url=f"sqlite:///{tmp_path / 'likeness.db'}", folder=tmp_path / "files")
    id = submitted(store)
    assert store.lease("a runner that died", ["draw"], 0.5, {"draw": 2}) is not None
    handle = _serving(place, QUICK.model_copy(update={"keep_s": 1.0, "expire_s": 0.3}))
    try:
        job = ended(store, id)
        assert (job.status, job.attempt) == ("succeeded", 2) and "requeued" in kinds(store, job)
        end = time.monotonic() + 10
        while store.list(EVERYBODY):
            assert time.monotonic() < end
            time.sleep(0.1)
        assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
    finally:
        handle.drain.remote().result(timeout_s=20)
