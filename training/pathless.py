"""What callers may read of an error: nothing of where things lie on the server. The log keeps it whole.

Where the path is the reader's own (the command line) nothing is taken away: it never comes by here.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from deployments.errors import LikenessError, unwrapped

_LOG = logging.getLogger("likeness.jobs")
_PART = r"[^\s/\"'`,;:()<>\[\]{}\\]+"
# An escape is one where somebody has quoted a log (`'first\n/srv/b'`), and then no word ends there.
_START = r"(?:(?<![\w.…])|(?<=\\[nrt]))"
_SCHEME = r"\b(?:file|sqlite(?:\+\w+)?):"
_WEB = r"(?i:https?)://[^\s\"'`<>\\]+"
_FILE = rf"{_SCHEME}/+(?:{_PART}/+)*(?P<file>{_PART})"
# Absolute, of two parts or more: `/flux-pulid` is none. `/v1/loras` is an address of our own; a folder `/v1` is told for its sake.
_PATH = rf"{_START}(?<!/)/(?!v1/){_PART}(?:/+{_PART})*/+(?P<path>{_PART})"
_CUT = "…"


def pathless(text: str, roots: Collection[Path] = ()) -> str:
    """Of each absolute path its last part alone; addresses of the web stay. roots: folders that are known, whose names may have blanks."""
    return _pattern(tuple(roots)).sub(_cut, text)


def pathless_error(error: LikenessError, roots: Collection[Path] = ()) -> LikenessError:
    """The same error, or itself where it names no path."""
    said = error.message, error.remedy, error.details
    details = {pathless(name, roots): _in_value(value, roots) for name, value in error.details.items()}
    cut = pathless(error.message, roots), pathless(error.remedy, roots), details
    return error if cut == said else type(error)(*cut)


@contextmanager
def for_callers(job: str, roots: Collection[Path]) -> Iterator[None]:
    """The one border between what errors of a job say on the server, which is logged, and what callers are told."""
    try:
        yield
    except Exception as error:
        inner = unwrapped(error)
        if not isinstance(inner, LikenessError) or (told := pathless_error(inner, roots)) is inner:
            raise
        _LOG.warning("%s: %s", job, inner)
        raise told from error


@lru_cache(64)
def _pattern(roots: tuple[Path, ...]) -> re.Pattern[str]:
    """What is looked for from left to right; of what begins at the same place the first counts."""
    # `/` and `.` are in every text.
    known = {str(path) for root in roots for path in (root, root.resolve()) if len(path.parts) > 1}
    names = "|".join(re.escape(name) for name in sorted(known, key=len, reverse=True))
    root = [rf"(?:{_SCHEME}/*|{_START})(?:{names})(?![\w-])"] if known else []
    return re.compile("|".join([rf"(?P<web>{_WEB})", *root, _FILE, _PATH]))


def _cut(found: re.Match[str]) -> str:
    if found["web"]:
        return found[0]
    last = found["file"] or found["path"]
    return f"{_CUT}/{last}" if last else _CUT


def _in_value(value: object, roots: Collection[Path]) -> object:
    """A plain JSON value whose texts and names are pathless."""
    if value is None or isinstance(value, bool | int | float):
        return value
    if isinstance(value, Mapping):
        return {pathless(str(name), roots): _in_value(item, roots) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_in_value(item, roots) for item in value]
    return pathless(str(value), roots)
