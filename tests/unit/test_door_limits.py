"""The door before a true application: how often, how many at once, how much of a body, and what that costs whom."""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
import tracemalloc
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from fastapi import FastAPI, Request
from sqlalchemy import event
from starlette.types import Message, Receive, Scope, Send

from deployments.errors import InvalidRequest
from deployments.store.keys import KeyLimits, KeyStore
from deployments.store.migrate import migrate
from tests.door_places import LIMIT, Place, at
from tests.lora_serving import over_a_socket


@pytest.fixture
def lite(tmp_path: Path) -> str:
    """The same, of SQLite alone: for what has nothing to do with the database."""
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    return url


@pytest.fixture
def small(lite: str) -> Iterator[Place]:
    with closing(Place(lite)) as place:
        yield place


def test_the_rate_of_a_key_and_a_retry_after_that_is_true(small: Place) -> None:
    slow, other = small.key(limits=KeyLimits(requests_per_minute=20)), small.key()
    small.clock.stopped = True

    async def run() -> None:
        async with small.client() as http:
            answers = [await http.get("/v1/models", headers=slow) for _ in range(25)]
            statuses = [answer.status_code for answer in answers]
            assert statuses == [200] * 20 + [429] * 5
            refused = await http.get("/v1/models", headers=slow)
            assert (refused.json()["code"], refused.headers["retry-after"]) == ("rate_limited", "3")
            assert (await http.get("/v1/models", headers=other)).status_code == 200
            small.clock.ahead += int(refused.headers["retry-after"]) - 1
            assert (await http.get("/v1/models", headers=slow)).status_code == 429
            small.clock.ahead += 1
            assert (await http.get("/v1/models", headers=slow)).status_code == 200

    asyncio.run(run())


def test_of_fifty_requests_at_once_as_many_are_answered_as_may(small: Place) -> None:
    limited, free = small.key(limits=KeyLimits(concurrent_requests=4)), small.key()

    async def run() -> None:
        async with small.client() as http:
            asked = [asyncio.create_task(http.post("/v1/faces/compare", headers=limited)) for _ in range(50)]
            while sum(task.done() for task in asked) < 46:
                await asyncio.sleep(0.005)
            others = [asyncio.create_task(http.post("/v1/faces/compare", headers=free)) for _ in range(9)]
            while small.at_once < 13:
                await asyncio.sleep(0.005)
            small.gate.set()
            answers, free_answers = await asyncio.gather(*asked), await asyncio.gather(*others)
            assert sorted(answer.status_code for answer in answers) == [200] * 4 + [429] * 46
            assert {answer.json()["code"] for answer in answers if answer.status_code == 429} == {"quota_exceeded"}
            assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 429)
            assert {answer.status_code for answer in free_answers} == {200} and small.most_at_once == 13
            small.gate.clear()
            left = [asyncio.create_task(http.post("/v1/faces/compare", headers=limited)) for _ in range(4)]
            while small.at_once < 4:
                await asyncio.sleep(0.005)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            small.gate.set()
            assert (await http.post("/v1/faces/compare", headers=limited)).status_code == 200

    asyncio.run(run())


def looks(keys: KeyStore) -> list[str]:
    """Every statement that the store is asked from now on."""
    seen: list[str] = []
    event.listen(keys._database._engine, "before_cursor_execute", lambda _, cursor, statement, *rest: seen.append(statement))
    return seen


def test_a_storm_of_wrong_keys_is_held_up_before_the_database(lite: str) -> None:
    with closing(at(lite, refusals_per_minute=10)) as place:
        place.clock.stopped = True
        good, late = place.key(), place.key()

        async def run() -> None:
            async with place.client() as http, place.client("198.51.100.7") as elsewhere:
                assert (await http.get("/v1/models", headers=good)).status_code == 200
                asked = looks(place.keys)
                made = [f"Bearer lk_{number:012x}_{'a' * 43}" for number in range(500)]
                answers = await asyncio.gather(*(http.get("/v1/models", headers={"authorization": key}) for key in made))
                statuses = [answer.status_code for answer in answers]
                assert statuses.count(401) == 10 and statuses.count(429) == 490
                assert (
                    int(answers[-1].headers["retry-after"]) >= 1
                    and sum(statement.lstrip().startswith("SELECT") for statement in asked) <= 10
                )
                assert place.audit.flush() == 10
                # Whoever was known stays in, also when the store has to be asked again; other addresses don't suffer.
                place.clock.ahead = 5.5
                assert (await http.get("/v1/models", headers=good)).status_code == 200
                assert (await elsewhere.get("/v1/models", headers=late)).status_code == 200

        asyncio.run(run())


def test_one_wrong_key_again_and_again_is_looked_up_once(small: Place) -> None:
    async def run() -> None:
        async with small.client() as http:
            asked = looks(small.keys)
            wrong = {"authorization": f"Bearer lk_{'0' * 12}_{'a' * 43}"}
            answers = await asyncio.gather(*(http.get("/v1/models", headers=wrong) for _ in range(200)))
            assert {answer.status_code for answer in answers} == {401}
            assert sum("api_keys" in statement for statement in asked) == 1

    asyncio.run(run())


def test_a_good_key_is_looked_up_once_in_five_seconds(small: Place) -> None:
    headers = small.key()

    async def run() -> None:
        async with small.client() as http:
            asked = looks(small.keys)
            for _ in range(2):
                await asyncio.gather(*(http.get("/v1/models", headers=headers) for _ in range(50)))
            assert sum(statement.lstrip().startswith("SELECT") for statement in asked) == 1

    asyncio.run(run())


def test_how_long_a_refusal_takes_does_not_tell_whether_there_is_the_key(small: Place) -> None:
    _, key = small.keys.create("k")
    known, unknown = key[:-4], f"lk_{'0' * 12}_{'b' * 39}"

    async def seconds(http: httpx.AsyncClient, key: str) -> float:
        began = time.perf_counter()
        assert (await http.get("/v1/models", headers={"authorization": f"Bearer {key}"})).status_code == 401
        return time.perf_counter() - began

    async def run() -> None:
        async with small.client() as http:
            taken: dict[str, list[float]] = {known: [], unknown: []}
            for number in range(300):
                for start, times in taken.items():
                    times.append(await seconds(http, f"{start}{number:04}"))
            one, other = (statistics.median(times) for times in taken.values())
            assert 0.7 < one / other < 1.4, (one, other)

    asyncio.run(run())


def test_a_store_that_is_away_is_not_a_wrong_key(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    with closing(at(url, refusals_per_minute=2)) as place:

        async def run() -> None:
            async with place.client() as http:
                wrong = {"authorization": f"Bearer lk_{'0' * 12}_{'a' * 43}"}
                for _ in range(5):
                    answer = await http.get("/v1/models", headers=wrong)
                    assert (answer.status_code, answer.json()["code"]) == (503, "store_unavailable") and answer.headers["retry-after"]
                    assert str(tmp_path) not in answer.text
                migrate(url)
                assert (await http.get("/v1/models", headers=place.key())).status_code == 200

        asyncio.run(run())


def test_a_body_too_large_is_refused_before_it_is_read_and_while_it_is(small: Place) -> None:
    headers = small.key()
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 2**16
            yield bytes(2**16)

    async def run() -> None:
        async with small.client() as http:
            assert (await http.post("/v1/generate", headers=headers, content=bytes(LIMIT))).json() == {"size": LIMIT}
            for said in (str(LIMIT + 1), "9" * 40):
                answer = await http.post("/v1/generate", headers={**headers, "content-length": said}, content=endless())
                assert (answer.status_code, answer.json()["code"], answer.headers["connection"]) == (
                    413,
                    "too_large",
                    "close",
                ) and read == 0
            answer = await http.post("/v1/generate", headers=headers, content=endless())
            assert (answer.status_code, answer.json()["code"], answer.headers["connection"]) == (413, "too_large", "close")
            assert LIMIT < read <= LIMIT + 2 * 2**16
            # A route with a limit of its own reads as it likes.
            assert (await http.post("/v1/loras", headers=headers, content=bytes(3 * LIMIT))).json() == {"size": 3 * LIMIT}

    asyncio.run(run())


def test_an_application_that_makes_something_of_its_own_of_it_is_not_heard(small: Place) -> None:
    async def swallowing(request: Request) -> dict[str, str]:
        try:
            await request.body()
        except Exception:  # noqa: BLE001
            return {"all": "is well"}
        return {}

    async def typed(body: dict[str, Any]) -> dict[str, Any]:  # read by FastAPI, which takes every error for bad JSON
        return body

    small.app.add_api_route("/v1/faces/swallow", swallowing, methods=["POST"])
    small.app.add_api_route("/v1/faces/typed", typed, methods=["POST"])

    async def body() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b'"' + bytes(2**16)

    async def run() -> None:
        async with small.client() as http:
            for path in ("/v1/faces/swallow", "/v1/faces/typed"):
                answer = await http.post(path, headers={**small.key(), "content-type": "application/json"}, content=body())
                assert (answer.status_code, answer.json()["code"]) == (413, "too_large"), path

    asyncio.run(run())


def test_who_sends_without_end_over_a_socket_takes_no_memory(lite: str) -> None:
    place = at(lite)
    headers = place.key()
    with over_a_socket(cast(FastAPI, place.door)) as url, httpx.Client(base_url=url) as http:
        tracemalloc.start()
        try:
            sent = 0
            with socket.create_connection(("127.0.0.1", http.base_url.port), timeout=30) as connection:
                said = f"POST /v1/generate HTTP/1.1\r\nhost: x\r\nauthorization: {headers['authorization']}\r\n"
                connection.sendall(said.encode() + b"transfer-encoding: chunked\r\n\r\n")
                try:
                    while sent < 10 * 2**30:
                        connection.sendall(b"100000\r\n" + bytes(2**20) + b"\r\n")
                        sent += 2**20
                except OSError:
                    pass  # the server has answered and hung up
            assert sent < 64 * 2**20 and tracemalloc.get_traced_memory()[1] < 32 * 2**20
        finally:
            tracemalloc.stop()
        assert http.get("/v1/models", headers=headers).status_code == 200
    place.close()


def test_who_sends_nothing_after_the_headers_is_told_and_let_go(lite: str) -> None:
    place = at(lite, body_seconds=0.3)
    headers = place.key()
    with over_a_socket(cast(FastAPI, place.door)) as url, httpx.Client(base_url=url) as http:
        with socket.create_connection(("127.0.0.1", http.base_url.port), timeout=30) as connection:
            said = f"POST /v1/generate HTTP/1.1\r\nhost: x\r\nauthorization: {headers['authorization']}\r\ncontent-length: 100\r\n\r\nabc"
            connection.sendall(said.encode())
            answer = b""
            while chunk := connection.recv(2**16):
                answer += chunk
        assert answer.startswith(b"HTTP/1.1 408") and b"request_timeout" in answer and b"3 bytes of it are here" in answer
    place.close()


def test_an_answer_that_flows_is_not_held_back(lite: str) -> None:
    place = at(lite)
    with over_a_socket(cast(FastAPI, place.door)) as url, httpx.Client(base_url=url, timeout=30) as http:
        with http.stream("GET", "/v1/jobs", headers=place.key()) as answer:
            parts = answer.iter_raw()
            assert next(parts) == b"first"
            place.drip.set()
            assert next(parts) == b"second"
    place.close()


def test_the_application_sees_that_a_client_has_gone(small: Place) -> None:
    seen: list[str] = []

    async def watching(scope: Scope, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "http.disconnect":
            seen.append(message["type"])
        seen.append("gone")

    async def run() -> None:
        small.door._app = watching
        messages: list[Message] = [{"type": "http.request", "body": b"", "more_body": False}, {"type": "http.disconnect"}]
        sent: list[Message] = []

        async def receive() -> Message:
            return messages.pop(0)

        async def send(message: Message) -> None:
            sent.append(message)

        headers = [(b"authorization", small.key()["authorization"].encode())]
        scope = {"type": "http", "method": "DELETE", "path": "/v1/loras/x", "headers": headers, "client": ("192.0.2.1", 1)}
        await small.door(scope, receive, send)
        assert seen == ["http.request", "gone"] and sent == []

    asyncio.run(run())
    small.audit.flush()
    assert [entry.status for entry in small.audit.entries()] == [499]


def test_refused_lengths_are_told(small: Place) -> None:
    async def run() -> None:
        async with small.client() as http:
            answer = await http.post("/v1/generate", headers={**small.key(), "content-length": "1e9"}, content=b"")
            assert (answer.status_code, answer.json()["code"]) == (422, InvalidRequest.code)

    asyncio.run(run())
