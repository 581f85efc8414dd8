"""Trainings that die of themselves, and Ray's records of those that are over: against Ray's Jobs API as its own client speaks it, over a
socket, whose jobs are true processes. What needs a true cluster is in tests/training_cluster."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray

from deployments.errors import InvalidRequest, LikenessError, ReplicaLost, StoreUnavailable
from deployments.store.job_values import Lease, NewJob
from deployments.store.jobs import JobStore
from deployments.store.provisional import Provisional
from tests.job_serving import opened
from training.dataset.dataset import DATASET as DATASET_FILE
from training.executor import TrainingExecutor
from training.orders import TrainingOrder
from training.placement import Placement
from training.ray_jobs import RayTrainings
from training.registry import Registry
from training.settings import preset
from training.tasks import MINI_FACES, NAMES, ProgressFile, TrainingTask, prepared

SETTINGS = preset("mini", steps=6, warm_up_steps=0)


class JobsApi:
    """As much of Ray's (ray/dashboard/modules/job/job_head.py) as is asked here. Entry points are executed, one after the other."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}

    def answer(self, method: str, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/api/version":
            return 200, {"version": "4", "ray_version": ray.__version__, "ray_commit": "", "session_name": ""}
        id = path.removeprefix("/api/jobs/")
        if method == "POST":
            self.jobs[body["submission_id"]] = self._done(body)
            return 200, {"job_id": body["submission_id"], "submission_id": body["submission_id"]}
        if not id:
            return 200, list(self.jobs.values())
        if id not in self.jobs:
            return 404, f"Job {id} does not exist"
        if method == "GET":
            return 200, self.jobs[id]
        del self.jobs[id]
        return 200, {"deleted": True}

    def add(self, name: str, job: str | None, status: str = "FAILED") -> None:
        metadata = {"likeness-training": job} if job is not None else {}
        self.jobs[name] = {"type": "SUBMISSION", "submission_id": name, "entrypoint": "true", "status": status, "metadata": metadata}

    def _done(self, body: dict[str, Any]) -> dict[str, Any]:
        over = subprocess.run(body["entrypoint"], shell=True, capture_output=True, text=True, check=False)
        said = f"Job entrypoint command failed with exit code {over.returncode}, last available logs:\n{over.stderr}"
        known = {name: body[name] for name in ("submission_id", "entrypoint", "metadata")}
        return {"type": "SUBMISSION", "status": "FAILED", "message": said, "driver_exit_code": over.returncode, **known}


@pytest.fixture
def api() -> Iterator[tuple[JobsApi, str]]:
    jobs = JobsApi()

    class Handler(BaseHTTPRequestHandler):
        def _any(self) -> None:
            sent = self.rfile.read(int(self.headers.get("content-length") or 0))
            status, answer = jobs.answer(self.command, self.path, json.loads(sent) if sent else {})
            content = json.dumps(answer).encode() if status == 200 else str(answer).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_DELETE = _any

        def log_message(self, format: str, *args: Any) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield jobs, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def trainings(url: str) -> RayTrainings:
    return RayTrainings(url, {"local": Placement(device="cpu")}, poll_s=0.05)


def test_a_training_that_dies_the_same_way_each_time_is_tried_three_times(tmp_path: Path, api: tuple[JobsApi, str]) -> None:
    """The true driver, of whose pictures the names cannot be read."""
    jobs, url = api
    prepared(tmp_path, TrainingTask(trigger_word="ohwx", settings=SETTINGS), {"a.png": b"x"})
    (tmp_path / NAMES).write_text("[torn")

    def follow() -> None:
        asyncio.run(trainings(url).follow("job_1", tmp_path, lambda progress: None))

    for _ in range(2):
        with pytest.raises(ReplicaLost, match="JSONDecodeError"):
            follow()
    ProgressFile(tmp_path).tell(weighty=True, stage="training", checkpoint=2)
    for _ in range(2):
        with pytest.raises(ReplicaLost):  # it has got further meanwhile
            follow()
    for _ in range(2):
        with pytest.raises(LikenessError, match=r"died 3 times at the same step, after the checkpoint of step 2: json\.decoder") as end:
            follow()
        assert not end.value.retryable
    assert sorted(jobs.jobs) == [f"job_1-{number}" for number in range(1, 6)], "given up is given up"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    with closing(opened(tmp_path)) as found:
        yield found


def executor(tmp_path: Path, store: JobStore, url: str, root: Path | None = None) -> TrainingExecutor:
    """Which gets no further than its trainings: nothing is drawn."""
    provisional = Provisional(f"sqlite:///{tmp_path / 'likeness.db'}", tmp_path / "files")
    registry = Registry(None, provisional, MINI_FACES)
    return TrainingExecutor(store, trainings(url), registry, provisional, root or tmp_path / "trainings", MINI_FACES, tmp_path / "datasets")


def leased(store: JobStore, **changes: Any) -> Lease:
    fields: dict[str, Any] = {"trigger_word": "ohwx", "settings": SETTINGS, "placement": "local", "name": "ada", **changes}
    new = NewJob(kind="training", pool="train-local", input=TrainingOrder(**fields).model_dump(mode="json"), pictures={"images/0": b"x"})
    store.submit("ada", new)
    lease = store.lease("a runner", ["train-local"], 600)
    assert lease is not None
    return lease


def test_rays_records_of_what_has_ended_for_good_are_deleted(tmp_path: Path, store: JobStore, api: tuple[JobsApi, str]) -> None:
    jobs, url = api
    training, ended, live = executor(tmp_path, store, url), leased(store).job.id, leased(store).job.id
    store.cancel(ended, "ada")
    for id in (ended, live):
        (training.root / id).mkdir(parents=True)
        os.utime(training.root / id, (time.time() - 600,) * 2)
        for number in (1, 2):
            jobs.add(f"{id}-{number}", id)
    jobs.add("job_elsewhere-1", "job_elsewhere")
    jobs.add("somebody", None)
    asyncio.run(training.sweep())
    assert sorted(jobs.jobs) == sorted([f"{live}-1", f"{live}-2", "job_elsewhere-1", "somebody"]), "it still counts what has died"
    assert [path.name for path in training.root.iterdir()] == [live]
    asyncio.run(training.trainings.forget([ended, "job_never_was"]))


def test_what_a_training_fails_of_names_no_folder_of_the_server(
    tmp_path: Path, store: JobStore, api: tuple[JobsApi, str], caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a file").touch()
    unwritable = executor(tmp_path, store, api[1], tmp_path / "a file" / "trainings")
    with pytest.raises(StoreUnavailable, match="cannot be written") as raised:
        asyncio.run(unwritable(leased(store), lambda event: None))
    assert str(tmp_path) not in str(raised.value) and str(tmp_path) in caplog.text
    (tmp_path / "datasets" / "bea").mkdir(parents=True)
    (tmp_path / "datasets" / "bea" / DATASET_FILE).write_text("{}")
    with pytest.raises(InvalidRequest, match="bea") as refused:
        asyncio.run(executor(tmp_path, store, api[1])(leased(store, dataset="bea"), lambda event: None))
    assert str(tmp_path) not in str(refused.value)
