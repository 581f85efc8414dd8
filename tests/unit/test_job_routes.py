"""`/v1/jobs` over a true store and runner: what is answered, to whom, in which state; `Prefer: wait`."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI, Request, Response

from deployments.job_runner import Runner
from deployments.store.jobs import JobStore
from serve.job_answers import problem_json
from serve.job_desk import JobDesk
from serve.jobs import JobsQuery
from serve.waiting import preferred
from tests.job_asking import LONG, PICTURE, http_of, over, post, serving
from tests.job_serving import QUICK, STEP_S, Painter, desk_of, opened, painted, routes, running, until


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = opened(tmp_path)
    yield store
    store.close()


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
            before_all = await post(http, {"prompt": "x"}, {"x-scopes": "jobs generate"}, priority="high")
            assert before_all.status_code == 403 and before_all.json()["details"] == {"scope": "admin"}
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
