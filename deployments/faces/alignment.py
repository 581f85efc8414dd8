"""The FFHQ crop: a face brought to where every face of that data set is. Knows no detector and no model.

Coordinates: pixels of the picture, the centre of the first one at 0 (as OpenCV counts).
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np
from numpy.typing import NDArray

from deployments.contracts import RGB, Floats

FFHQ_PX: Final = 512
# facexlib/utils/face_restoration_helper.py, face_template: eyes, nose and corners of the mouth in a crop of 512 x 512.
FFHQ_TEMPLATE: Final = np.array(
    [[192.98138, 239.94708], [318.90277, 240.1936], [256.63416, 314.01935], [201.26117, 371.41043], [313.08905, 371.15118]], np.float32
)
# The same file's grey beyond the picture's border, (135, 133, 132) in its order BGR.
_BORDER_RGB: Final = (132, 133, 135)
_LEAST_SPREAD_PX: Final = 1.0


def usable(landmarks: Floats) -> bool:
    """Whether five points can be brought onto a template: finite, and not all in one place."""
    return bool(np.isfinite(landmarks).all() and np.linalg.norm(np.ptp(landmarks, axis=0)) >= _LEAST_SPREAD_PX)


def ffhq_crop(picture: RGB, landmarks: Floats) -> RGB:
    """picture [H, W, 3], landmarks [5, 2] (`usable`) -> [512, 512, 3], grey where the picture ends.

    The similarity has the least median of squares, as in facexlib's align_warp_face.
    """
    warped = cv2.warpAffine(picture, _similarity(landmarks), (FFHQ_PX, FFHQ_PX), borderMode=cv2.BORDER_CONSTANT, borderValue=_BORDER_RGB)
    return np.asarray(warped, np.uint8)


def reduced(picture: RGB, landmarks: Floats) -> tuple[RGB, Floats]:
    """The same, smaller, where the face has twice the pixels of its crop or more; else as they came.

    Crops are sampled bilinearly, which reads noise out of a large photograph. PuLID's application therefore brings every picture to
    1024 px on its longer side; this reduces exactly those faces that would be too large after that, too, and leaves the small faces
    of a group alone. Whole factors, averaged by area.
    """
    # The columns of a similarity are orthogonal and of one length: its scale.
    factor = int(1 / max(float(np.linalg.norm(_similarity(landmarks)[:, 0])), 1e-6))
    if factor < 2:
        return picture, landmarks
    height, width = (max(1, side // factor) for side in picture.shape[:2])
    ratio = np.array([width / picture.shape[1], height / picture.shape[0]], np.float32)
    smaller = cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(smaller, np.uint8), ((landmarks + 0.5) * ratio - 0.5).astype(np.float32)


def _similarity(landmarks: Floats) -> NDArray[np.float64]:
    """[2, 3]: from the picture onto the template."""
    found, _ = cv2.estimateAffinePartial2D(landmarks, FFHQ_TEMPLATE, method=cv2.LMEDS)
    if found is None:
        raise ValueError("These landmarks lie in one point; ask `usable` before they are aligned.")
    return np.asarray(found, np.float64)
