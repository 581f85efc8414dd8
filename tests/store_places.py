"""Databases to keep things in: a file of SQLite, and a true PostgreSQL where its programs are installed. And who works on them at once."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any

from deployments.store.loras import LoraFile, LoraStore, labelled
from deployments.store.migrate import migrate

FILE = LoraFile(
    base="flux1-mini", family="flux1", format="kohya", keys=3, rank_low=4, rank_high=8, error=0.0, metadata={"ss_tag": "a", "null": "\0"}
)
SECONDS = 60


def add(store: LoraStore, content: bytes, owner: str = "ada", name: str = "hers") -> str:
    with store.arriving(content) as arrival:
        return store.keep(arrival, owner, labelled(name), FILE).id


def at_once(work: Callable[..., None], *arguments: tuple[Any, ...]) -> None:
    """One process for each tuple of arguments, all of them started before the first begins to work.

    They are forked from a process that has imported what they work with, and nothing else: done anew by each it would be most of the test.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.store_places", "tests.job_work"])
    barrier = context.Barrier(len(arguments))
    processes = [context.Process(target=_after, args=(barrier, work, given)) for given in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS)
    assert [process.exitcode for process in processes] == [0] * len(processes)


def _after(barrier: Any, work: Callable[..., None], given: tuple[Any, ...]) -> None:
    barrier.wait(SECONDS)
    work(*given)


def migrate_here(url: str) -> None:
    migrate(url)


def add_and_delete(url: str, folder: Path, content: bytes, owner: str, rounds: int) -> None:
    """Whatever the others do: as long as this one's row is there, so is its file, whole."""
    store = LoraStore(url, folder)
    for _ in range(rounds):
        id = add(store, content, owner)
        assert store.path(store.get(id, owner).sha256).read_bytes() == content
        store.delete(id, owner)
    store.close()


def add_here(url: str, folder: Path, content: bytes, owner: str) -> None:
    store = LoraStore(url, folder)
    add(store, content, owner)
    store.close()


@dataclass
class Postgres:
    """A fresh server of PostgreSQL, on a port of its own. PostgreSQL refuses to run as root: user is who it runs as then."""

    programs: Path
    folder: Path
    port: int
    user: str | None

    @property
    def url(self) -> str:
        return f"postgresql://ada@127.0.0.1:{self.port}/postgres"

    def make(self) -> None:
        self._run("initdb", "-U", "ada", "-A", "trust", "-E", "UTF8", "--no-sync")

    def start(self) -> None:
        options = f"-c listen_addresses=127.0.0.1 -c port={self.port} -c unix_socket_directories= -c fsync=off"
        self._run("pg_ctl", "-o", options, "-l", str(self.folder / "log"), "-w", "start")

    def stop(self) -> None:
        self._run("pg_ctl", "-m", "immediate", "-w", "stop")

    def away(self, seconds: float) -> None:
        """Gone with every connection, and back."""
        self.stop()
        time.sleep(seconds)
        self.start()

    def _run(self, program: str, *arguments: str) -> None:
        command: list[str | Path] = [self.programs / program, "-D", self.folder / "data", *arguments]
        subprocess.run(command, user=self.user, check=True, capture_output=True, cwd=self.folder)


@contextmanager
def postgres_server() -> Iterator[Postgres | None]:
    """None where PostgreSQL or its driver is not installed."""
    programs = _programs()
    if programs is None:
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix="likeness-postgres-"))
    user = "nobody" if os.geteuid() == 0 else None
    if user is not None:
        shutil.chown(folder, user)
    server = Postgres(programs, folder, free_port(), user)
    try:
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()
    finally:
        shutil.rmtree(folder)


@contextmanager
def postgres() -> Iterator[str | None]:
    """The URL of such a server."""
    with postgres_server() as server:
        yield server.url if server is not None else None


def _programs() -> Path | None:
    try:
        import psycopg  # noqa: F401
    except ImportError:
        return None
    found = shutil.which("initdb")
    # Debian keeps them out of the path, by version.
    places = [str(Path(found).resolve())] if found else sorted(glob("/usr/lib/postgresql/*/bin/initdb"))
    return Path(places[-1]).parent if places else None


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
