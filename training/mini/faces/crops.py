"""People and their faces as the networks are fed with them: drawn by the renderer straight into the crop. Knows no network.

A crop in use is sampled from a 192-px picture and holds no more detail than that picture; crops drawn here imitate it by
widening every edge to about a pixel of the picture.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mini.world.canvas import Canvas, Grid
from training.mini.world.identity import sample_identities
from training.mini.world.landmarks import arcface_grid, face_box, ffhq_grid, landmarks
from training.mini.world.render import PICTURE_SIZE_PX, paint
from training.mini.world.scene import Scene, sample_scenes

DETECTION_ERROR = 0.035
"""Standard deviation of a detected landmark, in eye distances: the detector's bar is a mean error of 5 %."""


class Crowd:
    """An endless source of random people in random scenes, the same for the same seed. people: how many different ones."""

    def __init__(self, people: int, seed: int, device: torch.device | str) -> None:
        self.identities = sample_identities(people, seed, device)
        self.generator = torch.Generator().manual_seed(seed)
        self.device = device

    def draw(self, n: int, **fixed: int) -> Sitters:
        index = torch.randint(0, len(self.identities), (n,), generator=self.generator).to(self.device)
        return Sitters(index, self.identities[index], sample_scenes(n, self.generator, "cpu", **fixed).to(self.device))


@dataclass(frozen=True, eq=False)
class Sitters:
    """index: [n], which of the crowd; identity: [n, 40]; scene: of n."""

    index: Tensor
    identity: Tensor
    scene: Scene


def recognition_crops(sitters: Sitters, size: int = 112, jitter: float = DETECTION_ERROR) -> Tensor:
    """[n, 3, size, size] RGB in -1..1, as insightface's norm_crop cuts them from pictures whose landmarks were found, not known."""
    return _drawn(sitters, arcface_grid(unsure(landmarks(sitters.identity, sitters.scene), jitter), size))[0]


def parsing_crops(sitters: Sitters, size: int, jitter: float = DETECTION_ERROR) -> tuple[Tensor, Tensor]:
    """FFHQ-aligned crops [n, 3, size, size] RGB in -1..1 and their labels [n, size, size]."""
    return _drawn(sitters, ffhq_grid(unsure(landmarks(sitters.identity, sitters.scene), jitter), size))


def box_crops(sitters: Sitters, size: int, margin: float, jitter: float = 0.06) -> Tensor:
    """[n, 3, size, size] RGB in -1..1: upright squares around the detector's box, `margin` times its longer side; jitter: of the
    box, as a share of that side."""
    box = face_box(sitters.identity, sitters.scene)
    side = (box[:, 2:] - box[:, :2]).amax(1)
    wander = (torch.rand(len(side), 3, device=box.device) * 2 - 1) * jitter
    centre = (box[:, 2:] + box[:, :2]) / 2 + wander[:, :2] * side[:, None]
    half = side * margin / 2 * (1 + wander[:, 2])
    nothing = torch.zeros_like(half)
    affine = torch.stack([torch.stack([half, nothing, centre[:, 0]], 1), torch.stack([nothing, half, centre[:, 1]], 1)], 1)
    return _drawn(sitters, Grid.under(affine, size))[0]


def unsure(points: Tensor, jitter: float) -> Tensor:
    """Landmarks [n, 5, 2] with errors like a detector's: each point on its own, by `jitter` eye distances."""
    eyes: Tensor = (points[:, 1] - points[:, 0]).norm(dim=-1)
    wander: Tensor = torch.randn_like(points) * (jitter * eyes).view(-1, 1, 1)
    return points + wander


def _drawn(sitters: Sitters, grid: Grid) -> tuple[Tensor, Tensor]:
    """Picture and labels at a grid; black (and label 0) beyond the border of the picture, as cv2.warpAffine leaves it."""
    picture_pixel = 2 / PICTURE_SIZE_PX
    soft = Grid(grid.x, grid.y, grid.pixel.clamp_min(picture_pixel * float(0.9 + 0.7 * torch.rand(()))))
    canvas: Canvas = paint(sitters.identity, sitters.scene, soft)
    outside = (grid.x.abs() > 1) | (grid.y.abs() > 1)
    rgb = (canvas.rgb.clamp(0, 1) * 2 - 1).masked_fill(outside[:, None], -1.0)
    return rgb, canvas.labels.masked_fill(outside, 0)
