"""What a file that comes is put into: memory, or a file beside its place, which takes the place once it is whole. Asks nobody for it."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self
from uuid import uuid4

from deployments.errors import InvalidRequest

Progress = Callable[[int, int], object]
"""Told how many bytes of how many have gone up, or come down."""


class Download:
    """A context: without `keep` nothing of the file is left after it. Raises InvalidRequest where the path cannot be written."""

    def __init__(self, path: Path | None, progress: Progress | None = None) -> None:
        """path: of the file, over one that is there, in a folder that may have to be made; None for memory."""
        self._path, self._progress = path, progress
        # Of this download alone: another may be writing to the same path.
        self._part = path.with_name(f"{path.name}.{uuid4().hex[:12]}.part") if path is not None else None
        self._stream: BinaryIO | None = None
        self._done = self._total = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._stream is None:
            return
        try:
            with self._writable():
                self._stream.close()
        finally:
            if self._part is not None:
                self._part.unlink(missing_ok=True)

    def begin(self, total: int) -> None:
        """total: bytes that are to come; 0 where that is not known. Makes the folder: not before there is something for it."""
        self._total = total
        with self._writable():
            if self._part is not None:
                self._part.parent.mkdir(parents=True, exist_ok=True)
            self._stream = io.BytesIO() if self._part is None else self._part.open("xb")

    def add(self, piece: bytes) -> None:
        with self._writable():
            self._begun.write(piece)
        self._done += len(piece)
        if self._progress is not None:
            self._progress(self._done, max(self._total, self._done))

    def keep(self) -> bytes | Path:
        """All of it has come: its bytes, or its path, where it is now."""
        if isinstance(self._begun, io.BytesIO):
            return self._begun.getvalue()
        assert self._part is not None and self._path is not None
        with self._writable():
            self._begun.flush()
            os.fsync(self._begun.fileno())
            os.replace(self._part, self._path)
        return self._path

    @property
    def _begun(self) -> BinaryIO:
        if self._stream is None:
            raise ValueError("The download has not begun.")
        return self._stream

    @contextmanager
    def _writable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise InvalidRequest(f"The file {self._path} cannot be written: {error.strerror}.", "Check the path, and the disk.") from error
