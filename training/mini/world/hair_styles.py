"""The hair styles as numbers: one row a style, one column a measure, so that a batch of mixed styles is drawn in one go.

Knows no drawing (hair.py) and no probabilities beyond how often each sex wears a style.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

HAIR_STYLES: Final = (
    "bald", "buzz cut", "short crop", "side part", "quiff", "curls", "afro",
    "bob", "long straight", "long wavy", "ponytail", "top bun", "mohawk",
)  # fmt: skip

# How often each is worn, per cent: (women, men).
STYLE_SHARES: Final = (
    (1, 3, 8, 6, 4, 11, 9, 14, 14, 13, 9, 7, 1),
    (12, 11, 15, 15, 13, 10, 9, 2, 3, 3, 2, 3, 2),
)


@dataclass(frozen=True, eq=False)
class HairStyle:
    """Measures of a style in head units (a head is 2 high); y and v run down from the head's centre. Each [n, 1, 1].

    density: 0 none .. 1 opaque (a buzz cut lets skin through). sides: the same for what is shaved beside a mohawk's strip.
    top, side: volume above and beside the skull. crown: exponent of its outline (2 an ellipse, more: boxier).
    lean: how much higher the top is on the side away from the parting. line: hairline over the middle of the forehead.
    temple: how far down hair comes at the sides of the face. sweep: slope of the hairline (a side parting). part: depth
    of the notch of a middle parting. panel: width of the locks that frame the face (0: none), lock: where these end.
    fall: where the hair behind the head ends (-2: there is none), spread: how far it stands off the skull.
    curl: depth of scallops in every outline; curly hair swells where other hair falls straight. wave: of a long outline.
    tail: radius of a gathered knot, tail_x, tail_y: its centre, tail_end: where the tail that hangs from it ends (at tail_y:
    a bun). crest: half-width of a mohawk's strip (2: the whole head).
    """

    density: Tensor
    sides: Tensor
    top: Tensor
    side: Tensor
    crown: Tensor
    lean: Tensor
    line: Tensor
    temple: Tensor
    sweep: Tensor
    part: Tensor
    panel: Tensor
    lock: Tensor
    fall: Tensor
    spread: Tensor
    curl: Tensor
    wave: Tensor
    tail: Tensor
    tail_x: Tensor
    tail_y: Tensor
    tail_end: Tensor
    crest: Tensor


# In the order of HairStyle's fields.
_MEASURES: Final = (
    # dens sides  top   side  crown lean  line   temple sweep part  panel lock  fall  spread curl  wave  tail  tail_x tail_y tail_end crest
    (0.00, 0.00, 0.00, 0.00, 2.30, 0.00, -0.60, -0.10, 0.00, 0.00, 0.00, 0.00, -2.0, 0.00, 0.00, 0.00, 0.00, 0.00, -0.90, -0.90, 2.00),
    (0.66, 0.00, 0.03, 0.02, 2.30, 0.00, -0.54, 0.02, 0.00, 0.00, 0.00, 0.00, -2.0, 0.00, 0.00, 0.00, 0.00, 0.00, -0.90, -0.90, 2.00),
    (1.00, 0.00, 0.14, 0.06, 2.50, 0.00, -0.42, 0.06, 0.06, 0.00, 0.00, 0.00, -2.0, 0.00, 0.00, 0.00, 0.00, 0.00, -0.90, -0.90, 2.00),
    (1.00, 0.00, 0.18, 0.07, 2.40, 0.10, -0.50, 0.08, 0.32, 0.00, 0.00, 0.00, -2.0, 0.00, 0.00, 0.00, 0.00, 0.00, -0.90, -0.90, 2.00),
    (1.00, 0.00, 0.36, 0.03, 3.40, 0.22, -0.56, 0.04, 0.10, 0.00, 0.00, 0.00, -2.0, 0.00, 0.00, 0.00, 0.00, 0.00, -0.90, -0.90, 2.00),
    (1.00, 0.00, 0.22, 0.13, 2.30, 0.00, -0.42, 0.04, 0.00, 0.00, 0.00, 0.00, 0.36, 0.15, 0.07, 0.00, 0.00, 0.00, -0.90, -0.90, 2.00),
    (1.00, 0.00, 0.44, 0.42, 2.00, 0.00, -0.50, -0.05, 0.00, 0.00, 0.00, 0.00, 0.72, 0.44, 0.035, 0.00, 0.00, 0.00, -0.90, -0.90, 2.00),
    (1.00, 0.00, 0.13, 0.13, 2.30, 0.00, -0.24, 0.40, 0.04, 0.00, 0.20, 0.78, 0.88, 0.13, 0.00, 0.00, 0.00, 0.00, -0.90, -0.90, 2.00),
    (1.00, 0.00, 0.10, 0.10, 2.30, 0.00, -0.34, 0.40, 0.00, 0.28, 0.19, 1.70, 1.60, 0.14, 0.00, 0.00, 0.00, 0.00, -0.90, -0.90, 2.00),
    (1.00, 0.00, 0.17, 0.16, 2.30, 0.05, -0.42, 0.40, 0.26, 0.00, 0.20, 1.35, 1.45, 0.26, 0.00, 0.06, 0.00, 0.00, -0.90, -0.90, 2.00),
    (1.00, 0.00, 0.10, 0.06, 2.30, 0.00, -0.46, 0.06, 0.14, 0.00, 0.00, 0.00, -2.0, 0.00, 0.00, 0.00, 0.32, 0.84, -0.60, 0.80, 2.00),
    (1.00, 0.00, 0.09, 0.06, 2.30, 0.00, -0.48, 0.06, 0.00, 0.08, 0.00, 0.00, -2.0, 0.00, 0.00, 0.00, 0.33, 0.00, -1.24, -1.24, 2.00),
    (1.00, 0.42, 0.44, 0.20, 2.30, 0.00, -0.54, 0.00, 0.00, 0.00, 0.00, 0.00, -2.0, 0.00, 0.00, 0.00, 0.00, 0.00, -0.90, -0.90, 0.24),
)  # fmt: skip


def hair_style(index: Tensor) -> HairStyle:
    """index: [n] long, into HAIR_STYLES."""
    row = torch.tensor(_MEASURES, device=index.device)[index]
    return HairStyle(*(value.view(-1, 1, 1) for value in row.unbind(1)))
