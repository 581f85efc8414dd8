"""The files of jobs: written before their rows, removed after them. What lies between is the sweep's. Knows of a job's state
only whether it has ended.

Their keys are `jobs/<job>/<artifact><suffix>`; other keys of the same store are left alone.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from itertools import islice

from sqlalchemy import delete, select

from deployments.errors import StoreUnavailable
from deployments.store.artifacts import ArtifactStore
from deployments.store.engine import Database
from deployments.store.job_tables import ArtifactRow, JobRow

FOLDER = "jobs/"
PLAIN = "application/octet-stream"
_SUFFIXES = {
    "image/png": ".png", "image/jpeg": ".jpg", "image/webp": ".webp", "application/json": ".json", "application/zip": ".zip",
    "text/csv": ".csv",
}  # fmt: skip
# Longer than any job takes to write its files and then its rows.
_ABANDONED_AFTER_S = 86_400.0
# Keys that one question to the database names.
_AT_ONCE = 400


@dataclass(frozen=True, kw_only=True)
class JobFile:
    """A file that was written. name: see `job_values.ArtifactInfo`."""

    id: str
    key: str
    name: str
    media_type: str
    bytes: int
    sha256: str

    def row(self, job: str, owner: str, given: bool, at: datetime) -> ArtifactRow:
        said = {"id": self.id, "key": self.key, "name": self.name, "media_type": self.media_type, "bytes": self.bytes}
        return ArtifactRow(job_id=job, owner=owner, given=given, sha256=self.sha256, created_at=at, **said)


class JobFiles:
    """Raises StoreUnavailable where the store of artifacts does not do what it should."""

    def __init__(self, artifacts: ArtifactStore) -> None:
        self._artifacts = artifacts

    def write(self, job: str, contents: Iterable[tuple[str, bytes, str]]) -> tuple[JobFile, ...]:
        """contents: name, bytes and media type of each. Either all are written, or none is left."""
        written: list[JobFile] = []
        try:
            for name, content, media_type in contents:
                id = f"art_{secrets.token_hex(12)}"
                key = f"{FOLDER}{job}/{id}{_SUFFIXES.get(media_type, '.bin')}"
                self._artifacts.put(key, content)
                sha256 = hashlib.sha256(content).hexdigest()
                written.append(JobFile(id=id, key=key, name=name, media_type=media_type, bytes=len(content), sha256=sha256))
        except BaseException:
            self.discard(written)
            raise
        return tuple(written)

    def read(self, key: str) -> bytes | None:
        return self._artifacts.get(key)

    def remove(self, keys: Iterable[str]) -> None:
        for key in keys:
            self._artifacts.delete(key)

    def discard(self, files: Iterable[JobFile]) -> None:
        """Removes files that have no rows; what does not go now, the sweep removes."""
        for file in files:
            with suppress(StoreUnavailable):
                self._artifacts.delete(file.key)

    def forget_given(self, database: Database) -> int:
        """Removes what came with jobs that have ended: pictures of people, which nobody needs any more. Returns how many."""
        ended = select(ArtifactRow.id, ArtifactRow.key).join(JobRow).where(ArtifactRow.given, JobRow.finished_at.is_not(None))
        with database.reading() as session:
            found = session.execute(ended.limit(_AT_ONCE)).all()
        if found:
            with database.writing() as session:
                session.execute(delete(ArtifactRow).where(ArtifactRow.id.in_([id for id, _ in found])))
            self.remove(key for _, key in found)
        return len(found)

    def sweep(self, database: Database) -> int:
        """Removes what dying processes left: files that no row names, and that nobody can be about to name. Returns how many."""
        self._artifacts.clear_arriving(_ABANDONED_AFTER_S)
        ours = (key for key in self._artifacts.keys() if key.startswith(FOLDER))
        old = [key for key in _unnamed(database, ours) if (self._artifacts.age(key) or 0.0) > _ABANDONED_AFTER_S]
        self.remove(old)
        return len(old)


def _unnamed(database: Database, keys: Iterator[str]) -> Iterator[str]:
    while some := tuple(islice(keys, _AT_ONCE)):
        with database.reading() as session:
            named = set(session.scalars(select(ArtifactRow.key).where(ArtifactRow.key.in_(some))))
        yield from (key for key in some if key not in named)
