"""What key A owns, key B can neither see, change, use nor delete: asked of every route of the whole application, and of every field that
names a thing."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from deployments.face_models import read_face_model
from serve.settings import AppSettings
from tests.character_serving import sample
from tests.isolation import assert_isolated, routes_with_ids
from tests.job_serving import painted
from tests.lora_serving import ADA as LORA
from tests.whole_application import DOOR, Whole, whole

Headers = Mapping[str, str]
PICTURE = base64.b64encode(sample("ada-1").read_bytes()).decode()
INPUT = {"prompt": "a portrait", "num_inference_steps": 1, "seed": 1}
OWNER = "olivia"
"""A's. No hexadecimal number, such as an id, can spell it."""


@dataclass(frozen=True)
class Things:
    """What A has: one of each."""

    character: str
    picture: str
    lora: str
    queued: str
    finished: str
    artifact: str
    training: str
    evaluation: str

    @property
    def jobs(self) -> list[str]:
        return sorted([self.queued, self.finished, self.training, self.evaluation])


@pytest.fixture(scope="module")
def house(handle: Any, settings: AppSettings) -> Iterator[Whole]:
    """Behind its door, over the store of the models' own settings: what Workflows reads of it is what the routes write."""
    with whole(handle, settings.model_copy(update={"door": DOOR})) as found:
        yield found


@pytest.fixture(scope="module")
def a(house: Whole) -> Headers:
    return house.key(OWNER)


@pytest.fixture(scope="module")
def b(house: Whole) -> Headers:
    return house.key("bruno")


@pytest.fixture(scope="module")
def things(house: Whole, a: Headers) -> Iterator[Things]:
    lora = _made(house, a, "/v1/loras", file=base64.b64encode(LORA).decode(), name="ada")["id"]
    character = _made(house, a, "/v1/characters", name="Ada", pictures=[PICTURE])
    _made(house, a, f"/v1/characters/{character['id']}/loras", lora_id=lora)
    finished = _made(house, a, "/v1/jobs", input={**INPUT, "reference_image": PICTURE}, workflow="flux-pulid")["id"]
    lease = house.jobs.lease("a runner", ["draw"], 60)
    assert lease is not None and lease.job.id == finished
    done = painted(INPUT)
    job = house.jobs.succeed(lease, done.answer, done.pictures, done.timings)
    assert job is not None and job.result is not None
    queued = _made(house, a, "/v1/jobs", input=INPUT)["id"]
    training = _made(house, a, "/v1/training/jobs", trigger_word="ohwx", character_id=character["id"])["id"]
    evaluation = _made(house, a, "/v1/evaluations", character_id=character["id"])["id"]
    artifact = job.result["data"][0]["artifact"]
    yield Things(character["id"], character["best"], lora, queued, finished, artifact, training, evaluation)
    for id in (training, evaluation):  # of the same store, in which others have theirs done
        house.jobs.cancel(id, OWNER)


def _made(house: Whole, headers: Headers, path: str, **body: Any) -> dict[str, Any]:
    answer = house.http.post(path, json=body, headers=dict(headers))
    assert answer.is_success, answer.text
    found: dict[str, Any] = answer.json()
    return found


def _ids(things: Things) -> dict[str, str]:
    character, job = "/v1/characters/{id}", "/v1/jobs/{id}"
    return {
        character: things.character,
        f"{character}/pictures/{{picture}}": things.picture,
        "/v1/loras/{id}": things.lora,
        job: things.finished,
        "/v1/artifacts/{id}": things.artifact,
        "/v1/training/jobs/{id}": things.training,
        "/v1/evaluations/{id}": things.evaluation,
    }


def test_no_route_that_takes_an_id_knows_another_owners_things(house: Whole, things: Things, a: Headers, b: Headers) -> None:
    one = "/v1/characters/{id}"
    bodies: dict[str, dict[str, Any]] = {
        one: {"name": "Mine"},
        f"{one}/pictures": {"pictures": [PICTURE]},
        f"{one}/loras": {"lora_id": things.lora},
    }
    before = _all_of(house, things, a)
    powerless = house.key("carla", "faces")
    asked = assert_isolated(house.app, house.http, _ids(things), a, b, powerless, bodies)
    assert asked == len(list(routes_with_ids(house.app))) >= 15
    assert _all_of(house, things, a) == before, "what another key asked for has changed something"


def test_a_job_that_waits_is_neither_cancelled_nor_deleted_by_another(house: Whole, things: Things, a: Headers, b: Headers) -> None:
    for method, suffix in (("GET", ""), ("GET", "/events"), ("POST", "/cancel"), ("DELETE", "")):
        answer = house.http.request(method, f"/v1/jobs/{things.queued}{suffix}", headers=dict(b))
        assert (answer.status_code, answer.json()["code"]) == (404, "job_not_found"), (method, suffix)
    assert house.http.get(f"/v1/jobs/{things.queued}", headers=dict(a)).json()["status"] == "queued"


def test_lists_hold_ones_own_things_alone(house: Whole, things: Things, a: Headers, b: Headers) -> None:
    owned = {"/v1/jobs": things.jobs, "/v1/characters": [things.character], "/v1/loras": [things.lora]}
    assert house.owned(a) == owned and house.owned(b) == {path: [] for path in owned}
    reading = [
        route.path for route in house.app.routes if isinstance(route, Route) and "GET" in (route.methods or ()) and "{" not in route.path
    ]
    assert {*owned, "/v1/training/jobs", "/v1/evaluations", "/v1/models", "/v1/webhooks/secret", "/metrics"} <= set(reading)
    for path in reading:
        answer = house.http.get(path, headers=dict(b))
        assert answer.is_success and not [id for id in vars(things).values() if id in answer.text], path
    # A place in A's list tells B nothing either.
    answer = house.http.get("/v1/jobs", params={"before": things.queued}, headers=dict(b))
    nobodys = house.http.get("/v1/jobs", params={"before": "job_" + "0" * 24}, headers=dict(b))
    assert (answer.status_code, _unnumbered(answer)) == (nobodys.status_code, _unnumbered(nobodys))


def test_a_second_key_of_the_same_owner_has_it_all(house: Whole, things: Things, a: Headers) -> None:
    assert house.owned(house.key(OWNER)) == house.owned(a)


def test_another_owners_things_cannot_be_used(house: Whole, things: Things, a: Headers, b: Headers) -> None:
    """By any field that names one, on any route that has the field. A's own request with the same fields is taken."""
    mine = _made(house, b, "/v1/characters", name="Bruno", pictures=[PICTURE])["id"]
    before, kept = _all_of(house, things, a), (house.owned(a), house.owned(b))
    person, lora = {"character_id": things.character}, {"loras": [{"id": things.lora}]}
    nested = {"identities": [{"method": "pulid", **person}]}
    asked: list[tuple[str, dict[str, Any]]] = [
        ("/v1/generate", {**INPUT, "workflow": "flux-pulid", **person}),
        ("/v1/generate", {**INPUT, **nested}),
        ("/v1/generate", {**INPUT, "identity": nested["identities"][0]}),
        ("/v1/generate", {**INPUT, **lora}),
        ("/flux-pulid", {**INPUT, **person}),
        ("/flux-avatar", {**INPUT, **person}),
        ("/flux-avatar", {**INPUT, "character_id": mine, **lora}),
        ("/v1/jobs", {"workflow": "flux-avatar", "input": {**INPUT, **person}}),
        ("/v1/jobs", {"input": {**INPUT, **nested}}),
        ("/v1/jobs", {"input": {**INPUT, **lora}}),
        (f"/v1/characters/{mine}/loras", {"lora_id": things.lora}),
        ("/v1/training/jobs", {"trigger_word": "ohwx", **person}),
        ("/v1/training/jobs", {"trigger_word": "ohwx", "images": [PICTURE], **person}),
        ("/v1/evaluations", person),
        ("/v1/evaluations", {"character_id": mine, "lora": things.lora}),
        ("/v1/evaluations", {"images": [PICTURE], "lora": things.lora}),
    ]
    for path, body in asked:
        for headers in ({}, {"prefer": "wait=1"}) if "characters" not in path else ({},):
            answer = house.http.post(path, json=body, headers={**b, **headers})
            names_lora = "lora" in body or "loras" in body or "lora_id" in body or "loras" in body.get("input", {})
            expected = "lora_not_found" if names_lora else "character_not_found"
            assert (answer.status_code, answer.json()["code"]) == (404, expected), (path, headers, answer.text)
            assert OWNER not in answer.text.lower(), answer.text
    patched = house.http.patch(f"/v1/characters/{mine}", json={"best": things.picture}, headers=dict(b))
    assert patched.status_code == 404
    assert _all_of(house, things, a) == before and (house.owned(a), house.owned(b)) == kept
    for body in ({**person, "workflow": "flux-pulid"}, lora):
        assert house.http.post("/v1/generate", json={**INPUT, **body}, headers=dict(a)).is_success


def test_a_key_for_jobs_does_not_draw_with_it(house: Whole) -> None:
    weak = house.key("dora", "jobs")
    answer = house.http.post("/v1/jobs", json={"input": INPUT}, headers=weak)
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    drawing = house.key("dora", "generate")
    answer = house.http.post("/v1/generate", json=INPUT, headers={**drawing, "prefer": "wait=1"})
    assert (answer.status_code, answer.json()["code"]) == (403, "forbidden")
    assert house.owned(house.key("dora"))["/v1/jobs"] == []


def test_an_idempotency_key_is_of_its_owner(house: Whole) -> None:
    one, other = house.key("one"), house.key("other")
    sent = {"idempotency-key": "the same"}
    first = house.http.post("/v1/jobs", json={"input": INPUT}, headers={**one, **sent})
    again = house.http.post("/v1/jobs", json={"input": INPUT}, headers={**one, **sent})
    foreign = house.http.post("/v1/jobs", json={"input": {**INPUT, "seed": 2}}, headers={**other, **sent})
    assert (first.status_code, again.status_code, foreign.status_code) == (202, 200, 202)
    assert first.json()["id"] == again.json()["id"] != foreign.json()["id"]


def test_webhooks_are_signed_with_a_secret_of_their_owner(house: Whole, a: Headers, b: Headers) -> None:
    def secret(headers: Headers) -> str:
        return str(house.http.get("/v1/webhooks/secret", headers=dict(headers)).raise_for_status().json()["secret"])

    mine, other = secret(a), secret(b)
    assert mine != other and mine.startswith("whsec_")
    rotated = house.http.post("/v1/webhooks/secret/rotate", headers=dict(b)).json()["secret"]
    assert rotated == secret(b) != other and secret(a) == mine


def test_the_same_lora_of_two_owners_is_two(house: Whole, things: Things, a: Headers, b: Headers) -> None:
    """The file is kept once; whoever deletes it first takes nothing from the other."""
    theirs = _made(house, b, "/v1/loras", file=base64.b64encode(LORA).decode(), name="ada")["id"]
    assert theirs != things.lora
    assert house.http.delete(f"/v1/loras/{theirs}", headers=dict(b)).is_success
    drawn = house.http.post("/v1/generate", json={**INPUT, "loras": [{"id": things.lora}]}, headers=dict(a))
    assert drawn.is_success, drawn.text


def test_metrics_and_readiness_tell_nobody_of_anybody(house: Whole, things: Things, b: Headers) -> None:
    assert house.http.get("/metrics", headers=house.key("erik", "generate", "jobs")).status_code == 403
    page = house.http.get("/metrics", headers=house.key("root", "admin")).text
    assert not [id for id in vars(things).values() if id in page] and "likeness_" in page
    assert house.http.get("/readyz").json() == {"status": "ready"}


def _all_of(house: Whole, things: Things, headers: Headers) -> dict[str, Any]:
    """Everything that A can read of what A has, as it is."""
    read: dict[str, Any] = {}
    for method, template in routes_with_ids(house.app):
        if method == "GET":
            path = template.replace("{id}", _ids(things)[template.partition("{id}")[0] + "{id}"])
            answer = house.http.get(path.replace("{picture}", things.picture), headers=dict(headers))
            # The order of the metadata in a safetensors file is no one's choice.
            read[template] = read_face_model(answer.content).packed if template.endswith("face-model") else answer.content
    read["lists"] = json.dumps(house.owned(headers))
    return read


def _unnumbered(answer: httpx.Response) -> dict[str, Any]:
    return {name: value for name, value in answer.json().items() if name not in ("request_id", "detail", "details")}
