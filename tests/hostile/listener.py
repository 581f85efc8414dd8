"""A server of this machine that writes down who comes, and names that lead where a test says."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np

from deployments.images import encode

PICTURE = encode(np.full((16, 16, 3), 90, np.uint8))
OK = b"HTTP/1.1 200 OK\r\ncontent-type: image/png\r\ncontent-length: %d\r\n\r\n" % len(PICTURE) + PICTURE


class Listener:
    """A server of this machine that writes down every connection and every request, and answers by path."""

    def __init__(self, answers: dict[str, Any] | None = None) -> None:
        self.connections, self.asked, self.answers = 0, list[bytes](), answers or {}
        self.port = 0

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.asked.append(head)
                answer = self.answers.get(head.split(b" ")[1].decode(), OK)
                if callable(answer):
                    await answer(writer)
                    break
                writer.write(answer)
                await writer.drain()
                if b"content-length" not in answer:  # then the end of the connection is the end of the answer
                    break
                await reader.readexactly(_body_bytes(head))
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    @asynccontextmanager
    async def open(self, secure: ssl.SSLContext | None = None, host: str = "127.0.0.1") -> AsyncIterator[Listener]:
        server = await asyncio.start_server(self._serve, host, self.port, ssl=secure)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            await asyncio.sleep(0)


def _body_bytes(head: bytes) -> int:
    lengths = [line.partition(b":")[2] for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:")]
    return int(lengths[0]) if lengths else 0


def redirect(to: str) -> bytes:
    return f"HTTP/1.1 302 Found\r\nlocation: {to}\r\ncontent-length: 0\r\n\r\n".encode()


def resolving(**names: Sequence[str] | Sequence[list[str]]) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    """Names (`__` for a dot) with their addresses; a list of lists answers differently each time."""
    asked: dict[str, int] = {}

    async def resolve(name: str, port: int) -> Sequence[str]:
        known: Any = names.get(name.replace(".", "__"))
        if known is None:
            raise OSError("no such name")
        turn = asked[name] = asked.get(name, -1) + 1
        return list(known if isinstance(known[0], str) else known[min(turn, len(known) - 1)])

    return resolve
