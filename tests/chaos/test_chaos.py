"""Whatever dies, fills up or goes away while jobs run: none is lost, none is done twice for its client, each webhook is told once.

`make test` has each fault once; `LIKENESS_CHAOS_ROUNDS` asks for more (`make prove`).
"""

from __future__ import annotations

import base64
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from deployments.images import decode
from deployments.store.settings import StoreSettings
from deployments.urls import UrlPolicy
from serve.client import Client
from serve.cluster import serving
from serve.job_answers import JobEvent
from serve.settings import load_settings
from tests.chaos.house import Database, House, Receiver, Sqlite, controller, database_away, full_disk, patiently, replica, small_disk
from tests.store_places import free_port, postgres_server

ROUNDS = int(os.environ.get("LIKENESS_CHAOS_ROUNDS", "1"))
JOBS, STEPS, SECONDS = 3, 12, 120
ADA = base64.b64encode((Path(__file__).parents[2] / "samples" / "characters" / "ada-1.png").read_bytes()).decode()

FAULTS: dict[str, Callable[[House], None]] = {
    "a runner dies": replica("JobServer"),
    "the ingress dies": replica("Ingress"),
    "a denoiser dies in mid-step": replica("DenoiserServer"),
    "the controller of Serve dies": controller,
    "the disk fills up": full_disk,
    "the database is away for ten seconds": database_away,
}


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgresql", marks=pytest.mark.slow)])
def house(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    with ExitStack() as stack:
        database: Database = Sqlite(folder / "store.db")
        if request.param == "postgresql":
            server = stack.enter_context(postgres_server())
            if server is None:
                pytest.skip("PostgreSQL, or its driver, is not installed")
            database = server
        disk = folder / "disk"
        small = stack.enter_context(small_disk(disk))
        receiver = stack.enter_context(Receiver.listening())
        store = StoreSettings(url=database.url, folder=folder, artifacts=str(disk / "artifacts"))
        webhooks = UrlPolicy(fetch="allow", allow=(receiver.address,))
        local = load_settings("local")
        # Ray's dashboard, which only trainings need, is a dozen processes.
        training = local.training.model_copy(update={"enabled": False})
        settings = local.model_copy(update={"store": store, "webhooks": webhooks, "training": training})
        address = stack.enter_context(serving(settings, port=free_port()))
        yield House(address, database, disk, small, receiver)


def body(seed: int) -> dict[str, Any]:
    return {
        "workflow": "flux-pulid", "prompt": "a portrait of a smiling person in a library", "reference_image": ADA,
        "width": 96, "height": 96, "num_inference_steps": STEPS, "seed": seed,
    }  # fmt: skip


def submitted(client: Client, house: House, key: str) -> list[str]:
    """As often as it must be sent: the key makes it one job."""
    ids = []
    for seed in range(JOBS):
        ask = partial(client.jobs.submit, webhook_url=house.receiver.url, idempotency_key=f"{key}-{seed}", **body(seed))
        ids.append(patiently(ask).id)
    return ids


def until_drawing(client: Client, ids: list[str]) -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        jobs = [patiently(partial(client.jobs.get, id)) for id in ids]
        if any(job.status == "running" and job.progress is not None for job in jobs) or all(job.status == "succeeded" for job in jobs):
            return
        time.sleep(0.05)
    raise AssertionError("no job began to be drawn")


def ended(client: Client, ids: list[str]) -> list[Any]:
    until = time.monotonic() + SECONDS
    while True:
        jobs = [patiently(partial(client.jobs.get, id)) for id in ids]
        if all(job.status in ("succeeded", "failed", "canceled", "moderated") for job in jobs):
            return jobs
        assert time.monotonic() < until, [(job.status, job.progress) for job in jobs]
        time.sleep(0.2)


@pytest.mark.parametrize("round", range(ROUNDS))
@pytest.mark.parametrize("name", FAULTS)
def test_no_job_is_lost_and_none_is_done_twice(house: House, name: str, round: int) -> None:
    if FAULTS[name] is full_disk and not house.small:
        pytest.skip("this user cannot mount a small file system to fill")
    with Client(house.url, timeout=20) as client:
        ids = submitted(client, house, f"{name}-{round}")
        assert len(set(ids)) == JOBS
        until_drawing(client, ids)
        breaking = threading.Thread(target=FAULTS[name], args=(house,))
        breaking.start()
        assert submitted(client, house, f"{name}-{round}") == ids, "the same keys made other jobs"
        jobs = ended(client, ids)
        breaking.join()
        for job in jobs:
            assert job.status == "succeeded", (job.status, job.error)
            (picture,) = job.result.data
            content = patiently(partial(client.jobs.artifact, picture.artifact))
            assert decode(content).shape == (96, 96, 3)
            kinds = Counter(event.kind for event in patiently(partial(events_of, client, job.id)))
            assert kinds["succeeded"] == 1 and kinds["failed"] == 0, kinds
        told = told_of(house.receiver, ids)
        for id in ids:
            assert len(told[id]) == 1, (id, told[id])
            (message,) = told[id]
            sent = {body for name, body in house.receiver.got if name == message}
            assert len(sent) == 1, "a webhook was sent again with another body"
            assert json.loads(sent.pop())["status"] == "succeeded"


def events_of(client: Client, id: str) -> list[JobEvent]:
    return list(client.jobs.events(id))


def told_of(receiver: Receiver, ids: list[str]) -> dict[str, set[str]]:
    """The ids of the webhooks about each job, once there is one about each."""
    until = time.monotonic() + SECONDS
    while True:
        told: dict[str, set[str]] = {id: set() for id in ids}
        for name, content in list(receiver.got):
            about = json.loads(content)["id"]
            if about in told:
                told[about].add(name)
        if all(told.values()) or time.monotonic() > until:
            return told
        time.sleep(0.2)


def test_what_was_broken_serves_again(house: House) -> None:
    with Client(house.url, timeout=60) as client:
        answer = patiently(lambda: client.generate(**body(1)))
        assert decode(answer.data[0].content).shape == (96, 96, 3)
