"""Which place is painted by which function. The places themselves: rooms.py and landscapes.py."""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world import landscapes, rooms
from training.mini.world.canvas import Grid
from training.mini.world.scene import Scene
from training.mini.world.sheet import Sheet

# In the order of scene.SCENES.
_PAINTERS = (
    rooms.office, rooms.cafe, landscapes.beach, landscapes.forest, landscapes.mountains,
    landscapes.desert, landscapes.city, rooms.studio, rooms.library, landscapes.park,
)  # fmt: skip


def paint_background(scene: Scene, grid: Grid) -> Tensor:
    """The places of a batch, without light: RGB [n, 3, H, W] in 0..1. The batch is grouped by place (so this part has
    shapes that depend on data)."""
    pictures = torch.zeros(grid.x.shape[0], 3, *grid.x.shape[1:], device=grid.x.device)
    for number, painter in enumerate(_PAINTERS):
        members = (scene.scene == number).nonzero()[:, 0]
        if members.numel() == 0:
            continue
        sheet = Sheet(grid.take(members), scene.variation[members])
        painter(sheet)
        pictures[members] = sheet.rgb
    return pictures
