"""A whole server with its store, a receiver of webhooks, and ways to break them: processes die, a disk fills, a database goes away."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Protocol

from deployments.errors import ServerUnreachable
from tests.ray_processes import named

_CONTROLLER = "ray::ServeController"
_FILL_BYTES = 2**16


class Database(Protocol):
    @property
    def url(self) -> str: ...

    def away(self, seconds: float) -> None:
        """Nobody can use the database meanwhile."""


@dataclass
class Sqlite:
    path: Path

    @property
    def url(self) -> str:
        return f"sqlite:///{self.path}"

    def away(self, seconds: float) -> None:
        holder = sqlite3.connect(self.path, isolation_level=None, timeout=30)
        holder.execute("BEGIN EXCLUSIVE")
        time.sleep(seconds)
        holder.execute("ROLLBACK")
        holder.close()


@dataclass
class Receiver:
    """Takes webhooks, and keeps what came: (webhook-id, body), in order."""

    got: list[tuple[str, bytes]] = field(default_factory=list)
    address: str = ""

    @property
    def url(self) -> str:
        return f"http://{self.address}/hook"

    @classmethod
    @contextmanager
    def listening(cls) -> Iterator[Receiver]:
        receiver = cls()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                receiver.got.append((self.headers["webhook-id"], body))
                self.send_response(204)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        receiver.address = f"127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield receiver
        finally:
            server.shutdown()
            server.server_close()


@dataclass
class House:
    """url: of the server. disk: the folder of its artifacts; small: whether that is a file system of its own, which can be filled."""

    url: str
    database: Database
    disk: Path
    small: bool
    receiver: Receiver


def kill(process: str) -> None:
    """SIGKILL to every process of this server whose name begins so."""
    found = named(process)
    assert found, f"no process is called {process}"
    for each in found:
        os.kill(each.pid, signal.SIGKILL)


def replica(deployment: str) -> Callable[[House], None]:
    def fault(house: House) -> None:
        kill(f"ray::ServeReplica:likeness:{deployment}")

    return fault


def controller(house: House) -> None:
    kill(_CONTROLLER)


def full_disk(house: House) -> None:
    """For as long as a picture takes to be written, and some tries more."""
    ballast = house.disk / "ballast"
    with ballast.open("wb", buffering=0) as stream:
        try:
            while True:
                stream.write(bytes(_FILL_BYTES))
        except OSError:
            pass
    time.sleep(4)
    ballast.unlink()


def database_away(house: House) -> None:
    house.database.away(10)


@contextmanager
def small_disk(folder: Path, size: str = "4m") -> Iterator[bool]:
    """The folder as a file system of its own, if this user may mount one; yields whether it is."""
    folder.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "likeness", folder], capture_output=True).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", folder], check=True)


def patiently(ask: Callable[[], Any], seconds: float = 60) -> Any:
    """What a client does whose server says that trying again may help."""
    until = time.monotonic() + seconds
    while True:
        try:
            return ask()
        except Exception as error:
            passing = isinstance(error, ServerUnreachable) or getattr(error, "retryable", False)
            if not passing or time.monotonic() > until:
                raise
            time.sleep(0.3)
