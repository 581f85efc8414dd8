"""OpenPose skeletons of the people drawn here: the joints exactly where body.py and head.py put them, and their picture.

The picture is that of controlnet_aux (`draw_bodypose`): black ground, limbs as thin ellipses in 60 % of their colour, joints as full
dots. It takes any 18 points, so a skeleton found in a photograph is drawn by the same code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from training.mini.world.canvas import Canvas, Grid, circle, cover
from training.mini.world.head_pose import head_pose
from training.mini.world.joints import LEFT, RIGHT, joints_of, to_picture
from training.mini.world.landmarks import landmarks
from training.mini.world.render import PICTURE_SIZE_PX
from training.mini.world.scene import Scene
from training.mini.world.shapes import oval
from training.mini.world.traits import traits_of

KEYPOINTS = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist", "right_hip",
    "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip
"""COCO-18 in OpenPose's order; left and right are the person's own."""

# controlnet_aux, dwpose/util.py, draw_bodypose: limbSeq (counted from 1 there) and the colours (RGB, 0..255) of limbs and joints.
_LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10), (1, 11), (11, 12), (12, 13), (1, 0),
    (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLOURS_RGB255 = (
    (255, 0, 0), (255, 85, 0), (255, 170, 0), (255, 255, 0), (170, 255, 0), (85, 255, 0), (0, 255, 0), (0, 255, 85), (0, 255, 170),
    (0, 255, 255), (0, 170, 255), (0, 85, 255), (0, 0, 255), (85, 0, 255), (170, 0, 255), (255, 0, 255), (255, 0, 170), (255, 0, 85),
)  # fmt: skip
_LIMB_BRIGHTNESS = 0.6
# Half width of a limb and radius of a joint there: 4 pixels of 512; here in picture coordinates.
_STICK = 4 * 2 / 512
# Where the ears sit on a head (share of its width, share of their own size; height), and how far they slide against a turn or a nod.
_EAR_OUT, _EAR_FREE, _EAR_Y, _EAR_SLIDE = 0.97, 0.40, 0.10, 0.30


def keypoints(identity: Tensor, scene: Scene) -> tuple[Tensor, Tensor]:
    """identity [n, 40] -> points [n, 18, 2] in picture coordinates (-1..1, in the order of KEYPOINTS), and [n, 18] bool:
    whether each lies inside the picture."""
    joints = joints_of(identity, scene)
    arms = [torch.stack((joints.shoulders[:, side], joints.elbows[:, side], joints.wrists[:, side]), dim=1) for side in (RIGHT, LEFT)]
    legs = [torch.stack((joints.hips[:, side], joints.knees[:, side], joints.ankles[:, side]), dim=1) for side in (RIGHT, LEFT)]
    body = to_picture(torch.cat((joints.neck[:, None], *arms, *legs), dim=1), scene)
    face = landmarks(identity, scene)
    points = torch.cat((face[:, 2:3], body, face[:, 0:2], _ears(identity, scene)), dim=1)
    return points, (points.abs() <= 1).all(-1)


def _ears(identity: Tensor, scene: Scene) -> Tensor:
    """[n, 2, 2]: the middle of what the head leaves free of each ear (face.paint_ears), the right one (the picture's left) first."""
    traits = traits_of(identity)
    pose = head_pose(scene, traits.width)
    out, height = _EAR_OUT * traits.width + _EAR_FREE * traits.ear, _EAR_Y - _EAR_SLIDE * pose.nod
    ears = [torch.cat(pose.to_picture(side * out - _EAR_SLIDE * pose.turn, height), dim=-1) for side in (-1, 1)]
    return torch.cat(ears, dim=1)


def draw_skeleton(points: Tensor, visible: Tensor, size: int = PICTURE_SIZE_PX) -> Tensor:
    """points [n, 18, 2] in picture coordinates, visible [n, 18] -> RGB [n, 3, size, size] in -1..1.

    A limb is drawn where both of its ends are visible."""
    grid = Grid.whole(points.shape[0], size, points.device)
    canvas = Canvas(torch.zeros(points.shape[0], 3, size, size, device=points.device))
    edge = grid.pixel.view(-1, 1, 1)
    shown = visible.to(points.dtype)[..., None, None]
    colours = torch.tensor(COLOURS_RGB255, device=points.device, dtype=points.dtype).view(-1, 1, 3, 1, 1) / 255
    for number, (start, end) in enumerate(_LIMBS):
        limb = cover(_limb(grid, points[:, start], points[:, end]), edge)
        canvas.paint(limb * shown[:, start] * shown[:, end], colours[number] * _LIMB_BRIGHTNESS)
    for number in range(len(KEYPOINTS)):
        px, py = points[:, number, 0].view(-1, 1, 1), points[:, number, 1].view(-1, 1, 1)
        canvas.paint(cover(circle(grid.x - px, grid.y - py, _STICK), edge) * shown[:, number], colours[number])
    return canvas.rgb * 2 - 1


def _limb(grid: Grid, start: Tensor, end: Tensor) -> Tensor:
    """Distance to the ellipse whose long axis is the segment between two points ([n, 2] each)."""
    middle, half = (start + end) / 2, (end - start) / 2
    length = half.norm(dim=-1).clamp_min(_STICK / 2)
    dx, dy, mx, my, long = (value.view(-1, 1, 1) for value in (*(half / length[:, None]).unbind(-1), *middle.unbind(-1), length))
    x, y = grid.x - mx, grid.y - my
    return oval(x * dx + y * dy, y * dx - x * dy, long, torch.full_like(long, _STICK))
