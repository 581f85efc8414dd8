"""The door: what is refused before anything is asked of a model, and what a body becomes. Behind it stands who only writes down."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
from starlette.requests import ClientDisconnect

from deployments.errors import Cancelled, LikenessError, MultipleFaces
from serve.answers import GenerateResponse
from serve.client import Client
from serve.ingress import Calls, api, told
from serve.limits import Room
from serve.problem import problem_of

ADA = Path(__file__).resolve().parents[2] / "samples" / "characters" / "ada-1.png"
LIMIT = 2**20


class Scribe:
    """Answers every request with no pictures, and remembers what was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str | None, Mapping[str, Any]]] = []

    async def generate(self, workflow: str | None, body: Mapping[str, Any], owner: str) -> GenerateResponse:
        self.asked.append((workflow, body))
        return GenerateResponse(created=0, model="none", data=[])


@pytest.fixture
def scribe() -> Scribe:
    return Scribe()


@pytest.fixture
def http(scribe: Scribe) -> Iterator[httpx.Client]:
    app = api(cast(Calls, scribe), LIMIT)
    with Client("http://likeness.local", transport=httpx.ASGITransport(app, raise_app_exceptions=False)) as client:
        yield client._http


DEEP = "[" * 100_000 + "]" * 100_000
NESTED = '{"identity":' * 200 + "1" + "}" * 200


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (DEEP, "more levels"),
        (NESTED, "more levels"),
        (json.dumps({f"field{k}": 1 for k in range(20_000)}), "more values"),
        ('{"prompt": "x", "seed": 1, "seed": 2}', "'seed' is given twice"),
        ('{"prompt": "x", "identity": {"weight": 1, "weight": 2}}', "'weight' is given twice"),
        ('{"prompt": "x", "\\ud800": 1, "\\ud800": 2}', "given twice"),
    ],
    ids=["deep", "nested", "many", "twice", "twice inside", "twice in surrogates"],
)
def test_json_that_no_request_looks_like_is_refused_at_the_door(http: httpx.Client, scribe: Scribe, content: str, says: str) -> None:
    answer = http.post("/v1/generate", content=content)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request"), answer.text
    assert says in answer.json()["detail"] and answer.json()["remedy"]
    assert not scribe.asked


def test_a_query_is_refused_rather_than_passed_over(http: httpx.Client, scribe: Scribe) -> None:
    for address in ("/flux-pulid?seed=7", "/v1/generate?workflow=flux-pulid"):
        answer = http.post(address, json={"prompt": "x"})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert not scribe.asked


def test_text_in_a_form_stays_text_and_people_are_json(http: httpx.Client, scribe: Scribe) -> None:
    people = [{"method": "pulid", "images": ["QUJD"]}]
    fields = {"prompt": "1984", "version": "0.9", "seed": "7", "identities": json.dumps(people), "negative_prompt": "[1]"}
    answer = http.post("/v1/generate", data=fields, files={"reference_image": ADA.read_bytes()})
    assert answer.status_code == 200, answer.text
    ((workflow, body),) = scribe.asked
    assert workflow is None and len(body.pop("reference_image")) > 1000  # type: ignore[attr-defined]
    assert body == fields | {"identities": people}


def test_a_list_in_a_form_is_that_list(http: httpx.Client, scribe: Scribe) -> None:
    http.post("/v1/generate", data={"reference_images": '["QUJD", "QUJE"]'}, files={"reference_image": b""})
    http.post("/v1/generate", data={"reference_images": "QUJD"}, files={"reference_image": b""})
    assert [body["reference_images"] for _, body in scribe.asked] == [["QUJD", "QUJE"], ["QUJD"]]


FORM = "multipart/form-data; boundary=zz"


@pytest.mark.parametrize(
    ("request_", "says"),
    [
        ({"files": {"prompt": ("prompt.txt", b"a portrait")}}, "`prompt` came as a file"),
        ({"content": b"abc", "headers": {"content-type": "multipart/form-data"}}, "boundary"),
        ({"content": b"abc", "headers": {"content-type": FORM}}, "cannot be read"),
        ({"content": b"abc", "headers": {"content-type": FORM, "content-length": "abc"}}, "how long"),
        ({"content": b"abc", "headers": {"content-type": FORM, "content-length": "9" * 5000}}, "larger"),
        ({"content": b"abc", "headers": {"content-type": FORM, "content-length": str(LIMIT + 1)}}, "larger"),
        ({"files": [("reference_images", ("a.png", b"x"))] * 65}, "Too many files"),
        ({"data": {"identities": DEEP}, "files": {"reference_image": b""}}, "`identities` has more levels"),
        ({"data": {"identities": "[{"}, "files": {"reference_image": b""}}, "`identities` is no JSON"),
    ],
)
def test_a_form_that_cannot_be_meant_is_refused(http: httpx.Client, scribe: Scribe, request_: dict[str, Any], says: str) -> None:
    answer = http.post("/v1/generate", **request_)
    assert (answer.status_code, answer.json()["code"]) == ((413, "too_large") if says == "larger" else (422, "invalid_request")), (
        answer.text
    )
    assert says in answer.json()["detail"] and answer.json()["remedy"]
    assert not scribe.asked


def test_a_wrong_method_is_told_which_one_is_right(http: httpx.Client) -> None:
    for method, path, allowed in (("GET", "/flux-pulid", "POST"), ("OPTIONS", "/v1/generate", "POST"), ("DELETE", "/v1/models", "GET")):
        answer = http.request(method, path)
        assert (answer.status_code, answer.headers["allow"], answer.json()["code"]) == (405, allowed, "method_not_allowed")
        assert answer.json()["remedy"]
    assert http.get("/nowhere").json()["code"] == "not_found"


def test_no_route_takes_anything_but_a_body(http: httpx.Client) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    given = [item for methods in paths.values() for what in methods.values() for item in what.get("parameters", ())]
    assert {item["in"] for item in given} == {"path"}


def test_an_error_that_crossed_deployments_is_told_whole() -> None:
    from ray.exceptions import RayTaskError

    wrapping: Any = RayTaskError

    error = MultipleFaces("Two faces.", details={"boxes": [[0, 1, 2, 3]]})
    once = wrapping("FaceServer.people", "", error).as_instanceof_cause()
    twice = wrapping("Workflows.generate", "", once).as_instanceof_cause()
    for wrapped in (error, once, twice):
        assert problem_of(told(wrapped)) == problem_of(error) and problem_of(error).title


def test_who_goes_away_is_no_fault_of_the_server(caplog: pytest.LogCaptureFixture) -> None:
    for error in (ClientDisconnect(), asyncio.CancelledError()):
        assert isinstance(told(error), Cancelled)
    assert not caplog.records


def test_errors_of_the_door_reach_the_sdk_as_errors(http: httpx.Client) -> None:
    with Client("http://likeness.local", transport=http._transport) as client, pytest.raises(LikenessError) as caught:
        client.generate(prompt="x" * 2 * LIMIT)
    assert caught.value.code == "too_large"


def test_whom_there_is_no_room_for_is_refused_before_the_body_is_looked_at(scribe: Scribe) -> None:
    room = Room(1)
    app = api(cast(Calls, scribe), LIMIT, room=room)
    with Client("http://likeness.local", transport=httpx.ASGITransport(app, raise_app_exceptions=False)) as client:
        with room.one():
            told = client._http.post("/v1/generate", content=DEEP)  # which would be refused for what it is
        assert (told.status_code, told.json()["code"]) == (429, "queue_full") and int(told.headers["retry-after"]) > 0
        assert not scribe.asked
        for _ in range(3):  # those that were answered have left
            assert client._http.post("/v1/generate", json={"prompt": "x"}).status_code == 200
