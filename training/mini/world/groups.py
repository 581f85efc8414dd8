"""Several people side by side in one picture: they share the place and the light, and nothing else."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mini.world.backgrounds import paint_background
from training.mini.world.canvas import Canvas, Grid
from training.mini.world.landmarks import face_box, landmarks
from training.mini.world.lighting import graded
from training.mini.world.render import PICTURE_SIZE_PX, paint_person
from training.mini.world.scene import PORTRAIT, Scene, sample_scenes

# Per number of people: head size, height of the heads, distance between neighbours, in picture coordinates.
_LAYOUT = {1: (0.39, -0.20, 0.0), 2: (0.30, -0.12, 0.94), 3: (0.225, -0.08, 0.64)}
_HEIGHT_SPREAD = 0.05
_PLACE_SPREAD = 0.02


@dataclass(frozen=True, eq=False)
class Group:
    """picture: RGB [n, 3, H, W] in -1..1. landmarks: [n, k, 5, 2] and boxes: [n, k, 4] (x0, y0, x1, y1) of the faces, in picture
    coordinates (-1..1), from the picture's left to its right."""

    picture: Tensor
    landmarks: Tensor
    boxes: Tensor


def sample_group(n: int, people: int, seed: int | torch.Generator, device: torch.device | str = "cpu", **fixed: int) -> list[Scene]:
    """n pictures of `people` (1 to 3): one Scene of n for each of them, from left to right, arms down, equal in place and light.

    fixed: as in sample_scenes, for all. Raises ValueError for another number of people."""
    if people not in _LAYOUT:
        raise ValueError(f"{people} people do not fit side by side: a group has {min(_LAYOUT)} to {max(_LAYOUT)}")
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)
    size, height, apart = _LAYOUT[people]
    shared = sample_scenes(n, g, "cpu", **fixed)
    members = []
    for number in range(people):
        own = sample_scenes(n, g, "cpu", **{"arms": 0, **fixed, "framing": PORTRAIT})
        place = (number - (people - 1) / 2) * apart + (torch.rand(n, generator=g) * 2 - 1) * _PLACE_SPREAD
        members.append(
            own.but(
                scene=shared.scene, light=shared.light, variation=shared.variation,
                jitter=torch.cat((shared.jitter[:, :1], own.jitter[:, 1:]), dim=1),
                head_x=place, head_y=height + (torch.rand(n, generator=g) * 2 - 1) * _HEIGHT_SPREAD, head_size=torch.full((n,), size),
            ).to(device)
        )  # fmt: skip
    return members


def paint_group(identities: Tensor, scenes: list[Scene], size: int = PICTURE_SIZE_PX) -> Group:
    """identities: [n, k, 40]; scenes: k scenes of n (`sample_group`), whose place and light is that of the first."""
    grid = Grid.whole(identities.shape[0], size, identities.device)
    canvas = Canvas(paint_background(scenes[0], grid))
    people = list(zip(identities.unbind(1), scenes, strict=True))
    for identity, scene in people:
        paint_person(canvas, identity, scene, grid)
    return Group(
        picture=graded(canvas.rgb, scenes[0]).clamp(0, 1) * 2 - 1,
        landmarks=torch.stack([landmarks(*person) for person in people], dim=1),
        boxes=torch.stack([face_box(*person) for person in people], dim=1),
    )
