"""One picture of one person in one place: the layers, in order. The only entrance to the drawing."""

from __future__ import annotations

from torch import Tensor

from training.mini.world.backgrounds import paint_background
from training.mini.world.body import paint_body
from training.mini.world.canvas import Canvas, Grid
from training.mini.world.hair import paint_back_hair
from training.mini.world.head import paint_head
from training.mini.world.lighting import graded
from training.mini.world.scene import Scene

PICTURE_SIZE_PX = 192


def paint_person(canvas: Canvas, identity: Tensor, scene: Scene, grid: Grid) -> None:
    """Draws one person a picture over what the canvas holds: hair behind, body and arms, head with all that is on it."""
    paint_back_hair(canvas, identity, scene, grid)
    paint_body(canvas, identity, scene, grid)
    paint_head(canvas, identity, scene, grid)


def paint(identity: Tensor, scene: Scene, grid: Grid) -> Canvas:
    """Everything: the place, then the person, then the light's tint over both."""
    canvas = Canvas(paint_background(scene, grid))
    paint_person(canvas, identity, scene, grid)
    canvas.rgb = graded(canvas.rgb, scene)
    return canvas


def render(identity: Tensor, scene: Scene, size: int = PICTURE_SIZE_PX, grid: Grid | None = None) -> Tensor:
    """identity [n, 40], scene of n -> RGB [n, 3, size, size] in -1..1; `grid` evaluates any other set of points (a crop)."""
    where = grid if grid is not None else Grid.whole(identity.shape[0], size, identity.device)
    return paint(identity, scene, where).rgb.clamp(0, 1) * 2 - 1


def parsing_map(identity: Tensor, scene: Scene, size: int = PICTURE_SIZE_PX, grid: Grid | None = None) -> Tensor:
    """The exact 19-class parsing map [n, size, size] (long, CelebAMask order: parsing.py) of what `render` draws."""
    where = grid if grid is not None else Grid.whole(identity.shape[0], size, identity.device)
    return paint(identity, scene, where).labels
