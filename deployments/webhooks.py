"""Webhooks as Standard Webhooks has them: signed, at least once, with one id for each event however often it is sent.

What is due comes from the store's outbox, where it was put in the transaction that ended the job; a sender may die at any line. The body is
what the address of the job answers at that moment. Whether an address may be posted to is for the guard to say (deployments/urls.py).
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import logging
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import TYPE_CHECKING, Any, Protocol

import httpx
from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import LikenessError

if TYPE_CHECKING:
    from deployments.store.outbox import Delivery, Outbox

_LOG = logging.getLogger("likeness.webhooks")
_SECRET_PREFIX, _SIGNATURE_VERSION = "whsec_", "v1"
_AGENT = "Likeness-Webhooks/1"
_GONE = 410
# Of an answer no more is read than tells a status: a receiver could send without an end.
_READ_BYTES = 64 * 2**10

Body = Callable[[str, str], bytes | None]
"""What the address of a job answers, by its id and owner; None where the job is gone."""


class Guard(Protocol):
    """Which addresses may be posted to; `deployments.urls.UrlGuard`."""

    def check(self, url: str) -> object:
        """Raises UrlNotAllowed for an address that can be refused without looking it up."""

    def transport(self) -> httpx.AsyncBaseTransport:
        """Connects to allowed addresses only, each looked up once; raises UrlNotAllowed for others."""


class WebhookSettings(BaseModel):
    """timeout_s: of a whole delivery. retry_s: the pauses after each one that failed, then it is given up. parallel: at once."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timeout_s: float = Field(default=15.0, gt=0)
    # As long as Standard Webhooks advises: a receiver may be away for a day.
    retry_s: tuple[float, ...] = (5, 30, 120, 600, 3_600, 21_600, 86_400)
    parallel: int = Field(default=32, ge=1)


class Sender:
    """Delivers what an outbox holds. Several may run on one outbox: it hands each delivery to one of them at a time."""

    def __init__(self, outbox: Outbox, body: Body, guard: Guard, settings: WebhookSettings) -> None:
        self._outbox, self._body, self._guard, self._settings = outbox, body, guard, settings
        self._sending: set[asyncio.Task[None]] = set()
        self._client: httpx.AsyncClient | None = None

    async def turn(self) -> int:
        """Begins to send what is due, as far as there is room; returns how many. A slow receiver holds up none of the others.
        Raises StoreUnavailable."""
        room = self._settings.parallel - len(self._sending)
        if room <= 0:
            return 0
        # A sender that dies holds its deliveries for this long; one that lives is done with them well before.
        due = await asyncio.to_thread(partial(self._outbox.due, None, room, 4 * self._settings.timeout_s))
        for delivery in due:
            task = asyncio.create_task(self._deliver(delivery))
            self._sending.add(task)
            task.add_done_callback(self._sent)
        return len(due)

    async def close(self) -> None:
        """Waits for what is being sent."""
        if self._sending:
            await asyncio.wait(self._sending)
        if self._client is not None:
            await self._client.aclose()
            self._client = None

    def _sent(self, task: asyncio.Task[None]) -> None:
        self._sending.discard(task)
        # What could not be written down is sent again once its claim has run out.
        if not task.cancelled() and (error := task.exception()) is not None:
            _LOG.warning("a webhook could not be seen to: %s", error)

    def _http(self) -> httpx.AsyncClient:
        """One for all: its connections are kept, and nothing that an answer sets. Redirects are answers like any other."""
        if self._client is None:
            forgetful = CookieJar(DefaultCookiePolicy(allowed_domains=[]))
            self._client = httpx.AsyncClient(
                transport=self._guard.transport(), follow_redirects=False, timeout=self._settings.timeout_s, trust_env=False,
                cookies=forgetful,
            )  # fmt: skip
        return self._client

    async def _deliver(self, delivery: Delivery) -> None:
        body = await asyncio.to_thread(self._body, delivery.job_id, delivery.owner)
        if body is None:  # the job was deleted meanwhile: there is nothing left to tell
            await asyncio.to_thread(self._outbox.failed, delivery.id, None)
            return
        secret = await asyncio.to_thread(self._outbox.secret, delivery.owner)
        status = await self._posted(delivery, body, secret)
        if status is not None and 200 <= status < 300:
            await asyncio.to_thread(self._outbox.delivered, delivery.id)
            return
        retry = None if status == _GONE else self._next(delivery.attempt)
        _LOG.warning("webhook %s (attempt %d): %s, %s", delivery.id, delivery.attempt, status or "no answer", retry or "given up")
        await asyncio.to_thread(self._outbox.failed, delivery.id, retry)

    async def _posted(self, delivery: Delivery, body: bytes, secret: str) -> int | None:
        """The status of the answer, None where there was none."""
        headers = signed(secret, delivery.id, datetime.now(UTC), body)
        try:
            self._guard.check(delivery.url)  # again: what is allowed may have changed since it was submitted
            async with asyncio.timeout(self._settings.timeout_s):
                return await _status(self._http().stream("POST", delivery.url, content=body, headers=headers))
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, OSError, LikenessError) as error:
            _LOG.info("webhook %s: %s", delivery.id, error or type(error).__name__)
            return None

    def _next(self, attempt: int) -> datetime | None:
        """When to try again after so many attempts; None: never."""
        pauses = self._settings.retry_s
        return datetime.now(UTC) + timedelta(seconds=pauses[attempt - 1]) if attempt <= len(pauses) else None


def signed(secret: str, id: str, at: datetime, body: bytes) -> dict[str, str]:
    """The headers of a delivery. The signature is over `id.timestamp.body`, under the bytes that the secret holds in base64.

    Source: https://github.com/standard-webhooks/standard-webhooks/blob/main/spec/standard-webhooks.md, "Signature scheme".
    """
    key = base64.b64decode(secret.removeprefix(_SECRET_PREFIX))
    timestamp = str(int(at.timestamp()))
    digest = hmac.new(key, b".".join((id.encode(), timestamp.encode(), body)), hashlib.sha256).digest()
    return {
        "content-type": "application/json",
        "user-agent": _AGENT,
        "webhook-id": id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"{_SIGNATURE_VERSION},{base64.b64encode(digest).decode()}",
    }


async def _status(asked: Any) -> int:
    """asked: httpx's stream of an answer. Its end is read, so far as it comes soon, so that the connection is left in order."""
    async with asked as answer:
        read = 0
        async for piece in answer.aiter_raw():
            read += len(piece)
            if read > _READ_BYTES:
                break
        status: int = answer.status_code
        return status
