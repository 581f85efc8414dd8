"""Bringing a database to the tables of this version: `migrate(url)`, from as many processes at once as there are.

Alembic's scripts lie in `migrations/`. Creates the file of SQLite; a database of PostgreSQL must exist.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.util.exc import CommandError
from filelock import FileLock
from sqlalchemy import URL, Connection, Engine, text

from deployments.errors import StoreUnavailable
from deployments.store.engine import open_engine, parsed, told

_SCRIPTS = "deployments.store:migrations"
# Any number that no other program takes for its own advisory lock: the letters "likeness".
_LOCK = int.from_bytes(b"likeness", "big", signed=True)


def migrate(url: str) -> None:
    """Applies every migration that the database lacks, all or none. Raises StoreUnavailable where it cannot be, or is newer than this."""
    where = parsed(url)
    # SQLite rebuilds a table to alter it: with foreign keys on, dropping the old one would empty those that refer to it.
    engine = open_engine(where, foreign_keys=False)
    try:
        with told(where), _alone(where, engine) as connection:
            _upgrade(connection, where)
    finally:
        engine.dispose()


def _upgrade(connection: Connection, where: URL) -> None:
    config = Config(attributes={"connection": connection})
    config.set_main_option("script_location", _SCRIPTS)
    try:
        command.upgrade(config, "head")
    except CommandError as error:  # a revision that is not among the scripts
        message = f"The database {where.render_as_string()} was made by a newer version of Likeness: {error}."
        raise StoreUnavailable(message, "Run that version, or give this one a database of its own.") from error
    if where.get_backend_name() == "sqlite" and (broken := connection.execute(text("PRAGMA foreign_key_check")).first()):
        raise StoreUnavailable(f"A migration of {where.render_as_string()} would leave the table {broken[0]} with rows that refer to none.")


@contextmanager
def _alone(where: URL, engine: Engine) -> Iterator[Connection]:
    """A connection in a transaction, to one process at a time."""
    if where.get_backend_name() != "sqlite":
        with engine.begin() as connection:
            connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _LOCK})
            yield connection
        return
    path = Path(where.database or "")
    lock = FileLock(f"{path}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise StoreUnavailable(f"The folder {path.parent} cannot be written: {error.strerror}.") from error
    try:
        _keep_a_log(engine)
        with engine.begin() as connection:
            yield connection
    finally:
        lock.release()


def _keep_a_log(engine: Engine) -> None:
    """Write-ahead logging, with which readers and the writer don't wait for one another: a property of the file, for all who open it."""
    raw = engine.raw_connection()
    try:
        raw.cursor().execute("PRAGMA journal_mode = WAL")  # not possible in a transaction, which SQLAlchemy's own connections begin
    finally:
        raw.close()
