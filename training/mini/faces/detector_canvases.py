"""What the detector is shown: pictures of the world, enlarged or reduced and laid on canvases, with the boxes and points of every face.

insightface resizes a picture to the detector's input and pads it with black; faces of 18 to 450 px, cut, single, in groups and
none at all come of it. Knows no anchors.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.mini.faces.crops import Crowd
from training.mini.faces.degradations import degraded
from training.mini.faces.detector_targets import Faces
from training.mini.world.backgrounds import paint_background
from training.mini.world.canvas import Grid
from training.mini.world.groups import paint_group, sample_group
from training.mini.world.landmarks import face_box, landmarks
from training.mini.world.lighting import graded
from training.mini.world.render import PICTURE_SIZE_PX, render

_MOST_PEOPLE = 3
_SMALLEST_PX, _LARGEST_PX = 17.0, 460.0
_COUNTS_FROM_PX = 16.0
_FILLING = 0.35
_SEEN_SHARE, _UNSEEN_SHARE = 0.75, 0.1
"""A face counts if this much of its box is on the canvas, and is not there at all below the second."""


@dataclass(frozen=True, eq=False)
class Shown:
    """pictures: [n, 3, H, W] RGB in -1..1; faces in pixels of the canvas, 0 at the centre of the first."""

    pictures: Tensor
    faces: Faces


@dataclass(frozen=True)
class Format:
    """A kind of canvas: `canvases` squares of `side` px, each divided into `split` x `split` tiles with a picture of its own."""

    canvases: int
    side: int
    split: int = 1


_FORMATS = (Format(16, 640), Format(16, 512, 2), Format(64, 192), Format(96, 128))
_GALLERY_CANVASES = 3
_USES_OF_GALLERY = 12
_REDUCED_FORMATS = (Format(2, 192), Format(1, 256, 2))


class Canvases:
    """An endless source; formats take turns."""

    def __init__(self, crowd: Crowd, reduced: bool = False) -> None:
        """reduced: tiny canvases, for a trial run."""
        self._crowd = crowd
        self._formats = _REDUCED_FORMATS if reduced else _FORMATS
        self._turns = itertools.cycle(self._formats)
        self._gallery: tuple[Tensor, ...] = ()
        self._uses = 0

    def draw(self) -> Shown:
        form = next(self._turns)
        tile = form.side // form.split
        pictures, boxes, points, there = self._chosen(form.canvases * form.split**2)
        tiles = placed(degraded(pictures, wobble=0.0), boxes, points, there, tile)
        return tiles if form.split == 1 else assembled(tiles, form)

    def _chosen(self, n: int) -> tuple[Tensor, ...]:
        """n at random of a gallery that is painted afresh after a few uses: painting takes far longer than a step of training, and
        every use places and damages the pictures anew."""
        if self._uses == 0:
            self._gallery = self._pictures(_GALLERY_CANVASES * max(form.canvases * form.split**2 for form in self._formats))
            self._uses = _USES_OF_GALLERY
        self._uses -= 1
        index = torch.randperm(len(self._gallery[0]), device=self._gallery[0].device)[:n]
        return tuple(part[index] for part in self._gallery)

    def _pictures(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Of five pictures about three show one person, one two or three people, and half of one nobody. Returns pictures, boxes
        [n, 3, 4], points [n, 3, 5, 2] in picture coordinates, and which of the three are there [n, 3]."""
        groups, empty = n // 5, max(1, n // 10)
        alone = self._crowd.draw(n - groups)
        picture = render(alone.identity, alone.scene)
        nobody = graded(paint_background(alone.scene, Grid.whole(len(alone.scene), PICTURE_SIZE_PX, picture.device)), alone.scene)
        picture[:empty] = nobody[:empty].clamp(0, 1) * 2 - 1
        boxes = face_box(alone.identity, alone.scene)[:, None].expand(-1, _MOST_PEOPLE, -1)
        points = landmarks(alone.identity, alone.scene)[:, None].expand(-1, _MOST_PEOPLE, -1, -1)
        there = torch.zeros(len(picture), _MOST_PEOPLE, dtype=torch.bool, device=picture.device)
        there[empty:, 0] = True
        if not groups:
            return picture, boxes, points, there
        crowded = self._groups(groups)
        together = [torch.cat(parts) for parts in zip((picture, boxes, points, there), crowded, strict=True)]
        order = torch.randperm(n, generator=self._crowd.generator).to(picture.device)
        return together[0][order], together[1][order], together[2][order], together[3][order]

    def _groups(self, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        people = int(torch.randint(2, _MOST_PEOPLE + 1, (), generator=self._crowd.generator))
        identities = torch.stack([self._crowd.draw(n).identity for _ in range(people)], 1)
        group = paint_group(identities, sample_group(n, people, self._crowd.generator, identities.device))
        missing = _MOST_PEOPLE - people
        boxes = F.pad(group.boxes, (0, 0, 0, missing))
        points = F.pad(group.landmarks, (0, 0, 0, 0, 0, missing))
        there = torch.arange(_MOST_PEOPLE, device=boxes.device).expand(n, -1) < people
        return group.picture, boxes, points, there


def placed(pictures: Tensor, boxes: Tensor, points: Tensor, there: Tensor, side: int) -> Shown:
    """Each picture at a random size and place on a square canvas of its own, black around it."""
    n, device = pictures.shape[0], pictures.device
    share = (boxes[:, 0, 2:] - boxes[:, 0, :2]).amax(-1) / 2
    largest = math.log(min(_LARGEST_PX, 0.9 * side))
    face = torch.exp(math.log(_SMALLEST_PX) + torch.rand(n, device=device) * (largest - math.log(_SMALLEST_PX)))
    # Some exactly fill the canvas, as a square picture does in insightface.
    length = torch.where(torch.rand(n, device=device) < _FILLING, torch.full_like(face, side), face / share).clamp(side / 6, side * 5)
    low, high = torch.minimum(side - length, torch.zeros_like(length)), torch.maximum(side - length, torch.zeros_like(length))
    corner = low[:, None] + torch.rand(n, 2, device=device) * (high - low)[:, None]
    centre = (boxes[:, 0, 2:] + boxes[:, 0, :2]) / 2
    spot = corner + (centre + 1) / 2 * length[:, None]
    pulled = corner + spot.clamp(0.1 * side, 0.9 * side) - spot
    corner = torch.where((torch.rand(n, 1, device=device) < 0.85) & (length[:, None] > side), pulled, corner)
    shown = _sampled(pictures, corner, length, side)
    to_canvas = length.view(-1, 1, 1) / 2
    moved = (boxes + 1) * to_canvas + corner.repeat(1, 2)[:, None]
    moved_points = (points + 1) * to_canvas[..., None] + corner[:, None, None]
    # Up to here the canvas begins at 0; cv2 and insightface put 0 at the centre of its first pixel.
    return Shown(shown, _judged(moved - 0.5, moved_points - 0.5, there, side))


def _sampled(pictures: Tensor, corner: Tensor, length: Tensor, side: int) -> Tensor:
    """Bilinear, without smoothing when the picture shrinks: as cv2.resize samples."""
    at = torch.arange(side, device=pictures.device) + 0.5
    x = (at[None] - corner[:, :1]) / length[:, None] * 2 - 1
    y = (at[None] - corner[:, 1:]) / length[:, None] * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, side, -1), y[:, :, None].expand(-1, -1, side)], -1)
    return F.grid_sample(pictures + 1, grid, mode="bilinear", padding_mode="zeros", align_corners=False) - 1


def _judged(boxes: Tensor, points: Tensor, there: Tensor, side: int) -> Faces:
    """Which faces count: large enough, and with enough of them on the canvas. Boxes: [n, k, 4] pixels."""
    size = boxes[..., 2:] - boxes[..., :2]
    inside = (boxes[..., 2:].clamp(0, side) - boxes[..., :2].clamp(0, side)).clamp_min(0)
    seen = inside.prod(-1) / size.prod(-1).clamp_min(1e-6)
    counted = there & (seen >= _SEEN_SHARE) & (size.amax(-1) >= _COUNTS_FROM_PX)
    # A point of a half seen face would be guessed beyond the border; its box is cut there, as annotators do.
    ignored = there & ~counted & (seen >= _UNSEEN_SHARE)
    return Faces(boxes, points, counted, ignored)


def assembled(tiles: Shown, form: Format) -> Shown:
    """split x split tiles become one canvas; [canvases * split^2, ...] -> [canvases, ...]."""
    n, split, tile = form.canvases, form.split, form.side // form.split
    grid = tiles.pictures.view(n, split, split, 3, tile, tile)
    pictures = grid.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, form.side, form.side)
    row, column = torch.meshgrid(torch.arange(split), torch.arange(split), indexing="ij")
    offset = (torch.stack([column, row], -1).reshape(1, -1, 1, 2) * tile).to(pictures.device)
    faces = tiles.faces
    k = faces.boxes.shape[1]
    boxes = faces.boxes.view(n, -1, k, 4) + offset.repeat(1, 1, 1, 2)
    points = faces.points.view(n, -1, k, 5, 2) + offset[..., None, :]
    flags = [flag.reshape(n, -1) for flag in (faces.counted, faces.ignored)]
    return Shown(pictures, Faces(boxes.reshape(n, -1, 4), points.reshape(n, -1, 5, 2), flags[0], flags[1]))
