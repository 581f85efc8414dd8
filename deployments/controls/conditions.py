"""What a union ControlNet is shown of a picture, by the mode's name: RGB [H, W, 3] -> RGB of the same shape, each a pure function.

Poses are not here: a detector finds them and skeleton_picture.py draws them. Knows no ControlNet, and no number of a mode: the
catalogue holds both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, Protocol

import cv2
import numpy as np

from deployments.contracts import RGB, Floats
from deployments.controls.canny import canny
from deployments.errors import InvalidRequest, MissingWeights

# The publisher of the union models does not say how strongly the pictures were blurred; this is plainly out of focus at any size.
BLUR_SHARE: Final = 0.01
# controlnet_aux, src/controlnet_aux/tile: reduced to an eighth and grown by three steps of a Gaussian pyramid.
TILE_STEPS: Final = 3


class DepthEstimator(Protocol):
    """A model that says how near each pixel is, such as Depth Anything, with which the union models' depth maps were made."""

    def nearness(self, picture: RGB) -> Floats:
        """RGB [H, W, 3] -> [H, W], larger is nearer; in any unit."""
        ...


def gray(picture: RGB) -> RGB:
    """Lightness alone, by the weights of ITU-R BT.601."""
    return np.repeat(np.asarray(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY), np.uint8)[..., None], 3, axis=2)


def blur(picture: RGB, share: float = BLUR_SHARE) -> RGB:
    """Out of focus. share: standard deviation of the Gaussian as a share of the shorter side. Raises InvalidRequest outside of 0..0.2."""
    if not 0 < share <= 0.2:
        raise InvalidRequest(f"A blur of {share} of the shorter side cannot be made.", "Use a share above 0, up to 0.2.")
    sigma = share * min(picture.shape[:2])
    return np.asarray(cv2.GaussianBlur(picture, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE), np.uint8)


def tile(picture: RGB, steps: int = TILE_STEPS) -> RGB:
    """Large forms and colours, the detail gone: halved `steps` times and grown again. Raises InvalidRequest for steps outside of 0..6, and
    for a picture that has not that many halves."""
    height, width = picture.shape[:2]
    if not 0 <= steps <= 6 or min(height, width) >> steps < 1:
        raise InvalidRequest(f"A picture of {width} x {height} cannot be halved {steps} times.", "Use 0 to 6, or a larger picture.")
    coarse = cv2.resize(picture, (width >> steps, height >> steps), interpolation=cv2.INTER_AREA)
    for _ in range(steps):
        coarse = cv2.pyrUp(coarse)
    return np.asarray(cv2.resize(coarse, (width, height), interpolation=cv2.INTER_LINEAR), np.uint8)


def low_quality(picture: RGB) -> RGB:
    """As it is: this mode is for a picture that is poor already."""
    return picture.copy()


def depth(picture: RGB, estimator: DepthEstimator | None = None) -> RGB:
    """Near is white, far is black, stretched to the whole range. Raises MissingWeights where there is no estimator."""
    if estimator is None:
        raise MissingWeights(
            "No depth model is installed, hence no depth map can be made of a picture.",
            "Send a finished depth map (near is white), or install a model such as Depth Anything behind DepthEstimator.",
        )
    near = estimator.nearness(picture)
    low, high = float(near.min()), float(near.max())
    levels = (near - low) / max(high - low, 1e-6) * 255
    return np.repeat(levels.round().astype(np.uint8)[..., None], 3, axis=2)


def soft_edge(picture: RGB) -> RGB:
    """Always raises MissingWeights: soft edges are drawn by a network (AnyLine), and none is installed."""
    raise MissingWeights(
        "No soft-edge model (AnyLine) is installed, hence no soft edges can be drawn of a picture.",
        "Send finished soft edges (white on black), or use canny.",
    )


CONDITIONS: Final[Mapping[str, Callable[[RGB], RGB]]] = {
    "canny": canny, "tile": tile, "depth": depth, "blur": blur, "gray": gray, "low_quality": low_quality, "soft_edge": soft_edge,
}  # fmt: skip
"""By the mode's name, everything at its default: the modes of Union-Pro and Union-Pro-2.0 (their model cards) but pose."""


def condition(mode: str, picture: RGB) -> RGB:
    """Raises InvalidRequest for a mode that is none, MissingWeights for one whose model is not installed."""
    if mode not in CONDITIONS:
        raise InvalidRequest(f"There is no condition {mode!r}.", f"Use one of: {', '.join(CONDITIONS)}, or pose.")
    return CONDITIONS[mode](picture)
