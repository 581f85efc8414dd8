"""Pictures on their way into a request: a path, bytes, a PIL picture or an array becomes a data URI; everything else stays as it is.

Opens no picture that is a file already: the server checks it. numpy and Pillow are imported only where a value is theirs.
"""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, cast

from deployments.errors import InvalidImage

PICTURE_FIELDS = frozenset(
    {
        "reference_image", "reference_images", "image", "images", "init_image", "pose_image", "mask", "held_out", "image_urls",
        "first", "second", "image_a", "image_b", "image1", "image2",
    }
)  # fmt: skip
"""Fields of any request whose value is a picture, or a list of them."""
_NESTED_FIELDS = ("identity", "identities", "controls")
# How a file says what it is: PNG, JPEG and RIFF (which WebP lies in).
_OPENINGS = ((b"\x89PNG", "image/png"), (b"\xff\xd8", "image/jpeg"), (b"RIFF", "image/webp"))
# Longer than any path, shorter than any picture in base64 that shows a face.
_PATH_CHARACTERS = 1024


def with_pictures(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields as JSON: pictures embedded, those of people and controls included, and what is None left out."""
    return {name: _value(name, value) for name, value in fields.items() if value is not None}


def data_uri(picture: Any) -> str:
    """A picture as text: str (path, data URI or base64), Path, bytes, a PIL picture, or an array uint8 [H, W, 3] RGB.

    Raises InvalidImage for a file that is not there, and for anything else.
    """
    found = source_of(picture)
    if isinstance(found, str):
        return found
    content = _read(found) if isinstance(found, Path) else found
    return f"data:{media_of(content)};base64,{base64.b64encode(content).decode('ascii')}"


def source_of(picture: Any) -> Path | bytes | str:
    """Where a picture lies: the path of its file, its bytes, or text that is for the server to judge. Raises InvalidImage as data_uri."""
    if isinstance(picture, os.PathLike):
        return Path(picture)
    if isinstance(picture, str):
        return _path_of(picture) or picture
    if isinstance(picture, bytes | bytearray | memoryview):
        return bytes(picture)
    return _png(picture)


def media_of(opening: bytes) -> str:
    """`image/png`, say. opening: the first bytes of a file, or all. Raises InvalidImage for those of no picture."""
    media = next((media for start, media in _OPENINGS if opening.startswith(start)), None)
    if media is None:
        raise InvalidImage("The file is not a PNG, JPEG or WebP picture.")
    return media


def unreadable(path: Path, error: OSError) -> InvalidImage:
    return InvalidImage(f"The picture {path} cannot be read: {error.strerror}.", "Check the path.", {"path": str(path)})


def _value(name: str, value: Any) -> Any:
    if name in PICTURE_FIELDS:
        return [data_uri(item) for item in value] if isinstance(value, list | tuple) else data_uri(value)
    if name in _NESTED_FIELDS:
        return [with_pictures(person) for person in value] if isinstance(value, list | tuple) else with_pictures(value)
    return value


def _path_of(text: str) -> Path | None:
    """None for what is no path."""
    if text.startswith(("data:", "http://", "https://")) or len(text) > _PATH_CHARACTERS:
        return None
    path = Path(text)
    return path if path.suffix or path.is_file() else None


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def _png(picture: Any) -> bytes:
    """A PIL picture or an array as PNG. Neither library is imported unless the caller has done so already."""
    pillow, numpy = sys.modules.get("PIL.Image"), sys.modules.get("numpy")
    if numpy is not None and isinstance(picture, numpy.ndarray):
        from PIL import Image

        if picture.dtype != numpy.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise InvalidImage(f"An array is uint8 [H, W, 3], RGB, not {picture.dtype} {list(picture.shape)}.", "Convert it first.")
        picture, pillow = Image.fromarray(picture), sys.modules["PIL.Image"]
    if pillow is None or not isinstance(picture, pillow.Image):
        raise InvalidImage(f"A {type(picture).__name__} is no picture.", "Give a path, bytes, a PIL picture or an array uint8 [H, W, 3].")
    stream = BytesIO()
    cast(Any, picture).save(stream, "PNG")
    return stream.getvalue()
