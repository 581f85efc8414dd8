"""What is heard of jobs while they are done: the events of `/v1/jobs/{id}/events`, and the SDK's `client.jobs` that reads them."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deployments.errors import ArtifactNotFound, IdempotencyConflict, InvalidRequest, JobNotFound, LikenessError
from deployments.store.jobs import JobStore
from serve.client_jobs import AsyncJobs, Jobs
from tests.job_asking import LONG, PICTURE, events, http_of, post, server, serving
from tests.job_serving import desk_of, opened, painted, routes, running


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = opened(tmp_path)
    yield store
    store.close()


def test_events_can_be_read_to_the_end_and_resumed_in_the_midst(store: JobStore) -> None:
    async def main() -> None:
        async with serving(store) as (http, _):
            job = (await post(http, {"prompt": "a portrait", "num_inference_steps": 20}, previews=True)).json()["id"]
            live = await events(http, job)  # while it runs
            kinds = [event.kind for event in live]
            assert kinds[:2] == ["queued", "started"] and kinds[-1] == "succeeded" and kinds.count("progress") >= 2
            assert "preview" not in kinds
            steps = [event.data["step"] for event in live if event.kind == "progress"]
            assert steps == sorted(steps)
            for cut in (0, 1, len(live) - 1):
                rest = [event for event in live if event.seq > live[cut].seq]
                assert await events(http, job, headers={"last-event-id": str(live[cut].seq)}) == rest
                assert await events(http, job, f"?after={live[cut].seq}") == rest
            assert await events(http, job, "?after=999999") == []
            for wrong in ({"last-event-id": "x"}, {"last-event-id": "-1"}, {"last-event-id": "9" * 30}):
                assert (await http.get(f"/v1/jobs/{job}/events", headers=wrong)).json()["code"] == "invalid_request"
            assert (await http.get(f"/v1/jobs/{job}/events?after=x")).json()["code"] == "invalid_request"

    asyncio.run(main())


def test_previews_come_where_they_are_asked_for_twice(store: JobStore) -> None:
    async def main() -> None:
        async with serving(store) as (http, _):
            job = (await post(http, LONG | {"num_inference_steps": 30, "n": 1}, previews=True)).json()["id"]
            seen = [event for event in await events(http, job, "?previews=true") if event.kind == "preview"]
            assert seen and all(base64.b64decode(event.data["jpeg"]).startswith(b"\xff\xd8") for event in seen)
            without = (await post(http, LONG | {"num_inference_steps": 10, "n": 1})).json()["id"]
            assert not [event for event in await events(http, without, "?previews=true") if event.kind == "preview"]

    asyncio.run(main())


def test_a_silent_stream_says_that_it_is_there(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.job_desk._KEEP_ALIVE_S", 0.1)

    async def main() -> None:
        async with http_of(routes(desk_of(store))) as http:
            job = (await post(http, {"prompt": "x"})).json()["id"]
            reading = asyncio.create_task(http.get(f"/v1/jobs/{job}/events"))
            await asyncio.sleep(1)
            await http.post(f"/v1/jobs/{job}/cancel")
            blocks = (await reading).text.split("\n\n")
            assert sum(block.startswith(":") for block in blocks) >= 2 and "event: canceled" in blocks[-2]

    asyncio.run(main())


def test_the_sdk_over_a_socket(store: JobStore) -> None:
    with server(store) as url, httpx.Client(base_url=url) as http:
        mine = Jobs(http)
        job = mine.submit(workflow="flux-pulid", prompt="x", reference_image=PICTURE, n=2, seed=3, num_inference_steps=10)
        heard = [event.kind for event in job.events()]
        assert heard[0] == "queued" and heard[-1] == "succeeded" and "progress" in heard
        assert [event.kind for event in job.events(after=10**6)] == []
        answer = job.answer()
        assert [item.content for item in answer.data] == job.pictures() == [content for content, _ in painted({"n": 2, "seed": 3}).pictures]
        assert job.item.ended and answer.request["prompt"] == "x" and not job.cancel()
        assert mine.list(status="succeeded").data == [job.item] and mine.get(job.id) == job.refresh()
        failed = mine.submit(prompt="impossible")
        with pytest.raises(InvalidRequest, match="impossible"):
            failed.answer()
        long = mine.submit(**LONG, idempotency_key="k")
        assert mine.submit(**LONG, idempotency_key="k").id == long.id
        with pytest.raises(IdempotencyConflict):
            mine.submit(prompt="another", idempotency_key="k")
        with pytest.raises(TimeoutError, match=long.id):
            long.wait(timeout=0.2)
        assert long.cancel() and long.wait(timeout=5).status == "canceled"
        with pytest.raises(LikenessError, match="canceled"):
            long.pictures()
        mine.delete(long.id)
        with pytest.raises(JobNotFound):
            long.refresh()
        with pytest.raises(JobNotFound):
            list(long.events())
        with pytest.raises(ArtifactNotFound):
            mine.artifact("art_" + "0" * 24)


def test_the_sdk_takes_a_stream_up_where_it_was_cut(store: JobStore) -> None:
    """Behind a door that ends every answer after some bytes: nothing is missed, nothing comes twice."""
    job_routes = routes(desk_of(store))

    async def cutting(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            if "events" in scope.get("path", "") and message["type"] == "http.response.body" and message.get("body"):
                await send({"type": "http.response.body", "body": message["body"], "more_body": False})
                raise ConnectionError
            await send(message)

        try:
            await job_routes(scope, receive, sent)
        except ConnectionError:
            return

    async def main() -> None:
        async with running(store), http_of(cutting) as http:  # type: ignore[arg-type]
            job = await AsyncJobs(http).submit(prompt="a portrait", num_inference_steps=15)
            heard = [event async for event in job.events()]
            assert [event.seq for event in heard] == sorted({event.seq for event in heard})
            assert heard[0].kind == "queued" and heard[-1].kind == "succeeded"
            everything = store.events(job.id, "ada", limit=1000)
            assert [event.seq for event in heard] == [event.seq for event in everything]

    asyncio.run(main())


def test_the_asynchronous_sdk_does_the_same(store: JobStore) -> None:
    async def main() -> None:
        async with serving(store) as (http, _):
            mine = AsyncJobs(http)
            job = await mine.submit(prompt="x", seed=9, num_inference_steps=5)
            assert [event.kind async for event in job.events()][-1] == "succeeded"
            assert await job.pictures() == [content for content, _ in painted({"seed": 9}).pictures]
            assert (await job.answer()).data[0].seed == 9 and (await job.wait()).ended
            assert (await mine.list(limit=1)).data == [await job.refresh()]
            long = await mine.submit(**LONG)
            assert await long.cancel() and not await long.cancel()
            await mine.delete(long.id)
            with pytest.raises(JobNotFound):
                await mine.get(long.id)

    asyncio.run(main())
