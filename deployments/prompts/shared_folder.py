"""Embeddings in a folder that several processes share: written whole or not at all, bounded, and never a reason to fail.

Whatever goes wrong with the disk costs a line in the log and the encoding of a prompt. Knows no encoder and no text.
"""

from __future__ import annotations

import logging
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from threading import Lock

from safetensors import SafetensorError
from safetensors.torch import load, save

from deployments.contracts import PromptEmbeds

_LOG = logging.getLogger(__name__)
_BYTES = 8 * 2**30
_SUFFIX, _PART = ".safetensors", ".part"
_AFTER_PRUNING = 0.9
_ABANDONED_SECONDS = 3600


class SharedFolder:
    """One safetensors file a key. Safe between threads and processes, also over NFS: a file appears by being renamed."""

    def __init__(self, folder: Path, limit_bytes: int = _BYTES) -> None:
        """limit_bytes: of all files; above it those go that were not read for longest."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._limit = folder, limit_bytes
        self._lock = Lock()
        self._bytes = sum(size for _, size, _ in self._files())

    def get(self, key: str) -> PromptEmbeds | None:
        """None if there is no such file, or it cannot be read; then `put` will replace it."""
        path = self._path(key)
        try:
            tensors = load(path.read_bytes())
            row = PromptEmbeds(tensors["states"], tensors["pooled"])
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, KeyError) as error:
            _LOG.warning("%s cannot be read and will be written anew: %s", path, error)
            return None
        with suppress(OSError):  # pruned meanwhile, or ours only to read
            os.utime(path)
        return row

    def put(self, key: str, row: PromptEmbeds) -> None:
        content = save({"states": row.states.contiguous(), "pooled": row.pooled.contiguous()})
        try:
            self._write(self._path(key), content)
            with self._lock:
                self._bytes += len(content)
                if self._bytes > self._limit:
                    self._prune()
        except OSError as error:
            _LOG.warning("An embedding could not be kept in %s: %s", self._folder, error)

    def _write(self, path: Path, content: bytes) -> None:
        descriptor, part = tempfile.mkstemp(suffix=_PART, dir=self._folder)
        try:
            with open(descriptor, "wb") as stream:
                stream.write(content)
            os.replace(part, path)
        except OSError:
            Path(part).unlink(missing_ok=True)
            raise

    def _prune(self) -> None:
        """Counts anew, since other processes write here too, and removes the oldest."""
        files = sorted(self._files())
        total = sum(size for _, size, _ in files)
        for _, size, path in files:
            if total <= self._limit * _AFTER_PRUNING:
                break
            path.unlink(missing_ok=True)
            total -= size
        self._bytes = total

    def _files(self) -> list[tuple[float, int, Path]]:
        """(time of the last use, bytes, path) of every embedding; what a killed process left half written goes."""
        found = []
        for path in self._folder.iterdir():
            try:
                stat = path.stat()
            except FileNotFoundError:  # another process pruned it
                continue
            if path.suffix == _SUFFIX:
                found.append((stat.st_mtime, stat.st_size, path))
            elif path.suffix == _PART and time.time() - stat.st_mtime > _ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        return found

    def _path(self, key: str) -> Path:
        return self._folder / f"{key}{_SUFFIX}"
