"""What belongs to one owner is not there for another: asked of every route that takes an id, from the application's own table of routes."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.routing import Route

_PARAMETER = re.compile(r"{[^{}]+}")
_SAFE = frozenset({"GET", "HEAD"})


def routes_with_ids(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and address (`/v1/loras/{id}`) of every route that takes an id; those that change nothing first."""
    found = [
        (method, route.path) for route in app.routes if isinstance(route, Route) and "{" in route.path for method in route.methods or ()
    ]
    yield from sorted(found, key=lambda item: (item[0] not in _SAFE, item[1], item[0]))


def assert_isolated(
    app: FastAPI,
    http: httpx.Client,
    ids: Mapping[str, str],
    owner: Mapping[str, str],
    stranger: Mapping[str, str],
    powerless: Mapping[str, str] | None = None,
    bodies: Mapping[str, Mapping[str, Any]] | None = None,
) -> int:
    """Asks every route that takes an id for what the owner has, as somebody else. Returns how many routes those were.

    app: whose routes are walked. http: a client of it, with the door before it where there is one. ids: by address up to and including the
    parameter (`/v1/loras/{id}`) an id of the owner's; a route whose id is not among them fails. owner, stranger: headers of two keys with
    every scope, of different owners. powerless: of a key with no scope that fits; asked where given, together with no key at all. bodies:
    by address what a route must be sent to get as far as asking whose it is.

    The owner finds each thing before and after, so that a route which finds nothing for anybody does not pass.
    """
    asked = list(routes_with_ids(app))
    assert asked, "The application has no route with an id."
    _assert_there(http, asked, ids, owner)
    for method, template in asked:
        address, body = _filled(template, ids), (bodies or {}).get(template)
        foreign = http.request(method, address, headers=dict(stranger), json=body)
        assert foreign.status_code == 404, f"{method} {template} answers another owner with {foreign.status_code}: {foreign.text[:300]}"
        nothing = http.request(method, _filled(template, ids, altered=True), headers=dict(stranger), json=body)
        assert nothing.status_code == 404, f"{method} {template} answers {nothing.status_code} for an id of nobody's: {nothing.text[:300]}"
        assert _told(foreign) == _told(nothing), f"{method} {template} tells another owner that there is such a thing."
        if powerless is not None:
            assert http.request(method, address, headers=dict(powerless), json=body).status_code == 403, (
                f"{method} {template} needs no scope"
            )
            assert http.request(method, address, json=body).status_code == 401, f"{method} {template} needs no key"
    _assert_there(http, asked, ids, owner)
    return len(asked)


def _assert_there(http: httpx.Client, asked: list[tuple[str, str]], ids: Mapping[str, str], owner: Mapping[str, str]) -> None:
    for method, template in asked:
        if method == "GET":
            answer = http.get(_filled(template, ids), headers=dict(owner))
            assert answer.status_code == 200, f"{template} answers its owner with {answer.status_code}: {answer.text[:300]}"


def _filled(template: str, ids: Mapping[str, str], altered: bool = False) -> str:
    """The address with the ids in it. altered: the last one as one of nobody's, of the same form."""
    given = []
    for parameter in _PARAMETER.finditer(template):
        known = template[: parameter.end()]
        assert known in ids, f"Give an id for {known}: {template} is not tested without."
        given.append(ids[known])
    if altered:
        last = given[-1]
        given[-1] = last[:-1] + ("0" if last[-1] != "0" else "1")
    filled = iter(given)
    return _PARAMETER.sub(lambda _: next(filled), template)


def _told(answer: httpx.Response) -> dict[str, Any]:
    """What an answer says, without what it repeats of the question."""
    told: dict[str, Any] = answer.json()
    return {name: value for name, value in told.items() if name not in ("detail", "details", "request_id")}
