"""Every face of a picture, the small ones of a large picture too: what a detector saw too small is looked at again, closer.

Knows nobody; who a face is, is select.py's.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from deployments.contracts import RGB, Face, Need
from training.dataset.settings import SMALLEST_FACE_PX
from training.dataset.values import area, overlap

if TYPE_CHECKING:
    from deployments.face_server import FaceSettings
    from deployments.faces.analysis import FaceAnalyser
    from deployments.images import Limits

_NEED: Final[tuple[Need, ...]] = ("embedding", "judge")
# SCRFD's finest stride is 8 px: a face of less than four of its cells has landmarks that are off by a good part of an eye.
_CELLS_PX: Final = 32.0
# A closer look shows the face with its surroundings: detectors are trained on faces in pictures, and miss those that fill one.
_AROUND: Final = 4.0
_CLOSER_LOOKS: Final = 4
"""At a picture's largest small faces: in a crowd nobody is the subject."""
# A picture that was reduced by a fifth or more for the detector, and in which nothing was found, is searched in nine overlapping halves.
_LARGE: Final = 1.25
_SAME_FACE: Final = 0.4


@dataclass(frozen=True)
class FaceFinder:
    """Faces with both embeddings. faces, judge: ids of the catalogue, whose embeddings these are. detector_px: the side that the detector
    is shown. smallest_px: what the models' entry asks of a face's shorter side."""

    analyser: FaceAnalyser
    faces: str
    judge: str
    detector_px: int
    smallest_px: float

    @staticmethod
    def of(settings: FaceSettings, limits: Limits | None = None) -> FaceFinder:
        """Opens the models. Raises as face_analyser does."""
        from deployments.catalog import load_catalog
        from deployments.face_server import face_analyser
        from deployments.images import DEFAULT_LIMITS

        options: dict[str, Any] = dict(load_catalog().entry(settings.faces).options)
        return FaceFinder(
            face_analyser(settings, limits or DEFAULT_LIMITS),
            settings.faces,
            settings.judge,
            min(options["det_size"]),
            float(options.get("smallest_px", SMALLEST_FACE_PX)),
        )

    def find(self, picture: RGB) -> tuple[Face, ...]:
        """picture [H, W, 3] -> its faces, by area of the box, largest first."""
        faces = self._seen(picture)
        fit = self.detector_px / max(picture.shape[:2])
        if not faces and fit * _LARGE < 1:
            faces = _distinct(face for window in _halves(picture) for face in self._within(picture, window))
        elif fit < 1:
            small = [face for face in faces if fit * _shorter(face) < _CELLS_PX][:_CLOSER_LOOKS]
            closer = {id(face): self._closer(picture, face) for face in small}
            faces = tuple(closer.get(id(face), face) for face in faces)
        return tuple(sorted(faces, key=lambda face: (-area(_box(face)), float(face.box[0]))))

    def _seen(self, picture: RGB) -> tuple[Face, ...]:
        return self.analyser.analyse_pixels([picture], _NEED)[0].faces

    def _within(self, picture: RGB, window: tuple[int, int, int, int]) -> list[Face]:
        x0, y0, x1, y1 = window
        corner = np.array([x0, y0], np.float32)
        seen = self._seen(np.ascontiguousarray(picture[y0:y1, x0:x1]))
        return [replace(face, box=face.box + np.tile(corner, 2), landmarks=face.landmarks + corner) for face in seen]

    def _closer(self, picture: RGB, face: Face) -> Face:
        """The same face as it is seen from nearer; as it was where it is not seen again."""
        centre, half = (face.box[:2] + face.box[2:]) / 2, _AROUND / 2 * float((face.box[2:] - face.box[:2]).max())
        height, width = picture.shape[:2]
        x0, y0 = np.clip(np.floor(centre - half), 0, None).astype(int)
        x1, y1 = np.minimum(np.ceil(centre + half), (width, height)).astype(int)
        again = self._within(picture, (int(x0), int(y0), int(x1), int(y1)))
        best = max(again, key=lambda other: _alike(face, other), default=face)
        return best if _alike(face, best) >= _SAME_FACE else face


def _halves(picture: RGB) -> list[tuple[int, int, int, int]]:
    """Nine windows of half the sides, each overlapping the next by half."""
    height, width = picture.shape[:2]
    steps = product(range(3), range(3))
    return [(width * i // 4, height * j // 4, width * (i + 2) // 4, height * (j + 2) // 4) for j, i in steps]


def _distinct(faces: Iterable[Face]) -> tuple[Face, ...]:
    """Those of several windows, each once: as it is seen best."""
    kept: list[Face] = []
    for face in sorted(faces, key=lambda face: -face.score):
        if all(_alike(face, other) < _SAME_FACE for other in kept):
            kept.append(face)
    return tuple(kept)


def _alike(first: Face, second: Face) -> float:
    """Intersection over union of the boxes."""
    shared = area(overlap(_box(first), _box(second)))
    return float(shared / max(area(_box(first)) + area(_box(second)) - shared, 1e-6))


def _box(face: Face) -> Sequence[float]:
    return [float(side) for side in face.box]


def _shorter(face: Face) -> float:
    return float((face.box[2:] - face.box[:2]).min())
