"""Who asks for jobs over HTTP: the routes in this process with a runner beside them or over a socket, and what a test asks of them."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from deployments.job_runner import JobSettings, Runner
from deployments.store.jobs import JobStore
from serve.job_answers import JobEvent
from tests.job_serving import QUICK, desk_of, routes, running
from tests.lora_serving import over_a_socket

URL = "http://likeness.local"
PICTURE = base64.b64encode((Path(__file__).resolve().parents[1] / "samples" / "characters" / "ada-1.png").read_bytes()).decode()
LONG: dict[str, Any] = {"prompt": "a portrait", "num_inference_steps": 100, "n": 8}


@asynccontextmanager
async def http_of(app: FastAPI, owner: str = "ada") -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(base_url=URL, transport=transport, headers={"x-owner": owner}) as http:
        yield http


@asynccontextmanager
async def serving(store: JobStore, settings: JobSettings = QUICK) -> AsyncIterator[tuple[httpx.AsyncClient, Runner]]:
    async with running(store, settings) as runner, http_of(routes(desk_of(store, runner.wake, settings))) as http:
        yield http, runner


@contextmanager
def server(store: JobStore) -> Iterator[str]:
    """The address of a server over a socket, with a runner in a thread of its own."""
    over, started = threading.Event(), threading.Event()

    async def work() -> None:
        async with running(store):
            started.set()
            while not over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    started.wait(10)
    try:
        with over_a_socket(routes(desk_of(store))) as url:
            yield url
    finally:
        over.set()
        thread.join()


async def post(http: httpx.AsyncClient, input: dict[str, Any], headers: dict[str, str] | None = None, **fields: Any) -> httpx.Response:
    return await http.post("/v1/jobs", json={"input": input, **fields}, headers=headers)


async def over(http: httpx.AsyncClient, id: str) -> dict[str, Any]:
    for _ in range(1000):
        found: dict[str, Any] = (await http.get(f"/v1/jobs/{id}")).json()
        if found["status"] not in ("queued", "running"):
            return found
        await asyncio.sleep(0.02)
    raise AssertionError("it does not end")


async def events(http: httpx.AsyncClient, id: str, query: str = "", headers: dict[str, str] | None = None) -> list[JobEvent]:
    answer = await http.get(f"/v1/jobs/{id}/events{query}", headers=headers)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    found = []
    for block in answer.text.split("\n\n")[:-1]:
        lines = dict(line.split(": ", 1) for line in block.split("\n"))
        event = JobEvent.model_validate_json(lines["data"])
        assert (int(lines["id"]), lines["event"]) == (event.seq, event.kind)
        found.append(event)
    return found
