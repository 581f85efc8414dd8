"""What somebody looks like: the 40 uniform numbers of an identity turned into sizes, colours and styles.

Most of a person is in a few coarse things that survive 192 pixels: skin, hair style and colour, shape of the head, eyes, brows,
beard, glasses, lips, ears. Knows nothing of the scene and draws nothing. Lengths are in head units (a head is about 2 high),
colours are RGB in 0..1 (sRGB, as painted).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from training.mini.world.hair_styles import STYLE_SHARES, HairStyle, hair_style
from training.mini.world.identity import sex

BEARDS: Final = ("none", "moustache", "goatee", "full beard")
GLASSES: Final = ("none", "round", "square")

# Which coordinate of the identity says what. 0 (sex) and 1 (age) belong to identity.py.
(
    _SKIN, _WARMTH, _STYLE, _HAIR_HUE, _HAIR_SHADE, _GREY, _WIDTH, _TAPER, _SQUARE, _EYE_APART, _EYE_SIZE, _EYE_ROUND, _EYE_TILT,
    _IRIS, _BROW_THICK, _BROW_ARCH, _BROW_TILT, _BROW_HEIGHT, _NOSE_WIDTH, _NOSE_LENGTH, _MOUTH_WIDTH, _LIP_FULL, _LIP_HUE,
    _LIP_STRENGTH, _BEARD, _BEARD_SIZE, _GLASSES, _GLASSES_HUE, _EAR, _FRECKLES, _BLUSH, _MOLE, _MOLE_PLACE, _VOLUME, _LENGTH,
    _LINE, _PARTING, _EARRING,
) = range(2, 40)  # fmt: skip

_SKINS: Final = (
    (1.00, 0.87, 0.79), (0.98, 0.80, 0.68), (0.93, 0.71, 0.55), (0.82, 0.59, 0.42),
    (0.67, 0.45, 0.31), (0.50, 0.33, 0.23), (0.37, 0.24, 0.17),
)  # fmt: skip
_HAIRS: Final = (
    (0.11, 0.10, 0.12), (0.24, 0.15, 0.11), (0.42, 0.26, 0.15), (0.52, 0.20, 0.11), (0.83, 0.40, 0.14),
    (0.90, 0.69, 0.34), (0.96, 0.88, 0.68), (0.56, 0.16, 0.36), (0.20, 0.42, 0.58),
)  # fmt: skip
_HAIR_SHARES: Final = ((20, 16, 15, 11, 12, 13, 6, 4, 3),)
_GREY_DARK, _GREY_LIGHT = (0.60, 0.61, 0.64), (0.92, 0.92, 0.94)
_IRISES: Final = (
    (0.34, 0.19, 0.09), (0.60, 0.42, 0.14), (0.22, 0.54, 0.30), (0.20, 0.48, 0.82), (0.50, 0.57, 0.64), (0.15, 0.10, 0.08),
)  # fmt: skip
_IRIS_SHARES: Final = ((22, 16, 17, 20, 12, 13),)
_LIPSTICKS: Final = ((0.84, 0.42, 0.42), (0.80, 0.16, 0.22), (0.66, 0.20, 0.40), (0.90, 0.42, 0.30))
_FRAMES: Final = ((0.12, 0.12, 0.14), (0.45, 0.22, 0.12), (0.78, 0.60, 0.22), (0.70, 0.15, 0.20), (0.15, 0.30, 0.58))
_FRAME_SHARES: Final = ((34, 20, 18, 14, 14),)
# Per cent, (women, men), in the order of BEARDS and of GLASSES.
_BEARD_SHARES: Final = ((100, 0, 0, 0), (42, 14, 18, 26))
_GLASSES_SHARES: Final = ((64, 18, 18),)
_EARRING_SHARE: Final = (0.45, 0.05)
_FRECKLE_SHARE, _MOLE_SHARE, _GREY_SHARE = 0.22, 0.22, 0.80
# Hair greys from 55 years on (identity.AGE_BANDS: senior), lines deepen from 50 to 65: coordinate 1 spans 18..75 years.
_GREY_FROM = (55 - 18) / (75 - 18)
_LINES_FROM, _LINES_FULL = (50 - 18) / (75 - 18), (65 - 18) / (75 - 18)


@dataclass(frozen=True, eq=False)
class Traits:
    """A batch of faces. Numbers are [n, 1, 1], colours [n, 3, 1, 1]; switches are 0 or 1.

    male, age: sex as a switch, age in 0..1. width: half-width of the head (its half-height is 1). taper: how much narrower the jaw is
    (share of width). square: exponent of the jaw's outline (2 an ellipse). eye_x, eye_y: eye centres (mirrored); eye_width,
    eye_height: half sizes; eye_tilt: radians, positive: outer corners up. brow_*: height above the eye's upper edge, half thickness,
    half length, tilt (radians, positive: inner ends down), arch. nose_y: height of the tip; nose_width, nose_height: half sizes.
    mouth_y, mouth_width (half), lip: thickness of a lip. lashes, lines (of age), earring, freckles, mole, blush: strengths 0..1.
    beard: 3 switches (moustache, goatee, full beard); beard_size 0..1. glasses: any; square_glasses: of that shape.
    hair: measures of the style; hair_volume, hair_length 0..1 vary them, parting: -1 or 1, the side of the parting.
    """

    male: Tensor
    age: Tensor
    width: Tensor
    taper: Tensor
    square: Tensor
    ear: Tensor
    eye_x: Tensor
    eye_y: Tensor
    eye_width: Tensor
    eye_height: Tensor
    eye_tilt: Tensor
    lashes: Tensor
    brow_height: Tensor
    brow_thickness: Tensor
    brow_length: Tensor
    brow_tilt: Tensor
    brow_arch: Tensor
    nose_y: Tensor
    nose_width: Tensor
    nose_height: Tensor
    mouth_y: Tensor
    mouth_width: Tensor
    lip: Tensor
    moustache: Tensor
    goatee: Tensor
    full_beard: Tensor
    beard_size: Tensor
    glasses: Tensor
    square_glasses: Tensor
    freckles: Tensor
    blush: Tensor
    mole: Tensor
    mole_x: Tensor
    mole_y: Tensor
    lines: Tensor
    earring: Tensor
    hair: HairStyle
    hair_volume: Tensor
    hair_length: Tensor
    hairline: Tensor
    parting: Tensor
    skin: Tensor
    hair_colour: Tensor
    brow_colour: Tensor
    iris: Tensor
    lip_colour: Tensor
    frame_colour: Tensor


def traits_of(identity: Tensor) -> Traits:
    """identity: [n, 40] in 0..1."""
    q = identity
    male = _number(sex(q).to(q.dtype))
    beard = _choice(q, _BEARD, _BEARD_SHARES)
    glasses = _choice(q, _GLASSES, _GLASSES_SHARES)
    eye_width = _between(q, _EYE_SIZE, 0.145, 0.205) - 0.012 * male
    skin = _skin(q)
    hair = _hair_colour(q)
    return Traits(
        male=male,
        age=_number(q[:, 1]),
        width=_between(q, _WIDTH, 0.72, 0.88) + 0.02 * male,
        taper=_between(q, _TAPER, 0.06, 0.34) - 0.06 * male,
        square=_between(q, _SQUARE, 2.0, 2.7) + 0.25 * male,
        ear=_between(q, _EAR, 0.13, 0.23),
        eye_x=_between(q, _EYE_APART, 0.30, 0.395),
        eye_y=torch.full_like(male, 0.06),
        eye_width=eye_width,
        eye_height=eye_width * _between(q, _EYE_ROUND, 0.66, 1.02),
        eye_tilt=_between(q, _EYE_TILT, -0.22, 0.22),
        lashes=1 - male,
        brow_height=_between(q, _BROW_HEIGHT, 0.09, 0.16) - 0.02 * male,
        brow_thickness=_between(q, _BROW_THICK, 0.020, 0.055) + 0.008 * male,
        brow_length=eye_width * 1.12,
        brow_tilt=_between(q, _BROW_TILT, -0.20, 0.24),
        brow_arch=_between(q, _BROW_ARCH, 0.0, 0.09),
        nose_y=_between(q, _NOSE_LENGTH, 0.28, 0.42),
        nose_width=_between(q, _NOSE_WIDTH, 0.07, 0.165) + 0.010 * male,
        nose_height=_between(q, _NOSE_LENGTH, 0.055, 0.095),
        mouth_y=torch.full_like(male, 0.64),
        mouth_width=_between(q, _MOUTH_WIDTH, 0.17, 0.29),
        lip=_between(q, _LIP_FULL, 0.024, 0.062) + 0.014 * (1 - male),
        moustache=_number((beard > 0).to(q.dtype)),
        goatee=_number((beard == 2).to(q.dtype)),
        full_beard=_number((beard == 3).to(q.dtype)),
        beard_size=_number(q[:, _BEARD_SIZE]),
        glasses=_number((glasses > 0).to(q.dtype)),
        square_glasses=_number((glasses == 2).to(q.dtype)),
        freckles=_number((q[:, _FRECKLES] < _FRECKLE_SHARE).to(q.dtype)),
        blush=_between(q, _BLUSH, 0.0, 0.55),
        mole=_number((q[:, _MOLE] < _MOLE_SHARE).to(q.dtype)),
        mole_x=torch.where(_number(q[:, _MOLE_PLACE]) > 0.5, 1.0, -1.0) * (0.30 + 0.12 * _number(q[:, _MOLE] / _MOLE_SHARE).clamp(0, 1)),
        mole_y=0.34 + 0.30 * (_number(q[:, _MOLE_PLACE]) * 2).remainder(1.0),
        lines=((_number(q[:, 1]) - _LINES_FROM) / (_LINES_FULL - _LINES_FROM)).clamp(0, 1),
        earring=_number((q[:, _EARRING] < _by_sex(q, _EARRING_SHARE)).to(q.dtype)),
        hair=hair_style(_choice(q, _STYLE, STYLE_SHARES)),
        hair_volume=_number(q[:, _VOLUME]),
        hair_length=_number(q[:, _LENGTH]),
        hairline=_between(q, _LINE, -0.07, 0.05),
        parting=torch.where(_number(q[:, _PARTING]) > 0.5, 1.0, -1.0),
        skin=skin,
        hair_colour=hair,
        brow_colour=hair * 0.62 + skin * 0.08,
        iris=_swatch(q, _IRIS, _IRISES, _IRIS_SHARES),
        lip_colour=_lip_colour(q, skin),
        frame_colour=_swatch(q, _GLASSES_HUE, _FRAMES, _FRAME_SHARES),
    )


def _number(value: Tensor) -> Tensor:
    return value.view(-1, 1, 1)


def _colour(value: Tensor) -> Tensor:
    return value.view(-1, 3, 1, 1)


def _between(q: Tensor, coordinate: int, low: float, high: float) -> Tensor:
    return _number(low + (high - low) * q[:, coordinate])


def _by_sex(q: Tensor, values: tuple[float, float]) -> Tensor:
    """(for women, for men) -> [n]."""
    return torch.tensor(values, device=q.device)[sex(q)]


def _choice(q: Tensor, coordinate: int, shares: tuple[tuple[int, ...], ...]) -> Tensor:
    """[n] long: which of the options the coordinate falls on. shares: per cent of each option, one row for all or (women, men)."""
    bounds = torch.tensor(shares, device=q.device, dtype=q.dtype).cumsum(1)[:, :-1] / 100
    return (q[:, coordinate, None] >= bounds[sex(q) * (len(shares) - 1)]).sum(1)


def _swatch(q: Tensor, coordinate: int, palette: tuple[tuple[float, float, float], ...], shares: tuple[tuple[int, ...], ...]) -> Tensor:
    return _colour(torch.tensor(palette, device=q.device)[_choice(q, coordinate, shares)])


def _skin(q: Tensor) -> Tensor:
    """From pale to deep, continuously, then a little warmer (redder) or cooler."""
    palette = torch.tensor(_SKINS, device=q.device)
    place = q[:, _SKIN] * (len(_SKINS) - 1.001)
    index = place.long()
    tone = torch.lerp(palette[index], palette[index + 1], (place - index)[:, None])
    warmth = (q[:, _WARMTH, None] - 0.5) * torch.tensor([0.08, -0.01, -0.09], device=q.device)
    return _colour((tone + warmth).clamp(0, 1))


def _hair_colour(q: Tensor) -> Tensor:
    shade = _colour((0.85 + 0.30 * q[:, _HAIR_SHADE, None]).expand(-1, 3))
    natural = (_swatch(q, _HAIR_HUE, _HAIRS, _HAIR_SHARES) * shade).clamp(0, 1)
    dark, light = torch.tensor(_GREY_DARK, device=q.device), torch.tensor(_GREY_LIGHT, device=q.device)
    grey = _colour(torch.lerp(dark, light, q[:, _HAIR_SHADE, None]))
    turned = ((q[:, 1] >= _GREY_FROM) & (q[:, _GREY] < _GREY_SHARE)).view(-1, 1, 1, 1)
    return torch.where(turned, grey, natural)


def _lip_colour(q: Tensor, skin: Tensor) -> Tensor:
    """Lips are the skin's own red; lipstick covers them more or less on women, hardly at all on men."""
    bare = skin * torch.tensor([0.86, 0.62, 0.62], device=q.device).view(1, 3, 1, 1)
    hue = torch.tensor(_LIPSTICKS, device=q.device)[(q[:, _LIP_HUE] * (len(_LIPSTICKS) - 0.001)).long()]
    strength = (0.25 + 0.75 * q[:, _LIP_STRENGTH]) * _by_sex(q, (0.90, 0.15))
    return torch.lerp(bare, _colour(hue), strength.view(-1, 1, 1, 1))
