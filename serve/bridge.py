"""An ASGI application, or any asynchronous transport, under a synchronous httpx client: in this process, without a socket.

One thread keeps one event loop for the bridge's whole life, because what an application binds to its loop (locks, handles) must find it
again at the next request. Knows nothing of what is asked.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import httpx

_Result = TypeVar("_Result")
_STOP_SECONDS = 5.0


class Bridge(httpx.BaseTransport):
    """A synchronous transport over an asynchronous one. Answers are read whole before they are handed on."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self._inner = inner
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="likeness-bridge", daemon=True)
        self._thread.start()

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        return self._wait(self._answer(request, request.read()))

    def close(self) -> None:
        """Closes what is inside and ends the thread."""
        if self._loop.is_closed():
            return
        self._wait(self._inner.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_SECONDS)
        self._loop.close()

    async def _answer(self, request: httpx.Request, body: bytes) -> httpx.Response:
        asked = httpx.Request(request.method, request.url, headers=request.headers, content=body, extensions=request.extensions)
        answer = await self._inner.handle_async_request(asked)
        content = await answer.aread()
        await answer.aclose()
        return httpx.Response(answer.status_code, headers=answer.headers, content=content, extensions=answer.extensions)

    def _wait(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            # The request goes with whoever asked: the application sees a cancelled task, as after a disconnect.
            future.cancel()
            raise
