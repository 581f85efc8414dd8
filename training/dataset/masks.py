"""How much each pixel counts in the loss: wholly, but little on the heads of other people that a crop could not leave out.

Not blurred: a blurred face is a target, and a LoRA learns the blur. Not 0: what is not punished may become anything. Weighing each picture
by its own mean is the trainer's. Blurring is there for those who want it.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from deployments.contracts import RGB, Floats
from training.dataset.values import Box, Crop

# Of the longer side of the head: nobody is recognised, and no edge is left that could be learned as a thing.
_BLUR = 0.15


def loss_weights(crop: Crop, subject: Box, weight: float) -> Floats | None:
    """[height, width] of the crop, 1, and `weight` on the masked heads, the subject's own face left out of them; None where all is 1.

    subject: the box of the face, in the whole picture's pixels like the crop's.
    """
    if not crop.masked:
        return None
    x0, y0, x1, y1 = crop.box
    weights = np.ones((y1 - y0, x1 - x0), np.float32)
    for other in crop.masked:
        weights[_place(other, crop)] = weight
    weights[_place(subject, crop)] = 1
    return weights


def others_blurred(picture: RGB, crop: Crop, subject: Box) -> RGB:
    """The crop of the picture with the masked heads blurred, the subject's own face as it is."""
    x0, y0, x1, y1 = crop.box
    cut = np.ascontiguousarray(picture[y0:y1, x0:x1])
    own = cut[_place(subject, crop)].copy()
    for other in crop.masked:
        place = _place(other, crop)
        side = max(other[2] - other[0], other[3] - other[1])
        cut[place] = cv2.GaussianBlur(cut, (0, 0), _BLUR * side)[place]
    cut[_place(subject, crop)] = own
    return cut


def _place(box: Sequence[float], crop: Crop) -> tuple[slice, slice]:
    """Rows and columns of the crop, whole pixels outwards."""
    x0, y0, x1, y1 = crop.box
    left, right = max(int(np.floor(box[0])) - x0, 0), min(int(np.ceil(box[2])), x1) - x0
    top, bottom = max(int(np.floor(box[1])) - y0, 0), min(int(np.ceil(box[3])), y1) - y0
    return slice(top, max(bottom, top)), slice(left, max(right, left))
