"""The door: every request passes it before it reaches a route. Who asks, what they may, how much of it, and what is written down of it.

Plain ASGI, since a middleware of Starlette's own kind would hold answers back that are to flow, and would hide that a client has gone.
Knows no route (serve/access.py has the table) and no model. Whose a key is says serve/keyring.py, how much of what serve/limits.py.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deployments.errors import InvalidRequest, LikenessError, StoreUnavailable, Unauthenticated
from deployments.store.audit import AuditEntry, AuditLog
from deployments.store.keys import KeyInfo, KeyStore
from serve.access import access_to, require
from serve.callers import SCOPES, Caller
from serve.door_settings import DoorSettings, refuse_other_pages
from serve.keyring import Keyring
from serve.limits import Body, Buckets, Clock, UnderWay, neighbourhood, refuse_length
from serve.problem import MEDIA_TYPE, RETRY_AFTER_S, problem_of

_LOG = logging.getLogger("likeness")
# Headers by which a caller could change what Ray Serve does with the request behind our back.
_REFUSED_HEADERS = (b"x-request-timeout-seconds", b"x-request-disconnect-disabled")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_METHODS = frozenset({"GET", "HEAD", "OPTIONS", "POST", "PUT", "PATCH", "DELETE"})
_SUBJECT = re.compile(r"[a-z]{1,16}_[0-9a-f]{12,32}")
_ACTION_CHARACTERS = 200
_LEFT = 499  # nginx's number for a client that has gone
_CSP = "default-src 'none'; frame-ancestors 'none'; sandbox"
# Swagger UI as FastAPI serves it: its program and style from that host, and a script and styles inside the page.
_DOCS_CSP = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' https://cdn.jsdelivr.net; "
    "img-src 'self' data: https://fastapi.tiangolo.com; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class NoSuchAddress(LikenessError):
    """There is no such address."""

    code = "not_found"
    status = 404
    advice = "The addresses and their methods are listed at /docs."


@dataclass(frozen=True)
class DoorPolicy:
    """max_body_bytes: of a request whose route has no limit of its own. workflows: the addresses of the workflows (configs/workflows/).
    echo: whether answers carry the request's id; not where Ray Serve's proxy adds that header."""

    settings: DoorSettings
    max_body_bytes: int
    workflows: frozenset[str] = frozenset()
    echo: bool = True


class Door:
    """Around an application. What it counts (rates, requests under way, keys that were seen) is in this process alone: of several ingress
    replicas each allows as much."""

    def __init__(
        self, app: ASGIApp, keys: KeyStore | None, policy: DoorPolicy, audit: AuditLog | None = None, clock: Clock = time.monotonic
    ) -> None:
        """keys: None exactly where the settings say `auth: off`; raises ValueError else. audit: closed with the application."""
        if (keys is None) != (policy.settings.auth == "off"):
            raise ValueError("`auth: on` needs a KeyStore, `auth: off` none.")
        self._app, self._policy, self._audit, self._clock = app, policy, audit, clock
        self._keyring = Keyring(keys, policy.settings.refusals_per_minute, clock) if keys is not None else None
        self._rates, self._under_way = Buckets(clock), UnderWay()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, self._closing(send))
        elif scope["type"] == "http":
            await self._visit(scope, receive, send)
        else:  # there are no websockets here
            await send({"type": "websocket.close", "code": 1008})

    async def _visit(self, scope: Scope, receive: Receive, send: Send) -> None:
        visit = _Visit(scope, self._policy.workflows)
        settings = self._policy.settings
        body = Body(receive, self._limit(visit), settings.body_seconds, settings.body_bytes_per_second, self._clock)
        answer = _Answer(send, visit, body, self._policy.echo)
        try:
            with ExitStack() as until_answered:
                scope = await self._admit(visit, answer, until_answered)
                await self._app(scope, body, answer)
        except Exception as error:
            if answer.cut:
                return
            # The application may have made something of its own of what the body was refused with.
            told = body.refused or error
            if answer.started or not isinstance(told, LikenessError):
                raise
            await _refuse(visit, answer, told)
        else:
            if body.refused is not None and not answer.started:
                await _refuse(visit, answer, body.refused)
        finally:
            self._note(visit, answer, scope)

    async def _admit(self, visit: _Visit, answer: _Answer, until_answered: ExitStack) -> Scope:
        """The scope with which the application is called: it has the caller. Raises what the request is refused with."""
        for name in _REFUSED_HEADERS:
            if name in visit.headers:
                raise InvalidRequest(f"The header {name.decode()} is not accepted.", "Leave it out.")
        if (coding := visit.header(b"content-encoding").strip().lower()) not in ("", "identity"):
            raise InvalidRequest(f"The body is compressed ({ascii(coding[:20])}), and is read as it comes.", "Send it as it is.")
        if self._keyring is None:
            refuse_other_pages(visit.header(b"host"), visit.header(b"origin") if b"origin" in visit.headers else None)
        settings, info = self._policy.settings, await self._key_of(visit)
        caller = visit.enter(info, everybody=self._keyring is None)
        state: dict[str, Any] = {"caller": caller}
        if info is not None:
            self._rates.take(info.id, info.requests_per_minute or settings.requests_per_minute, f"Requests of the API key {info.id}")
            until_answered.enter_context(self._under_way.one(info.id, info.concurrent_requests or settings.concurrent_requests))
            state["queued_jobs"] = info.queued_jobs or settings.queued_jobs
        if visit.access is None:
            raise NoSuchAddress("There is nothing at this address.")
        if visit.access.right in SCOPES:
            require(caller, visit.access.right)
        answer.status_only = visit.access.right == "status" and "admin" not in caller.scopes
        if (limit := self._limit(visit)) is not None:
            refuse_length(visit.header(b"content-length"), limit)
        return {**visit.scope, "state": {**visit.scope.get("state", {}), **state}}

    async def _key_of(self, visit: _Visit) -> KeyInfo | None:
        """Whose key the request brings; None where the door is open to all, or to this address. Raises what Keyring.owner does."""
        right = visit.access.right if visit.access is not None else None
        if self._keyring is None or right == "open" or (right == "docs" and self._policy.settings.docs):
            return None
        sent = visit.all(b"authorization")
        if right == "status" and not sent:
            return None
        scheme, _, key = sent[0].partition(" ") if sent else ("", "", "")
        if len(sent) != 1 or scheme.lower() != "bearer":
            self._keyring.refuse(visit.address)
            raise Unauthenticated("The request does not bring an API key." if not sent else "The header authorization holds no API key.")
        visit.valid = partial(self._keyring.owner, key.strip(), visit.address)
        return await visit.valid()

    def _limit(self, visit: _Visit) -> int | None:
        return None if visit.access is not None and visit.access.own_limit else self._policy.max_body_bytes

    def _note(self, visit: _Visit, answer: _Answer, scope: Scope) -> None:
        """Into the audit log: what changed something, or was not let in. Not what came too often: it did nothing, and there may be many."""
        kept = visit.access is not None and (answer.status in (401, 403) or visit.access.audits(visit.method))
        if self._audit is None or not kept or answer.status == 429:
            return
        ids = [*map(str, scope.get("path_params", {}).values()), answer.location.rpartition("/")[2]]
        caller = visit.caller
        entry = AuditEntry(
            at=datetime.now(UTC), owner=caller.owner if caller else None, key=caller.key if caller else None, request=visit.request,
            action=f"{visit.method} {getattr(scope.get('route'), 'path', visit.prefix)}"[:_ACTION_CHARACTERS],
            subject=next((id for id in ids if _SUBJECT.fullmatch(id)), None), status=answer.status or _LEFT,
        )  # fmt: skip
        self._audit.note(entry)

    def _closing(self, send: Send) -> Send:
        """What an application says of its life; the audit log ends with it."""

        async def sending(message: Message) -> None:
            if self._audit is not None and message["type"].startswith("lifespan.shutdown"):
                await asyncio.to_thread(self._audit.close)
            await send(message)

        return sending


async def _refuse(visit: _Visit, answer: _Answer, error: LikenessError) -> None:
    if isinstance(error, StoreUnavailable):  # where the store is, is not for everybody
        _LOG.error("a key cannot be looked up: %s", error)
        error = StoreUnavailable("API keys cannot be looked up at present.", "Send the request again later.")
    problem = problem_of(error).model_copy(update={"request_id": visit.request})
    headers = {"content-type": MEDIA_TYPE}
    if problem.status == 401:
        headers["www-authenticate"] = 'Bearer realm="likeness"'
    if problem.status in (429, 503):
        headers["retry-after"] = str(error.details.get("retry_after_s", RETRY_AFTER_S))
    _LOG.info("request %s, %s %s, is refused: %s", visit.request, visit.method, visit.prefix, problem.code)
    await answer.instead(problem.status, headers, problem.model_dump_json().encode())


class _Visit:
    """What is known of one request before it is let in. caller: None until it is known who asks. valid: looks again at the key that it
    brought; raises Unauthenticated."""

    def __init__(self, scope: Scope, workflows: frozenset[str]) -> None:
        self.scope, self.method = scope, scope["method"] if scope["method"] in _METHODS else "?"
        self.headers = frozenset(name for name, _ in scope["headers"])
        path = str(scope["path"]).removeprefix(scope.get("root_path", ""))
        self.access = access_to(self.method, path, workflows)
        # What a caller wrote is not repeated into logs.
        self.prefix = self.access.prefix if self.access is not None else "an unknown address"
        self.address = neighbourhood((scope.get("client") or ("nobody",))[0])
        said = self.header(b"x-request-id")
        self.request = said if _REQUEST_ID.fullmatch(said) else f"req_{secrets.token_hex(12)}"
        self.has_body = b"transfer-encoding" in self.headers or self.header(b"content-length") not in ("", "0")
        self.caller: Caller | None = None
        self.valid: Callable[[], Awaitable[KeyInfo]] | None = None

    def all(self, name: bytes) -> list[str]:
        return [value.decode("latin-1") for header, value in self.scope["headers"] if header == name]

    def header(self, name: bytes) -> str:
        """The first of that name, empty where there is none."""
        return next(iter(self.all(name)), "")

    def enter(self, info: KeyInfo | None, everybody: bool) -> Caller:
        """everybody: whether nobody needs a key. Who brings none to an address that needs none has no right."""
        if info is not None:
            self.caller = Caller(owner=info.owner, key=info.id, scopes=info.scopes & set(SCOPES), request=self.request)
            return self.caller
        found = Caller(request=self.request) if everybody else Caller(owner="", scopes=frozenset(), request=self.request)
        self.caller = found if everybody else None
        return found


class _Answer:
    """The way back: adds the headers of every answer, and knows what was said. status: 0 until then. location: the header of that name.

    status_only: of the body nothing goes out but whether the status is a good one. cut: whether it was ended because its key was.
    """

    def __init__(self, send: Send, visit: _Visit, body: Body, echo: bool) -> None:
        self._send, self._visit, self._body, self._echo = send, visit, body, echo
        self._refusing = False
        self.status, self.location = 0, ""
        self.status_only = self.cut = False

    @property
    def started(self) -> bool:
        return self.status != 0

    async def __call__(self, message: Message) -> None:
        if self._body.refused is not None and not self.started and not self._refusing:
            return  # the application speaks of an error that is not its own
        if message["type"] != "http.response.start":
            await self._go_on(message)
            if not self.status_only:
                await self._send(message)
            return
        self.status = int(message["status"])
        if self.status_only:
            await self._say_status(self.status)
            return
        await self._send({**message, "headers": self._headers(message.get("headers", ()))})

    async def _go_on(self, message: Message) -> None:
        """An answer that flows ends with the key that opened it, in order: who reads it may come again, with another one. Raises OSError
        then, as a server does where the client has gone."""
        if not self.cut and message.get("more_body") and self._visit.valid is not None:
            try:
                await self._visit.valid()
            except StoreUnavailable:  # it was valid when it came
                pass
            except LikenessError as error:
                _LOG.info("request %s is cut off: %s", self._visit.request, error)
                self.cut = True
                await self._send({"type": "http.response.body", "body": b"", "more_body": False})
        if self.cut:
            raise OSError("The answer is over.")

    async def instead(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        """A whole answer in place of the application's."""
        self._refusing, self.status_only = True, False
        length = (b"content-length", str(len(content)).encode())
        encoded = [*((name.encode(), value.encode()) for name, value in headers.items()), length]
        await self({"type": "http.response.start", "status": status, "headers": encoded})
        await self({"type": "http.response.body", "body": content})

    async def _say_status(self, status: int) -> None:
        content = b'{"status":"ready"}' if status < 400 else b'{"status":"not ready"}'
        given = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
        await self._send({"type": "http.response.start", "status": status, "headers": self._headers(given)})
        await self._send({"type": "http.response.body", "body": content})

    def _headers(self, given: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The application's own, without cookies, and ours where it says nothing else."""
        kept = [(name.lower(), value) for name, value in given if name.lower() not in (b"set-cookie", b"x-request-id")]
        said = dict(kept)
        self.location = said.get(b"location", b"").decode("latin-1")
        access = self._visit.access
        docs = access is not None and access.right == "docs"
        ours = {
            b"x-content-type-options": b"nosniff",
            b"referrer-policy": b"no-referrer",
            b"content-security-policy": (_DOCS_CSP if docs else _CSP).encode(),
        }
        if not docs:
            ours[b"cache-control"] = b"no-store"
        if self._echo:
            ours[b"x-request-id"] = self._visit.request.encode()
        if self.status >= 400 and self._visit.has_body and not self._body.ended:
            ours[b"connection"] = b"close"  # or the server would go on reading what nobody wants
        return kept + [(name, value) for name, value in ours.items() if name not in said]
