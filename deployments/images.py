"""Bytes <-> pixels: the only place that opens pictures.

What comes in is hostile until it is decoded: kind, size and number of frames are read from the header and checked before a pixel is
unpacked. What goes out can be made again and says what it is: it carries the parameters it was drawn from and the mark of a drawn picture
(deployments/provenance.py), and neither time nor id, so that equal pictures of equal parameters are equal files. Knows no face, no model
and no network: a picture by URL is refused.
"""

from __future__ import annotations

import base64
import json
import re
import struct
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms, PngImagePlugin, UnidentifiedImageError

from deployments.contracts import RGB
from deployments.errors import InvalidImage, InvalidRequest
from deployments.provenance import SOFTWARE, XMP_KEYWORD, Source, source_of, xmp

Format = Literal["png", "jpeg", "webp"]
Paper = Literal["white", "black"]
"""What transparency is laid on: white, as a page is; black for a mask, where it means: not here."""

PARAMETERS_KEY = "parameters"
"""The PNG text chunk that other programs, too, read a picture's recipe from."""
_READ_AS = ("PNG", "JPEG", "WEBP")
_MEDIA_TYPES = frozenset({"image/png", "image/jpeg", "image/jpg", "image/webp"})
# What Pillow lets through, by damaging bytes at random: its own errors, and those of the parsers beneath it.
_DAMAGE = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, ArithmeticError, struct.error, zlib.error)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# EXIF 2.32, tables 3 and 8: the turn, the pointer to the camera's own fields, and the comment among them with the mark of its encoding.
_ORIENTATION, _SOFTWARE, _EXIF_FIELDS, _USER_COMMENT, _ASCII = 0x0112, 0x0131, 0x8769, 0x9286, b"ASCII\0\0\0"
# An APP1 segment of a JPEG holds 65,533 bytes; some are TIFF structure.
_JPEG_COMMENT_BYTES = 65_000
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# Pillow reads a file part by part, or byte by byte where there are none, in Python: 32 MiB of nothing but tiny parts took it up to 26 s and
# 560 MB. libpng's parts of 8 KiB, four reads each, come to 16,000 in the largest file that is allowed.
_MOST_READS = 100_000
# A scan of a progressive JPEG goes over the whole picture for a few bytes: 30 ms each at 50 megapixels. Encoders write about ten.
_MOST_SCANS, _MOST_MARKERS = 50, 1000
_SCAN, _END_OF_PICTURE = 0xDA, 0xD9
# What opens a segment with a length: not stuffing, filling, TEM or RST (ITU T.81, table B.1).
_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd7\xff]")
_QUALITY: Mapping[Format, int] = {"jpeg": 95, "webp": 90}
# zlib's level for PNG: less than half of level 6's time for a hundredth more bytes (pictures of 1024 x 1024, measured).
_PNG_EFFORT = 4
_DATA_URI = re.compile(r"data:(?P<media>[^;,]*)(?P<options>(?:;[^;,]*)*),", re.IGNORECASE)
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_WHITESPACE = re.compile(r"[ \t\r\n]+")
# Beside the payload of a data URI: its own head, and the line breaks of a wrapped one (one or two in 76 characters).
_HEAD_CHARACTERS, _WRAPPED = 256, 1.03


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a picture may be. bytes: of its file; pixels: width x height, a photograph of 50 megapixels by default.

    Pillow's own limit, 179 megapixels, holds beside it.
    """

    bytes: int = 32 * 2**20
    pixels: int = 50_000_000


DEFAULT_LIMITS = Limits()


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS, paper: Paper = "white") -> RGB:
    """A PNG, JPEG or WebP file -> uint8 RGB [H, W, 3], upright, in sRGB, what is transparent on white (or on black).

    Raises InvalidImage, with the reason: too many bytes or pixels, another format, animated, damaged, cut short.
    """
    with _opened(data, limits) as image:
        try:
            image.load()
            flat = _in_srgb(_flat(image, paper), image.info.get("icc_profile"))
        except _DAMAGE as error:
            raise InvalidImage(f"The picture is damaged or cut short: {error}.", "Save it anew and send it again.") from error
        turn = _turn(image)
    return np.array(flat if turn is None else flat.transpose(turn), dtype=np.uint8)


def pixels_of(data: bytes, limits: Limits = DEFAULT_LIMITS) -> int:
    """Width x height as the header says, before anything is unpacked; 0 for what `decode` would refuse by its header."""
    try:
        with _opened(data, limits) as image:
            return image.width * image.height
    except InvalidImage:
        return 0


def refuse_by_header(data: bytes, limits: Limits = DEFAULT_LIMITS) -> None:
    """Raises InvalidImage for all that is wrong with a file and known before its pixels are unpacked: less than `decode` finds."""
    with _opened(data, limits):
        pass


def from_text(text: str, limits: Limits = DEFAULT_LIMITS) -> bytes:
    """The bytes of a picture given as `data:image/png;base64,...` or as bare base64; nothing of them is opened yet.

    Raises InvalidImage: not base64, another media type, too long (before it is unpacked), an address.
    """
    text = text.strip()
    allowed = round(limits.bytes * 4 / 3 * _WRAPPED) + _HEAD_CHARACTERS
    if len(text) > allowed:
        raise InvalidImage(f"The picture's text has {len(text)} characters; {allowed} are allowed, for {limits.bytes} bytes.")
    payload = _WHITESPACE.sub("", _payload(text))
    if not payload:
        raise InvalidImage("The picture is empty.")
    try:
        return base64.b64decode(payload, validate=True)
    except ValueError as error:  # binascii.Error, and what is not ASCII
        raise InvalidImage(
            f"The picture is not valid base64: {error}.", "Send `data:image/png;base64,...`, or the standard base64 alone."
        ) from error


def encode(
    rgb: RGB,
    format: Format = "png",
    parameters: Mapping[str, object] | None = None,
    quality: int | None = None,
    source: Source | None = "trainedAlgorithmicMedia",
) -> bytes:
    """uint8 RGB [H, W, 3] -> a file. Equal input gives equal bytes.

    parameters: JSON values that `parameters_of` gives back; in a PNG the text chunk `parameters`, else EXIF's UserComment.
    quality: 1 to 100 for JPEG (95 where None) and WebP (90); a PNG loses nothing. source: what the file says it is, in XMP and as the
    text Software; None says nothing, for pictures that no model drew. Raises InvalidRequest for parameters that do not fit into a
    JPEG, ValueError for an array of another kind.
    """
    if rgb.dtype != np.uint8 or rgb.ndim != 3 or rgb.shape[2] != 3:
        raise ValueError(f"A picture is uint8 [H, W, 3], not {rgb.dtype} {list(rgb.shape)}; convert it first.")
    text = None if parameters is None else parameters_text(parameters, format)
    image, stream = Image.fromarray(np.ascontiguousarray(rgb)), BytesIO()
    if format == "png":
        image.save(stream, "PNG", pnginfo=_chunks(text, source), compress_level=_PNG_EFFORT)
        return stream.getvalue()
    chosen = _QUALITY[format] if quality is None else quality
    options: dict[str, Any] = {} if source is None else {"xmp": xmp(source).encode()}
    if format == "jpeg":  # 4:4:4: halved colour would blur lips and eyes, which are what the pictures are about.
        options["subsampling"] = 0
    image.save(stream, format.upper(), quality=chosen, exif=_exif(text, source), **options)
    return stream.getvalue()


def parameters_text(parameters: Mapping[str, object], format: Format) -> str:
    """The parameters as a file of that kind carries them, ASCII. Raises InvalidRequest where it has no room for them."""
    text = json.dumps(parameters, sort_keys=True, separators=(",", ":"), allow_nan=False)
    if format == "jpeg" and len(text) > _JPEG_COMMENT_BYTES:
        raise InvalidRequest(f"The parameters take {len(text)} bytes; a JPEG has room for {_JPEG_COMMENT_BYTES}.", "Ask for png.")
    return text


def parameters_of(data: bytes, limits: Limits = DEFAULT_LIMITS) -> dict[str, object] | None:
    """What `encode` was given, read back from the file; None where there is nothing, or something of another program's.

    Raises InvalidImage as `decode` does, except for damaged pixels, which are not looked at.
    """
    with _opened(data, limits) as image:
        text = image.info.get(PARAMETERS_KEY)
        if text is None:
            comment = _exif_of(image).get_ifd(_EXIF_FIELDS).get(_USER_COMMENT, b"")
            text = comment.removeprefix(_ASCII) if isinstance(comment, bytes) else b""
    try:
        parameters = json.loads(text)
    except (ValueError, TypeError):
        return None
    return parameters if isinstance(parameters, dict) else None


def drawn_by(data: bytes, limits: Limits = DEFAULT_LIMITS) -> str | None:
    """What a file says of how it came about: IPTC's term for its digital source (deployments/provenance.py), or None.

    Raises InvalidImage as `parameters_of` does.
    """
    with _opened(data, limits) as image:
        packet = image.info.get("xmp") or image.info.get(XMP_KEYWORD) or b""
    return source_of(packet.encode() if isinstance(packet, str) else packet)


@contextmanager
def _opened(data: bytes, limits: Limits) -> Iterator[Image.Image]:
    """The picture with its header read and checked, its pixels still packed."""
    if not data:
        raise InvalidImage("The picture is empty.")
    if len(data) > limits.bytes:
        raise InvalidImage(f"The picture has {len(data)} bytes; {limits.bytes} are allowed.")
    try:
        image = Image.open(_Patience(data), formats=_READ_AS)
    except UnidentifiedImageError as error:
        raise InvalidImage("The bytes are not a PNG, JPEG or WebP picture.") from error
    except _BOMBS as error:
        raise InvalidImage(f"The picture has too many pixels; {limits.pixels} are allowed.") from error
    except _DAMAGE as error:
        raise InvalidImage(f"The picture's header is damaged: {error}.", "Save it anew and send it again.") from error
    with image:
        _refuse(image, limits)
        if image.format in ("JPEG", "MPO"):
            _refuse_scans(data)
        yield image


class _Patience(BytesIO):
    """A file that lets itself be read so many times and no more, whatever it is that reads so often."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = _MOST_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise InvalidImage("The picture's file is made of more parts than any picture has.", "Save it anew and send it again.")
        return super().read(size)


def _refuse(image: Image.Image, limits: Limits) -> None:
    width, height = image.size
    if width * height > limits.pixels:
        raise InvalidImage(f"The picture is {width} x {height} = {width * height} pixels; {limits.pixels} are allowed.")
    # A JPEG with several pictures (MPO) is a photograph first; what follows are a camera's depth or gain maps.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames != 1:
        raise InvalidImage(f"The picture is an animation of {frames} frames.", "Send a single frame.")


def _refuse_scans(data: bytes) -> None:
    """The walk over the segments of a JPEG that libjpeg will make, up to the first picture's end."""
    place, scans = 2, 0
    for _ in range(_MOST_MARKERS):
        found = _MARKER.search(data, place)
        kind = None if found is None else data[found.end() - 1]
        if found is None or kind == _END_OF_PICTURE:
            return
        scans += kind == _SCAN
        if scans > _MOST_SCANS:
            break
        place = found.end() + max(2, int.from_bytes(data[found.end() : found.end() + 2], "big"))
    raise InvalidImage(f"The JPEG draws itself in more than {_MOST_SCANS} passes.", "Save it anew, not as progressive, and send it again.")


def _flat(image: Image.Image, paper: Paper) -> Image.Image:
    """Any mode -> L, RGB or CMYK (the modes that colour profiles speak of), without transparency."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip where it should scale
        return Image.fromarray((np.asarray(image).astype(np.uint32) // 257).astype(np.uint8))
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, paper), coloured).convert("RGB")
    return image if image.mode in ("L", "RGB", "CMYK") else image.convert("RGB")


def _in_srgb(image: Image.Image, profile: object) -> Image.Image:
    """RGB in sRGB. A profile that cannot be read, or is for another mode, counts as none, as in any viewer."""
    if isinstance(profile, bytes) and profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            if "sRGB" not in ImageCms.getProfileDescription(source):
                converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode="RGB")
                return image.convert("RGB") if converted is None else converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            pass
    return image.convert("RGB")


def _exif_of(image: Image.Image) -> Image.Exif:
    """Empty where it is damaged: then it says nothing, and the pixels may still be sound."""
    try:
        return image.getexif()
    except _DAMAGE:
        return Image.Exif()


def _turn(image: Image.Image) -> Image.Transpose | None:
    orientation = _exif_of(image).get(_ORIENTATION)
    return _TURNS.get(orientation) if isinstance(orientation, int) else None


def _payload(text: str) -> str:
    """The base64 of a data URI, or the text itself."""
    head = _DATA_URI.match(text)
    if head is not None:
        media, options = head["media"].lower(), head["options"].lower().split(";")
        if media not in _MEDIA_TYPES:
            raise InvalidImage(f"The data URI holds {media or 'no media type'}; image/png, image/jpeg and image/webp are read.")
        if options[-1] != "base64":
            raise InvalidImage("The data URI is not base64.", "Write it as `data:image/png;base64,...`.")
        return text[head.end() :]
    if text.lower().startswith("data:"):
        raise InvalidImage("The data URI has no comma before its content.", "Write it as `data:image/png;base64,...`.")
    if _ADDRESS.match(text):
        raise InvalidImage(
            f"The picture is an address ({text.split(':')[0]}:), and addresses are not followed.", "Send the picture itself as base64."
        )
    return text


def _chunks(text: str | None, source: Source | None) -> PngImagePlugin.PngInfo:
    """ASCII (json.dumps escapes the rest), hence plain tEXt chunks, which every reader knows."""
    chunks = PngImagePlugin.PngInfo()
    if source is not None:
        chunks.add_text("Software", SOFTWARE)
        chunks.add_itxt(XMP_KEYWORD, xmp(source))
    if text is not None:
        chunks.add_text(PARAMETERS_KEY, text)
    return chunks


def _exif(text: str | None, source: Source | None) -> bytes:
    if text is None and source is None:
        return b""
    exif = Image.Exif()
    if source is not None:
        exif[_SOFTWARE] = SOFTWARE
    if text is not None:
        exif.get_ifd(_EXIF_FIELDS)[_USER_COMMENT] = _ASCII + text.encode("ascii")
    return exif.tobytes()
