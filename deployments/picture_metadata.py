"""What a picture's file says beside its pixels, taken out without touching them: places, times, names, cameras, and whatever is hidden
behind its end. The compressed pixels stay byte for byte; so do colour profile and transparency, and the turn, which is how it is seen.

JPEG (ITU-T T.81, annex B): the segments APP1 to APP15 but ICC's and Adobe's, comments, and what follows the end of the image. PNG (third
edition, W3C): every chunk that is not needed to show the picture. WebP (RFC 9649): the chunks EXIF and XMP, and unknown ones. (A turn
that stands in XMP alone, or in a PNG's text, goes as well: few programs heed it.)

Walks over the parts of the file and unpacks nothing, in time that grows with the file and no faster; imports no picture library.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from typing import TypeVar

from deployments.errors import InvalidImage

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# Those that change what is seen; those of an animation too, or it would pass for a still picture further on.
_PNG_SHOWN = frozenset(
    {
        b"IHDR", b"PLTE", b"IDAT", b"IEND", b"tRNS", b"cHRM", b"gAMA", b"iCCP", b"sBIT", b"sRGB", b"cICP", b"bKGD", b"pHYs",
        b"acTL", b"fcTL", b"fdAT",
    }
)  # fmt: skip
_WEBP_SHOWN = frozenset({b"VP8 ", b"VP8L", b"VP8X", b"ALPH", b"ICCP", b"ANIM", b"ANMF"})
_WEBP_EXIF, _WEBP_XMP = 0x08, 0x04
_EOI, _SOS, _COM, _APP1, _APP2, _APP14, _APP15 = 0xD9, 0xDA, 0xFE, 0xE1, 0xE2, 0xEE, 0xEF
_ICC, _EXIF = b"ICC_PROFILE\0", b"Exif\0\0"
# Entropy-coded data holds 0xFF before 0x00, restart markers and further 0xFF only.
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")
# A photograph has some dozens; a PNG of libpng's 8 KiB 16,000 in the largest file that is allowed.
_MOST_PARTS = 100_000
# EXIF 2.32, table 4; TIFF 6.0, page 13 and following: an entry has 12 bytes, SHORT is type 3.
_ORIENTATION, _SHORT, _ENTRY_BYTES, _MOST_ENTRIES = 0x0112, 3, 12, 1000
_TURNED = range(2, 9)
_Part = TypeVar("_Part")


def without_metadata(data: bytes) -> bytes:
    """The same picture with nothing but what shows it. Raises InvalidImage for a file that is no PNG, JPEG or WebP, or breaks off."""
    try:
        if data.startswith(_PNG_SIGNATURE):
            return _png(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
        if data[:2] == b"\xff\xd8":
            return _jpeg(data)
    except (struct.error, IndexError, ValueError) as error:
        raise InvalidImage("The picture is damaged or cut short.", "Save it anew and send it again.") from error
    raise InvalidImage("The bytes are not a PNG, JPEG or WebP picture.")


def _png(data: bytes) -> bytes:
    kept, turn = [_PNG_SIGNATURE], b""
    for kind, start, end in _bounded(_chunks_of_png(data)):
        if kind == b"eXIf":
            turn = _turn(data[start + 8 : end - 4])
        if kind in _PNG_SHOWN:
            kept.append(data[start:end])
    if turn:  # behind the header, which comes first
        kept.insert(2, struct.pack(">I", len(turn)) + b"eXIf" + turn + struct.pack(">I", zlib.crc32(b"eXIf" + turn)))
    return b"".join(kept)


def _chunks_of_png(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    place, kind = len(_PNG_SIGNATURE), b""
    while kind != b"IEND":
        (length,) = struct.unpack_from(">I", data, place)
        kind, end = data[place + 4 : place + 8], place + 12 + length
        if end > len(data):
            raise ValueError("a chunk breaks off")
        yield kind, place, end
        place = end


def _webp(data: bytes) -> bytes:
    chunks = list(_bounded(_chunks_of_webp(data)))
    turn = next((_turn(data[start + 8 : end].removeprefix(_EXIF)) for kind, start, end in chunks if kind == b"EXIF"), b"")
    kept = []
    for kind, start, end in chunks:
        content = data[start + 8 : end]
        if kind == b"VP8X":
            content = bytes([content[0] & ~(_WEBP_EXIF | _WEBP_XMP) | (_WEBP_EXIF if turn else 0)]) + content[1:]
        if kind in _WEBP_SHOWN:
            kept.append(_riff(kind, content))
    body = b"WEBP" + b"".join([*kept, *([_riff(b"EXIF", turn)] if turn else [])])
    return b"RIFF" + struct.pack("<I", len(body)) + body


def _chunks_of_webp(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    (length,) = struct.unpack_from("<I", data, 4)
    place, whole = 12, 8 + length
    if whole > len(data):
        raise ValueError("the file breaks off")
    while place < whole:
        (size,) = struct.unpack_from("<I", data, place + 4)
        if place + 8 + size > whole:
            raise ValueError("a chunk breaks off")
        yield data[place : place + 4], place, place + 8 + size
        place += 8 + size + size % 2


def _riff(kind: bytes, content: bytes) -> bytes:
    return kind + struct.pack("<I", len(content)) + content + b"\0" * (len(content) % 2)


def _jpeg(data: bytes) -> bytes:
    kept, turn = [b"\xff\xd8"], b""
    for marker, start, end in _bounded(_segments_of_jpeg(data)):
        opening = data[start + 4 : start + 4 + len(_ICC)]
        if marker == _APP1 and opening.startswith(_EXIF) and not turn:
            turn = _turn(data[start + 4 + len(_EXIF) : end])
        if not _tells(marker, opening):
            kept.append(data[start:end])
    if turn:
        kept.insert(1, b"\xff\xe1" + struct.pack(">H", 2 + len(_EXIF) + len(turn)) + _EXIF + turn)
    return b"".join([*kept, b"\xff\xd9"])


def _segments_of_jpeg(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of each segment up to the end of the image; a scan's reaches to the next one."""
    place = 2
    while True:
        if data[place] != 0xFF:
            raise ValueError("no marker where one must be")
        marker = data[place + 1]
        if marker == 0xFF:  # filling
            yield _COM, place, place + 1
            place += 1
            continue
        if marker == _EOI:
            return
        (length,) = struct.unpack_from(">H", data, place + 2)
        end = place + 2 + length
        if length < 2 or end > len(data):
            raise ValueError("a segment breaks off")
        if marker == _SOS:
            found = _AFTER_SCAN.search(data, end)
            if found is None:
                raise ValueError("the image has no end")
            end = found.start()
        yield marker, place, end
        place = end


def _tells(marker: int, opening: bytes) -> bool:
    """Whether a segment is about the picture instead of being part of it."""
    if marker == _APP2:
        return opening != _ICC
    return marker == _COM or (_APP1 <= marker <= _APP15 and marker != _APP14)


def _bounded(parts: Iterator[_Part]) -> Iterator[_Part]:
    for number, part in enumerate(parts):
        if number >= _MOST_PARTS:
            raise InvalidImage("The picture's file is made of more parts than any picture has.", "Save it anew and send it again.")
        yield part


def _turn(exif: bytes) -> bytes:
    """EXIF that says how the picture is turned and nothing else; empty for one that is upright or says nothing that can be read."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    try:
        if order is None:
            return b""
        (place,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, place)
        for number in range(min(entries, _MOST_ENTRIES)):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, place + 2 + _ENTRY_BYTES * number)
            if (tag, kind) == (_ORIENTATION, _SHORT):
                return _turned(value)
    except struct.error:
        pass
    return b""


def _turned(value: int) -> bytes:
    if value not in _TURNED:
        return b""
    # Header, the place of the first directory, its one entry, and that no other follows.
    return struct.pack("<4sIHHHIHHI", b"II*\0", 8, 1, _ORIENTATION, _SHORT, 1, value, 0, 0)
