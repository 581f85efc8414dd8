"""Writing a file so that it is whole or not there, whatever dies meanwhile. Knows no folder's order and nobody's rows."""

from __future__ import annotations

import os
from pathlib import Path

# A folder may vanish between its making and the move into it, where others clear folders away; not each time anew.
_TRIES = 5


def placed(arriving: Path, content: bytes, target: Path) -> None:
    """Writes `arriving` (a new path on the same file system) and renames it to `target`, over one that is there, in a folder that may
    have to be made. Raises OSError, and then leaves neither."""
    arriving.parent.mkdir(parents=True, exist_ok=True)
    try:
        written(arriving, content)
        moved(arriving, target)
    except BaseException:
        arriving.unlink(missing_ok=True)
        raise


def renamed_first(arriving: Path, content: bytes, target: Path) -> None:
    """As `placed`, and waits for the disk once in place of twice: what writes the file out writes its new name out with it (ext4, XFS).

    Until this returns a power cut may leave `target` in part: for names that nobody knows before. Raises OSError, and leaves neither.
    """
    arriving.parent.mkdir(parents=True, exist_ok=True)
    moved = False
    try:
        with arriving.open("xb") as stream:
            stream.write(content)
            stream.flush()
            made = _move(arriving, target)
            moved = True
            os.fsync(stream.fileno())
        _remember(target, made)
    except BaseException:
        (target if moved else arriving).unlink(missing_ok=True)
        raise


def written(path: Path, content: bytes) -> None:
    """Writes a new file in a folder that is there, out to the disk. Raises OSError, and may leave a part of it."""
    with path.open("xb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def moved(arriving: Path, target: Path) -> None:
    """Renames a file that was written, over one that is there, into a folder that may have to be made; it lasts. Raises OSError."""
    _remember(target, _move(arriving, target))


def remember(folder: Path) -> None:
    """A renamed file survives a power cut once its folder was written out too."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _move(arriving: Path, target: Path) -> bool:
    """Whether the folder was made for it."""
    made = False
    for left in reversed(range(_TRIES)):
        made = made or not target.parent.is_dir()
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(arriving, target)
            break
        # mkdir raises the second where the folder that was in its way is gone when it looks what that was.
        except (FileNotFoundError, FileExistsError):
            if not left:
                raise
    return made


def _remember(target: Path, made: bool) -> None:
    remember(target.parent)
    if made:
        remember(target.parent.parent)
