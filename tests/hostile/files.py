"""Hostile picture files, made in code: bombs, files of nothing but parts, polyglots, files that are something else, files cut short.

Each builder gives bytes; REFUSED are to be refused as pictures, OPENED are pictures with something else in them.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from io import BytesIO
from typing import Any

import numpy as np
from PIL import Image

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_MANY_BYTES = 8 * 2**20
MARK = b"<script>alert(1)</script>"
"""What no file that leaves the server may hold."""


def chunk(kind: bytes, body: bytes = b"") -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, body: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """body: all chunks between the header and the end. colour: 0 grey, 2 RGB."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return _SIGNATURE + chunk(b"IHDR", header) + body + chunk(b"IEND")


def pixels(width: int = 8, height: int = 8) -> bytes:
    """The IDAT of a black RGB picture."""
    return chunk(b"IDAT", zlib.compress(bytes(height * (1 + 3 * width))))


def saved(format: str, size: tuple[int, int] = (16, 16), mode: str = "RGB", **options: Any) -> bytes:
    stream = BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).convert(mode).save(stream, format, **options)
    return stream.getvalue()


def one_bit_bomb() -> bytes:
    """30,000 x 30,000 pixels, whole, in about 110 KB."""
    packer = zlib.compressobj(9)
    row = bytes(1 + 30_000 // 8)
    packed = b"".join(packer.compress(row) for _ in range(30_000)) + packer.flush()
    return png(30_000, 30_000, chunk(b"IDAT", packed), depth=1, colour=0)


def text_bomb(kind: bytes, head: bytes, times: int = 1) -> bytes:
    """A compressed text (or colour profile) of 256 MB in each of `times` chunks."""
    body = zlib.compress(bytes(2**28), 9)
    return png(8, 8, b"".join(chunk(kind, head + body) for _ in range(times)) + pixels())


def many_texts() -> bytes:
    """Just under a megabyte each, a hundred of them: more than Pillow keeps."""
    body = zlib.compress(bytes(1_000_000), 9)
    return png(8, 8, b"".join(chunk(b"zTXt", b"k%d\0\0" % k + body) for k in range(100)) + pixels())


def animation(format: str, frames: int) -> bytes:
    first, *rest = (Image.new("RGB", (16, 16), (k % 251, k // 251, 0)) for k in range(frames))
    stream = BytesIO()
    first.save(stream, format, save_all=True, append_images=rest, duration=10)
    return stream.getvalue()


def boasting_animation() -> bytes:
    """An APNG that claims two thousand million frames."""
    return png(8, 8, chunk(b"acTL", struct.pack(">II", 2**31 - 1, 0)) + pixels())


def huge_canvas() -> bytes:
    """An animated WebP of 16383 x 16383 pixels in 156 bytes."""
    frame = saved("WEBP")[12:]
    header = b"VP8X" + struct.pack("<I", 10) + bytes((2, 0, 0, 0)) + (16382).to_bytes(3, "little") * 2
    body = bytes(6) + (15).to_bytes(3, "little") * 2 + (10).to_bytes(3, "little") + b"\0" + frame
    content = b"WEBP" + header + b"ANIM" + struct.pack("<I", 6) + bytes(6) + (b"ANMF" + struct.pack("<I", len(body)) + body) * 2
    return b"RIFF" + struct.pack("<I", len(content)) + content


def jpeg_with(parts: bytes) -> bytes:
    """parts: what stands between the beginning and the first segment."""
    plain = saved("JPEG")
    return plain[:2] + parts + plain[2:]


def jpeg_of_scans(scans: int) -> bytes:
    """A progressive JPEG of 49 megapixels that refines itself again and again: 400 bytes, 30 ms a scan."""
    stream = BytesIO()
    Image.new("L", (7000, 7000), 9).save(stream, "JPEG", progressive=True)
    data = stream.getvalue()
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * scans + data[-2:]


def jpeg_of_size(width: int, height: int) -> bytes:
    """A small JPEG whose header says another size."""
    data = bytearray(saved("JPEG"))
    place = data.index(b"\xff\xc0") + 5
    data[place : place + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def with_zip_behind(data: bytes) -> bytes:
    """A picture to one program, an archive to another."""
    stream = BytesIO(data)
    with zipfile.ZipFile(stream, "a") as archive:
        archive.writestr("run.html", MARK)
    return stream.getvalue()


def film_behind() -> bytes:
    """A telephone's moving photograph: a JPEG with a film behind its end, in which any two bytes may stand."""
    return saved("JPEG") + b"\0\0\0\x18ftypmp42" + b"\xff\xda\0\x02" * 5000


REFUSED: dict[str, Callable[[], bytes]] = {
    "30k x 30k of one bit": one_bit_bomb,
    "30k x 30k by its header": partial(png, 30_000, 30_000, pixels()),
    "2**31 x 2**31": partial(png, 2**31 - 1, 2**31 - 1, pixels()),
    "no width": partial(png, 0, 8, pixels()),
    "text of 256 MB": partial(text_bomb, b"zTXt", b"parameters\0\0"),
    "international text of 256 MB": partial(text_bomb, b"iTXt", b"parameters\0\1\0\0\0"),
    "a colour profile of 256 MB": partial(text_bomb, b"iCCP", b"profile\0\0"),
    "a hundred texts of 1 MB": many_texts,
    "APNG of 2000 frames": partial(animation, "PNG", 2000),
    "WebP of 2000 frames": partial(animation, "WEBP", 2000),
    "APNG of 2**31 frames": boasting_animation,
    "WebP of 16383 x 16383": huge_canvas,
    "JPEG of 65535 x 65535": partial(jpeg_of_size, 65535, 65535),
    "PNG of private chunks": lambda: png(8, 8, chunk(b"prVt") * (_MANY_BYTES // 12) + pixels()),
    "PNG of empty pixels": lambda: png(8, 8, pixels() + chunk(b"IDAT") * (_MANY_BYTES // 12)),
    "PNG of chunks behind the pixels": lambda: png(8, 8, pixels() + chunk(b"prVt") * (_MANY_BYTES // 12)),
    "JPEG of comments": lambda: jpeg_with(b"\xff\xfe\0\2" * (_MANY_BYTES // 4)),
    "JPEG of fill bytes": lambda: jpeg_with(b"\xff" * _MANY_BYTES),
    "JPEG of application data": lambda: jpeg_with(b"\xff\xe1\0\x08http:/" * (_MANY_BYTES // 10)),
    "JPEG of 300 scans": partial(jpeg_of_scans, 300),
    "GIF": partial(saved, "GIF"),
    "TIFF": partial(saved, "TIFF"),
    "BMP": partial(saved, "BMP"),
    "ICO": partial(saved, "ICO"),
    "PDF": partial(saved, "PDF"),
    "EPS, which would start Ghostscript": partial(saved, "EPS"),
    "SVG": lambda: b'<svg xmlns="http://www.w3.org/2000/svg" onload="alert(1)"><image href="file:/etc/passwd"/></svg>',
    "SVG with entities": lambda: b'<!DOCTYPE svg [<!ENTITY x SYSTEM "file:/etc/passwd">]><svg>&x;</svg>',
    "HTML": lambda: b"<html>" + MARK,
    "ZIP": lambda: with_zip_behind(b""),
    "a PNG behind an archive": lambda: with_zip_behind(b"") + saved("PNG"),
    "PNG cut short": lambda: saved("PNG", (64, 64))[:-4000],
    "JPEG cut short": lambda: saved("JPEG", (64, 64))[:-1500],
    "WebP cut short": lambda: saved("WEBP", (64, 64))[:-1500],
    "a signature alone": lambda: _SIGNATURE,
    "a JPEG's first bytes": lambda: b"\xff\xd8\xff",
    "a RIFF that is no WebP": lambda: b"RIFF\x24\0\0\0WAVEfmt ",
}
OPENED: dict[str, Callable[[], bytes]] = {
    "PNG with an archive behind": lambda: with_zip_behind(saved("PNG")),
    "JPEG with HTML in its comment": lambda: saved("JPEG", comment=MARK),
    "PNG with HTML in a text": lambda: png(8, 8, chunk(b"tEXt", b"Comment\0" + MARK) + pixels()),
    "PNG with HTML behind the end": lambda: saved("PNG") + MARK,
    "JPEG with a film behind": film_behind,
    "JPEG with EXIF of 60 KB": lambda: saved("JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0" + bytes(60_000)),
    "progressive JPEG": partial(saved, "JPEG", progressive=True),
    "CMYK": partial(saved, "JPEG", mode="CMYK"),
    "grey of 16 bits": partial(saved, "PNG", mode="I;16"),
    "PNG with 256 MB behind its last row": lambda: png(8, 8, chunk(b"IDAT", zlib.compress(bytes(2**28), 9))),
    "PNG in 4000 parts": lambda: png(8, 8, chunk(b"prVt") * 4000 + pixels()),
}
