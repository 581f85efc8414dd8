"""One pass over pictures: what each shows, measured once. A file that cannot be opened is told of, never passed over.

Decides nothing: select.py does, as often as settings change, without a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from hashlib import sha256
from io import BytesIO
from typing import Any, Final, Protocol

import cv2
import numpy as np
from PIL import Image

from deployments.contracts import RGB, Face
from deployments.curation import compression, of_face
from deployments.errors import InvalidImage
from deployments.faces.alignment import FFHQ_PX, ffhq_crop, reduced
from deployments.images import DEFAULT_LIMITS, Limits, decode
from deployments.store.character_values import PictureFacts
from training.dataset.duplicates import look
from training.dataset.search import FaceFinder
from training.dataset.sources import PictureSource
from training.dataset.values import FaceFacts, PictureAnalysis

Progress = Callable[[int, int], object]
"""Is told how many of how many are done."""
_THUMBNAIL_PX: Final = 224
_THUMBNAIL_QUALITY: Final = 85
# Traces of compression are looked for in this much of a picture, at its middle: they are everywhere, and a photograph of 50 megapixels
# would take seconds.
_SAMPLED_PX: Final = 1024
# The distance of the eyes in an FFHQ crop (deployments/faces/alignment.py).
_FFHQ_EYES_PX: Final = 125.9
_LEAST_CROP_PX: Final = 32
_MEASURED_PX: Final = 128
"""At which side of the crop sharpness is measured (deployments/identity/blending.py); of a larger one it makes that itself."""


class Memory(Protocol):
    """What was found before, by the file's sha256: lets an interrupted run go on."""

    def get(self, sha256: str) -> PictureAnalysis | None: ...

    def put(self, analysis: PictureAnalysis) -> None: ...


def analyse(
    sources: Sequence[PictureSource],
    finder: FaceFinder,
    *,
    workers: int = 2,
    memory: Memory | None = None,
    progress: Progress | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[PictureAnalysis, ...]:
    """One item a picture, in their order, whatever the number of threads. Equal files are looked at as often as they come."""

    def one(source: PictureSource) -> PictureAnalysis:
        return _remembered(source, finder, memory, limits)

    with ThreadPoolExecutor(workers, thread_name_prefix="curation") as pool:
        return tuple(_counted(pool.map(one, sources), len(sources), progress))


def analysed(data: bytes, finder: FaceFinder, limits: Limits = DEFAULT_LIMITS) -> PictureAnalysis:
    """What one file shows. Pictures that cannot be opened have a `fault` instead."""
    name = sha256(data).hexdigest()
    try:
        picture = decode(data, limits)
    except InvalidImage as error:
        return PictureAnalysis(sha256=name, fault=error.message)
    lost = compression(_middle(picture), _tables(data))
    height, width = picture.shape[:2]
    faces = tuple(_facts(picture, face, lost) for face in finder.find(picture))
    thumbnail = _thumbnail(picture)
    return PictureAnalysis(sha256=name, width=width, height=height, compression=round(lost, 4), faces=faces, thumbnail=thumbnail)


def _remembered(source: PictureSource, finder: FaceFinder, memory: Memory | None, limits: Limits) -> PictureAnalysis:
    try:
        data = source.read()
    except OSError as error:
        return PictureAnalysis(sha256=sha256(b"").hexdigest(), fault=f"The file cannot be read: {error.strerror}.")
    known = memory.get(sha256(data).hexdigest()) if memory is not None else None
    if known is not None:
        return known
    found = analysed(data, finder, limits)
    if memory is not None:
        memory.put(found)
    return found


def _counted(found: Iterable[PictureAnalysis], total: int, progress: Progress | None) -> Iterable[PictureAnalysis]:
    for number, analysis in enumerate(found, 1):
        yield analysis
        if progress is not None:
            progress(number, total)


def _facts(picture: RGB, face: Face, lost: float) -> FaceFacts:
    """lost: the picture's compression."""
    height, width = picture.shape[:2]
    blank = PictureFacts(sha256="", format="png", width=width, height=height, faces=1, compression=lost)
    facts = of_face(blank, replace(face, aligned=_at_own_size(picture, face)))
    known: dict[str, Any] = {name: getattr(facts, name) for name in FaceFacts.model_fields if name != "look"}
    return FaceFacts(**known, look=look(picture, known["box"]))


def _at_own_size(picture: RGB, face: Face) -> RGB:
    """The aligned crop, no larger than the face is in the picture: enlarged, every small face would count as blurred."""
    near, spots = reduced(picture, face.landmarks)
    crop = ffhq_crop(near, spots)
    eyes = float(np.linalg.norm(spots[1] - spots[0]))
    side = max(int(FFHQ_PX * eyes / _FFHQ_EYES_PX), _LEAST_CROP_PX)
    return crop if side >= _MEASURED_PX else np.asarray(cv2.resize(crop, (side, side), interpolation=cv2.INTER_AREA), np.uint8)


def _middle(picture: RGB) -> RGB:
    height, width = picture.shape[:2]
    top, left = max((height - _SAMPLED_PX) // 2, 0), max((width - _SAMPLED_PX) // 2, 0)
    return picture[top : top + _SAMPLED_PX, left : left + _SAMPLED_PX]


def _tables(data: bytes) -> Any:
    """A JPEG's tables of quantisation; None of another file."""
    with Image.open(BytesIO(data)) as image:
        return getattr(image, "quantization", None)


def _thumbnail(picture: RGB) -> bytes:
    image = Image.fromarray(picture)
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX), Image.Resampling.BOX, reducing_gap=2.0)
    stream = BytesIO()
    image.save(stream, "JPEG", quality=_THUMBNAIL_QUALITY)
    return stream.getvalue()
