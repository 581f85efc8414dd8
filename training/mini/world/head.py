"""A head: its parts, from the back to the front. The only entrance to what is painted in front of the body.

"Left" and "right" in the parsing map are the person's own, as in CelebAMask-HQ: on a face that looks at the viewer the left eye is at
the picture's right (checked against a label map published with it, MaskGAN_demo/samples/0.png: l_eye at x = 321 of 512, r_eye at 192).
Brows are painted over the hair, so that a fringe never hides an expression.
"""

from __future__ import annotations

from torch import Tensor

from training.mini.world.canvas import Canvas, Grid
from training.mini.world.eyes import eye_pair, paint_brows, paint_eyes, paint_glasses
from training.mini.world.face import paint_beard, paint_ears, paint_lines, paint_marks, paint_nose, paint_skin
from training.mini.world.hair import paint_front_hair
from training.mini.world.mouth import paint_mouth
from training.mini.world.scene import Scene
from training.mini.world.sitter import sitter


def paint_head(canvas: Canvas, identity: Tensor, scene: Scene, grid: Grid) -> None:
    """identity: [n, 40]; one head a picture. Every part leaves its class in the canvas's parsing map."""
    s = sitter(canvas, identity, scene, grid)
    paint_ears(s)
    head = paint_skin(s)
    paint_beard(s, head)
    paint_marks(s, head)
    paint_lines(s)
    paint_nose(s)
    pair = eye_pair(s)
    paint_eyes(s, pair)
    paint_mouth(s)
    paint_front_hair(s, head)
    paint_brows(s, pair)
    paint_glasses(s, pair, head)
