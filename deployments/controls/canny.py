"""The edges of a picture, as ControlNets were trained on them. Knows no model."""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np

from deployments.contracts import RGB
from deployments.errors import InvalidRequest

# lllyasviel/ControlNet, gradio_canny2image.py: the thresholds that everyone took over.
LOW: Final = 100
HIGH: Final = 200


def canny(picture: RGB, low: int = LOW, high: int = HIGH) -> RGB:
    """RGB [H, W, 3] -> white lines on black, same shape. low, high: gradient from which a pixel continues and begins a line, 0..1000 or
    so. The gradient of a pixel is that of its steepest channel. Raises InvalidRequest unless 0 <= low <= high."""
    if not 0 <= low <= high:
        raise InvalidRequest(
            f"Canny's thresholds are 0 <= low <= high, not {low} and {high}.", f"Use {LOW} and {HIGH}, or others so ordered."
        )
    return np.repeat(np.asarray(cv2.Canny(np.ascontiguousarray(picture), low, high), np.uint8)[..., None], 3, axis=2)
