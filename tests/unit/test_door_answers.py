"""The door before a true application: what every answer says, and what is written down of a request."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
from fastapi import Response
from starlette.types import Message

from deployments.store.migrate import migrate
from tests.door_places import Place, at


@pytest.fixture
def lite(tmp_path: Path) -> str:
    """The same, of SQLite alone: for what has nothing to do with the database."""
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    return url


@pytest.fixture
def place(url: str) -> Iterator[Place]:
    with closing(Place(url)) as place:
        yield place


@pytest.fixture
def small(lite: str) -> Iterator[Place]:
    with closing(Place(lite)) as place:
        yield place


def test_readiness_is_a_word_for_everybody_and_the_parts_for_who_looks_after_them(small: Place) -> None:
    async def run() -> None:
        async with small.client() as http:
            assert (
                (await http.get("/readyz")).json() == (await http.get("/readyz", headers=small.key("jobs"))).json() == {"status": "ready"}
            )
            assert (await http.get("/readyz", headers=small.key("admin"))).json() == {"denoiser": True}
            assert (await http.get("/readyz", headers={"authorization": "Bearer lk_1"})).status_code == 401

    asyncio.run(run())


def test_a_broken_part_is_a_word_too(lite: str) -> None:
    async def broken() -> Response:
        return Response(json.dumps({"detail": "FaceServer did not start: /secret/path"}), 503, media_type="application/problem+json")

    with closing(Place(lite)) as place:
        place.app.router.routes[:] = [route for route in place.app.routes if getattr(route, "path", "") != "/readyz"]
        place.app.add_api_route("/readyz", broken)

        async def run() -> None:
            async with place.client() as http:
                answer = await http.get("/readyz")
                assert (answer.status_code, answer.json(), answer.headers["content-length"]) == (503, {"status": "not ready"}, "22")

        asyncio.run(run())


def test_documentation_is_open_where_the_settings_say_so_and_swagger_may_run(lite: str) -> None:
    for docs in (True, False):
        with closing(at(lite, docs=docs)) as place:

            async def run(place: Place = place, docs: bool = docs) -> None:
                async with place.client() as http:
                    for path in ("/docs", "/openapi.json"):
                        answer = await http.get(path)
                        assert answer.status_code == (200 if docs else 401), path
                        assert (await http.get(path, headers=place.key("faces"))).status_code == 200
                    page = await http.get("/docs", headers=place.key())
                    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
                    for source, name in (
                        (r'<script src="(https://[^/"]+)', "script-src"),
                        (r'<link[^>]*stylesheet" href="(https://[^/"]+)', "style-src"),
                    ):
                        hosts = re.findall(source, page.text)
                        assert hosts and all(host in policy[name] for host in hosts)
                    (icon,) = re.findall(r'icon" href="(https://[^/"]+)', page.text)
                    assert icon in policy["img-src"] and "'unsafe-inline'" in policy["script-src"] and policy["connect-src"] == "'self'"

            asyncio.run(run())


def test_every_answer_has_the_headers_and_no_cookie(small: Place) -> None:
    async def run() -> None:
        async with small.client() as http:
            key = small.key()
            answers = [
                await http.request(method, path, headers=headers)
                for method, path, headers in (
                    ("POST", "/v1/loras", key), ("GET", "/v1/models", {}), ("GET", "/healthz", {}), ("GET", "/readyz", {}),
                    ("GET", "/nowhere", key), ("PATCH", "/v1/models", key),
                )
            ]  # fmt: skip
            assert [answer.status_code for answer in answers] == [200, 401, 200, 200, 404, 405]
            for answer in answers:
                assert answer.headers["x-content-type-options"] == "nosniff" and answer.headers["referrer-policy"] == "no-referrer"
                assert answer.headers["content-security-policy"].startswith("default-src 'none'")
                assert answer.headers["cache-control"] == "no-store" and "set-cookie" not in answer.headers
                assert re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])

    asyncio.run(run())


def test_what_the_application_says_of_caching_stays(small: Place) -> None:
    async def kept() -> Response:
        return Response(b"x", headers={"cache-control": "private, max-age=60", "etag": '"1"'})

    small.app.add_api_route("/v1/artifacts/{id}", kept)

    async def run() -> None:
        async with small.client() as http:
            answer = await http.get("/v1/artifacts/x", headers=small.key())
            assert answer.headers["cache-control"] == "private, max-age=60" and answer.headers["etag"] == '"1"'

    asyncio.run(run())


@pytest.mark.parametrize("sent", ["ok-1", "A.b:c_9", "x" * 128])
def test_a_callers_request_id_is_kept(small: Place, sent: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "likeness")

    async def run() -> None:
        async with small.client() as http:
            answer = await http.get("/v1/models", headers={"x-request-id": sent})
            assert answer.headers["x-request-id"] == answer.json()["request_id"] == sent

    asyncio.run(run())
    assert f"request {sent}, GET /v1/models, is refused: unauthenticated" in caplog.text


@pytest.mark.parametrize("sent", ["", "x" * 129, "a b", "a\x1b[2J", "é", "a;b", "<script>"])
def test_a_request_id_that_could_do_harm_is_replaced(small: Place, sent: str) -> None:
    async def run() -> None:
        async with small.client() as http:
            answer = await http.get("/healthz", headers=cast(Any, {"x-request-id": sent.encode("latin-1")}))
            assert (
                re.fullmatch(r"req_[0-9a-f]{24}", answer.headers["x-request-id"])
                and answer.json()["request"] == answer.headers["x-request-id"]
            )

    asyncio.run(run())


def test_where_the_proxy_adds_the_request_id_the_door_does_not(lite: str) -> None:
    async def run() -> None:
        with closing(Place(lite)) as place:
            place.door._policy = replace(place.door._policy, echo=False)
            async with place.client() as http:
                answer = await http.get("/healthz", headers={"x-request-id": "a"})
                assert "x-request-id" not in answer.headers and answer.json()["request"] == "a"

    asyncio.run(run())


@pytest.mark.parametrize("name", ["x-request-timeout-seconds", "X-Request-Disconnect-Disabled"])
def test_headers_that_would_change_what_serve_does_are_refused(small: Place, name: str) -> None:
    async def run() -> None:
        async with small.client() as http:
            for path in ("/v1/models", "/healthz"):
                answer = await http.get(path, headers={**small.key(), name: "1"})
                assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request") and name.lower() in answer.json()["detail"]

    asyncio.run(run())


def test_no_websocket_and_the_log_ends_with_the_application(small: Place) -> None:
    async def run() -> None:
        sent: list[Message] = []

        async def send(message: Message) -> None:
            sent.append(message)

        async def nothing() -> Message:
            raise AssertionError

        await small.door({"type": "websocket", "path": "/v1/models", "headers": []}, nothing, send)
        assert sent == [{"type": "websocket.close", "code": 1008}]
        async with small.client() as http:
            await http.get("/v1/models")
        assert small.audit.entries() == ()
        life: list[Message] = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def living() -> Message:
            return life.pop(0)

        await small.door({"type": "lifespan", "state": {}}, living, send)
        assert sent[-1]["type"] == "lifespan.shutdown.complete"
        assert [entry.status for entry in small.audit.entries()] == [401]

    asyncio.run(run())


def test_what_changes_something_or_is_refused_is_written_down_and_nothing_that_was_said(place: Place) -> None:
    info, key = place.keys.create("k", owner="studio", scopes=("loras", "generate"))
    headers = {"authorization": f"Bearer {key}"}
    secret = "a-prompt-that-nobody-may-keep"
    lora = f"lora_{'b' * 24}"

    async def run() -> None:
        async with place.client() as http:
            asked = (
                ("POST", "/v1/loras", 200), ("DELETE", f"/v1/loras/{lora}", 200), ("DELETE", f"/v1/loras/{secret}", 200),
                ("POST", "/v1/generate", 200), ("GET", "/v1/models", 200), ("GET", "/v1/jobs", 403), ("GET", f"/v1/jobs/{secret}", 403),
                ("POST", f"/{secret}", 404),
            )  # fmt: skip
            for number, (method, path, status) in enumerate(asked):
                answer = await http.request(method, path, headers={**headers, "x-request-id": f"r{number}"}, content=secret.encode())
                assert answer.status_code == status, answer.text
            for given in ({}, {"authorization": f"Bearer {secret}"}):
                await http.get(f"/v1/models?prompt={secret}", headers={**given, "x-request-id": "r9"})

    asyncio.run(run())
    place.audit.flush()
    found = [(entry.request, entry.owner, entry.key, entry.action, entry.subject, entry.status) for entry in place.audit.entries()]
    assert found == [
        ("r0", "studio", info.id, "POST /v1/loras", f"lora_{'a' * 24}", 200),
        ("r1", "studio", info.id, "DELETE /v1/loras/{id}", lora, 200),
        ("r2", "studio", info.id, "DELETE /v1/loras/{id}", None, 200),
        ("r5", "studio", info.id, "GET /v1/jobs", None, 403),
        ("r6", "studio", info.id, "GET /v1/jobs", None, 403),
        ("r9", None, None, "GET /v1/models", None, 401),
        ("r9", None, None, "GET /v1/models", None, 401),
    ]
    assert all(secret not in repr(entry) and key not in repr(entry) for entry in place.audit.entries())
