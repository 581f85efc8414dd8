"""/readyz: broken is what has no replica that works; slow, away and busy are not."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Mapping

import httpx
import pytest
from fastapi import FastAPI

from serve.readiness import Part, Readiness, ReadyResponse, add_ready_route

FINE = Part.of(running=1, others=0, healthy=True)


@pytest.mark.parametrize(
    ("running", "others", "healthy", "state", "works"),
    [
        (2, 0, True, "ready", True),
        (1, 1, True, "degraded", True),
        (1, 0, False, "degraded", True),
        (0, 1, True, "starting", False),
        (0, 1, False, "starting", False),
        (0, 0, False, "broken", False),
        (0, 0, True, "ready", True),  # scaled to zero
    ],
)
def test_the_state_of_a_part(running: int, others: int, healthy: bool, state: str, works: bool) -> None:
    part = Part.of(running, others, healthy)
    assert part.state == state and part.works is works


class Parts:
    """What a look finds, changed by the test as a server changes."""

    def __init__(self) -> None:
        self.now: dict[str, Part] = {"faces": FINE, "denoiser": FINE}
        self.looks = 0
        self.away = False
        self.hanging: threading.Event | None = None

    def __call__(self) -> Mapping[str, Part]:
        self.looks += 1
        if self.hanging is not None:
            self.hanging.wait(20)
        if self.away:
            raise ConnectionError("the controller restarts")
        return dict(self.now)


def ask(readiness: Readiness) -> httpx.Response:
    app = FastAPI()
    add_ready_route(app, readiness)

    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://likeness.local") as client:
            return await client.get("/readyz")

    return asyncio.run(asked())


def test_ready_while_every_part_has_a_replica_that_works() -> None:
    parts = Parts()
    parts.now["faces"] = Part.of(running=1, others=1, healthy=False)  # one of two restarts
    answer = ask(Readiness(parts, fresh_s=0))
    assert answer.status_code == 200 and answer.headers["cache-control"] == "no-store"
    found = ReadyResponse.model_validate(answer.json())
    assert found.ready and {name: part.state for name, part in found.parts.items()} == {"faces": "degraded", "denoiser": "ready"}


def test_503_names_the_part_that_is_broken() -> None:
    parts = Parts()
    parts.now["denoiser"] = Part.of(running=0, others=0, healthy=False)
    answer = ask(Readiness(parts, fresh_s=0))
    assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
    assert answer.json()["parts"]["denoiser"]["state"] == "broken" and answer.json()["parts"]["faces"]["state"] == "ready"


def test_without_any_part_nothing_is_ready() -> None:
    parts = Parts()
    parts.now = {}
    assert ask(Readiness(parts)).status_code == 503


def test_a_controller_that_is_away_makes_nobody_unready() -> None:
    async def main() -> None:
        parts = Parts()
        readiness = Readiness(parts, fresh_s=0)
        assert (await readiness.ask()).ready
        parts.away = True
        await asyncio.sleep(0.12)
        answer = await readiness.ask()
        assert answer.ready and answer.age_s >= 0.1 and set(answer.parts) == {"faces", "denoiser"}
        parts.away = False
        parts.now["faces"] = Part.of(running=0, others=1, healthy=False)
        assert not (await readiness.ask()).ready

    asyncio.run(main())


def test_a_server_that_was_never_seen_is_not_ready() -> None:
    parts = Parts()
    parts.away = True
    answer = ask(Readiness(parts))
    assert answer.status_code == 503 and answer.json() == {"ready": False, "parts": {}, "age_s": 0.0}


def test_it_answers_in_time_and_one_thread_hangs_however_many_ask() -> None:
    async def main() -> None:
        parts = Parts()
        parts.hanging = threading.Event()
        readiness = Readiness(parts, patience_s=0.3, fresh_s=0)
        try:
            started = time.perf_counter()
            answers = await asyncio.gather(*(readiness.ask() for _ in range(50)))
            answers.append(await readiness.ask())
            spent = time.perf_counter() - started
        finally:
            parts.hanging.set()
        # One after the other they would have waited for fifteen seconds.
        assert spent < 5 and not any(answer.ready for answer in answers) and parts.looks == 1
        await asyncio.sleep(0.1)
        assert (await readiness.ask()).ready

    asyncio.run(main())


def test_a_look_is_good_for_a_second() -> None:
    async def main() -> None:
        parts = Parts()
        readiness = Readiness(parts, fresh_s=0.2)
        for _ in range(100):
            assert (await readiness.ask()).ready
        assert parts.looks == 1
        await asyncio.sleep(0.25)
        await readiness.ask()
        assert parts.looks == 2

    asyncio.run(main())


def test_who_leaves_while_waiting_takes_nobody_with_them() -> None:
    async def main() -> None:
        parts = Parts()
        parts.hanging = threading.Event()
        readiness = Readiness(parts, patience_s=5, fresh_s=0)
        leaving, staying = asyncio.create_task(readiness.ask()), asyncio.create_task(readiness.ask())
        await asyncio.sleep(0.05)
        leaving.cancel()
        await asyncio.sleep(0.05)
        parts.hanging.set()
        assert (await staying).ready

    asyncio.run(main())
