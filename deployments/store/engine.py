"""The database, whichever it is: connections, transactions, locks between processes. SQLite embedded, PostgreSQL for a cluster.

Knows no table. What goes wrong inside leaves as StoreUnavailable, without the password of the URL.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.orm import Session

from deployments.errors import StoreUnavailable

# A writer of SQLite waits so long for the others; each holds the file for milliseconds.
_BUSY_TIMEOUT_S = 30.0
# For readers to end; a deletion is not held up by one that does not.
_LOG_WAIT_MS = 1_000
_WRITING, _LASTING = "likeness_writing", "likeness_lasting"
_FORMS = "Give sqlite:////absolute/path.db or postgresql://user:password@host/name."


class Database:
    """Sessions on one database. Any thread may ask for one; connections are pooled."""

    def __init__(self, url: str) -> None:
        """Connects to nothing yet. Raises StoreUnavailable for a URL that leads nowhere."""
        self._url = parsed(url)
        self._engine = open_engine(self._url)
        self._writer = self._engine.execution_options(**{_WRITING: True, _LASTING: True})
        self._noting = self._engine.execution_options(**{_WRITING: True, _LASTING: False})

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that sees one state of the database, waits for nobody and keeps nothing that is changed in it."""
        with told(self._url), Session(self._engine) as session:
            yield session

    @contextmanager
    def writing(self, lock: str | None = None, *, lasting: bool = True) -> Iterator[Session]:
        """One transaction: committed at the end of the context, undone where something was raised.

        lasting: whether it is on the disk when the context has ended. With SQLite one that is not gets there with the next that is; a
        power cut before takes it back whole, and with it all that came after it. PostgreSQL's always are: its clients outlive it.

        lock: any name; of all processes on this database, one at a time is between here and its commit with the same name. (SQLite has
        one writer at a time, whatever the name.)
        """
        engine = self._writer if lasting else self._noting
        with told(self._url), _turn_of(self._url), Session(engine) as session, session.begin():
            session.connection()  # or the transaction, and with it SQLite's lock, would begin with the first statement
            if lock is not None and self._url.get_backend_name() == "postgresql":
                session.execute(text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": lock})
            yield session

    def forget(self) -> None:
        """Empties SQLite's log, in which rows that were deleted still stand. Where somebody reads for long, a later call does; PostgreSQL
        recycles its own by itself. For after a deletion of what must not be found again."""
        if self._url.get_backend_name() != "sqlite":
            return
        engine = open_engine(self._url)  # a connection of its own: outside of any transaction, and with a patience of its own
        try:
            with told(self._url):
                raw = engine.raw_connection()
                try:
                    raw.cursor().execute(f"PRAGMA busy_timeout = {_LOG_WAIT_MS}")
                    raw.cursor().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                finally:
                    raw.close()
        finally:
            engine.dispose()

    def close(self) -> None:
        self._engine.dispose()


def parsed(url: str) -> URL:
    """Raises StoreUnavailable for anything but a file of SQLite, by an absolute path, and PostgreSQL."""
    try:
        found = make_url(url)
    except ArgumentError as error:
        raise StoreUnavailable("The URL of the store's database cannot be read.", _FORMS) from error
    if found.drivername == "postgresql":
        # By name: which driver SQLAlchemy takes by itself differs between its versions.
        return found.set(drivername="postgresql+psycopg")
    # Processes differ in their working directory, and a database in memory is forgotten with its connection.
    if found.get_backend_name() == "sqlite" and found.database and Path(found.database).is_absolute():
        return found
    if found.get_backend_name() == "postgresql":
        return found
    raise StoreUnavailable(f"{found.render_as_string()} is neither PostgreSQL nor an absolute path of SQLite.", _FORMS)


def open_engine(url: URL, *, foreign_keys: bool = True) -> Engine:
    """The engine of a parsed URL. foreign_keys: whether SQLite enforces them, which it does not by itself; PostgreSQL always does."""
    sqlite = url.get_backend_name() == "sqlite"
    try:
        engine = create_engine(url, pool_pre_ping=not sqlite, connect_args={"timeout": _BUSY_TIMEOUT_S} if sqlite else {})
    except (ImportError, NoSuchModuleError) as error:
        raise StoreUnavailable(
            f"The driver of {url.drivername} is not installed.", "Install the extra `postgres`, or name no driver."
        ) from error
    if sqlite:
        _prepare_sqlite(engine, foreign_keys)
    return engine


def _prepare_sqlite(engine: Engine, foreign_keys: bool) -> None:
    @event.listens_for(engine, "connect")
    def connected(connection: Any, _: object) -> None:
        # Python's sqlite3 begins transactions by itself, and not before every statement: from here on it leaves them to us.
        connection.isolation_level = None
        connection.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
        # What is deleted here may be of a face: SQLite would leave it in the free pages of the file.
        connection.execute("PRAGMA secure_delete = ON")

    @event.listens_for(engine, "begin")
    def begun(connection: Connection) -> None:
        # A reader that turns into a writer fails at once where another wrote meanwhile; one that says so from the start waits its turn.
        options = connection.get_execution_options()
        writing, lasting = options.get(_WRITING, False), options.get(_LASTING, True)
        if writing and connection.info.get(_LASTING, True) != lasting:  # SQLite's own default: FULL
            connection.exec_driver_sql(f"PRAGMA synchronous = {'FULL' if lasting else 'NORMAL'}")
            connection.info[_LASTING] = lasting
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writing else "BEGIN")


@contextmanager
def _turn_of(url: URL) -> Iterator[None]:
    """Of this process's writers on a file of SQLite one at a time, as they came. SQLite's own wait is a look now and then, up to 100 ms
    apart, and whoever looks at the right moment is first: of many, some would wait for seconds."""
    if url.get_backend_name() != "sqlite":
        yield
        return
    lock = _lock_of(str(url.database))
    if not lock.acquire(timeout=_BUSY_TIMEOUT_S):
        raise StoreUnavailable(f"The store ({url.render_as_string()}) cannot be used: other writers hold it.")
    try:
        yield
    finally:
        lock.release()


@cache
def _lock_of(file: str) -> Lock:
    return Lock()


@contextmanager
def told(url: URL) -> Iterator[None]:
    """Errors of the database as StoreUnavailable."""
    try:
        yield
    except SQLAlchemyError as error:
        cause = getattr(error, "orig", None) or error
        reason = " ".join(str(cause).splitlines()[:1]) or type(cause).__name__
        raise StoreUnavailable(f"The store ({url.render_as_string()}) cannot be used: {reason}.") from error
