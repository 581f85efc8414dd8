"""The door before a true application: who comes in, to what, and that what one owner has is not there for another."""

from __future__ import annotations

import asyncio
import gzip
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx
import pytest
import yaml
from fastapi import FastAPI, Request
from pydantic import ValidationError
from starlette.routing import Route

from deployments.errors import Forbidden, InvalidCatalog
from deployments.lora_server import LoraServer
from deployments.store.keys import KeyLimits, KeyStore
from deployments.store.migrate import migrate
from deployments.store.settings import StoreSettings
from serve.access import ACCESS, access_to, quota_of, require
from serve.bridge import Bridge
from serve.callers import SCOPES, Caller, caller_of
from serve.door import Door, DoorPolicy
from serve.door_settings import DoorSettings, refuse_open_door
from serve.ingress import Calls, api
from tests.door_places import LIMIT, SETTINGS, WORKFLOWS, Place, at
from tests.isolation import assert_isolated
from tests.lora_serving import KOHYA, LorasOnly


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


def test_a_key_opens_and_says_whose_request_it_is(place: Place) -> None:
    info, key = place.keys.create("k", owner="studio", scopes=("generate", "jobs"), limits=KeyLimits(queued_jobs=3))

    async def run() -> None:
        async with place.client() as http:
            answer = await http.get("/v1/models", headers={"authorization": f"bEaReR  {key} ", "x-request-id": "mine-1"})
            assert answer.status_code == 200, answer.text
            assert answer.json() == {
                "owner": "studio", "key": info.id, "scopes": ["generate", "jobs"], "request": "mine-1", "quota": 3,
            }  # fmt: skip
            others = await http.get("/v1/models", headers=place.key("generate"))
            assert others.json()["quota"] == SETTINGS.queued_jobs and others.json()["owner"] == others.json()["key"] != info.id

    asyncio.run(run())


@pytest.mark.parametrize("authorization", [None, "", "Bearer", "Bearer ", "Basic YTpi", "Bearer lk_1", "Bearer \xff", "lk_" + "0" * 56])
def test_without_a_key_nothing_but_healthz_opens(small: Place, authorization: str | None) -> None:
    headers = {} if authorization is None else {"authorization": authorization.encode("latin-1")}

    async def run() -> None:
        async with small.client() as http:
            for method, path in (
                ("GET", "/v1/models"),
                ("POST", "/v1/generate"),
                ("DELETE", "/v1/loras/x"),
                ("GET", "/nowhere"),
                ("GET", "/healthz/x"),
            ):
                answer = await http.request(method, path, headers=cast(Any, headers))
                assert (answer.status_code, answer.json()["code"]) == (401, "unauthenticated"), (path, answer.text)
                assert answer.headers["www-authenticate"].startswith("Bearer") and answer.json()["remedy"]
            assert (await http.get("/healthz", headers=cast(Any, headers))).json()["scopes"] == []

    asyncio.run(run())


def test_two_keys_are_none(small: Place) -> None:
    async def run() -> None:
        async with small.client() as http:
            pair = [("authorization", small.key()["authorization"]), ("authorization", small.key()["authorization"])]
            assert (await http.get("/v1/models", headers=pair)).status_code == 401

    asyncio.run(run())


def test_a_revoked_key_opens_no_longer_than_five_seconds(place: Place) -> None:
    info, key = place.keys.create("k", scopes=SCOPES)
    headers = {"authorization": f"Bearer {key}"}

    async def run() -> None:
        async with place.client() as http:
            assert (await http.get("/v1/models", headers=headers)).status_code == 200
            place.keys.revoke(info.id)
            place.clock.ahead = 5.0
            answer = await http.get("/v1/models", headers=headers)
            assert answer.status_code == 401 and "revoked" in answer.json()["detail"]

    asyncio.run(run())


def test_an_answer_that_flows_ends_with_its_key(place: Place) -> None:
    info, key = place.keys.create("k", scopes=SCOPES)

    async def run() -> None:
        came: list[bytes] = []
        began = asyncio.Event()

        async def send(message: Any) -> None:
            came.append(message.get("body", b""))
            if message.get("body") == b"first":
                began.set()
            elif message["type"] == "http.response.body" and not message.get("more_body"):
                came.append(b"the end")

        async def receive() -> Any:
            return {"type": "http.request", "body": b"", "more_body": False}

        headers = [(b"authorization", f"Bearer {key}".encode()), (b"host", b"localhost")]
        scope: dict[str, Any] = {"type": "http", "method": "GET", "path": "/v1/jobs", "query_string": b"", "headers": headers}
        # From that version on nobody listens for a client that has gone: an error tells it.
        scope |= {"client": ("192.0.2.1", 1), "asgi": {"version": "3.0", "spec_version": "2.4"}}
        answering = asyncio.create_task(place.door(scope, receive, send))
        await began.wait()
        place.keys.revoke(info.id)
        place.clock.ahead = 5.0
        place.drip.set()
        await asyncio.wait_for(answering, 10)
        assert came[-1] == b"the end" and b"second" not in came

    asyncio.run(run())


def test_a_compressed_body_is_refused_as_such(small: Place) -> None:
    async def run() -> None:
        async with small.client() as http:
            said = {**small.key(), "content-encoding": "gzip"}
            answer = await http.post("/v1/generate", content=gzip.compress(b"{}"), headers=said)
            assert answer.status_code == 422 and "compressed" in answer.json()["detail"]
            assert (await http.post("/v1/generate", content=b"{}", headers={**said, "content-encoding": "identity"})).status_code == 200

    asyncio.run(run())


def test_an_expired_key_does_not_open(lite: str) -> None:
    with closing(Place(lite)) as place:
        headers = place.key(expires_at=datetime.now(UTC) + timedelta(seconds=0.5))

        async def run() -> None:
            async with place.client() as http:
                assert (await http.get("/v1/models", headers=headers)).status_code == 200
                await asyncio.sleep(0.5)
                place.clock.ahead = 5.0
                answer = await http.get("/v1/models", headers=headers)
                assert answer.status_code == 401 and "expired" in answer.json()["detail"]

        asyncio.run(run())


def test_the_last_use_is_written_without_the_request_waiting(place: Place) -> None:
    headers = place.key()

    async def run() -> None:
        async with place.client() as http:
            await http.get("/v1/models", headers=headers)
            until = time.monotonic() + 10
            while place.keys.list()[0].last_used_at is None:
                assert time.monotonic() < until
                await asyncio.sleep(0.01)

    asyncio.run(run())


def test_a_scope_opens_what_it_is_for_and_nothing_else(small: Place) -> None:
    async def run() -> None:
        async with small.client() as http:
            for scope in SCOPES:
                headers = small.key(scope)
                for method, path, needs in (
                    ("GET", "/v1/models", "generate"),
                    ("POST", "/v1/loras", "loras"),
                    ("DELETE", "/v1/loras/x", "loras"),
                ):
                    answer = await http.request(method, path, headers=headers)
                    assert (answer.status_code == 200) == (scope == needs), (scope, path, answer.text)
                    if scope != needs:
                        assert (answer.status_code, answer.json()["code"], answer.json()["details"]) == (403, "forbidden", {"scope": needs})
                assert (await http.get("/nowhere", headers=headers)).json()["code"] == "not_found"

    asyncio.run(run())


def test_require_asks_what_the_door_asks() -> None:
    require(Caller(scopes=frozenset({"jobs"})), "jobs")
    with pytest.raises(Forbidden, match="'train'.* jobs"):
        require(Caller(scopes=frozenset({"jobs"})), "train")
    assert quota_of(cast(Request, SimpleNamespace(state=SimpleNamespace()))) is None


def whole(folder: Path) -> tuple[FastAPI, LoraServer]:
    """Every route there is, over LoRAs that are true."""
    server = LoraServer("flux1-mini", StoreSettings(url=f"sqlite:///{folder / 'loras.db'}", folder=folder / "files"))
    app = api(cast(Calls, LorasOnly(server)), LIMIT, LIMIT, owner_of=lambda request: caller_of(request).owner)
    return app, server


def test_every_route_is_in_the_table(tmp_path: Path) -> None:
    app, server = whole(tmp_path)
    server.close()
    routes = [route for route in app.routes if isinstance(route, Route)]
    assert len(routes) == len(app.routes) > 15
    for route in routes:
        for method in route.methods or ():
            access = access_to(method, route.path, WORKFLOWS)
            assert access is not None, f"{method} {route.path} is not in serve/access.py"
            expected = {"/healthz": "open", "/readyz": "status"}.get(
                route.path, "docs" if "/docs" in route.path or "openapi" in route.path else None
            )
            assert access.right == expected if expected else access.right in SCOPES
    assert {access.right for access in ACCESS.values()} == {*SCOPES, "open", "status", "docs"}


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "//v1/models",
        "/v1",
        "/v2/models",
        "/V1/models",
        "/v1/modelsx",
        "/healthz/x",
        "/healthz/",
        "/metrics/x",
        "/flux-pulid/x",
        "v1/models",
        "/v1/models\0",
    ],
)
def test_what_is_not_in_the_table_does_not_exist(path: str) -> None:
    assert access_to("GET", path, WORKFLOWS) is None


def test_the_most_exact_entry_counts() -> None:
    for method, path, right, own in (
        ("POST", "/v1/loras", "loras", True), ("GET", "/v1/loras", "loras", False), ("GET", "/v1/loras/a/b", "loras", False),
        ("POST", "/v1/training/jobs", "train", True), ("GET", "/v1/training/jobs", "train", False),
        ("POST", "/v1/evaluations", "train", True), ("GET", "/v1/evaluations/a", "train", False),
        ("POST", "/flux-pulid", "generate", False), ("GET", "/docs/oauth2-redirect", "docs", False),
    ):  # fmt: skip
        access = access_to(method, path, WORKFLOWS)
        assert access is not None and (access.right, access.own_limit) == (right, own)


def test_what_one_key_has_is_not_there_for_another(url: str, tmp_path: Path) -> None:
    app, server = whole(tmp_path)
    with closing(server), closing(KeyStore(url)) as keys:
        door = Door(app, keys, DoorPolicy(SETTINGS, LIMIT, WORKFLOWS))
        ada, bruno, faces = ({"authorization": f"Bearer {keys.create('k', scopes=scopes)[1]}"} for scopes in (SCOPES, SCOPES, ["faces"]))
        with httpx.Client(transport=Bridge(httpx.ASGITransport(door)), base_url="http://likeness.local") as http:
            lora = http.post("/v1/loras", files={"file": ("ada.safetensors", KOHYA)}, headers=ada).json()["id"]
            ids = {"/v1/loras/{id}": lora}
            assert assert_isolated(app, http, ids, ada, bruno, faces) == 3
            assert http.get("/v1/loras", headers=bruno).json() == {"data": []}
            with pytest.raises(AssertionError, match="answers another owner with 200"):
                assert_isolated(app, http, ids, ada, ada)
            with pytest.raises(AssertionError, match="Give an id for /v1/loras/{id}"):
                assert_isolated(app, http, {}, ada, bruno)
            with pytest.raises(AssertionError, match="answers its owner with 404"):
                assert_isolated(app, http, ids, bruno, ada)
            while not all(info.last_used_at for info in keys.list()):  # written beside the requests; the store is not closed under it
                time.sleep(0.01)


def test_without_auth_everybody_has_every_right(lite: str) -> None:
    with closing(at(lite, auth="off")) as place:

        async def run() -> None:
            async with place.client() as http:
                answer = await http.get("/v1/models")
                assert answer.json() | {"request": ""} == {
                    "owner": "local",
                    "key": None,
                    "scopes": sorted(SCOPES),
                    "request": "",
                    "quota": None,
                }
                assert (await http.get("/readyz")).json() == {"denoiser": True}
                assert (await http.get("/nowhere")).status_code == 404
                assert (await http.post("/v1/generate", content=bytes(LIMIT + 1))).status_code == 413

        asyncio.run(run())


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "likeness.example.org"}, {"host": "192.0.2.1:8000"}, {"host": ""}, {"host": "127.0.0.1.nip.io"}, {"host": "[x"},
        {"host": "example.org@127.0.0.1x"}, {"origin": "https://example.org"}, {"origin": "null"}, {"origin": ""}, {"origin": "http://[x"},
    ],
)  # fmt: skip
def test_without_auth_no_page_of_the_web_gets_an_answer(lite: str, headers: dict[str, str]) -> None:
    with closing(at(lite, auth="off")) as place:

        async def run() -> None:
            async with place.client() as http:
                for method, path in (("GET", "/healthz"), ("POST", "/v1/generate")):
                    answer = await http.request(method, path, headers=headers)
                    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
                for own in ({"host": "127.0.0.1:9"}, {"host": "[::1]:9"}, {"origin": "http://localhost:3000"}, {"host": "LOCALHOST"}):
                    assert (await http.get("/v1/models", headers=own)).status_code == 200

        asyncio.run(run())


@pytest.mark.parametrize(("said", "auth"), [("{}", "on"), ("{auth: on}", "on"), ("{auth: off}", "off"), ('{auth: "off"}', "off")])
def test_settings_mean_what_yaml_makes_of_them(said: str, auth: str) -> None:
    settings = DoorSettings.model_validate(yaml.safe_load(said))
    assert settings.auth == auth and DoorSettings.model_validate_json(settings.model_dump_json()) == settings
    for wrong in ({"auth": "maybe"}, {"auth": 0}, {"authorisation": "on"}, {"requests_per_minute": 0}):
        with pytest.raises(ValidationError):
            DoorSettings.model_validate(wrong)


def test_an_open_door_is_for_this_machine_alone(lite: str) -> None:
    for host in ("127.0.0.1", "127.9.9.9", "::1", "localhost"):
        refuse_open_door(DoorSettings(auth="off"), host)
    for host in ("0.0.0.0", "::", "", "192.168.1.5", "example.org", "localhost.example.org", "127.0.0.1.nip.io"):
        refuse_open_door(DoorSettings(), host)
        with pytest.raises(InvalidCatalog, match="auth: off"):
            refuse_open_door(DoorSettings(auth="off"), host)
    with closing(KeyStore(lite)) as keys:
        for settings, given in ((DoorSettings(), None), (DoorSettings(auth="off"), keys)):
            with pytest.raises(ValueError, match="KeyStore"):
                Door(FastAPI(), given, DoorPolicy(settings, LIMIT))
