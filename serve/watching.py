"""The outermost layer of the ingress: every request is counted, timed and logged, whoever answers it. Knows no route's content.

Plain ASGI: it reads nothing of a body, and passes every piece of an answer on as it comes.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments import metrics
from serve.callers import Caller
from serve.logs import about

_LOG = logging.getLogger("likeness.access")
_REQUEST_ID = b"x-request-id"
_SAFE_ID = re.compile(r"[0-9A-Za-z._:-]{1,128}")
# nginx's number for a client that closed the request before its answer.
_GONE = 499
_NO_ROUTE = "none"
_NOTE = "likeness.note"
# Asked every few seconds by machines; counted, not logged.
_UNLOGGED = frozenset({"/healthz", "/readyz", "/metrics"})


@dataclass(eq=False)
class _Note:
    """What is found out about a request further inside."""

    caller: Caller | None = None
    route: object = None


class Watching:
    """Around everything, also the door. A request's id, as it is called from here on, stands in its header x-request-id."""

    def __init__(self, app: ASGIApp, routes: Iterable[BaseRoute] = (), named: Callable[[str], object] | None = None) -> None:
        """routes: of the application, for the requests that are answered before they reach one (401, 429). named: called with every
        request's id in its own task, for whoever passes it on."""
        self._app, self._routes, self._named = app, routes, named

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started, note, id = 500, time.perf_counter(), _Note(), _id_of(scope)
        headers = [(name, value) for name, value in scope["headers"] if name != _REQUEST_ID] + [(_REQUEST_ID, id.encode())]
        inner = {**scope, "headers": headers, "state": {**scope.get("state", {}), _NOTE: note}}

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        with about(request_id=id):
            if self._named is not None:
                self._named(id)
            try:
                await self._app(inner, receive, noting)
            except asyncio.CancelledError:
                status = _GONE
                raise
            finally:
                note.route = note.route or inner.get("route")
                self._tell(scope, note, status, time.perf_counter() - started)

    def _tell(self, scope: Scope, note: _Note, status: int, seconds: float) -> None:
        endpoint = self._endpoint(scope, note)
        metrics.requested(endpoint, status, seconds)
        if endpoint in _UNLOGGED:
            return
        with about(**_of(note.caller)):
            facts = {"method": scope["method"], "endpoint": endpoint, "status": status, "seconds": round(seconds, 4)}
            _LOG.log(logging.ERROR if status == 500 else logging.INFO, "%s %s %d", scope["method"], endpoint, status, extra=facts)

    def _endpoint(self, scope: Scope, note: _Note) -> str:
        """The template of the route, never the path: ids would be labels without end."""
        route: Any = note.route
        if route is None:
            found = ((candidate.matches(scope)[0], candidate) for candidate in self._routes)
            route = next((candidate for match, candidate in found if match is not Match.NONE), None)
        return str(getattr(route, "path", _NO_ROUTE))


class Known:
    """Inside the door, which has found out who asks: from here on every line of the request's says so."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = scope.get("state", {})
        caller, note = state.get("caller"), state.get(_NOTE)
        if isinstance(note, _Note):
            note.caller = caller if isinstance(caller, Caller) else None
        with about(**_of(caller)):
            try:
                await self._app(scope, receive, send)
            finally:
                if isinstance(note, _Note):
                    note.route = scope.get("route")


def _of(caller: object) -> dict[str, object]:
    return {"owner": caller.owner, "key_id": caller.key} if isinstance(caller, Caller) else {}


def _id_of(scope: Scope) -> str:
    """What the caller, or Ray Serve's proxy, calls the request; an id of ours, where that is nothing to write into a log."""
    given = next((value.decode("latin-1") for name, value in scope["headers"] if name == _REQUEST_ID), "")
    return given if _SAFE_ID.fullmatch(given) else f"req_{token_hex(12)}"
