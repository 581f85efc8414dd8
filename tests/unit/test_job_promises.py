"""What a job promises beside its pictures: a key that is sent again finds it whatever has changed since, and nothing is left of one that
was deleted."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.errors import CharacterNotFound
from deployments.store.artifacts import ArtifactStore
from deployments.store.job_values import NewJob
from deployments.store.jobs import JobStore
from deployments.store.migrate import migrate
from serve.job_desk import JobDesk
from tests.job_asking import PICTURE, http_of
from tests.job_serving import PUBLIC, QUICK, routes

PORTRAIT = {"prompt": "a portrait"}
THERE = "https://pictures.example/me.png"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    store = JobStore(url, ArtifactStore(str(tmp_path / "files")))
    yield store
    store.close()


class World:
    """What requests name: characters that may be deleted, and what an address holds at the moment."""

    def __init__(self) -> None:
        self.characters, self.picture, self.fetched = {"character_a"}, PICTURE, 0

    async def check(self, workflow: str | None, body: Mapping[str, Any], owner: str) -> None:
        if (id := body.get("character_id")) is not None and id not in self.characters:
            raise CharacterNotFound(f"There is no character {id!r}.")

    async def fetch(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        if body.get("reference_image") != THERE:
            return body
        self.fetched += 1
        return {**body, "reference_image": self.picture}

    def desk(self, store: JobStore) -> JobDesk:
        return JobDesk(store, QUICK, check=self.check, wake=lambda: None, guard=PUBLIC, fetch=self.fetch)


async def sent(http: httpx.AsyncClient, key: str, named: str | None = "flux-pulid", **input: Any) -> httpx.Response:
    said = {"workflow": named, "input": {**PORTRAIT, **input}}
    return await http.post("/v1/jobs", json=said, headers={"idempotency-key": key})


def test_a_key_finds_its_job_when_what_the_request_names_is_gone(store: JobStore) -> None:
    async def main() -> None:
        world = World()
        async with http_of(routes(world.desk(store))) as http:
            first = await sent(http, "k", character_id="character_a")
            world.characters.clear()
            again, other = await sent(http, "k", character_id="character_a"), await sent(http, "l", character_id="character_a")
            assert (first.status_code, again.status_code, other.status_code) == (202, 200, 404)
            assert first.json()["id"] == again.json()["id"]

    asyncio.run(main())


def test_a_key_finds_its_job_whatever_an_address_holds_by_now(store: JobStore) -> None:
    async def main() -> None:
        world = World()
        async with http_of(routes(world.desk(store))) as http:
            first = await sent(http, "k", reference_image=THERE)
            png = Path(__file__).resolve().parents[2] / "samples" / "characters" / "bruno-1.png"
            world.picture = base64.b64encode(png.read_bytes()).decode()
            again = await sent(http, "k", reference_image=THERE)
            assert (first.status_code, again.status_code, world.fetched) == (202, 200, 1)
            assert first.json()["id"] == again.json()["id"]
            assert (await sent(http, "k", reference_image=PICTURE)).status_code == 409
            job = store.get(first.json()["id"], "ada")
            assert store.pictures(job) == {"reference_image": base64.b64decode(PICTURE)}

    asyncio.run(main())


def test_a_job_is_listed_by_its_workflow_wherever_the_request_names_it(store: JobStore) -> None:
    async def main() -> None:
        async with http_of(routes(World().desk(store))) as http:
            inside, beside = await sent(http, "k", None, workflow="flux-pulid"), await sent(http, "l")
            found = (await http.get("/v1/jobs", params={"workflow": "flux-pulid"})).json()["data"]
            assert {item["id"] for item in found} == {inside.json()["id"], beside.json()["id"]}

    asyncio.run(main())


@pytest.mark.parametrize("way", ["deleted", "expired"])
def test_on_sqlite_no_byte_of_a_job_is_left(store: JobStore, tmp_path: Path, way: str) -> None:
    preview, words = b"\xff\xd8" + bytes(range(256)) * 8, "nobody else's idea"
    with_previews = {"input": {"prompt": words}, "previews": True, "pictures": {"reference_image": b"a face" * 50}}
    id = store.submit("ada", _new(**with_previews))[0].id
    kept = store.submit("ada", _new(input={"prompt": "another"}))[0].id
    lease = store.lease("one", ["draw"], 60)
    assert lease is not None and lease.job.id == id
    assert store.progress(lease, picture=0, pictures=1, step=1, steps=2, preview=preview)
    traces = [words.encode(), base64.b64encode(preview)[100:160], b"a facea face"]
    assert all(trace in _everything(tmp_path) for trace in traces)
    if way == "deleted":
        store.delete(id, "ada")
    else:
        assert store.succeed(lease, {"data": [{}]}, [(b"a face" * 50, "image/png")], {}) is not None
        assert store.expire(keep_s=-1) == 1
    assert [trace for trace in traces if trace in _everything(tmp_path)] == [] and id.encode() not in _everything(tmp_path)
    assert store.get(kept, "ada").status == "queued"


def test_what_came_with_a_job_is_gone_soon_after_its_end(store: JobStore, tmp_path: Path) -> None:
    ids = [store.submit("ada", _new(input={"prompt": "x"}, pictures={"reference_image": b"a face"}))[0].id for _ in range(3)]
    lease = store.lease("one", ["draw"], 60)
    assert lease is not None and lease.job.id == ids[0]
    store.expire()
    assert store.pictures(lease) == {"reference_image": b"a face"}
    done = store.succeed(lease, {"data": [{}]}, [(b"drawn", "image/png")], {})
    store.cancel(ids[1], "ada")
    store.expire()
    assert done is not None and done.result is not None
    assert store.artifact(done.result["data"][0]["artifact"], "ada")[1] == b"drawn"
    # Only the one that waits still has what it needs.
    left = [path.read_bytes() for path in sorted((tmp_path / "files").rglob("*")) if path.is_file()]
    assert sorted(left) == [b"a face", b"drawn"]
    assert store.pictures(store.get(ids[2], "ada")) == {"reference_image": b"a face"}


def _new(**said: Any) -> NewJob:
    return NewJob(kind="generate", pool="draw", **said)


def _everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file())
