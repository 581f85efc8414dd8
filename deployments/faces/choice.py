"""Which face of a reference picture is meant. Chosen once, here; every identity method is then given the same one."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from deployments.contracts import RGB, Face, FaceIndex, PictureFaces
from deployments.errors import FaceTooSmall, InvalidRequest, MultipleFaces, NoFaceDetected

_SHOULDERS = 1.5
"""Half the side of the square that shows one person of several, in longer sides of the face's box: head and shoulders."""
_HEAD = 0.75
"""The same, at least: never less than the head, however close the next one is."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Where a picture stands in the request: the person's number, of how many people, and the picture's among theirs."""

    person: int
    people: int
    picture: int

    def __str__(self) -> str:
        whose = f" of person {self.person}" if self.people > 1 else ""
        return f"Reference picture {self.picture}{whose}"

    @property
    def details(self) -> dict[str, object]:
        return {"person": self.person, "picture": self.picture}


def choose(found: PictureFaces, index: FaceIndex, smallest_px: float, reference: Reference) -> int:
    """The place in `found.faces` of the face that is meant. smallest_px: of the shorter side of its box.

    Raises NoFaceDetected, MultipleFaces (with every box in `details`), InvalidRequest, FaceTooSmall, naming the picture.
    """
    count = len(found.faces)
    if not count:
        raise NoFaceDetected(f"{reference} shows no face.", details=reference.details)
    if index is None and count > 1:
        boxes = [[round(float(side), 1) for side in face.box] for face in found.faces]
        raise MultipleFaces(f"{reference} shows {count} faces.", details={**reference.details, "boxes": boxes})
    place = index if isinstance(index, int) else 0
    if not 0 <= place < count:
        fix = f"Choose one of 0 to {count - 1}; they go by size." if count > 1 else "Choose 0, or leave it out."
        raise InvalidRequest(f"{reference} shows {count} face{'s' if count > 1 else ''}; face_index is {place}.", fix, reference.details)
    width, height = side_lengths(found.faces[place])
    if min(width, height) < smallest_px:
        raise FaceTooSmall(
            f"The face in {str(reference).lower()} is {width:.0f} x {height:.0f} pixels; at least {smallest_px:.0f} are needed either way.",
            details={**reference.details, "width": round(width, 1), "height": round(height, 1), "needed": smallest_px},
        )
    return place


def alone(picture: RGB, found: PictureFaces, place: int, face: Face) -> tuple[RGB, Face]:
    """The picture as methods may see it that see more than the face, and the face with its place in it.

    A picture of one person stays whole. Of several people only the square around the chosen face is left, from which the other faces
    are kept out: an embedding of the whole picture would be of everybody on it. face: `found.faces[place]`, completed.
    """
    others = [other.box for number, other in enumerate(found.faces) if number != place]
    if not others:
        return picture, face
    centre, longer = (face.box[:2] + face.box[2:]) / 2, max(side_lengths(face))
    gaps = [float(np.maximum(box[:2] - centre, centre - box[2:]).max()) for box in others]
    half = max(min(_SHOULDERS * longer, *gaps), _HEAD * longer)
    height, width = picture.shape[:2]
    x0, y0 = np.clip(np.floor(centre - half), 0, (width - 1, height - 1)).astype(int)
    x1, y1 = np.clip(np.ceil(centre + half), (x0 + 1, y0 + 1), (width, height)).astype(int)
    corner = np.array([x0, y0], np.float32)
    moved = replace(face, box=face.box - np.tile(corner, 2), landmarks=face.landmarks - corner)
    return np.ascontiguousarray(picture[y0:y1, x0:x1]), moved


def side_lengths(face: Face) -> tuple[float, float]:
    """Width and height of the box, in pixels."""
    width, height = face.box[2:] - face.box[:2]
    return float(width), float(height)
