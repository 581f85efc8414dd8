"""What the detector should answer where, and how wrong it is: anchors, targets, losses. Knows no network and no pictures.

Coordinates are pixels of the canvas; an anchor stands at the top left of its cell, as insightface decodes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STRIDES = (8, 16, 32)
SIZES_PX = {8: (16.0, 32.0), 16: (64.0, 128.0), 32: (256.0, 512.0)}
"""The face size (longer side of the box) in the middle of each anchor's octave, as in SCRFD's own anchors (Guo et al. 2021)."""
ANCHORS = 2
_CENTRE_SPREAD = {8: (0.8, 1.2), 16: (1.2, 1.2), 32: (1.2, 1.2)}
"""Standard deviation, in strides, of the score around the centre of a face; the smallest faces span two cells. The worst placed
centre is 0.71 strides from the nearest anchor: the score wanted there is at least 0.67, well above the usual threshold of 0.5."""
_FULL_OCTAVE, _NO_OCTAVE = 0.6, 1.0
"""Distance in octaves up to which an anchor answers fully for a face, and from which it doesn't at all."""
_REGRESSED_FROM = 0.25
_SCORE_WEIGHT, _BOX_WEIGHT, _POINT_WEIGHT, _GUESS_SHARE = 2.0, 5.0, 20.0, 0.5
"""Against one another: errors of boxes and points are shares of a face, about 0.03 when all is well."""


@dataclass(frozen=True, eq=False)
class Level:
    """The answers of one stride. logits: [n, A]; boxes: [n, A, 4] left, top, right, bottom; points: [n, A, 10] x, y, and guess, the
    same before it was corrected: all in strides from the anchor. A = cells x anchors, cells row by row, anchor fastest."""

    logits: Tensor
    boxes: Tensor
    points: Tensor
    guess: Tensor


@dataclass(frozen=True, eq=False)
class Faces:
    """boxes: [n, k, 4] x0, y0, x1, y1; points: [n, k, 5, 2]; counted: [n, k] faces that must be found; ignored: [n, k] faces that
    may be found or not (cut by a border, too small). The rest of the k are not there."""

    boxes: Tensor
    points: Tensor
    counted: Tensor
    ignored: Tensor


@dataclass(frozen=True, eq=False)
class Targets:
    """score: [n, A] wanted; weight: [n, A], 0 where an ignored face lies; box: [n, A, 4] and points: [n, A, 10] in strides from the
    anchor; size: [n, A] of the face in strides. The last three mean something where score > 0."""

    score: Tensor
    weight: Tensor
    box: Tensor
    points: Tensor
    size: Tensor


def detection_losses(levels: list[Level], faces: Faces, canvas: tuple[int, ...]) -> dict[str, Tensor]:
    """loss, and its parts: score (quality focal loss), box and points (mean errors as a share of the face's size)."""
    score, box, points = levels[0].logits.new_zeros(()), levels[0].logits.new_zeros(()), levels[0].logits.new_zeros(())
    positives = levels[0].logits.new_zeros(())
    for stride, level in zip(STRIDES, levels, strict=True):
        wanted = targets(faces, stride, canvas)
        score = score + (quality_focal_loss(level.logits, wanted.score) * wanted.weight).sum()
        regressed = wanted.score * (wanted.score > _REGRESSED_FROM)
        box = box + (_relative_error(level.boxes, wanted.box, wanted.size) * regressed).sum()
        guess = _relative_error(level.guess, wanted.points, wanted.size)
        both = _relative_error(level.points, wanted.points, wanted.size) + _GUESS_SHARE * guess
        points = points + (both * regressed).sum()
        positives = positives + regressed.sum()
    positives = positives.clamp_min(1.0)
    parts = {"score": score / positives, "box": box / positives, "points": points / positives}
    return {"loss": _SCORE_WEIGHT * parts["score"] + _BOX_WEIGHT * parts["box"] + _POINT_WEIGHT * parts["points"], **parts}


def quality_focal_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy to a graded score, weighted by the squared error (Li et al. 2020, "Generalized Focal Loss", beta = 2)."""
    entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none")
    return entropy * (wanted - logits.sigmoid()).square().detach()


def anchors_at(stride: int, canvas: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Positions [A, 2] in pixels and the anchor's number in its cell [A] for a canvas of (height, width)."""
    height, width = canvas[0] // stride, canvas[1] // stride
    y, x = torch.meshgrid(torch.arange(height, device=device), torch.arange(width, device=device), indexing="ij")
    cells = torch.stack([x, y], -1).reshape(-1, 1, 2).expand(-1, ANCHORS, -1).reshape(-1, 2)
    return cells.float() * stride, torch.arange(ANCHORS, device=device).repeat(height * width)


def targets(faces: Faces, stride: int, canvas: tuple[int, ...]) -> Targets:
    """Every anchor of a stride is assigned the face that wants the highest score of it."""
    place, kind = anchors_at(stride, canvas, faces.boxes.device)
    spread = torch.tensor(_CENTRE_SPREAD[stride], device=place.device)[kind] * stride
    octave = torch.tensor(SIZES_PX[stride], device=place.device)[kind]
    size = (faces.boxes[..., 2:] - faces.boxes[..., :2]).amax(-1)
    centre = (faces.boxes[..., 2:] + faces.boxes[..., :2]) / 2
    off = (place[None, :, None] - centre[:, None]) / spread[None, :, None, None]
    near = torch.exp(-0.5 * off.square().sum(-1))
    apart = (size[:, None].clamp_min(1.0) / octave[None, :, None]).log2().abs()
    in_octave = ((_NO_OCTAVE - apart) / (_NO_OCTAVE - _FULL_OCTAVE)).clamp(0, 1)
    wanted = near * in_octave * faces.counted[:, None]
    score, owner = wanted.max(-1)
    rows = torch.arange(len(owner), device=owner.device)[:, None]
    box, points = faces.boxes[rows, owner], faces.points[rows, owner]
    to_box = torch.cat([place - box[..., :2], box[..., 2:] - place], -1)
    to_points = (points - place[None, :, None]).flatten(2)
    weight = torch.where(_inside_ignored(place, faces) & (score < _REGRESSED_FROM), 0.0, 1.0)
    return Targets(score, weight, to_box / stride, to_points / stride, size[rows, owner].clamp_min(1.0) / stride)


def _inside_ignored(place: Tensor, faces: Faces) -> Tensor:
    """[n, A]: anchors in the box of a face that doesn't count."""
    low, high = faces.boxes[:, None, :, :2], faces.boxes[:, None, :, 2:]
    spot = place[None, :, None]
    return (((spot >= low) & (spot <= high)).all(-1) & faces.ignored[:, None]).any(-1)


def _relative_error(found: Tensor, wanted: Tensor, size: Tensor) -> Tensor:
    """Mean absolute error per anchor as a share of the face's size."""
    return (found - wanted).abs().mean(-1) / size
