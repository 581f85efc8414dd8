"""DWPose: a person detector (YOLOX) and a whole-body pose network (RTMPose's kind), both ONNX, as IDEA-Research/DWPose publishes them.

Yang et al., "Effective Whole-body Pose Estimation with Two-stages Distillation", arXiv:2307.15880; the files are yolox_l.onnx and
dw-ll_ucoco_384.onnx. Written from the published description and tested with networks of the same outside whose answers are known; it
has not been run on the published files. Of the 133 points only the body's are kept: points of the face fight the geometry that an
identity method draws.
"""

from __future__ import annotations

from typing import Final

import cv2
import numpy as np

from deployments.contracts import RGB, Floats
from deployments.controls.pose_detector import Session, size_of
from deployments.controls.skeleton import JOINTS, Skeleton
from deployments.errors import DamagedWeights

# Megvii-BaseDetection/YOLOX, yolox/data/data_augment.py (preproc): the grey of the margin; yolox/exp/yolox_base.py: sides and strides.
_DETECTOR_PX, _MARGIN_GREY, _STRIDES = 640, 114, (8, 16, 32)
_CLASSES, _PERSON = 80, 0
# DWPose, annotator/dwpose/onnxdet.py: boxes that overlap more are one; a box below the score is nobody.
_SAME_BOX, _SURE_FROM = 0.45, 0.3
# MMPose, rtmpose-l_8xb32-270e_coco-wholebody-384x288.py: input, the share around a box, bins a pixel, ImageNet's mean and deviation (RGB).
_POSE_WIDTH, _POSE_HEIGHT, _AROUND, _BINS = 288, 384, 1.25, 2
_MEAN: Final = np.array([123.675, 116.28, 103.53], np.float32)
_DEVIATION: Final = np.array([58.395, 57.12, 57.375], np.float32)
_WHOLE_BODY = 133
# DWPose, annotator/dwpose/wholebody.py: a joint below is not drawn; which of COCO-WholeBody's points each of OpenPose's 18 is. The neck is
# none of them: it is the middle of the shoulders (5 and 6), and as sure as the less sure of both.
_VISIBLE_FROM = 0.3
_SHOULDERS = (5, 6)
_OF_WHOLE_BODY: Final = (0, -1, 6, 8, 10, 5, 7, 9, 12, 14, 16, 11, 13, 15, 2, 1, 4, 3)

_OUTPUTS: Final = (
    (sum((_DETECTOR_PX // stride) ** 2 for stride in _STRIDES), 5 + _CLASSES),
    (_WHOLE_BODY, _POSE_WIDTH * _BINS),
    (_WHOLE_BODY, _POSE_HEIGHT * _BINS),
)


class DWPose:
    """See pose_detector.PoseDetector. detector: input [1, 3, 640, 640], output [1, 8400, 85]; estimator: input [1, 3, 384, 288],
    outputs [1, 133, 576] and [1, 133, 768], the likelihood of each half pixel across and down (SimCC)."""

    def __init__(self, detector: Session, estimator: Session) -> None:
        """Raises DamagedWeights if the outputs are others."""
        shapes = [list(output.shape[1:]) for session in (detector, estimator) for output in session.get_outputs()]
        # A size that a file leaves open (a name, None) may turn out right.
        fits = len(shapes) == len(_OUTPUTS) and all(
            len(shape) == len(wanted) and all(not isinstance(size, int) or size == right for size, right in zip(shape, wanted, strict=True))
            for shape, wanted in zip(shapes, _OUTPUTS, strict=True)
        )
        if not fits:
            raise DamagedWeights(f"DWPose's networks answer {_OUTPUTS}, these {shapes}.", "Use yolox_l.onnx and dw-ll_ucoco_384.onnx.")
        self._detector, self._estimator = detector, estimator

    def detect(self, picture: RGB) -> tuple[Skeleton, ...]:
        """See PoseDetector. As upstream, everyone whom the detector is sure of; unlike upstream, nobody where it is sure of nobody."""
        people = [skeleton for box in self._boxes(picture) if (skeleton := self._pose(picture, box)).visible.any()]
        return tuple(sorted(people, key=size_of, reverse=True))

    def _boxes(self, picture: RGB) -> Floats:
        """[n, 4] x0, y0, x1, y1 in pixels of the picture."""
        ratio = min(_DETECTOR_PX / picture.shape[0], _DETECTOR_PX / picture.shape[1])
        width, height = (max(1, int(side * ratio)) for side in picture.shape[1::-1])
        square = np.full((_DETECTOR_PX, _DETECTOR_PX, 3), _MARGIN_GREY, np.uint8)
        square[:height, :width] = cv2.resize(picture, (width, height), interpolation=cv2.INTER_LINEAR)
        # YOLOX was trained on pictures as OpenCV reads them: BGR, 0..255.
        planes = square[..., ::-1].astype(np.float32).transpose(2, 0, 1)[None]
        (output,) = self._detector.run(None, {self._detector.get_inputs()[0].name: np.ascontiguousarray(planes)})
        boxes, scores = decoded_boxes(np.asarray(output[0], np.float32))
        return np.asarray(boxes[distinct(boxes, scores)] / ratio, np.float32)

    def _pose(self, picture: RGB, box: Floats) -> Skeleton:
        height, width = picture.shape[:2]
        corner, scale = crop_of(box)
        # As upstream, and hence in training: picture and points alike are counted from the centre of the first pixel.
        affine = np.array([[scale, 0, -corner[0] * scale], [0, scale, -corner[1] * scale]], np.float64)
        crop = cv2.warpAffine(picture, affine, (_POSE_WIDTH, _POSE_HEIGHT), flags=cv2.INTER_LINEAR)
        planes = ((crop.astype(np.float32) - _MEAN) / _DEVIATION).transpose(2, 0, 1)[None]
        across, down = self._estimator.run(None, {self._estimator.get_inputs()[0].name: np.ascontiguousarray(planes)})
        points, scores = decoded_simcc(np.asarray(across[0], np.float32), np.asarray(down[0], np.float32))
        return body_of(np.asarray((points / scale + corner + 0.5) / (width, height), np.float32), scores, width / height)


def decoded_boxes(cells: Floats) -> tuple[Floats, Floats]:
    """YOLOX's [8400, 85] -> boxes [8400, 4] x0, y0, x1, y1 in pixels of its input, and how sure each is of a person [8400].

    A cell holds its box's middle in strides from its own corner and the logarithms of its sides in strides, then how sure it is of a
    thing at all and of each class (Ge et al., arXiv:2107.08430)."""
    corners, strides = [], []
    for stride in _STRIDES:
        side = _DETECTOR_PX // stride
        y, x = np.divmod(np.arange(side * side), side)
        corners.append(np.stack([x, y], -1))
        strides.append(np.full((side * side, 1), stride))
    stride_of = np.concatenate(strides).astype(np.float32)
    middle = (cells[:, :2] + np.concatenate(corners)) * stride_of
    half = np.exp(cells[:, 2:4]) * stride_of / 2
    return np.concatenate([middle - half, middle + half], -1).astype(np.float32), cells[:, 4] * cells[:, 5 + _PERSON]


def distinct(boxes: Floats, scores: Floats) -> list[int]:
    """Of boxes that are sure enough, the surest of each heap: their indices, surest first."""
    left = [int(index) for index in np.argsort(-scores, kind="stable") if scores[index] > _SURE_FROM]
    kept: list[int] = []
    while left:
        best, *rest = left
        kept.append(best)
        left = [index for index in rest if _overlap(boxes[best], boxes[index]) <= _SAME_BOX]
    return kept


def crop_of(box: Floats) -> tuple[Floats, float]:
    """The pose network's part of a picture: its corner [2] in pixels, and the factor from the picture's pixels to its own.

    The box grown by a quarter, and in one direction more, so that nothing is stretched (MMPose: GetBBoxCenterScale, TopdownAffine)."""
    middle, size = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) * _AROUND
    height = max(float(size[1]), float(size[0]) * _POSE_HEIGHT / _POSE_WIDTH, 1.0)
    scale = _POSE_HEIGHT / height
    return np.asarray(middle - np.array([_POSE_WIDTH, _POSE_HEIGHT]) / (2 * scale), np.float32), scale


def decoded_simcc(across: Floats, down: Floats) -> tuple[Floats, Floats]:
    """[k, width x 2], [k, height x 2] -> points [k, 2] in pixels of the network's input, and scores [k]: the lower of both peaks.

    Li et al., "SimCC", arXiv:2107.03332; MMPose, get_simcc_maximum."""
    points = np.stack([across.argmax(1), down.argmax(1)], -1) / _BINS
    return points.astype(np.float32), np.minimum(across.max(1), down.max(1))


def body_of(points: Floats, scores: Floats, aspect: float) -> Skeleton:
    """COCO-WholeBody's [133, 2] in 0..1 and their scores -> OpenPose's 18; what is not sure enough is not known."""
    chosen = list(_OF_WHOLE_BODY)
    body, sure = points[chosen].astype(np.float32), scores[chosen] > _VISIBLE_FROM
    neck = JOINTS.index("neck")
    body[neck], sure[neck] = points[list(_SHOULDERS)].mean(0), (scores[list(_SHOULDERS)] > _VISIBLE_FROM).all()
    body[~sure] = np.nan
    return Skeleton(body, aspect)


def _overlap(one: Floats, other: Floats) -> float:
    """Intersection over union."""
    sides = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    both = float(np.prod(sides.clip(0)))
    return both / max(float(np.prod(one[2:] - one[:2]) + np.prod(other[2:] - other[:2])) - both, 1e-9)
