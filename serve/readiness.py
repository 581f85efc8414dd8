"""GET /readyz: whether every part of the server has a replica that works. Answers within two seconds, whatever is the matter.

A full queue or a replica among several that restarts makes nobody unready: the parts are not asked, since a question would wait in the
same queues as the work. A function looks at them from outside. Knows no Ray: serve/app.py has that function.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Literal

from fastapi import FastAPI, Response
from pydantic import BaseModel, ConfigDict, Field

_LOG = logging.getLogger("likeness.readiness")
_PATIENCE_S = 1.5
# For so long an answer is given again: whoever asks a thousand times a second asks Ray once.
_FRESH_S = 1.0


class Part(BaseModel):
    """One deployment. `degraded`: at least one replica works, and another does not; `starting`, `broken`: none works."""

    model_config = ConfigDict(extra="forbid")

    state: Literal["ready", "degraded", "starting", "broken"]
    running: int = Field(ge=0, description="Replicas that work.")
    others: int = Field(default=0, ge=0, description="Replicas that start, or are being replaced.")

    @classmethod
    def of(cls, running: int, others: int, healthy: bool) -> Part:
        """healthy: what Ray Serve says of the deployment as a whole. A deployment that has scaled to zero is healthy and ready."""
        if running:
            return cls(state="degraded" if others or not healthy else "ready", running=running, others=others)
        if others:
            return cls(state="starting", running=0, others=others)
        return cls(state="ready" if healthy else "broken", running=0)

    @property
    def works(self) -> bool:
        return self.state in ("ready", "degraded")


class ReadyResponse(BaseModel):
    """ready: every part works. age_s: how old the look at them is; it grows while Ray Serve's controller is away."""

    model_config = ConfigDict(extra="forbid")

    ready: bool
    parts: dict[str, Part] = Field(default_factory=dict)
    age_s: float = 0.0


Look = Callable[[], Mapping[str, Part]]
"""Called in a thread; may block and may raise."""


def in_one_process() -> Mapping[str, Part]:
    """The look where every part lives in the process that answers: it could not answer otherwise."""
    return {"process": Part.of(running=1, others=0, healthy=True)}


class Readiness:
    """Of one server, for any number who ask at once."""

    def __init__(self, look: Look, patience_s: float = _PATIENCE_S, fresh_s: float = _FRESH_S) -> None:
        self._look, self._patience_s, self._fresh_s = look, patience_s, fresh_s
        self._seen: tuple[float, dict[str, Part]] | None = None
        self._looking: asyncio.Task[None] | None = None

    async def ask(self) -> ReadyResponse:
        """What was last seen, where looking fails or takes too long: that Ray's controller restarts breaks no replica. Never raises."""
        if self._seen is None or time.monotonic() - self._seen[0] > self._fresh_s:
            if self._looking is None or self._looking.done():  # one thread at most hangs on a controller that is away
                self._looking = asyncio.create_task(self._refresh())
            await asyncio.wait({self._looking}, timeout=self._patience_s)
        if self._seen is None:
            return ReadyResponse(ready=False)
        seen_at, parts = self._seen
        ready = bool(parts) and all(part.works for part in parts.values())
        return ReadyResponse(ready=ready, parts=parts, age_s=round(time.monotonic() - seen_at, 1))

    async def _refresh(self) -> None:
        try:
            parts = dict(await asyncio.to_thread(self._look))
        except Exception as error:  # noqa: BLE001 (what was last seen stands)
            _LOG.warning("the parts of the server cannot be looked at: %s", error)
            return
        self._seen = time.monotonic(), parts


def add_ready_route(app: FastAPI, readiness: Readiness, told: Callable[[], bool] = lambda: True) -> None:
    """told: whether this process itself is willing; a server that drains says no."""

    async def ready(response: Response) -> ReadyResponse:
        answer = await readiness.ask()
        if not told():
            answer = answer.model_copy(update={"ready": False})
        if not answer.ready:
            response.status_code = 503
            response.headers["retry-after"] = "2"
        response.headers["cache-control"] = "no-store"
        return answer

    text = "200 while every part of the server has a replica that works, 503 else."
    app.add_api_route(
        "/readyz", ready, methods=["GET"], response_model=ReadyResponse, responses={503: {"model": ReadyResponse}}, summary=text
    )
