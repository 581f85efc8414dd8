"""What people wear: five tops in eight colours, dark trousers, shoes. Painted part by part, in the order that body.py asks for.

All five tops are computed for every picture and switched by factors of 0 and 1, so that nothing depends on data.
What tells them apart is at the collar, where a close-up shows it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world.canvas import Canvas, box, capsule, circle, ellipse
from training.mini.world.figure import Figure, Rgb, limbs_between
from training.mini.world.joints import HIP_Y, SOLE_Y
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
# Where sleeves end and cuffs begin, along the upper arm or the forearm (0..1); stripes on each.
_SHORT_SLEEVE_END, _SLEEVE_END, _CUFF_FROM = 0.66, 0.93, 0.76
_STRIPES_PER_SEGMENT = 2.0
# About how long a segment of an arm, and a shin, is: turns "how far along" into a distance.
_FOREARM, _SHIN = 0.7, 0.7
_STRIPE_PERIOD = 0.34


def _wears(figure: Figure, *kinds: int) -> Tensor:
    """1 where the top is one of these, else 0; [n, 1, 1]."""
    worn = torch.stack([figure.scene.clothes == kind for kind in kinds]).any(0)
    return worn.view(-1, 1, 1).to(figure.x.dtype)


def _of_colour(figure: Figure, palette: tuple[Rgb, ...]) -> Tensor:
    """[n, 3, 1, 1]."""
    return torch.tensor(palette, device=figure.x.device)[figure.scene.colour].view(-1, 3, 1, 1)


def _darker(colour: Tensor, by: float) -> Tensor:
    """A seam or a second layer in the same cloth: darker, or lighter where the cloth is nearly black."""
    return torch.where(colour.mean(1, keepdim=True) < 0.25, colour + by * 0.45, colour * (1 - by))


def paint_trousers(canvas: Canvas, figure: Figure) -> None:
    joints = figure.joints
    thighs = limbs_between(figure.x, figure.y, joints.hips, joints.knees)
    shins = limbs_between(figure.x, figure.y, joints.knees, joints.ankles)
    cut = torch.maximum(shins.tapered(0.29, 0.25), (shins.along - 1.0) * _SHIN)
    figure.paint(canvas, torch.minimum(thighs.tapered(0.36, 0.29), cut), _TROUSERS, CLOTH)


def paint_shoes(canvas: Canvas, figure: Figure) -> None:
    shoes = torch.maximum(ellipse(figure.x.abs() - 0.47, figure.y - (SOLE_Y - 0.06), 0.34, 0.24), figure.y - SOLE_Y)
    figure.paint(canvas, shoes, _SHOES, CLOTH)
    figure.paint(canvas, torch.maximum(shoes, SOLE_Y - 0.07 - figure.y), _SOLES, None)


def paint_behind_neck(canvas: Canvas, figure: Figure) -> None:
    """The hood of a hoodie, hanging behind the neck."""
    hood = ellipse(figure.x, figure.y - 1.22, 0.66, 0.40)
    figure.paint(canvas, hood, _darker(_of_colour(figure, _CLOTH), 0.28), CLOTH, _wears(figure, HOODIE))


def paint_top(canvas: Canvas, figure: Figure) -> None:
    """The trunk in cloth, with its hem and what is on the chest; a neckline is cut out by painting skin over it."""
    cloth = _of_colour(figure, _CLOTH)
    hem = HIP_Y + 0.05 + 0.22 * _wears(figure, SUIT)
    trunk = torch.maximum(figure.torso, figure.y - hem)
    figure.paint(canvas, trunk, cloth, CLOTH)
    _paint_stripes(canvas, figure, trunk)
    band = torch.maximum(trunk, hem - 0.16 - figure.y)
    figure.paint(canvas, band, _darker(cloth, 0.16), None, _wears(figure, HOODIE, SWEATER, TURTLENECK))
    _paint_neckline(canvas, figure, trunk)
    _paint_suit(canvas, figure, trunk)
    _paint_pocket(canvas, figure)


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
    """Shirt and tie in the opening of a jacket, its lapels, its button."""
    worn, cloth = _wears(figure, SUIT), _of_colour(figure, _CLOTH)
    x, y = figure.x.abs(), figure.y
    opening = x - (2.38 - y) * 0.42
    lapels = torch.maximum(trunk, torch.maximum((x - (2.42 - y) * 0.78) * 0.79, 1.42 - 0.5 * (x - 0.5) - y))
    figure.paint(canvas, lapels - 0.02, _darker(cloth, 0.34), None, worn)
    figure.paint(canvas, lapels, _darker(cloth, 0.16), None, worn)
    figure.paint(canvas, torch.maximum(trunk, opening * 0.92), _SHIRT, None, worn)
    blade = torch.maximum(torch.maximum(x - 0.055 - 0.06 * (y - 1.5), opening), 1.45 - y)
    knot = torch.maximum(x - 0.11 + 0.25 * (y - 1.38), (y - 1.46).abs() - 0.10)
    figure.paint(canvas, torch.minimum(blade, knot), _of_colour(figure, _TIE), None, worn)
    closing = torch.minimum(box(x, y - 2.68, 0.010, 0.30), circle(figure.x - 0.07, y - 2.52, 0.045))
    figure.paint(canvas, closing, _darker(cloth, 0.40), None, worn)


def _paint_pocket(canvas: Canvas, figure: Figure) -> None:
    """The seam of a hoodie's pouch."""
    pouch = torch.maximum(figure.x.abs() - 0.34 - 0.35 * (figure.y - 2.3).clamp(0, 0.3), (figure.y - 2.50).abs() - 0.22)
    figure.paint(canvas, (pouch + 0.02).abs() - 0.022, _darker(_of_colour(figure, _CLOTH), 0.30), None, _wears(figure, HOODIE))


def paint_collar(canvas: Canvas, figure: Figure) -> None:
    """What lies around the neck, over it: the points of a shirt, a hood with its strings, the tube of a turtleneck."""
    suit = _wears(figure, SUIT)
    points = torch.maximum((figure.x.abs() - 0.20).abs() - 0.19 + 0.40 * (figure.y - 1.16), (figure.y - 1.30).abs() - 0.17)
    figure.shadow(canvas, points - 0.02, 0.18 * suit)
    figure.paint(canvas, points, _SHIRT, CLOTH, suit)
    _paint_hood(canvas, figure)
    _paint_tube(canvas, figure)


def _paint_hood(canvas: Canvas, figure: Figure) -> None:
    x, y, worn, cloth = figure.x, figure.y, _wears(figure, HOODIE), _of_colour(figure, _CLOTH)
    around = torch.maximum(ellipse(x, y - 1.30, 0.62, 0.34), -ellipse(x, y - 1.14, 0.36, 0.29))
    figure.paint(canvas, torch.maximum(around - 0.03, 1.05 - y), _darker(cloth, 0.32), CLOTH, worn)
    figure.paint(canvas, torch.maximum(around, 1.05 - y), _darker(cloth, 0.10), CLOTH, worn)
    strings = capsule(x.abs(), y, 0.20, 1.58, 0.22, 2.04, 0.028)
    figure.paint(canvas, strings, _of_colour(figure, _STRIPE), None, worn)


def _paint_tube(canvas: Canvas, figure: Figure) -> None:
    """A collar up to the chin, folded once: the fold and its lower border are lines of shadow left open."""
    x, y, worn, cloth = figure.x, figure.y, _wears(figure, TURTLENECK), _of_colour(figure, _CLOTH)
    tube = torch.maximum(x.abs() - 0.36 - 0.10 * (y - 1.2).clamp_min(0), (y - 1.12).abs() - 0.28)
    figure.paint(canvas, tube - 0.02, _darker(cloth, 0.30), CLOTH, worn)
    figure.paint(canvas, torch.maximum(tube, 0.014 - (y - 1.20).abs()), _darker(cloth, 0.08), None, worn)


def paint_sleeves(canvas: Canvas, figure: Figure) -> None:
    """Short on a t-shirt; else to the wrists, with stripes on a sweater, and with cuffs: knitted, or a shirt's under a suit."""
    cloth, short, suit = _of_colour(figure, _CLOTH), _wears(figure, T_SHIRT), _wears(figure, SUIT)
    upper, fore = figure.upper_arms.tapered(*_SLEEVE_RADII[0]), figure.forearms.tapered(*_SLEEVE_RADII[1])
    along_upper, along_fore = figure.upper_arms.along, figure.forearms.along
    long_sleeves = torch.minimum(upper, torch.maximum(fore, (along_fore - _SLEEVE_END) * _FOREARM))
    short_sleeves = torch.maximum(upper, (along_upper - _SHORT_SLEEVE_END) * _FOREARM)
    figure.paint(canvas, torch.lerp(long_sleeves, short_sleeves, short), cloth, CLOTH)
    wave = torch.remainder(torch.where(upper < fore, along_upper, along_fore) * _STRIPES_PER_SEGMENT, 1.0) - 0.5
    stripes = torch.maximum(long_sleeves, (wave.abs() - 0.25) * (_FOREARM / _STRIPES_PER_SEGMENT))
    figure.paint(canvas, stripes, _of_colour(figure, _STRIPE), None, _wears(figure, SWEATER))
    cuffs = torch.maximum(long_sleeves, (_CUFF_FROM + 0.08 * suit - along_fore) * _FOREARM)
    white = torch.tensor(_SHIRT, device=cloth.device).view(1, 3, 1, 1)
    figure.paint(canvas, cuffs, torch.lerp(_darker(cloth, 0.16), white.expand_as(cloth), suit[..., None]), None, 1 - short)
