"""Files by a key, beneath one URL: a folder of this machine, or any store that fsspec reaches (S3 and the like). Whole or not there.

Knows neither owners nor the database: whose a file is, and when nobody needs it, is for whoever holds the rows. Keys are the store's own
making; nothing that a client sent becomes part of one.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol
from uuid import uuid4

import fsspec

from deployments.errors import StoreUnavailable
from deployments.store.durable import renamed_first

_KEY = re.compile(r"(?:[a-z0-9_]+/)*[a-z0-9_]+(?:\.[a-z0-9]+)?")
_KEY_SHOWN = 80
_FORMS = "Give an absolute path, or a URL that fsspec reads: s3://bucket/folder (with the package s3fs installed)."


class _Place(Protocol):
    """Where keys lie. Each method raises FileNotFoundError for a key without a file, and whatever its library raises for the rest."""

    def put(self, key: str, content: bytes) -> None: ...
    def get(self, key: str) -> bytes: ...
    def delete(self, key: str) -> None: ...
    def keys(self) -> Iterator[str]: ...
    def written(self, key: str) -> float: ...
    def clear(self, before: float) -> None: ...


class ArtifactStore:
    """For any number of threads and processes at one URL. Raises StoreUnavailable where it cannot be reached, read or written (a full
    disk), and ValueError for what is no key."""

    def __init__(self, url: str) -> None:
        """url: an absolute path, `file://` and one, `s3://bucket/folder`, `memory://folder` (of this process). Opens nothing yet. Raises
        StoreUnavailable for a relative path, and for a protocol that is unknown or not installed."""
        # A secret may stand before the @.
        self._shown = re.sub(r"//[^/@]*@", "//***@", url)
        self._place = self._opened(url)

    def put(self, key: str, content: bytes) -> None:
        """Keeps the content under a key, in place of what is there. Where it fails, nothing is left of it; where the power does, perhaps
        a part."""
        with self._reached("written"):
            self._place.put(_checked(key), content)

    def get(self, key: str) -> bytes | None:
        """None where there is no such file."""
        with self._reached("read"), suppress(FileNotFoundError):
            return self._place.get(_checked(key))
        return None

    def delete(self, key: str) -> None:
        """Nothing happens where there is no such file."""
        with self._reached("written"), suppress(FileNotFoundError):
            self._place.delete(_checked(key))

    def exists(self, key: str) -> bool:
        return self.age(key) is not None

    def age(self, key: str) -> float | None:
        """Seconds since the file was written; None where there is none."""
        with self._reached("read"), suppress(FileNotFoundError):
            return time.time() - self._place.written(_checked(key))
        return None

    def keys(self) -> Iterator[str]:
        """Every key, in no order; of those that come and go meanwhile, some."""
        with self._reached("read"):
            yield from (key for key in self._place.keys() if _KEY.fullmatch(key))

    def clear_arriving(self, older_than_s: float) -> None:
        """Removes what was begun so long ago that whoever wrote it must have died."""
        with self._reached("written"):
            self._place.clear(time.time() - older_than_s)

    def _opened(self, url: str) -> _Place:
        path = url.removeprefix("file://")
        if "://" not in path:
            if not Path(path).is_absolute():
                raise StoreUnavailable(f"{url!r} is no absolute path, and no URL, of a store of artifacts.", _FORMS)
            return _Folder(Path(path))
        try:
            system, root = fsspec.url_to_fs(url)
        except (ImportError, ValueError, OSError) as error:  # some file systems connect at once
            raise StoreUnavailable(f"The store of artifacts {self._shown} cannot be opened: {error}", _FORMS) from error
        return _Remote(system, root)

    @contextmanager
    def _reached(self, done: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or " ".join(str(error).splitlines()[:1]) or type(error).__name__
            raise StoreUnavailable(f"The store of artifacts {self._shown} cannot be {done}: {reason}.") from error


class _Folder:
    """A file for each key, written beside all others under a name of its own until it is whole."""

    def __init__(self, root: Path) -> None:
        self._root, self._arriving = root, root / ".arriving"

    def put(self, key: str, content: bytes) -> None:
        # Whoever stores a file tells nobody its key before it is there.
        renamed_first(self._arriving / uuid4().hex, content, self._root / key)

    def get(self, key: str) -> bytes:
        return (self._root / key).read_bytes()

    def delete(self, key: str) -> None:
        path = self._root / key
        path.unlink()
        # A folder belongs to one job, and goes with its last file.
        with suppress(OSError):
            path.parent.rmdir()

    def keys(self) -> Iterator[str]:
        # os.walk passes over folders that vanish meanwhile; Path.rglob of Python 3.11 does not.
        for folder, _, names in os.walk(self._root):
            for name in names:
                yield (Path(folder) / name).relative_to(self._root).as_posix()

    def written(self, key: str) -> float:
        return (self._root / key).stat().st_mtime

    def clear(self, before: float) -> None:
        for path in self._arriving.glob("*"):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < before:
                    path.unlink()


class _Remote:
    """An object for each key; stores of objects show one only once it is whole."""

    def __init__(self, system: Any, root: str) -> None:
        self._system, self._root = system, root.rstrip("/")

    def put(self, key: str, content: bytes) -> None:
        with _as_os_error():
            self._system.pipe_file(f"{self._root}/{key}", content)

    def get(self, key: str) -> bytes:
        with _as_os_error():
            return bytes(self._system.cat_file(f"{self._root}/{key}"))

    def delete(self, key: str) -> None:
        with _as_os_error():
            self._system.rm_file(f"{self._root}/{key}")

    def keys(self) -> Iterator[str]:
        with _as_os_error():
            # What was listed a moment ago is not what is there: other processes write too.
            self._system.invalidate_cache()
            found: list[str] = self._system.find(self._root)
        for path in found:
            yield path.removeprefix(f"{self._root}/")

    def written(self, key: str) -> float:
        with _as_os_error():
            return float(self._system.modified(f"{self._root}/{key}").timestamp())

    def clear(self, before: float) -> None:
        """Nothing is there before it is whole; what an interrupted upload left is for the bucket's own lifecycle rules."""


@contextmanager
def _as_os_error() -> Iterator[None]:
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - each file system raises its own library's family (botocore's, aiohttp's), without a base
        raise OSError(f"{type(error).__name__}: {error}") from error


def _checked(key: str) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"{key[:_KEY_SHOWN]!r} is no key of an artifact.")
    return key
