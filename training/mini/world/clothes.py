"""What people wear: five tops in eight colours, dark trousers, shoes. Painted part by part, in the order that body.py asks for.

All five tops are computed for every picture and switched by factors of 0 and 1, so that nothing depends on data.
What tells them apart is at the collar, where a close-up shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world.canvas import Canvas, box, capsule, ellipse
from training.mini.world.figure import Figure
from training.mini.world.joints import HIP_Y, LEFT, RIGHT, SOLE_Y
from training.mini.world.parsing import CLOTH, NECK

T_SHIRT, SUIT, HOODIE, SWEATER, TURTLENECK = range(5)

# Per scene.COLOURS: the cloth, the stripes of a sweater and the tie of a suit that go with it.
_CLOTH = (
    (0.84, 0.20, 0.22), (0.19, 0.42, 0.84), (0.18, 0.60, 0.35), (0.97, 0.80, 0.22),
    (0.15, 0.15, 0.18), (0.96, 0.96, 0.95), (0.53, 0.28, 0.72), (0.97, 0.53, 0.15),
)  # fmt: skip
_STRIPE = (
    (0.98, 0.93, 0.88), (0.95, 0.96, 0.98), (0.95, 0.97, 0.90), (0.99, 0.98, 0.93),
    (0.70, 0.71, 0.75), (0.40, 0.47, 0.60), (0.95, 0.91, 0.97), (0.99, 0.95, 0.88),
)  # fmt: skip
_TIE = (
    (0.20, 0.16, 0.22), (0.80, 0.22, 0.22), (0.93, 0.76, 0.28), (0.26, 0.30, 0.50),
    (0.78, 0.20, 0.24), (0.25, 0.35, 0.62), (0.95, 0.78, 0.36), (0.22, 0.26, 0.42),
)  # fmt: skip
_SHIRT = (0.97, 0.97, 0.98)
_TROUSERS, _SHOES, _SOLES = (0.21, 0.24, 0.34), (0.16, 0.15, 0.19), (0.86, 0.86, 0.88)
_SLEEVE_RADII = ((0.265, 0.235), (0.23, 0.185))
_SHORT_SLEEVE_END, _LONG_SLEEVE_END = 0.66, 0.93
_STRIPE_PERIOD = 0.34


def _wears(figure: Figure, *kinds: int) -> Tensor:
    """1 where the top is one of these, else 0; [n, 1, 1]."""
    worn = torch.stack([figure.scene.clothes == kind for kind in kinds]).any(0)
    return worn.view(-1, 1, 1).to(figure.x.dtype)


def _of_colour(figure: Figure, palette: tuple[tuple[float, float, float], ...]) -> Tensor:
    """[n, 3, 1, 1]."""
    return torch.tensor(palette, device=figure.x.device)[figure.scene.colour].view(-1, 3, 1, 1)


def _darker(colour: Tensor, by: float) -> Tensor:
    """A seam or a second layer in the same cloth: darker, or lighter where the cloth is nearly black."""
    return torch.where(colour.mean(1, keepdim=True) < 0.25, colour + by * 0.45, colour * (1 - by))


def paint_trousers(canvas: Canvas, figure: Figure) -> None:
    joints = figure.joints
    for side in (RIGHT, LEFT):
        thigh, _ = figure.limb(joints.hips, joints.knees, side, (0.36, 0.29))
        shin, along = figure.limb(joints.knees, joints.ankles, side, (0.29, 0.25))
        leg = torch.minimum(thigh, torch.maximum(shin, (along - 1.0) * 0.7))
        figure.paint(canvas, leg, _TROUSERS, CLOTH)
    seam = torch.maximum(figure.x.abs() - 0.012, box(figure.x, figure.y - 3.55, 1.0, 0.35))
    figure.shadow(canvas, seam, 0.25)


def paint_shoes(canvas: Canvas, figure: Figure) -> None:
    for side, outwards in ((RIGHT, -1.0), (LEFT, 1.0)):
        x = figure.x - outwards * 0.47
        shoe = torch.maximum(ellipse(x, figure.y - (SOLE_Y - 0.06), 0.34, 0.24), figure.y - SOLE_Y)
        figure.paint(canvas, shoe, _SHOES, CLOTH)
        figure.paint(canvas, torch.maximum(shoe, SOLE_Y - 0.07 - figure.y), _SOLES, None)


def paint_behind_neck(canvas: Canvas, figure: Figure) -> None:
    """The hood of a hoodie, hanging behind the neck."""
    hood = ellipse(figure.x, figure.y - 1.22, 0.66, 0.40)
    figure.paint(canvas, hood, _darker(_of_colour(figure, _CLOTH), 0.28), CLOTH, _wears(figure, HOODIE))


def paint_top(canvas: Canvas, figure: Figure) -> None:
    """The trunk in cloth, with its hem and what is on the chest; a neckline is cut out by painting skin over it."""
    cloth = _of_colour(figure, _CLOTH)
    hem = HIP_Y + 0.05 + 0.22 * _wears(figure, SUIT)
    trunk = torch.maximum(figure.torso(), figure.y - hem)
    figure.paint(canvas, trunk, cloth, CLOTH)
    _paint_stripes(canvas, figure, trunk)
    band = torch.maximum(trunk, hem - 0.16 - figure.y)
    figure.paint(canvas, band, _darker(cloth, 0.16), None, _wears(figure, HOODIE, SWEATER, TURTLENECK))
    _paint_neckline(canvas, figure, trunk)
    _paint_suit(canvas, figure, trunk)
    _paint_pocket(canvas, figure, cloth)


def _paint_stripes(canvas: Canvas, figure: Figure, trunk: Tensor) -> None:
    wave = (torch.remainder((figure.y - 1.54) / _STRIPE_PERIOD, 1.0) - 0.5).abs() * _STRIPE_PERIOD
    stripes = torch.maximum(trunk, wave - 0.25 * _STRIPE_PERIOD)
    figure.paint(canvas, stripes, _of_colour(figure, _STRIPE), None, _wears(figure, SWEATER))


def _paint_neckline(canvas: Canvas, figure: Figure, trunk: Tensor) -> None:
    """Round: wide on a t-shirt, close to the neck on a sweater; a ribbed border around it."""
    cloth = _of_colour(figure, _CLOTH)
    wide = _wears(figure, T_SHIRT)
    opening = ellipse(figure.x, figure.y - 1.20, 0.36 + 0.10 * wide, 0.17 + 0.16 * wide)
    worn = _wears(figure, T_SHIRT, SWEATER)
    figure.paint(canvas, torch.maximum(trunk, opening - 0.075), _darker(cloth, 0.22), None, worn)
    figure.paint(canvas, torch.maximum(trunk, opening), figure.skin * 0.96, NECK, worn)


def _paint_suit(canvas: Canvas, figure: Figure, trunk: Tensor) -> None:
    """Shirt and tie in the opening of a jacket, its lapels, a button."""
    worn, cloth = _wears(figure, SUIT), _of_colour(figure, _CLOTH)
    x, y = figure.x.abs(), figure.y
    opening = torch.maximum(trunk, (x - (2.38 - y) * 0.42) * 0.92)
    lapel = torch.maximum(trunk, torch.maximum((x - (2.42 - y) * 0.78) * 0.79, 1.42 - 0.5 * (x - 0.5) - y))
    figure.paint(canvas, lapel - 0.02, _darker(cloth, 0.34), None, worn)
    figure.paint(canvas, lapel, _darker(cloth, 0.16), None, worn)
    figure.paint(canvas, opening, _SHIRT, None, worn)
    tie = torch.maximum(torch.maximum(x - 0.055 - 0.06 * (y - 1.5), (x - (2.38 - y) * 0.42)), 1.45 - y)
    knot = torch.maximum(x - 0.11 + 0.25 * (y - 1.38), (y - 1.46).abs() - 0.10)
    figure.paint(canvas, tie, _of_colour(figure, _TIE), None, worn)
    figure.paint(canvas, knot, _of_colour(figure, _TIE) * 0.86, None, worn)
    figure.paint(canvas, torch.maximum(x - 0.010, (y - 2.68).abs() - 0.30), _darker(cloth, 0.34), None, worn)
    figure.paint(canvas, ellipse(figure.x - 0.07, y - 2.52, 0.045, 0.045), _darker(cloth, 0.45), None, worn)


def _paint_pocket(canvas: Canvas, figure: Figure, cloth: Tensor) -> None:
    """The pouch of a hoodie."""
    x, y = figure.x.abs(), figure.y
    pouch = torch.maximum(x - 0.34 - 0.35 * (y - 2.3).clamp(0, 0.3), (y - 2.50).abs() - 0.22)
    figure.paint(canvas, pouch, _darker(cloth, 0.30), None, _wears(figure, HOODIE))
    figure.paint(canvas, pouch + 0.035, _darker(cloth, 0.08), None, _wears(figure, HOODIE))


def paint_collar(canvas: Canvas, figure: Figure) -> None:
    """What lies around the neck: shirt collar, hood with its strings, turtleneck."""
    x, y, cloth = figure.x, figure.y, _of_colour(figure, _CLOTH)
    suit, hoodie, turtleneck = _wears(figure, SUIT), _wears(figure, HOODIE), _wears(figure, TURTLENECK)
    point = torch.maximum((x.abs() - 0.20).abs() - 0.19 + 0.40 * (y - 1.16), (y - 1.30).abs() - 0.17)
    figure.shadow(canvas, point - 0.02, 0.18 * suit)
    figure.paint(canvas, point, _SHIRT, CLOTH, suit)
    rim = torch.maximum(ellipse(x, y - 1.30, 0.62, 0.34), -ellipse(x, y - 1.14, 0.36, 0.29))
    figure.paint(canvas, torch.maximum(rim - 0.03, 1.05 - y), _darker(cloth, 0.32), CLOTH, hoodie)
    figure.paint(canvas, torch.maximum(rim, 1.05 - y), _darker(cloth, 0.10), CLOTH, hoodie)
    for side, length in ((-1.0, 0.50), (1.0, 0.42)):
        string = capsule(x * side, y, 0.20, 1.58, 0.22, 1.58 + length, 0.028)
        figure.paint(canvas, string, _of_colour(figure, _STRIPE), None, hoodie)
    tube = torch.maximum(x.abs() - 0.36 - 0.10 * (y - 1.2).clamp_min(0), (y - 1.12).abs() - 0.28)
    figure.paint(canvas, tube - 0.02, _darker(cloth, 0.30), CLOTH, turtleneck)
    figure.paint(canvas, tube, _darker(cloth, 0.08), CLOTH, turtleneck)
    figure.shadow(canvas, torch.maximum(tube, (y - 1.20).abs() - 0.016), 0.20 * turtleneck)


def paint_sleeve(canvas: Canvas, figure: Figure, side: int) -> None:
    """Short on a t-shirt; else to the wrist, with a cuff."""
    joints, cloth, short = figure.joints, _of_colour(figure, _CLOTH), _wears(figure, T_SHIRT)
    upper, along_upper = figure.limb(joints.shoulders, joints.elbows, side, _SLEEVE_RADII[0])
    fore, along_fore = figure.limb(joints.elbows, joints.wrists, side, _SLEEVE_RADII[1])
    figure.paint(canvas, torch.maximum(upper, (along_upper - _SHORT_SLEEVE_END) * 0.7), cloth, CLOTH, short)
    sleeve = torch.minimum(upper, torch.maximum(fore, (along_fore - _LONG_SLEEVE_END) * 0.7))
    figure.paint(canvas, sleeve, cloth, CLOTH, 1 - short)
    stripe = (torch.remainder(torch.where(upper < fore, along_upper * 2.2, along_fore * 2.2 + 0.2), 1.0) - 0.5).abs() - 0.25
    figure.paint(canvas, torch.maximum(sleeve, stripe * 0.4), _of_colour(figure, _STRIPE), None, _wears(figure, SWEATER))
    cuff = torch.maximum(sleeve, (0.76 - along_fore) * 0.7)
    figure.paint(canvas, cuff, _darker(cloth, 0.16), None, _wears(figure, HOODIE, SWEATER, TURTLENECK))
    figure.paint(canvas, torch.maximum(sleeve, (0.84 - along_fore) * 0.7), _SHIRT, None, _wears(figure, SUIT))
