"""Where pictures come from: files of a folder, or bytes that somebody holds. Opens no picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deployments.errors import InvalidRequest

# Those of the second line cannot be opened here, and are named in the report rather than passed over.
_SUFFIXES: Final = frozenset(
    {".png", ".jpg", ".jpeg", ".webp",
     ".heic", ".heif", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".jfif"}
)  # fmt: skip


@dataclass(frozen=True)
class PictureSource:
    """name: how it is called in reports, unique in a set. read: its bytes, when they are wanted; may raise OSError."""

    name: str
    read: Callable[[], bytes]


def from_folder(folder: Path) -> tuple[PictureSource, ...]:
    """The pictures of a folder and of those in it, by name; hidden files and folders are passed over.

    Raises InvalidRequest where the folder is not there, or holds no picture.
    """
    if not folder.is_dir():
        raise InvalidRequest(f"The folder {folder} is not there.", "Name a folder with pictures in it.")
    inside = ((path, path.relative_to(folder)) for path in sorted(folder.rglob("*")))
    files = [(path, name) for path, name in inside if path.suffix.lower() in _SUFFIXES and not any(part[0] == "." for part in name.parts)]
    if not files:
        raise InvalidRequest(f"The folder {folder} holds no picture.", "PNG, JPEG and WebP are read.")
    return tuple(PictureSource(name.as_posix(), path.read_bytes) for path, name in files if path.is_file())


def from_bytes(pictures: Sequence[tuple[str, bytes]]) -> tuple[PictureSource, ...]:
    """Pictures by name. Raises InvalidRequest for a name that comes twice, or no picture."""
    names = [name for name, _ in pictures]
    if not names:
        raise InvalidRequest("There is no picture.", "Send at least one; ten or more make a LoRA.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise InvalidRequest(f"Two pictures are called {twice!r}.", "Give each a name of its own.")

    def reading(data: bytes) -> Callable[[], bytes]:
        return lambda: data

    return tuple(PictureSource(name, reading(data)) for name, data in pictures)
