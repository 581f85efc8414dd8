"""Who a key belongs to, with as few looks into the store as may be: none for a key that was just seen, and few for what is no key.

A valid key is looked up again after VERIFIED_S, so long at most does a revoked one still open. Knows no request.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import TypeVar

from deployments.errors import LikenessError, Unauthenticated
from deployments.store.keys import USED_EVERY, KeyInfo, KeyStore, is_key
from serve.limits import Buckets, Clock

VERIFIED_S, REFUSED_S = 5.0, 60.0
_REMEMBERED = 10_000
_LOG = logging.getLogger("likeness")
_Value = TypeVar("_Value")


class Keyring:
    """For one event loop. Keeps hashes of keys, never keys."""

    def __init__(self, keys: KeyStore, refusals_per_minute: int, clock: Clock = time.monotonic) -> None:
        """refusals_per_minute: see DoorSettings."""
        self._keys, self._per_minute, self._clock = keys, refusals_per_minute, clock
        self._refusals = Buckets(clock)
        self._valid: OrderedDict[bytes, tuple[KeyInfo, float]] = OrderedDict()
        self._invalid: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._asking: dict[bytes, asyncio.Task[KeyInfo]] = {}
        self._touching: set[asyncio.Task[None]] = set()

    async def owner(self, key: str, address: str) -> KeyInfo:
        """The facts of a valid key. address: where the request came from.

        Raises Unauthenticated; RateLimited where the address has sent too many keys that are none; StoreUnavailable. A key that was valid
        before is never held up by what others send from the same address.
        """
        digest = hashlib.sha256(key.encode()).digest()
        known = self._valid.get(digest)
        if known is not None and self._clock() < known[1]:
            self._valid.move_to_end(digest)
            return known[0]
        if reason := self._refusal(digest, key):
            self.refuse(address)
            raise Unauthenticated(reason)
        asking = self._asking.get(digest)
        if asking is None:  # of those that come at once with the same key, one asks
            if known is None:
                self.refuse(address)
            asking = self._asking[digest] = asyncio.create_task(self._ask(digest, key, None if known else address))
            asking.add_done_callback(_seen)
        return await asyncio.shield(asking)

    def refuse(self, address: str) -> None:
        """Counts a request without a valid key. Raises RateLimited where that is one too many."""
        self._refusals.take(address, self._per_minute, "Too many requests without a valid API key came from this address")

    def _refusal(self, digest: bytes, key: str) -> str | None:
        if not is_key(key):
            return "What came as an API key is none."
        reason, until = self._invalid.get(digest, (None, 0.0))
        return reason if self._clock() < until else None

    async def _ask(self, digest: bytes, key: str, counted: str | None) -> KeyInfo:
        """counted: the address that this was counted against as a refusal, which is undone unless it is one."""
        try:
            info = await asyncio.to_thread(self._keys.verify, key)
        except Unauthenticated as error:
            self._valid.pop(digest, None)
            _remember(self._invalid, digest, (error.message, self._clock() + REFUSED_S))
            raise
        except BaseException:
            self._undo(counted)
            raise
        finally:
            del self._asking[digest]
        self._undo(counted)
        _remember(self._valid, digest, (info, self._clock() + VERIFIED_S))
        if info.last_used_at is None or datetime.now(UTC) - info.last_used_at >= USED_EVERY:
            task = asyncio.create_task(self._touch(info.id))
            self._touching.add(task)
            task.add_done_callback(self._touching.discard)
        return info

    def _undo(self, counted: str | None) -> None:
        if counted is not None:
            self._refusals.give_back(counted, self._per_minute)

    async def _touch(self, id: str) -> None:
        try:
            await asyncio.to_thread(self._keys.touch, id)
        except LikenessError as error:
            _LOG.warning("when the key %s was used is not written down: %s", id, error)


def _remember(kept: OrderedDict[bytes, _Value], digest: bytes, value: _Value) -> None:
    kept[digest] = value
    kept.move_to_end(digest)
    if len(kept) > _REMEMBERED:
        kept.popitem(last=False)


def _seen(task: asyncio.Task[KeyInfo]) -> None:
    """Python complains of errors that nobody has looked at: all who waited may have gone."""
    if not task.cancelled():
        task.exception()
