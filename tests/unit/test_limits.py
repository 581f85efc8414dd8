"""Rates, requests under way, bodies: what they let through, when they let through again, and that they don't grow."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from starlette.types import Message

from deployments.errors import InvalidRequest, LikenessError, QuotaExceeded, RateLimited, TooLarge
from serve.limits import Body, Buckets, SlowBody, UnderWay, neighbourhood, refuse_length


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def taken(buckets: Buckets, name: str, per_minute: int, tries: int) -> int:
    done = 0
    for _ in range(tries):
        try:
            buckets.take(name, per_minute, "Requests")
            done += 1
        except RateLimited:
            pass
    return done


@pytest.mark.parametrize("per_minute", [1, 7, 60, 600, 100_000])
def test_a_minutes_worth_comes_at_once_and_again_as_it_passes(per_minute: int) -> None:
    clock = Clock()
    buckets = Buckets(clock)
    assert taken(buckets, "ada", per_minute, per_minute + 5) == per_minute
    clock.now += 60
    assert taken(buckets, "ada", per_minute, per_minute + 5) == per_minute
    clock.now += 1e9
    assert taken(buckets, "ada", per_minute, per_minute + 5) == per_minute


@pytest.mark.parametrize("per_minute", [1, 7, 59, 60, 61, 600])
def test_the_seconds_that_are_told_are_true(per_minute: int) -> None:
    clock = Clock()
    buckets = Buckets(clock)
    for _ in range(3):
        taken(buckets, "ada", per_minute, per_minute + 1)
        with pytest.raises(RateLimited) as caught:
            buckets.take("ada", per_minute, "Requests")
        seconds = caught.value.details["retry_after_s"]
        assert isinstance(seconds, int) and seconds >= 1
        if seconds > 1:
            clock.now += seconds - 1
            with pytest.raises(RateLimited):
                buckets.take("ada", per_minute, "Requests")
            clock.now -= seconds - 1
        clock.now += seconds
        buckets.take("ada", per_minute, "Requests")


def test_names_have_their_own_and_giving_back_undoes() -> None:
    buckets = Buckets(Clock())
    assert taken(buckets, "ada", 3, 5) == 3 and taken(buckets, "bruno", 3, 5) == 3
    buckets.give_back("ada", 3)
    assert taken(buckets, "ada", 3, 5) == 1
    for _ in range(9):
        buckets.give_back("ada", 3)
    assert taken(buckets, "ada", 3, 5) == 3


def test_names_are_forgotten_the_least_recently_used_first() -> None:
    buckets = Buckets(Clock(), names=100)
    taken(buckets, "ada", 5, 5)
    for number in range(1000):
        if number % 50 == 0:
            assert taken(buckets, "ada", 5, 1) == 0
        taken(buckets, str(number), 5, 1)
    assert len(buckets) == 100 and taken(buckets, "ada", 5, 1) == 0


def test_requests_under_way_are_counted_and_leave_nothing() -> None:
    counted = UnderWay()
    with counted.one("ada", 2), counted.one("ada", 2), counted.one("bruno", 1):
        with pytest.raises(QuotaExceeded, match="2 requests"), counted.one("ada", 2):
            raise AssertionError
    with pytest.raises(ZeroDivisionError), counted.one("ada", 1):
        raise ZeroDivisionError
    assert len(counted) == 0


def chunks(*sizes: int, end: bool = True) -> Callable[[], Awaitable[Message]]:
    """Messages of a body of these sizes; then, that the client has gone."""
    left = [
        {"type": "http.request", "body": bytes(size), "more_body": index + 1 < len(sizes) or not end} for index, size in enumerate(sizes)
    ]

    async def receive() -> Message:
        return left.pop(0) if left else {"type": "http.disconnect"}

    return receive


async def read(body: Body, messages: int) -> int:
    return sum([len((await body()).get("body", b"")) for _ in range(messages)])


def test_a_body_of_the_limit_passes_and_one_byte_more_does_not() -> None:
    async def run() -> None:
        whole = Body(chunks(60, 40), 100, 30, 1000)
        assert await read(whole, 2) == 100 and whole.ended
        assert (await whole())["type"] == "http.disconnect"
        more = Body(chunks(60, 41), 100, 30, 1000)
        for _ in range(2):
            with pytest.raises(TooLarge, match="100 bytes"):
                await read(more, 2)
        assert isinstance(more.refused, TooLarge)
        unbounded = Body(chunks(60, 10**6), None, 30, 1000)
        assert await read(unbounded, 2) == 60 + 10**6

    asyncio.run(run())


def test_a_body_that_holds_back_is_cut_and_one_that_is_slow_is_not() -> None:
    async def run() -> None:
        pending: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        silent = Body(lambda: pending, 100, 0.05, 1000)
        with pytest.raises(SlowBody, match="0 bytes of it are here"):
            await silent()
        assert isinstance(silent.refused, SlowBody) and silent.refused.status == 408

        clock = Clock()

        async def drip() -> Message:
            await asyncio.sleep(0.001)
            clock.now += 0.5
            return {"type": "http.request", "body": bytes(20), "more_body": True}

        fast_enough = Body(drip, None, 1, 39, clock)  # 40 bytes a second come
        assert await read(fast_enough, 200) == 4000
        too_slow = Body(drip, None, 1, 60, clock)
        with pytest.raises(SlowBody):
            await read(too_slow, 20)

    asyncio.run(run())


def test_time_that_the_application_takes_is_not_the_callers() -> None:
    clock = Clock()

    async def run() -> int:
        body = Body(chunks(10, 10, 10), 100, 1, 1000, clock)
        size = 0
        for _ in range(3):
            size += await read(body, 1)
            clock.now += 60
        return size

    assert asyncio.run(run()) == 30


def test_waiting_for_the_end_of_a_connection_has_no_limit() -> None:
    async def run() -> None:
        gone = asyncio.Event()
        first = chunks(5)

        async def receive() -> Message:
            message = await first()
            if message["type"] == "http.disconnect":
                await gone.wait()
            return message

        body = Body(receive, 10, 0.02, 10**6)
        await body()
        waiting = asyncio.create_task(read(body, 1))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        gone.set()
        await waiting

    asyncio.run(run())


def test_ten_gigabytes_take_no_memory() -> None:
    async def run() -> int:
        chunk: dict[str, Any] = {"type": "http.request", "body": bytes(2**20), "more_body": True}

        async def receive() -> Message:
            return chunk

        body = Body(receive, 10 * 2**30, 30, 2**20)
        read_bytes = 0
        with pytest.raises(TooLarge):
            while True:
                read_bytes += len((await body())["body"])
        return read_bytes

    tracemalloc.start()
    try:
        assert asyncio.run(run()) == 10 * 2**30
        assert tracemalloc.get_traced_memory()[1] < 4 * 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("said", ["101", "9" * 18, "9" * 5000])
def test_what_announces_too_much_is_refused(said: str) -> None:
    with pytest.raises(TooLarge):
        refuse_length(said, 100)


@pytest.mark.parametrize("said", ["-1", "1e3", "١٢", "0x10", " 5", "5,5"])
def test_what_announces_no_number_is_refused(said: str) -> None:
    with pytest.raises(InvalidRequest):
        refuse_length(said, 100)


def test_what_announces_enough_or_nothing_passes() -> None:
    for said in ("", "0", "100", "0100"):
        refuse_length(said, 100)


def test_one_sender_has_one_neighbourhood() -> None:
    for one, other in (("2001:db8:1:2::1", "2001:db8:1:2:ffff::9"), ("::ffff:10.0.0.1", "10.0.0.1"), ("fe80::1%eth0", "fe80::2%eth1")):
        assert neighbourhood(one) == neighbourhood(other)
    for one, other in (("10.0.0.1", "10.0.0.2"), ("2001:db8:1:2::1", "2001:db8:1:3::1"), ("testclient", "nobody")):
        assert neighbourhood(one) != neighbourhood(other)


def test_every_refusal_says_what_to_do() -> None:
    kinds: tuple[type[LikenessError], ...] = (SlowBody, TooLarge, RateLimited, QuotaExceeded)
    for kind in kinds:
        assert kind("x").remedy.endswith(".") and 400 <= kind.status < 500
