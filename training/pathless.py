"""What callers may read of an error: nothing of where things lie on the server. The log keeps it whole.

Where the path is the reader's own (the command line) nothing is taken away: it never comes by here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from deployments.errors import LikenessError

_PART = r"[^\s/\"'`,;:()<>\[\]{}\\]+"
# Absolute, of two parts or more: `/flux-pulid` and addresses of our own (`/v1/loras`, `http://host/a/b`) are none.
_PATH = re.compile(rf"(?<![\w.…/:])/(?!v1/){_PART}(?:/{_PART})*/({_PART})")
_CUT = "…"


def pathless(text: str, roots: Collection[Path] = ()) -> str:
    """Of each absolute path its last part alone. roots: folders that are known, whose names may have blanks."""
    known = {name for root in roots for name in (str(root), str(root.resolve()))}
    for name in sorted(known, key=len, reverse=True):
        text = text.replace(name, _CUT)
    return _PATH.sub(rf"{_CUT}/\1", text)


def pathless_error(error: LikenessError, roots: Collection[Path] = ()) -> LikenessError:
    """The same error, or itself where it names no path."""
    details = json.dumps(error.details, default=str, ensure_ascii=False)
    said = error.message, error.remedy, details
    cut = tuple(pathless(text, roots) for text in said)
    return error if cut == said else type(error)(cut[0], cut[1], json.loads(cut[2]))
