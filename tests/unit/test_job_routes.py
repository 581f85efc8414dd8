"""`/v1/jobs` over a true store and runner: what is answered, to whom, in which state; the SDK's `client.jobs`; `Prefer: wait`."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from deployments.errors import ArtifactNotFound, IdempotencyConflict, InvalidRequest, JobNotFound, LikenessError
from deployments.job_runner import JobSettings, Runner
from deployments.store.jobs import JobStore
from serve.client_jobs import AsyncJobs, Jobs
from serve.job_answers import JobEvent, problem_json
from serve.job_desk import JobDesk
from serve.jobs import JobsQuery
from serve.waiting import preferred
from tests.job_serving import QUICK, STEP_S, Painter, desk_of, opened, painted, routes, running, until
from tests.lora_serving import over_a_socket

URL = "http://likeness.local"
PICTURE = base64.b64encode((Path(__file__).resolve().parents[2] / "samples" / "characters" / "ada-1.png").read_bytes()).decode()
LONG: dict[str, Any] = {"prompt": "a portrait", "num_inference_steps": 100, "n": 8}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = opened(tmp_path)
    yield store
    store.close()


@asynccontextmanager
async def http_of(app: FastAPI, owner: str = "ada") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(base_url=URL, transport=transport, headers={"x-owner": owner}) as http:
        yield http


@asynccontextmanager
async def serving(store: JobStore, settings: JobSettings = QUICK) -> AsyncIterator[tuple[httpx.AsyncClient, Runner]]:
    async with running(store, settings) as runner, http_of(routes(desk_of(store, runner.wake, settings))) as http:
        yield http, runner


@contextmanager
def server(store: JobStore) -> Iterator[str]:
    """The address of a server over a socket, with a runner in a thread of its own."""
    over, started = threading.Event(), threading.Event()

    async def work() -> None:
        async with running(store):
            started.set()
            while not over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    started.wait(10)
    try:
        with over_a_socket(routes(desk_of(store))) as url:
            yield url
    finally:
        over.set()
        thread.join()


async def post(http: httpx.AsyncClient, input: dict[str, Any], headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return await http.post("/v1/jobs", json={"input": input, **fields}, headers=headers)


async def over(http: httpx.AsyncClient, id: str) -> dict[str, Any]:
    for _ in range(1000):
        found: dict[str, Any] = (await http.get(f"/v1/jobs/{id}")).json()
        if found["status"] not in ("queued", "running"):
            return found
        await asyncio.sleep(0.02)
    raise AssertionError("it does not end")


async def events(http: httpx.AsyncClient, id: str, query: str = "", headers: dict[str, str] | None = None) -> list[JobEvent]:
    answer = await http.get(f"/v1/jobs/{id}/events{query}", headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        event = JobEvent.model_validate_json(lines["data"])
        assert (int(lines["id"]), lines["event"]) == (event.seq, event.kind)
        found.append(event)
    return found


def test_a_job_from_its_submission_to_its_pictures(store: JobStore) -> None:
    async def main() -> None:
        async with serving(store) as (http, _):
            input = {"prompt": "a portrait", "reference_image": PICTURE, "n": 2, "seed": 5}
            answer = await post(http, input, workflow="flux-pulid", priority="high")
            assert answer.status_code == 202, answer.text
            job = answer.json()
            assert answer.headers["location"] == f"/v1/jobs/{job['id']}" == job["links"]["job"]
            assert (job["kind"], job["workflow"], job["priority"]) == ("generate", "flux-pulid", "high")
            done = await over(http, job["id"])
            assert done["status"] == "succeeded" and done["attempt"] == 1 and done["error"] is None and done["eta_s"] is None
            assert done["progress"]["percent"] == 100 and done["progress"]["pictures"] == 2
            assert done["created"] <= done["started"] <= done["finished"] < done["expires"]
            assert {"queued", "total", "denoise"} <= done["timings"].keys()
            for item, (expected, _) in zip(done["result"]["data"], painted(input).pictures, strict=True):
                assert "b64_json" not in item
                file = await http.get(item["url"])
                assert (file.content, file.headers["content-type"]) == (expected, "image/png")
                again = await http.get(item["url"], headers={"if-none-match": file.headers["etag"]})
                assert (again.status_code, again.content) == (304, b"")
                assert "private" in file.headers["cache-control"]
            assert PICTURE not in json.dumps(done)

    asyncio.run(main())


def test_without_any_runner_a_job_waits_in_the_store_and_says_where(store: JobStore) -> None:
    async def main() -> None:
        async with http_of(routes(desk_of(store))) as http:
            ids = [(await post(http, {"prompt": str(k)})).json()["id"] for k in range(3)]
            assert [(await http.get(f"/v1/jobs/{id}")).json()["queue_position"] for id in ids] == [0, 1, 2]
            assert (await http.get(f"/v1/jobs/{ids[0]}")).json()["eta_s"] is None
        async with serving(store) as (http, _):
            assert [(await over(http, id))["status"] for id in ids] == ["succeeded"] * 3
            later = (await post(http, LONG)).json()
            assert 0 < later["eta_s"] < 5  # from how long the others took

    asyncio.run(main())


def test_what_the_workflow_would_refuse_is_refused_before_there_is_a_job(store: JobStore) -> None:
    async def main() -> None:
        async with http_of(routes(desk_of(store))) as http:
            for body, says in (
                ({"input": {"prompt": "x", "nonsense": 1}}, "`nonsense`"),
                ({"input": {"prompt": "x"}, "workflow": "none-such"}, "none-such"),
                ({"input": {"prompt": "x"}, "kind": "dance"}, "`kind`"),
                ({"input": "x"}, "`input`"),
                ({}, "`input`: this field is needed"),
                ({"input": {"prompt": "x"}, "priority": 7}, "`priority`"),
                ({"input": {"prompt": "x"}, "when": "now"}, "`when`: there is no such field"),
                ({"input": {"prompt": "x"}, "webhook_url": "https://user:word@example.org"}, "user name"),
                ({"input": {"prompt": "x"}, "webhook_url": "x" * 3000}, "`webhook_url`"),
            ):
                answer = await http.post("/v1/jobs", json=body)
                assert answer.status_code in (404, 422) and says in answer.json()["detail"], answer.text
            for name, value in (
                ("idempotency-key", "x" * 256),
                ("idempotency-key", ""),
                ("prefer", "wait=0"),
                ("prefer", "wait=601"),
            ):
                answer = await post(http, {"prompt": "x"}, {name: value})
                assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
            assert (await http.get("/v1/jobs")).json() == {"data": [], "next": None}

    asyncio.run(main())


def test_one_key_is_one_job(store: JobStore) -> None:
    async def main() -> None:
        key = {"idempotency-key": "order-7"}
        async with http_of(routes(desk_of(store))) as http:
            first = await post(http, {"prompt": "x", "reference_image": PICTURE}, key, workflow="flux-pulid")
            again = await post(http, {"prompt": "x", "reference_image": f"data:image/png;base64,{PICTURE}"}, key, workflow="flux-pulid")
            assert (first.status_code, again.status_code) == (202, 200) and first.json()["id"] == again.json()["id"]
            other = await post(http, {"prompt": "y", "reference_image": PICTURE}, key, workflow="flux-pulid")
            assert (other.status_code, other.json()["code"]) == (409, "idempotency_conflict")
            together = await asyncio.gather(*(post(http, {"prompt": "x"}, {"idempotency-key": "at once"}) for _ in range(8)))
            assert {answer.status_code for answer in together} == {200, 202}, [answer.text for answer in together]
            assert len({answer.json()["id"] for answer in together}) == 1
            assert sorted(answer.status_code for answer in together) == [200] * 7 + [202]
            elsewhere = await post(http, {"prompt": "z"}, {**key, "x-owner": "bruno"})
            assert elsewhere.status_code == 202

    asyncio.run(main())


def test_a_full_queue_and_a_quota_answer_429(store: JobStore) -> None:
    async def main() -> None:
        full = QUICK.model_copy(update={"room": 3, "quota": 2})
        async with http_of(routes(desk_of(store, settings=full))) as http:
            codes = []
            for owner in ("ada", "ada", "ada", "bruno", "bruno"):
                answer = await post(http, {"prompt": "x"}, {"x-owner": owner})
                codes.append((answer.status_code, answer.json().get("code"), answer.headers.get("retry-after")))
            assert codes[2] == (429, "quota_exceeded", "2") and codes[4] == (429, "queue_full", "2")
            assert [code for code, *_ in codes] == [202, 202, 429, 202, 429]

    asyncio.run(main())


def test_a_key_needs_the_scope_of_jobs_and_of_what_the_job_does(store: JobStore) -> None:
    async def main() -> None:
        async with http_of(with_workflow(desk_of(store))) as http:
            body = {"prompt": "x", "reference_image": PICTURE}
            awaited = http.post("/workflow", json=body, headers={"x-scopes": "generate", "prefer": "wait=5"})
            for scopes, asked in (("jobs", post(http, {"prompt": "x"}, {"x-scopes": "jobs"})), ("generate", awaited)):
                answer = await asked
                assert (answer.status_code, answer.json()["code"]) == (403, "forbidden"), scopes
            assert store.list("ada") == ()
            codes = [(await post(http, {"prompt": "x"}, {"x-quota": "1"})).status_code for _ in range(2)]
            assert codes == [202, 429]

    asyncio.run(main())


def test_lists_are_filtered_and_paged(store: JobStore) -> None:
    async def main() -> None:
        async with http_of(routes(desk_of(store))) as http:
            ids = [(await post(http, {"prompt": str(k)})).json()["id"] for k in range(5)]
            named = (await post(http, {"prompt": "x", "reference_image": PICTURE}, workflow="flux-pulid")).json()["id"]
            await http.post(f"/v1/jobs/{ids[1]}/cancel")
            newest = [named, *reversed(ids)]
            page, seen = None, []
            while True:
                query: dict[str, Any] = {"limit": 4, **({"before": page} if page else {})}
                found = (await http.get("/v1/jobs", params=query)).json()
                seen += [item["id"] for item in found["data"]]
                if (page := found["next"]) is None:
                    break
            assert seen == newest
            for query, expected in (
                ({"status": "canceled"}, [ids[1]]),
                ({"workflow": "flux-pulid"}, [named]),
                ({"kind": "generate", "status": "queued"}, [id for id in newest if id != ids[1]]),
                ({"kind": "dance"}, []),
            ):
                assert [item["id"] for item in (await http.get("/v1/jobs", params=query)).json()["data"]] == expected
            for wrong in ("?limit=0", "?limit=999", "?status=asleep", "?limit=1&limit=2", "?owner=bruno"):
                assert (await http.get(f"/v1/jobs{wrong}")).json()["code"] == "invalid_request"
            assert set(JobsQuery.model_fields) == {
                p["name"] for p in routes(desk_of(store)).openapi()["paths"]["/v1/jobs"]["get"]["parameters"]
            }

    asyncio.run(main())


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


def test_cancelling_is_the_same_whatever_the_state(store: JobStore) -> None:
    async def main() -> None:
        async with serving(store) as (http, runner):
            job = (await post(http, LONG)).json()["id"]
            await until(lambda: job in runner.running)
            began = time.monotonic()
            answers = [(await http.post(f"/v1/jobs/{job}/cancel")).json() for _ in range(3)]
            assert [answer["cancelled"] for answer in answers] == [True, False, False]
            assert {answer["status"] for answer in answers} == {"canceled"}
            await until(lambda: job not in runner.running)
            assert time.monotonic() - began < 2
            done = (await post(http, {"prompt": "x"})).json()["id"]
            await over(http, done)
            assert (await http.post(f"/v1/jobs/{done}/cancel")).json() == {"id": done, "cancelled": False, "status": "succeeded"}

    asyncio.run(main())


def test_deleting_takes_the_pictures_along(store: JobStore, tmp_path: Path) -> None:
    async def main() -> None:
        async with serving(store) as (http, runner):
            job = (await post(http, {"prompt": "x", "reference_image": PICTURE}, workflow="flux-pulid")).json()["id"]
            picture = (await over(http, job))["result"]["data"][0]["url"]
            assert (await http.delete(f"/v1/jobs/{job}")).json() == {"id": job, "deleted": True}
            for gone in (f"/v1/jobs/{job}", f"/v1/jobs/{job}/events", picture):
                assert (await http.get(gone)).status_code == 404
            assert not [path for path in (tmp_path / "files").rglob("*") if path.is_file()]
            long = (await post(http, LONG)).json()["id"]
            await until(lambda: long in runner.running)
            assert (await http.delete(f"/v1/jobs/{long}")).status_code == 200
            await until(lambda: long not in runner.running)

    asyncio.run(main())


ASKED = (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", ""))


def test_what_is_anothers_is_not_there(store: JobStore) -> None:
    async def main() -> None:
        async with serving(store) as (http, _):
            job = (await post(http, {"prompt": "x"})).json()["id"]
            picture = (await over(http, job))["result"]["data"][0]["url"]
            for method, path in (*((method, f"/v1/jobs/{job}{rest}") for method, rest in ASKED), ("GET", picture)):
                answer = await http.request(method, path, headers={"x-owner": "bruno"})
                assert answer.status_code == 404 and answer.json()["code"] in ("job_not_found", "artifact_not_found"), path
            assert (await http.get("/v1/jobs", headers={"x-owner": "bruno"})).json()["data"] == []
            assert (await http.get("/v1/jobs", params={"before": job}, headers={"x-owner": "bruno"})).status_code == 404
            assert (await http.get(f"/v1/jobs/{job}")).json()["status"] == "succeeded"

    asyncio.run(main())


@pytest.mark.parametrize(
    "id", ["x", "job_", "%00", "..%2f..%2fsecret", "..", "job_" + "0" * 24, "j" * 10_000, "%E2%80%AE", "job_%F0%9F%90%B1", "'--"]
)
def test_ids_that_are_none_are_not_found(store: JobStore, id: str) -> None:
    async def main() -> None:
        async with http_of(routes(desk_of(store))) as http:
            for method, rest in ASKED:
                answer = await http.request(method, f"/v1/jobs/{id}{rest}")
                assert answer.status_code in (404, 405) and answer.headers["content-type"] == "application/problem+json"
            assert (await http.get(f"/v1/artifacts/{id}")).status_code == 404

    asyncio.run(main())


def with_workflow(desk: JobDesk) -> FastAPI:
    """The routes of jobs, and one of a workflow that asks `preferred` first, as the ingress does."""
    app = routes(desk)

    async def workflow(request: Request) -> Response:
        answer = await preferred(request, "flux-pulid", await request.json(), desk)
        return answer if answer is not None else Response("drawn at once")

    app.post("/workflow")(workflow)
    return app


def test_a_workflow_may_be_awaited_as_a_job(store: JobStore) -> None:
    async def main() -> None:
        async with running(store) as runner, http_of(with_workflow(desk_of(store, runner.wake))) as http:
            body = {"prompt": "x", "reference_image": PICTURE}
            assert (await http.post("/workflow", json=body)).text == "drawn at once"
            assert (await http.post("/workflow", json=body, headers={"prefer": "respond-async"})).text == "drawn at once"
            keyed = {"prefer": "return=minimal, wait=20", "idempotency-key": "k"}
            answer = await http.post("/workflow", json=body, headers=keyed)
            assert answer.status_code == 200 and answer.headers["preference-applied"] == "wait=20"
            assert answer.json()["status"] == "succeeded" and answer.json()["workflow"] == "flux-pulid"
            again = await http.post("/workflow", json=body, headers=keyed)
            assert again.json()["id"] == answer.json()["id"]
            slow = await http.post("/workflow", json=body | {"num_inference_steps": 100}, headers={"prefer": "wait=1"})
            assert slow.status_code == 202 and slow.json()["status"] == "running" and "preference-applied" not in slow.headers
            assert (await over(http, slow.headers["location"].rsplit("/", 1)[1]))["status"] == "succeeded"
            refused = await http.post("/workflow", json={"prompt": "x", "nonsense": 1}, headers={"prefer": "wait=5"})
            assert (refused.status_code, refused.json()["code"]) == (422, "invalid_request")
            lone = await http.post("/workflow", json=body, headers={"idempotency-key": "k"})
            assert (lone.status_code, lone.json()["code"]) == (422, "invalid_request")
            posted = await post(http, {"prompt": "x"}, {"prefer": "wait=20"})
            assert (posted.status_code, posted.json()["status"]) == (200, "succeeded")

    asyncio.run(main())


def test_submitting_wakes_the_runner(store: JobStore) -> None:
    """A runner that looks by itself only now and then has the job at once."""
    rare = QUICK.model_copy(update={"poll_s": 30.0})

    async def main() -> float:
        async with serving(store, rare) as (http, _):
            await asyncio.sleep(0.2)
            began = time.monotonic()
            answer = await post(http, {"prompt": "x", "num_inference_steps": 1}, {"prefer": "wait=20"})
            assert answer.json()["status"] == "succeeded"
            return time.monotonic() - began

    assert asyncio.run(main()) < 2


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


def test_two_owners_take_turns_however_many_jobs_either_has(store: JobStore) -> None:
    async def main() -> list[str]:
        order: list[str] = []

        class Noting(Painter):
            async def __call__(self, lease: Any, report: Any) -> Any:
                order.append(lease.job.owner)
                return painted(lease.job.input)

        desk = desk_of(store)
        async with http_of(routes(desk)) as http:
            for owner in ("ada", "bruno"):
                for _ in range(20):
                    assert (await post(http, {"prompt": "x"}, {"x-owner": owner})).status_code == 202
        runner = Runner(store, {"generate": Noting(store)}, QUICK, problem_json)
        task = asyncio.create_task(runner.run())
        await until(lambda: not store.depth().get("draw", (0, 0))[0] and not runner.running, 60)
        runner.stop()
        await task
        return order

    order = asyncio.run(main())
    assert len(order) == 40
    for end in range(4, 40, 2):
        assert abs(order[:end].count("ada") - order[:end].count("bruno")) <= 2


def test_nothing_waits_for_a_step(store: JobStore) -> None:
    """Reading about a job is quick while others are being drawn."""

    async def main() -> float:
        async with serving(store) as (http, runner):
            jobs = [(await post(http, LONG)).json()["id"] for _ in range(2)]
            await until(lambda: len(runner.running) == 2)
            began = time.monotonic()
            for _ in range(20):
                assert (await http.get(f"/v1/jobs/{jobs[0]}")).status_code == 200
            took = time.monotonic() - began
            for job in jobs:
                await http.post(f"/v1/jobs/{job}/cancel")
            return took

    assert asyncio.run(main()) < 100 * STEP_S
