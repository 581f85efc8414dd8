"""How much of what: rates, requests under way, and the bytes and seconds of a body. In the memory of one process, and bounded there.

Knows no key and no route: names are whatever the caller of these counts by.
"""

from __future__ import annotations

import asyncio
import ipaddress
import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from starlette.types import Message, Receive

from deployments.errors import InvalidRequest, LikenessError, QueueFull, QuotaExceeded, RateLimited, TooLarge

Clock = Callable[[], float]
"""Seconds that only grow."""
_NAMES = 10_000
# What is left of a token after its seconds have passed is what floating point lost.
_ROUNDING = 1e-6
_LENGTH_DIGITS = 18  # no number of bytes that a body may have is longer
_V6_NETWORK = 64  # what one customer is given at least (RFC 6177): whoever has one address of it has all


class Buckets:
    """Token buckets by name: `per_minute` may come at once, and again as the minute passes.

    The least recently used of more than `names` names is forgotten, and begins anew with a full bucket.
    """

    def __init__(self, clock: Clock = time.monotonic, names: int = _NAMES) -> None:
        self._clock, self._names = clock, names
        self._levels: OrderedDict[str, tuple[float, float]] = OrderedDict()  # tokens, and when there were so many

    def take(self, name: str, per_minute: int, what: str) -> None:
        """Takes a token. Raises RateLimited, with the whole seconds after which there is one again; what: too many of what."""
        level = self._level(name, per_minute)
        if level >= 1 - _ROUNDING:
            self._set(name, max(0.0, level - 1))
            return
        self._set(name, level)  # or who is refused would be forgotten first, and begin anew
        seconds = max(1, math.ceil((1 - level) * 60 / per_minute))
        raise RateLimited(f"{what}: more than {per_minute} in a minute.", None, {"retry_after_s": seconds})

    def give_back(self, name: str, per_minute: int) -> None:
        """Undoes a take."""
        self._set(name, min(float(per_minute), self._level(name, per_minute) + 1))

    def __len__(self) -> int:
        return len(self._levels)

    def _level(self, name: str, per_minute: int) -> float:
        tokens, then = self._levels.get(name, (float(per_minute), 0.0))
        return min(float(per_minute), tokens + (self._clock() - then) * per_minute / 60)

    def _set(self, name: str, level: float) -> None:
        self._levels[name] = (level, self._clock())
        self._levels.move_to_end(name)
        if len(self._levels) > self._names:
            self._levels.popitem(last=False)


class UnderWay:
    """Requests that are being answered, by name; a name without any takes no memory."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()

    @contextmanager
    def one(self, name: str, limit: int, what: str = "requests of this API key are being answered") -> Iterator[None]:
        """One more, for the length of the context. Raises QuotaExceeded where there are as many as may be. what: of what."""
        if self._counts[name] >= limit:
            raise QuotaExceeded(f"{limit} {what}, as many as may be at once.")
        self._counts[name] += 1
        try:
            yield
        finally:
            self._counts[name] -= 1
            if not self._counts[name]:
                del self._counts[name]

    def __len__(self) -> int:
        return len(self._counts)


class Room:
    """Places for requests that one process knows of, by default those that are drawn or wait for it."""

    def __init__(self, places: int, what: str = "requests are being drawn or wait; no more may.") -> None:
        """what: the error's words behind how many there are."""
        self._places, self._what, self._inside = places, what, 0

    @contextmanager
    def one(self) -> Iterator[None]:
        """One more, for the length of the context. Raises as `refuse_full`."""
        self.refuse_full()
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    def refuse_full(self) -> None:
        """Raises QueueFull where no place is left."""
        if self._inside >= self._places:
            raise QueueFull(f"{self._inside} {self._what}")


class Sets:
    """Sets of pictures that one process takes in: while their body comes, while they are fetched, until their job is kept. Each may be as
    large as `max_set_bytes`, on the disk and then in memory."""

    def __init__(self, most: int, of_owner: int) -> None:
        """most: at once; of_owner: of one owner's."""
        self._of_owner, self._owners = of_owner, UnderWay()
        self._room = Room(most, "requests that may bring sets of pictures are being taken in; no more may at once.")

    @contextmanager
    def one(self, owner: str) -> Iterator[None]:
        """One more, for the length of the context. Raises QuotaExceeded for the owner's, QueueFull for everybody's."""
        own = self._owners.one(owner, self._of_owner, "requests of yours that may bring sets of pictures are being taken in")
        with own, self._room.one():
            yield


class SlowBody(LikenessError):
    """The body of a request did not come within its time."""

    code = "request_timeout"
    status = 408
    advice = "Send the body at once and whole, over a faster line."
    retryable = True


class Body:
    """The messages of one request, as long as its body keeps within bytes and time. What comes after the body passes as it is.

    Asked again after it has refused, it refuses again; `refused` says with what, for whoever stands around the application: that may take
    the error for one of its own.
    """

    def __init__(self, receive: Receive, limit: int | None, seconds: float, bytes_per_second: int, clock: Clock = time.monotonic) -> None:
        """limit: bytes, None where somebody else counts. Time counts while the application waits for the body, not while it works."""
        self._receive, self._limit, self._seconds, self._rate, self._clock = receive, limit, seconds, bytes_per_second, clock
        self._bytes, self._waited = 0, 0.0
        self.ended = False
        self.refused: LikenessError | None = None

    async def __call__(self) -> Message:
        """Raises TooLarge, SlowBody."""
        if self.refused is not None:
            raise self.refused
        if self.ended:
            return await self._receive()
        message = await self._in_time()
        self._bytes += len(message.get("body", b""))
        self.ended = not message.get("more_body", False)
        if self._limit is not None and self._bytes > self._limit:
            self.refused = too_large(self._limit)
            raise self.refused
        return message

    async def _in_time(self) -> Message:
        allowed = self._seconds + self._bytes / self._rate
        began = self._clock()
        try:
            async with asyncio.timeout(max(0.0, allowed - self._waited)):
                return await self._receive()
        except TimeoutError as error:
            self.refused = SlowBody(f"The body did not come within {allowed:.0f} seconds: {self._bytes} bytes of it are here.")
            raise self.refused from error
        finally:
            self._waited += self._clock() - began


def refuse_length(said: str, limit: int) -> None:
    """said: the header content-length. Raises TooLarge where it announces more, InvalidRequest where it announces nothing."""
    if not said:
        return
    if not (said.isascii() and said.isdecimal()):
        raise InvalidRequest("The header content-length is no number.", "Send the length of the body in bytes.")
    if len(said) > _LENGTH_DIGITS or int(said) > limit:
        raise too_large(limit)


def too_large(limit: int) -> TooLarge:
    return TooLarge(f"The body is larger than {limit} bytes.")


def neighbourhood(address: str) -> str:
    """Who counts as one sender: an IPv4 address, the /64 of an IPv6 address; anything else as it is."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((parsed, _V6_NETWORK), strict=False))
