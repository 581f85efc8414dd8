"""What a job has in the making: nobody's until it succeeds, its owner's from then on, and gone if it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import InvalidRequest, StoreUnavailable
from deployments.job_server import open_jobs
from deployments.store.characters import CharacterStore
from deployments.store.job_values import Lease, NewJob
from deployments.store.jobs import JobStore
from deployments.store.keys import KeyStore
from deployments.store.loras import LoraStore
from deployments.store.provisional import Provisional, maker_of
from deployments.store.settings import StoreSettings
from tests.store_places import add
from tests.unit.test_character_store import make

NEW = NewJob(kind="training", pool="train-local")
Stores = tuple[JobStore, LoraStore, CharacterStore, Provisional]


@pytest.fixture
def stores(url: str, tmp_path: Path) -> Iterator[Stores]:
    """On either database, with files of their own."""
    files = tmp_path / "files"
    opened = open_jobs(StoreSettings(url=url, folder=files), 60), LoraStore(url, files), CharacterStore(url, files), Provisional(url, files)
    yield opened
    for store in opened:
        store.close()


def begun(jobs: JobStore) -> Lease:
    jobs.submit("ada", NEW)
    lease = jobs.lease("a runner", ["train-local"], 60)
    assert lease is not None
    return lease


def succeeded(jobs: JobStore, lease: Lease, within: Any) -> bool:
    return jobs.succeed(lease, {"data": []}, (), {}, within) is not None


def test_it_is_the_owners_in_the_moment_in_which_the_job_succeeds(stores: Stores) -> None:
    jobs, loras, characters, provisional = stores
    lease = begun(jobs)
    job, maker = lease.job.id, maker_of(lease.job.id)
    lora, character = add(loras, b"a lora", maker), make(characters, 1, 2, owner=maker).id
    assert loras.list("ada") == () == characters.list("ada") and provisional.jobs() == {job}
    assert succeeded(jobs, lease, provisional.handing_over(job, "ada", lora, character))
    assert [info.id for info in loras.list("ada")] == [lora] and characters.lora(character, "ada") == (lora, None)
    assert characters.references(character, "ada") and provisional.jobs() == set()
    provisional.remove(job)
    assert loras.path(loras.get(lora, "ada").sha256).read_bytes() == b"a lora"


def test_a_lora_goes_to_a_character_of_the_owners_alone(stores: Stores) -> None:
    jobs, loras, characters, provisional = stores
    theirs, mine = make(characters, 1, owner="bea").id, make(characters, 2, owner="ada").id
    for character, attached in ((theirs, None), ("character_" + "0" * 24, None), (mine, mine)):
        lease = begun(jobs)
        lora = add(loras, b"a lora", maker_of(lease.job.id))
        assert succeeded(jobs, lease, provisional.handing_over(lease.job.id, "ada", lora, character))
        assert loras.get(lora, "ada").id == lora
        assert characters.lora(mine, "ada") == ((lora, None) if attached else None) and characters.lora(theirs, "bea") is None


def test_a_job_that_was_cancelled_or_whose_lora_is_gone_gives_nothing(stores: Stores) -> None:
    jobs, loras, characters, provisional = stores
    lease = begun(jobs)
    job, maker = lease.job.id, maker_of(lease.job.id)
    lora, character = add(loras, b"a lora", maker), make(characters, 1, owner=maker).id
    within = provisional.handing_over(job, "ada", lora, character)
    jobs.cancel(job, "ada")
    assert not succeeded(jobs, lease, within) and loras.list("ada") == () == characters.list("ada")
    assert jobs.live([job, "job_" + "0" * 24]) == set()
    for _ in range(2):  # a runner and a sweep may both see to it
        provisional.remove(job)
    assert provisional.jobs() == set() and loras.list(maker) == () == characters.list(maker)
    again = begun(jobs)
    with pytest.raises(StoreUnavailable):
        succeeded(jobs, again, provisional.handing_over(again.job.id, "ada", lora, None))
    assert jobs.get(again.job.id, "ada").status == "running" and jobs.live([again.job.id]) == {again.job.id}


def test_no_key_can_have_what_a_job_has_in_the_making(url: str) -> None:
    keys = KeyStore(url)
    with pytest.raises(InvalidRequest):
        keys.create("thief", maker_of("job_" + "0" * 24))
    keys.close()


def test_what_is_told_of_the_work_stands_in_the_event_and_in_the_job(stores: Stores) -> None:
    jobs = stores[0]
    lease = begun(jobs)
    assert jobs.progress(lease, step=3, steps=10, facts={"stage": "training", "loss": 0.5})
    info = jobs.get(lease.job.id, "ada")
    assert (info.step, info.steps, info.pictures, dict(info.facts)) == (3, 10, 0, {"stage": "training", "loss": 0.5})
    event = jobs.events(lease.job.id, "ada")[-1]
    assert event.data == {"stage": "training", "loss": 0.5, "picture": 0, "pictures": 0, "step": 3, "steps": 10}
    jobs.release(lease)
    assert jobs.get(lease.job.id, "ada").facts == {}
