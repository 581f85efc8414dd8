"""Pictures and poses put into the size that is drawn, unstretched: pictures cover it, skeletons stay whole. Knows no mode and no model."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from deployments.contracts import RGB
from deployments.controls.skeleton import Skeleton, cropped


def covering(picture: RGB, width: int, height: int) -> RGB:
    """RGB [H, W, 3] -> [height, width, 3]: as small as covers it, centred; what hangs over is cut off, before it could take memory."""
    factor = max(width / picture.shape[1], height / picture.shape[0])
    across, down = (min(side, max(1, round(wanted / factor))) for side, wanted in ((picture.shape[1], width), (picture.shape[0], height)))
    left, top = (picture.shape[1] - across) // 2, (picture.shape[0] - down) // 2
    return np.ascontiguousarray(_resized(picture[top : top + down, left : left + across], width, height))


def on_black(picture: RGB, width: int, height: int) -> RGB:
    """RGB [H, W, 3] -> [height, width, 3]: the whole picture, as large as goes in, centred on black: for skeletons, whose paper it is."""
    factor = min(width / picture.shape[1], height / picture.shape[0])
    smaller = _resized(picture, max(1, round(picture.shape[1] * factor)), max(1, round(picture.shape[0] * factor)))
    paper = np.zeros((height, width, 3), np.uint8)
    left, top = (width - smaller.shape[1]) // 2, (height - smaller.shape[0]) // 2
    paper[top : top + smaller.shape[0], left : left + smaller.shape[1]] = smaller
    return paper


def placed(people: Sequence[Skeleton], aspect: float) -> tuple[Skeleton, ...]:
    """Everyone found in one picture, as they stand in a picture of another aspect (width / height).

    Where `covering` would cut nobody they are where that puts them, hence in line with the edges or the depth of the same picture. Else
    they are left as they are, and drawing them adds paper at the sides.
    """
    covered = tuple(_covered(person, aspect) for person in people)
    whole = all((before.visible <= after.visible).all() for before, after in zip(people, covered, strict=True))
    return covered if whole else tuple(people)


def _covered(person: Skeleton, aspect: float) -> Skeleton:
    wider = aspect / person.aspect
    x, y = (1 - min(1.0, wider)) / 2, (1 - min(1.0, 1 / wider)) / 2
    return cropped(person, x, y, 1 - x, 1 - y)


def _resized(picture: RGB, width: int, height: int) -> RGB:
    """Averaged where it shrinks, so that no line is skipped; cubic where it grows."""
    if (width, height) == picture.shape[1::-1]:
        return picture
    shrinks = width < picture.shape[1]
    return np.asarray(cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC), np.uint8)
