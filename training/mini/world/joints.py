"""Where the joints of a body are: one function, for whoever draws the body and whoever draws its skeleton.

Body coordinates: the unit and origin of the head (its centre; its half height is about 1), x right, y down, never rolled.
Knows no clothes and no pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.mini.world.identity import sex
from training.mini.world.scene import CLOSE_UP, Scene

RIGHT, LEFT = 0, 1
"""Index of the person's own right (the picture's left) and left side."""

NECK_Y, HIP_Y, SOLE_Y = 1.35, 2.85, 4.40
_HIP, _KNEE, _ANKLE = (0.36, HIP_Y), (0.39, 3.56), (0.42, 4.18)
# How broad the shoulders are, by sex (identity.sex): the only thing about a body that belongs to the person.
_BREADTH = (0.94, 1.04)

# Shoulder, elbow and wrist of a left arm, by what it does. Raised arms are longer: a head as large as this hides the hands otherwise.
_DOWN, _RAISED, _ON_HIP = range(3)
_ARM = (
    ((0.82, 1.70), (1.13, 2.34), (1.17, 2.98)),
    ((0.82, 1.62), (1.42, 0.72), (1.45, -0.52)),
    ((0.82, 1.70), (1.55, 2.16), (0.95, 2.58)),
)
# What the arms do, per scene.ARMS: (right, left).
_POSE = ((_DOWN, _DOWN), (_DOWN, _RAISED), (_RAISED, _DOWN), (_RAISED, _RAISED), (_ON_HIP, _ON_HIP))
# How far the moment's jitter moves shoulder, elbow and wrist (body units, outwards and downwards), by what the arm does.
_SWAY = (
    ((0.0, 0.0), (0.05, 0.03), (0.10, 0.04)),
    ((0.0, 0.0), (0.05, 0.06), (0.08, 0.10)),
    ((0.0, 0.0), (0.08, 0.08), (0.02, 0.04)),
)


@dataclass(frozen=True, eq=False)
class Joints:
    """Body coordinates. neck: [n, 2]; all others [n, 2, 2]: side (RIGHT, LEFT), then x, y. breadth: [n], 1 = average shoulders."""

    neck: Tensor
    shoulders: Tensor
    elbows: Tensor
    wrists: Tensor
    hips: Tensor
    knees: Tensor
    ankles: Tensor
    breadth: Tensor


def arms_shown(scene: Scene) -> Tensor:
    """[n] index into scene.ARMS of what is drawn: a close-up is tight, its arms hang down whatever the scene says."""
    return torch.where(scene.framing == CLOSE_UP, 0, scene.arms)


def joints_of(identity: Tensor, scene: Scene) -> Joints:
    """identity [n, 40] (only the sex of it) and scene -> the joints in body coordinates."""
    device = identity.device
    breadth = torch.tensor(_BREADTH, device=device)[sex(identity)]
    pose = torch.tensor(_POSE, device=device)[arms_shown(scene)]
    sway = torch.tensor(_SWAY, device=device)[pose] * (scene.jitter[:, None, None, 2:4] * 2 - 1)
    arm = torch.tensor(_ARM, device=device)[pose] + sway
    wider = torch.tensor((_ARM[0][0][0], 0.0), device=device) * (breadth.view(-1, 1, 1, 1) - 1)
    arm = (arm + wider) * _mirror(device)[:, None]
    leg = (torch.tensor((_HIP, _KNEE, _ANKLE), device=device) * _mirror(device)[:, None]).expand(len(scene), -1, -1, -1)
    neck = torch.tensor((0.0, NECK_Y), device=device).expand(len(scene), 2)
    return Joints(neck, arm[:, :, 0], arm[:, :, 1], arm[:, :, 2], leg[:, :, 0], leg[:, :, 1], leg[:, :, 2], breadth)


def _mirror(device: torch.device) -> Tensor:
    """[side, xy]: the person's right side is the picture's left."""
    return torch.tensor(((-1.0, 1.0), (1.0, 1.0)), device=device)


def to_picture(points: Tensor, scene: Scene) -> Tensor:
    """Body coordinates [n, k, 2] -> picture coordinates (-1..1), same shape."""
    head = torch.stack((scene.head_x, scene.head_y), dim=-1)
    return head[:, None] + points * scene.head_size.view(-1, 1, 1)
