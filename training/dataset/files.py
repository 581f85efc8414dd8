"""The files of a dataset's folder: written whole or not at all, found again, and what was measured kept beside them.

pictures/0001-name.png   a crop        pictures/0001-name.txt   its caption, one line
masks/0001-name.png      weights of the loss, 8-bit grey, 255 is 1; only where they differ from 1
dataset.json             what a trainer reads (dataset.py)
report.json report.html contact_sheet.png       what a person reads (report.py)
analysis/                what was measured of each picture that was looked at, by its sha256 and the face models
"""

from __future__ import annotations

import os
import secrets
from hashlib import sha256
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from deployments.store.durable import placed
from training.dataset.values import PictureAnalysis

PICTURES, MASKS, ANALYSIS = "pictures", "masks", "analysis"
# Of what is measured, and how: another number forgets what older versions found.
_VERSION: Final = 1


class KeptAnalyses:
    """What was measured of pictures, a file each: an interrupted pass goes on where it was. models: whose measures they are."""

    def __init__(self, folder: Path, models: tuple[str, ...]) -> None:
        self._folder = folder / ANALYSIS / sha256("\n".join((str(_VERSION), *models)).encode()).hexdigest()[:12]

    def get(self, sha256: str) -> PictureAnalysis | None:
        """None for what was never seen, and for a file that is damaged: it is looked at again."""
        try:
            return PictureAnalysis.model_validate_json((self._folder / f"{sha256}.json").read_bytes())
        except (OSError, ValidationError):
            return None

    def put(self, analysis: PictureAnalysis) -> None:
        write(self._folder / f"{analysis.sha256}.json", analysis.model_dump_json().encode())


def write(path: Path, content: bytes) -> None:
    """Whole or not at all; a file that has this content already is left alone."""
    try:
        if path.stat().st_size == len(content) and path.read_bytes() == content:
            return
    except OSError:
        pass
    placed(path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}"), content, path)


def remove_others(folder: Path, kept: frozenset[str]) -> None:
    """Deletes the files of a folder of ours that are not among `kept`: what an earlier run with other settings left."""
    if folder.is_dir():
        for path in folder.iterdir():
            if path.is_file() and path.name not in kept:
                path.unlink()
