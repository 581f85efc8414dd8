"""The audit log: who changed what, and who was refused. Never a prompt, a picture, a name that a caller chose, or a secret.

Entries are taken at once and written by a thread of their own, many in one transaction: whoever notes one does not wait for the database.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections import deque
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime, timedelta
from itertools import islice

from sqlalchemy import delete, insert, select

from deployments.errors import StoreUnavailable
from deployments.store.engine import Database
from deployments.store.key_tables import AuditRow

_LOG = logging.getLogger("likeness")
_BATCH = 500
_FORGET_EVERY_S = 3600.0


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One request. at: when it was answered, UTC. owner, key: None where nobody was recognised. request: its id, which the log lines have
    too. action: method and address, as the table of routes spells it: `DELETE /v1/loras/{id}`. subject: the id of what it was about.
    status: of the answer, 499 where the caller left before there was one."""

    at: datetime
    owner: str | None
    key: str | None
    request: str
    action: str
    subject: str | None
    status: int


class AuditLog:
    """For any number of threads. Of a process that is killed, what was noted within the last `every_s` seconds is lost."""

    def __init__(self, url: str, keep_days: int = 90, every_s: float = 1.0, room: int = 10_000) -> None:
        """url: of a database that was migrated. keep_days: how long entries are kept. room: how many may wait to be written; what comes on
        top is dropped, and the log says how many: while the database is away, or under a flood of refusals."""
        self._database, self._keep, self._every_s, self._room = Database(url), timedelta(days=keep_days), every_s, room
        self._waiting: deque[AuditEntry] = deque()
        self._dropped = 0
        self._lock = threading.Lock()  # of the two above and the thread
        self._writing = threading.Lock()  # one writer at a time, so that entries stay in order
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, entry: AuditEntry) -> None:
        """Takes an entry, to be written soon. Never raises, and never waits for the database."""
        with self._lock:
            if len(self._waiting) >= self._room:
                self._dropped += 1
                return
            self._waiting.append(entry)
            if self._thread is None and not self._end.is_set():
                self._thread = threading.Thread(target=self._write, name="likeness-audit", daemon=True)
                self._thread.start()
                atexit.register(self.close)

    def flush(self) -> int:
        """Writes what waits, and returns how many that were. Raises StoreUnavailable: then they wait on."""
        written = 0
        with self._writing:
            while batch := self._next():
                with self._database.writing() as session:
                    session.execute(insert(AuditRow), [asdict(entry) for entry in batch])
                with self._lock:  # only this writer takes from the left
                    for _ in batch:
                        self._waiting.popleft()
                written += len(batch)
        with self._lock:
            dropped, self._dropped = self._dropped, 0
        if dropped:
            _LOG.warning("%d entries of the audit log were dropped: more came than could be written", dropped)
        return written

    def entries(self, owner: str | None = None, since: datetime | None = None, limit: int = 1000) -> tuple[AuditEntry, ...]:
        """The newest, at most `limit`, in the order in which they were written. owner: only theirs. since: not older ones."""
        wanted = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
        if owner is not None:
            wanted = wanted.where(AuditRow.owner == owner)
        if since is not None:
            wanted = wanted.where(AuditRow.at >= since)
        names = [field.name for field in fields(AuditEntry)]
        with self._database.reading() as session:
            found = [AuditEntry(**{name: getattr(row, name) for name in names}) for row in session.scalars(wanted)]
        return tuple(reversed(found))

    def forget(self) -> int:
        """Deletes what is older than it is to be kept. Returns how many those were."""
        with self._database.writing() as session:
            gone = session.scalars(delete(AuditRow).where(AuditRow.at < datetime.now(UTC) - self._keep).returning(AuditRow.id))
            return len(gone.all())

    def close(self) -> None:
        """Writes what waits, if the database is there, and ends. May be called again."""
        atexit.unregister(self.close)
        self._end.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        try:
            self.flush()
        except StoreUnavailable as error:
            _LOG.warning("the end of the audit log is lost: %s", error)
        self._database.close()

    def _next(self) -> list[AuditEntry]:
        with self._lock:
            return list(islice(self._waiting, _BATCH))

    def _write(self) -> None:
        """What the thread does."""
        away, forgotten = False, float("-inf")
        while not self._end.wait(self._every_s):
            try:
                self.flush()
                if time.monotonic() >= forgotten + _FORGET_EVERY_S:
                    self.forget()
                    forgotten = time.monotonic()
                away = False
            except StoreUnavailable as error:
                if not away:
                    _LOG.warning("the audit log waits for the database: %s", error)
                away = True
