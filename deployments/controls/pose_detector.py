"""People's joints found in a picture: what every detector is to its caller, and the one for networks that answer with heatmaps.

Networks come as opened sessions (deployments/sessions.py). Knows no request and draws nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import cv2
import numpy as np

from deployments.contracts import RGB, Floats
from deployments.controls.skeleton import JOINTS, Skeleton
from deployments.errors import DamagedWeights, InvalidImage

# What the network was trained to draw (training/mini/faces/body_keypoints.py): a peak below this is no joint.
_VISIBLE_FROM: Final = 0.3
# A headshot has seven joints or eight. Of a hundred empty backgrounds three show as many, but faintly: their peaks are 0.4 at most on
# average, a person's 0.6 at least (measured on the embedded pack; between them there is room for a pack trained anew).
_LEAST_JOINTS, _SURE_FROM = 4, 0.5


class Session(Protocol):
    """The part of onnxruntime.InferenceSession that is used."""

    def get_inputs(self) -> Sequence[Any]: ...
    def get_outputs(self) -> Sequence[Any]: ...
    def run(self, output_names: Sequence[str] | None, input_feed: dict[str, Any]) -> Sequence[Any]: ...


class PoseDetector(Protocol):
    """Finds people. Implementations: HeatmapDetector below, DWPose in dwpose.py."""

    def detect(self, picture: RGB) -> tuple[Skeleton, ...]:
        """RGB [H, W, 3] of any size -> its people, the largest first; nobody is an empty tuple. Joints that were not found are NaN."""
        ...


def people_of(detector: PoseDetector, picture: RGB) -> tuple[Skeleton, ...]:
    """What a pose picture of a request shows, one person or more. Raises InvalidImage if it shows nobody."""
    people = detector.detect(picture)
    if not people:
        raise InvalidImage(
            "The pose picture shows no person.", "Send a picture in which the body is visible, a drawn skeleton, or the name of a pose."
        )
    return people


def size_of(skeleton: Skeleton) -> float:
    """Area of the box around the visible joints, as a share of the picture: what the order of people goes by."""
    seen = skeleton.points[skeleton.visible]
    return float(np.prod(np.ptp(seen, axis=0))) if len(seen) else 0.0


class HeatmapDetector:
    """One ONNX file: input [n, 3, side, side] RGB in 0..1, output [n, 18, cells, cells] in 0..1, a Gaussian for each joint that is seen.

    Knows one person a picture: of a group it finds whom it likes.
    """

    def __init__(self, model: Session) -> None:
        """Raises DamagedWeights if the network's outside is another."""
        entrance, exit_ = model.get_inputs()[0], model.get_outputs()[0]
        *_, height, width = entrance.shape
        if not (isinstance(height, int) and height == width and len(exit_.shape) == 4 and exit_.shape[1] == len(JOINTS)):
            raise DamagedWeights(
                f"A keypoint model reads [n, 3, side, side] and answers [n, {len(JOINTS)}, cells, cells], this one {entrance.shape} "
                f"and {exit_.shape}.",
                "Use the model that the catalogue names.",
            )
        self._session, self._input, self._output, self._side = model, entrance.name, exit_.name, height

    def detect(self, picture: RGB) -> tuple[Skeleton, ...]:
        """See PoseDetector: here one person or none."""
        square, scale, corner = _squared(picture, self._side)
        planes = (square.astype(np.float32) / 255).transpose(2, 0, 1)[None]
        (heatmaps,) = self._session.run([self._output], {self._input: np.ascontiguousarray(planes)})
        points, peaks = points_of(np.asarray(heatmaps[0], np.float32))
        # From the square to the picture that lies in it.
        height, width = picture.shape[:2]
        points = (points * self._side - corner) / (scale * (width, height))
        found = peaks >= _VISIBLE_FROM
        points[~found] = np.nan
        skeleton = Skeleton(points.astype(np.float32), width / height)
        somebody = skeleton.visible.sum() >= _LEAST_JOINTS and peaks[found].mean() >= _SURE_FROM
        return (skeleton,) if somebody else ()


def points_of(heatmaps: Floats) -> tuple[Floats, Floats]:
    """[18, h, w] in 0..1 -> points [18, 2] in 0..1 of the map, and their peaks [18]: the highest cell, refined by a parabola through
    the logarithms of its neighbours, which is exact for a Gaussian."""
    count, height, width = heatmaps.shape
    flat = heatmaps.reshape(count, -1)
    joints, cells = np.arange(count), flat.argmax(1)
    row, column = np.divmod(cells, width)
    logarithm = np.log(np.maximum(heatmaps, 1e-6))

    def refined(cell: Floats, last: int, before: Floats, here: Floats, after: Floats) -> Floats:
        offset = (after - before) / np.maximum(2 * (2 * here - after - before), 1e-6)
        return cell + np.where((cell > 0) & (cell < last), offset.clip(-0.5, 0.5), 0)

    def at(rows: Floats, columns: Floats) -> Floats:
        return np.asarray(logarithm[joints, rows.clip(0, height - 1), columns.clip(0, width - 1)])

    here = at(row, column)
    x = refined(column, width - 1, at(row, column - 1), here, at(row, column + 1))
    y = refined(row, height - 1, at(row - 1, column), here, at(row + 1, column))
    points = (np.stack([x, y], -1) + 0.5) / (width, height)
    return points.astype(np.float32), flat[joints, cells]


def _squared(picture: RGB, side: int) -> tuple[RGB, Floats, Floats]:
    """The picture, whole and unstretched, in the middle of a square, its border pixels drawn on to the edge.

    Also the factors [2] from its pixels to the square's, and its corner [2] there."""
    height, width = picture.shape[:2]
    factor = side / max(height, width)
    new_width, new_height = max(1, round(width * factor)), max(1, round(height * factor))
    smaller = cv2.resize(picture, (new_width, new_height), interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    left, top = (side - new_width) // 2, (side - new_height) // 2
    square = cv2.copyMakeBorder(smaller, top, side - new_height - top, left, side - new_width - left, cv2.BORDER_REPLICATE)
    return (
        np.asarray(square, np.uint8),
        np.array([new_width / width, new_height / height], np.float32),
        np.array([left, top], np.float32),
    )
