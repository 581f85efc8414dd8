"""Stage results in transit: a run's files, packed into pieces small enough for a narrow channel, and unpacked elsewhere.

Stages may run on different machines; what one made travels as `part.000, part.001, ...`, pieces of one tar file. Knows files,
not models.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

PIECE_BYTES = 16 * 2**20
_PREFIX = "part."


def export_files(files: Iterable[Path], folder: Path, piece_bytes: int = PIECE_BYTES) -> list[Path]:
    """Writes the files (by name, without folders) into pieces of at most `piece_bytes`; returns their paths."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for file in sorted(files):
            tar.add(file, arcname=file.name)
    folder.mkdir(parents=True, exist_ok=True)
    data = packed.getbuffer()
    pieces = [folder / f"{_PREFIX}{number:03d}" for number in range(-(-len(data) // piece_bytes))]
    for number, piece in enumerate(pieces):
        piece.write_bytes(data[number * piece_bytes : (number + 1) * piece_bytes])
    return pieces


def import_files(folder: Path, into: Path) -> list[Path]:
    """Joins the pieces in a folder and unpacks them. Raises FileNotFoundError for missing pieces, tarfile.ReadError for damaged ones."""
    pieces = sorted(folder.glob(f"{_PREFIX}[0-9][0-9][0-9]"))
    expected = [folder / f"{_PREFIX}{number:03d}" for number in range(len(pieces))]
    if not pieces or pieces != expected:
        raise FileNotFoundError(
            f"{folder} must hold {_PREFIX}000, {_PREFIX}001, ... without a gap; found {[p.name for p in pieces] or 'none'}"
        )
    into.mkdir(parents=True, exist_ok=True)
    with tarfile.open(fileobj=io.BytesIO(b"".join(piece.read_bytes() for piece in pieces))) as tar:
        tar.extractall(into, filter="data")
        return [into / name for name in tar.getnames()]
