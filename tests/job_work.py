"""Stores of jobs to test: on SQLite and on PostgreSQL, empty; what is asked of them; and what processes of their own do to them, whose
answers go into files, one line each."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import select

from deployments.errors import IdempotencyConflict
from deployments.store.artifacts import ArtifactStore
from deployments.store.engine import Database
from deployments.store.jobs import JobStore, Lease, NewJob
from deployments.store.tables import Base

PNG = b"\x89PNG\r\n\x1a\n" + b"pixels" * 100
ANSWER = {"created": 1, "data": [{"seed": 7}]}
PROBLEM = {"type": "urn:likeness:problem:replica_lost", "title": "It died.", "status": 503, "code": "replica_lost"}
POOL = "draw"


def new(**changed: Any) -> NewJob:
    said: dict[str, Any] = {"kind": "generate", "pool": POOL, "workflow": "flux-pulid", "input": {"prompt": "a portrait"}}
    return NewJob(**{**said, **changed})


def files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "files").rglob("*") if path.is_file())


def submitted(store: JobStore, owner: str = "ada", **said: Any) -> str:
    return store.submit(owner, new(**said))[0].id


def leased(store: JobStore, runner: str = "one", for_s: float = 60) -> Lease:
    lease = store.lease(runner, [POOL], for_s)
    assert lease is not None
    return lease


def kinds(store: JobStore, id: str) -> list[str]:
    return [event.kind for event in store.events(id, "ada")]


def rows(url: str, table: type[Base]) -> list[dict[str, Any]]:
    database = Database(url)
    with database.reading() as session:
        found = [{name: getattr(row, name) for name in table.__table__.columns.keys()} for row in session.scalars(select(table))]
    database.close()
    return found


def finish(store: JobStore, lease: Lease) -> bool:
    return store.succeed(lease, ANSWER, [(PNG, "image/png")], {"denoise": 1.5}) is not None


def execute_all(url: str, folder: Path, runner: str, notes: Path) -> None:
    """Leases and ends until nothing waits."""
    store = JobStore(url, ArtifactStore(str(folder)))
    done = []
    while (lease := store.lease(runner, [POOL], 60)) is not None:
        assert finish(store, lease)
        done.append(lease.job.id)
    notes.write_text("\n".join(done))
    store.close()


def submit_the_same(url: str, folder: Path, prompt: str, notes: Path) -> None:
    """One key; whoever has another prompt than the first is refused."""
    store = JobStore(url, ArtifactStore(str(folder)))
    try:
        job, made = store.submit("ada", new(idempotency_key="once", input={"prompt": prompt}, pictures={"face": PNG}))
        notes.write_text(f"{job.id} {made}")
    except IdempotencyConflict:
        notes.write_text("conflict")
    store.close()


def end_each(url: str, folder: Path, leases: Sequence[Lease], notes: Path, together: Any, cancel: bool) -> None:
    """Two processes meet at each job (together: a barrier): one finishes it, one cancels it, at the same moment or up to 0.3 s later."""

    def act(store: JobStore, place: int, lease: Lease) -> bool:
        together.wait(60)
        if not cancel:
            return finish(store, lease)
        time.sleep(place % 4 * 0.1)
        return store.cancel(lease.job.id, "ada")[1]

    _note(url, folder, notes, lambda store: [act(store, place, lease) for place, lease in enumerate(leases)])


def reap_once(url: str, folder: Path, notes: Path) -> None:
    _note(url, folder, notes, lambda store: [len(store.reap())])


class Deadly(ArtifactStore):
    """A store of artifacts in a process that is killed as soon as the file is written."""

    def put(self, key: str, content: bytes) -> None:
        super().put(key, content)
        os.kill(os.getpid(), signal.SIGKILL)


def die_while_finishing(url: str, folder: Path, lease: Lease) -> None:
    finish(JobStore(url, Deadly(str(folder))), lease)


def _note(url: str, folder: Path, notes: Path, act: Callable[[JobStore], Sequence[object]]) -> None:
    store = JobStore(url, ArtifactStore(str(folder)))
    notes.write_text("\n".join(map(str, act(store))))
    store.close()
