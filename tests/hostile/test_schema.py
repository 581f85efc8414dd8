"""The OpenAPI document against the whole application, by schemathesis: no request that follows it, or does not, is answered by a fault of
ours, with a status that is not in it, or with a body that is not as it says. Through a true server, behind the door, with a key."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any, cast

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import content_type_conformance, response_schema_conformance, status_code_conformance

from serve.openapi import ANYWHERE
from serve.problem import MEDIA_TYPE
from tests.character_serving import sample
from tests.lora_serving import ADA as LORA
from tests.lora_serving import over_a_socket
from tests.whole_application import Whole

Headers = dict[str, str]
CHECKS: list[Any] = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
PICTURE = base64.b64encode(sample("ada-1").read_bytes()).decode()


@pytest.fixture(scope="module")
def key(house: Whole) -> Headers:
    return house.key("schema")


@pytest.fixture(scope="module")
def address(house: Whole) -> Iterator[str]:
    with over_a_socket(cast(Any, house.entry)) as url:
        yield url


def _own(house: Whole, key: Headers) -> dict[str, dict[str, str]]:
    """By the beginning of an address: parameters of something that is there. What a test has deleted is made anew."""
    found = house.owned(key)
    for path, body in (
        ("/v1/jobs", {"input": {"prompt": "x", "num_inference_steps": 1}}),
        ("/v1/characters", {"name": "Ada", "pictures": [PICTURE]}),
        ("/v1/loras", {"name": "ada", "file": base64.b64encode(LORA).decode()}),
    ):
        if not found[path]:
            made = house.http.post(path, json=body, headers=key).raise_for_status().json()
            found[path] = [made["id"]]
    # One that waits for ever would never end its events.
    house.http.post(f"/v1/jobs/{found['/v1/jobs'][0]}/cancel", headers=key).raise_for_status()
    character = house.http.get(f"/v1/characters/{found['/v1/characters'][0]}", headers=key).json()
    picture = character["pictures"][0]["id"] if character["pictures"] else "picture_0"
    return {path: {"id": ids[0], **({"picture": picture} if path == "/v1/characters" else {})} for path, ids in found.items()}


def _quick(body: Any) -> None:
    """A request that would be drawn is drawn in one step: there are many."""
    fields = body.get("input", body) if isinstance(body, dict) else None
    if isinstance(fields, dict) and isinstance(fields.get("prompt"), str):
        for name in ("steps", "num_images"):
            fields.pop(name, None)
        fields |= {"num_inference_steps": 1, "n": 1, "scores": False}


def _conforms(house: Whole, address: str, key: Headers, examples: int) -> int:
    """Returns how many requests that were."""
    schema = schemathesis.openapi.from_dict(house.http.get("/openapi.json").json())
    asked = 0
    for found in schema.get_all_operations():
        operation: Any = cast(Any, found).ok()
        own = _own(house, key).get("/".join(operation.path.split("/")[:3]), {})
        asked += _asked(operation, own, address, key, examples)
    return asked


def _asked(operation: Any, own: dict[str, str], address: str, key: Headers, examples: int) -> int:
    """own: parameters of something that is there, sent every other time."""
    count = 0
    strategies = [operation.as_strategy(generation_mode=mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)]
    phases, checks = (Phase.generate,), tuple(HealthCheck)

    @settings(max_examples=examples, derandomize=True, deadline=None, database=None, phases=phases, suppress_health_check=checks)
    @given(case=st.one_of(strategies), known=st.booleans())
    def conforms(case: Any, known: bool) -> None:
        nonlocal count
        count += 1
        if known and own and case.path_parameters:
            case.path_parameters = {name: own.get(name, value) for name, value in case.path_parameters.items()}
        _quick(case.body)
        case.call_and_validate(base_url=address, headers=key, checks=CHECKS, timeout=60)

    conforms()
    return count


def test_the_document_tells_of_every_problem_as_what_it_is(house: Whole) -> None:
    document = house.http.get("/openapi.json").json()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            assert set(ANYWHERE) <= set(operation["responses"]), (method, path)
            problems = [answer["content"] for status, answer in operation["responses"].items() if status >= "400"]
            assert all(content[MEDIA_TYPE]["schema"] == {"$ref": "#/components/schemas/Problem"} for content in problems), (method, path)


def test_a_parameter_that_is_none_is_told_as_a_problem(house: Whole, key: Headers) -> None:
    answer = house.http.get("/v1/characters/x", params={"centroid": "perhaps"}, headers=key)
    assert (answer.status_code, answer.headers["content-type"]) == (422, MEDIA_TYPE)
    assert (answer.json()["code"], answer.json()["param"]) == ("invalid_request", "centroid")


def test_what_is_answered_is_what_the_document_says(house: Whole, address: str, key: Headers) -> None:
    assert _conforms(house, address, key, examples=6) > 150


@pytest.mark.slow
def test_what_is_answered_is_what_the_document_says_of_many(house: Whole, address: str, key: Headers) -> None:
    assert _conforms(house, address, key, examples=100) > 2500
