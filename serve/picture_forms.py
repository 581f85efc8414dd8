"""Fields with a set of pictures on their way to a server, as a form: the files go up as they are, from the disk.

In JSON they would be a third larger, all in memory, and soon more than a body may have. Opens no picture: the server checks them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from serve.attachments import media_of, source_of, unreadable, with_pictures

SETS = frozenset({"images", "held_out", "reference_image"})
"""Fields whose pictures are files of the form."""
_ADDRESSES = "image_urls"
_OPENING_BYTES = 16
_Part = tuple[str, tuple[str | None, Any, str | None]]
"""(field, (name of the file, content, media type)), as httpx has them; a text has neither name nor type."""


@contextmanager
def sent(fields: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Keyword arguments of an httpx request with these fields: a form where one of them holds pictures, else JSON. Its files are open as
    long as the context is. Raises InvalidImage for a file that cannot be read or is no picture."""
    if not any(fields.get(name) is not None for name in SETS):
        yield {"json": with_pictures(fields)}
        return
    with ExitStack() as files:
        yield {"files": [part for name, value in fields.items() if value is not None for part in _parts(name, value, files)]}


def _parts(name: str, value: Any, files: ExitStack) -> list[_Part]:
    """One by one, so that pictures keep their order whatever they are given as."""
    several = value if isinstance(value, list | tuple) else [value]
    if name in SETS:
        return [_picture(name, item, files) for item in several]
    if name == _ADDRESSES:
        return [_text(name, item) for item in several]
    return [_text(name, value)]


def _text(name: str, value: Any) -> _Part:
    return name, (None, value if isinstance(value, str) else json.dumps(value), None)


def _picture(name: str, value: Any, files: ExitStack) -> _Part:
    found = source_of(value)
    if isinstance(found, str):
        return _text(name, found)
    stream: IO[bytes] = files.enter_context(_opened(found) if isinstance(found, Path) else BytesIO(found))
    media = media_of(stream.read(_OPENING_BYTES))
    stream.seek(0)
    # What the file is called here is nobody's business there; that it has a name makes it a file.
    return name, ("picture", stream, media)


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("rb")
    except OSError as error:
        raise unreadable(path, error) from error
