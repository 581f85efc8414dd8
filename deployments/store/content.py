"""Files by the sha256 of their content, beneath one folder: written beside and renamed, so that a file is whole or not there.

Knows neither owners nor the database: who may need a file, and when nobody does, is for whoever holds the rows.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

from deployments.errors import StoreUnavailable
from deployments.store.durable import moved, written

_SHA256 = re.compile(r"[0-9a-f]{64}")
_ARRIVING = "arriving"
# Longer than any file takes to be checked: what lies there since then was left by a process that died.
_ABANDONED_AFTER_S = 86_400.0


@dataclass(frozen=True)
class Arrival:
    """A file that is not kept yet. path: where it lies meanwhile. bytes: its size."""

    path: Path
    sha256: str
    bytes: int


class ContentFolder:
    """`<root>/<sha256[:2]>/<sha256><suffix>`. Raises StoreUnavailable where the folder cannot be written."""

    def __init__(self, root: Path, suffix: str) -> None:
        self._root, self._suffix = root, suffix

    def path(self, sha256: str) -> Path:
        """Where the file lies, if it is kept. Raises ValueError for what is no sha256 in hex."""
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256[:80]!r} is no sha256 in hex.")
        return self._root / sha256[:2] / f"{sha256}{self._suffix}"

    @contextmanager
    def arriving(self, content: bytes) -> Iterator[Arrival]:
        """The content as a file that is gone when the context ends, unless it was kept."""
        path = self._root / _ARRIVING / f"{uuid4().hex}{self._suffix}"
        with _writable(self._root):
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with _writable(self._root):
                written(path, content)
            yield Arrival(path, hashlib.sha256(content).hexdigest(), len(content))
        finally:
            path.unlink(missing_ok=True)

    def keep(self, arrival: Arrival) -> None:
        """Moves the file to its place, over an equal one that is there already."""
        target = self.path(arrival.sha256)
        with _writable(self._root):
            moved(arrival.path, target)

    def remove(self, sha256: str) -> None:
        with _writable(self._root):
            self.path(sha256).unlink(missing_ok=True)

    def kept(self) -> Iterator[str]:
        """The sha256 of every file that is kept."""
        for path in self._root.glob(f"??/*{self._suffix}"):
            if _SHA256.fullmatch(path.stem):
                yield path.stem

    def clear_abandoned(self) -> None:
        """Removes what arrived so long ago that nobody can be about to keep it."""
        for path in (self._root / _ARRIVING).glob(f"*{self._suffix}"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    path.unlink()


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"The folder {root} of the store cannot be written: {error.strerror}.") from error
