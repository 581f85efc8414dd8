"""A house with a few true routes and the door before it, over a database of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

from deployments.store.audit import AuditLog
from deployments.store.keys import KeyStore
from serve.access import quota_of
from serve.callers import SCOPES, caller_of
from serve.door import Door, DoorPolicy
from serve.door_settings import DoorSettings
from serve.presets import load_presets

LIMIT = 2**20
WORKFLOWS = frozenset(preset.endpoint for preset in load_presets().values())
SETTINGS = DoorSettings(requests_per_minute=100_000, refusals_per_minute=100_000)


class Clock:
    """Time that passes as it does until it is stopped, and by more when it is told to."""

    def __init__(self) -> None:
        self.ahead, self.stopped = 0.0, False

    def __call__(self) -> float:
        return self.ahead if self.stopped else time.monotonic() + self.ahead


class Place:
    """A house with a few true routes, and the door before it."""

    def __init__(self, url: str, settings: DoorSettings = SETTINGS) -> None:
        self.keys, self.audit, self.clock = KeyStore(url), AuditLog(url, every_s=3600), Clock()
        self.app, self.at_once, self.most_at_once, self.gate = FastAPI(), 0, 0, asyncio.Event()
        self.drip = threading.Event()
        for path, methods, route in (
            ("/healthz", ["GET"], self.who), ("/readyz", ["GET"], self.parts), ("/v1/models", ["GET"], self.who),
            ("/v1/generate", ["POST"], self.size), ("/v1/loras", ["POST"], self.made), ("/v1/loras/{id}", ["DELETE"], self.who),
            ("/v1/jobs", ["GET"], self.flow), ("/v1/faces/compare", ["POST"], self.wait),
        ):  # fmt: skip
            self.app.add_api_route(path, route, methods=methods)
        policy = DoorPolicy(settings, LIMIT, WORKFLOWS)
        self.door = Door(self.app, self.keys if settings.auth == "on" else None, policy, self.audit, self.clock)

    async def who(self, request: Request) -> dict[str, Any]:
        caller = caller_of(request)
        return {
            "owner": caller.owner,
            "key": caller.key,
            "scopes": sorted(caller.scopes),
            "request": caller.request,
            "quota": quota_of(request),
        }

    async def parts(self) -> dict[str, bool]:
        return {"denoiser": True}

    async def size(self, request: Request) -> dict[str, int]:
        return {"size": len(await request.body())}

    async def made(self, request: Request, response: Response) -> dict[str, int]:
        response.headers["location"] = f"/v1/loras/lora_{'a' * 24}"
        response.set_cookie("session", "1")
        return {"size": len(await request.body())}

    async def flow(self) -> StreamingResponse:
        async def parts() -> AsyncIterator[bytes]:
            yield b"first"
            await asyncio.to_thread(self.drip.wait, 30)
            yield b"second"

        return StreamingResponse(parts())

    async def wait(self) -> dict[str, int]:
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self.gate.wait()
        finally:
            self.at_once -= 1
        return {}

    def key(self, *scopes: str, **given: Any) -> dict[str, str]:
        return {"authorization": f"Bearer {self.keys.create('k', scopes=scopes or SCOPES, **given)[1]}"}

    def client(self, address: str = "192.0.2.1") -> httpx.AsyncClient:
        return httpx.AsyncClient(transport=httpx.ASGITransport(self.door, client=(address, 1)), base_url="http://localhost:8000")

    def close(self) -> None:
        self.audit.close()
        self.keys.close()


def at(lite: str, **settings: Any) -> Place:
    return Place(lite, SETTINGS.model_copy(update=settings))
