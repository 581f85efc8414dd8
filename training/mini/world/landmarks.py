"""Five points and a box on every face, exactly where they are drawn, and the aligned crops that face models are fed with.

Points are in picture coordinates (-1..1, x right, y down) and in insightface's order: the eye at the picture's left (the person's
right eye), the other eye, the tip of the nose, the corner of the mouth at the picture's left, the other corner.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from training.mini.world.canvas import Grid
from training.mini.world.expressions import expression_of
from training.mini.world.head_pose import HeadPose, head_pose
from training.mini.world.mouth import CORNER_SHARE
from training.mini.world.scene import Scene
from training.mini.world.traits import Traits, traits_of

# Pixels of a 112 x 112 crop: insightface/utils/face_align.py, arcface_dst.
ARCFACE_112: Final = ((38.2946, 51.6963), (73.5318, 51.5014), (56.0252, 71.7366), (41.5493, 92.3655), (70.7299, 92.2041))
# Pixels of a 512 x 512 crop: facexlib/utils/face_restoration_helper.py, face_template.
FFHQ_512: Final = ((192.98138, 239.94708), (318.90277, 240.1936), (256.63416, 314.01935), (201.26117, 371.41043), (313.08905, 371.15118))

# A detector's box runs from the middle of the forehead to the chin and from cheek to cheek, in head units.
_BOX_TOP, _BOX_BOTTOM, _BOX_SHARE_OF_WIDTH = -0.62, 1.02, 0.96
# How far the box follows the features of a turned head, as a share of the slide of the middle of the face.
_BOX_FOLLOWS = 0.25


def landmarks(identity: Tensor, scene: Scene) -> Tensor:
    """identity [n, 40] -> [n, 5, 2]."""
    traits = traits_of(identity)
    pose = head_pose(scene, traits.width)
    x, y = (torch.cat(parts, dim=1)[..., 0] for parts in zip(*_in_head_frame(traits, pose, scene), strict=True))
    px, py = pose.to_picture(x[..., None], y[..., None])
    return torch.stack([px[..., 0], py[..., 0]], dim=-1)


def _in_head_frame(traits: Traits, pose: HeadPose, scene: Scene) -> list[tuple[Tensor, Tensor]]:
    """The five points, each x, y [n, 1, 1] in the head's frame: what eyes.py, face.py and mouth.py anchor their shapes at."""
    face, middle = expression_of(scene.expression), torch.zeros_like(traits.eye_x)
    left_x, left_y, _ = pose.place(-traits.eye_x, traits.eye_y)
    right_x, right_y, _ = pose.place(traits.eye_x, traits.eye_y)
    nose_x, nose_y, _ = pose.place(middle, traits.nose_y)
    mouth_x, mouth_y, narrowing = pose.place(middle, traits.mouth_y)
    half, corner_y = traits.mouth_width * face.width * narrowing, mouth_y - CORNER_SHARE * face.bend
    return [(left_x, left_y), (right_x, right_y), (nose_x, nose_y), (mouth_x - half, corner_y), (mouth_x + half, corner_y)]


def face_box(identity: Tensor, scene: Scene) -> Tensor:
    """[n, 4] x0, y0, x1, y1 in picture coordinates: forehead to chin, the box a face detector is trained on."""
    pose = head_pose(scene, traits_of(identity).width)
    half_width, half_height = pose.width * _BOX_SHARE_OF_WIDTH, torch.full_like(pose.width, (_BOX_BOTTOM - _BOX_TOP) / 2)
    x, y = pose.to_picture(pose.turn * _BOX_FOLLOWS, (_BOX_BOTTOM + _BOX_TOP) / 2 - pose.nod * _BOX_FOLLOWS)
    # The upright box around a tilted ellipse with these half-axes.
    reach_x = pose.size * torch.sqrt((half_width * pose.cos) ** 2 + (half_height * pose.sin) ** 2)
    reach_y = pose.size * torch.sqrt((half_width * pose.sin) ** 2 + (half_height * pose.cos) ** 2)
    return torch.cat([x - reach_x, y - reach_y, x + reach_x, y + reach_y], dim=1)[..., 0]


def to_pixels(points: Tensor, size: int) -> Tensor:
    """Picture coordinates (any shape) -> pixels of a picture of that size, in cv2's convention: pixel i has its centre at i."""
    return (points + 1) * (size / 2) - 0.5


def template(pixels: tuple[tuple[float, float], ...], size: int, device: torch.device | str = "cpu") -> Tensor:
    """Template points in pixels (centre of pixel i at i) of a crop of `size` pixels -> [5, 2] crop coordinates (-1..1)."""
    return (torch.tensor(pixels, device=device) + 0.5) * (2 / size) - 1


def similarity(source: Tensor, template: Tensor) -> Tensor:
    """The similarity [n, 2, 3] that takes crop coordinates to picture coordinates, for Grid.under.

    source: [n, 5, 2] points in the picture; template: [5, 2] where they should come to lie in the crop. As in insightface
    (Umeyama's estimate without reflection, closed form in two dimensions), the squared error is minimal in the *crop*; the fit is
    then inverted. Raises nothing: coinciding source points give a crop of that point.
    """
    middle, target = source.mean(1), template.mean(0)
    p, t = source - middle[:, None], template - target
    spread = (p * p).sum((1, 2))
    along = (p * t).sum((1, 2))
    across = (p[..., 0] * t[:, 1] - p[..., 1] * t[:, 0]).sum(1)
    # Picture to crop: (along, across) / spread is scale times (cos, sin); its inverse, times (cos, -sin), divides by the square.
    square = (along * along + across * across).clamp_min(1e-12)
    a, b = along * spread / square, across * spread / square
    turn = torch.stack([torch.stack([a, b], -1), torch.stack([-b, a], -1)], 1)
    return torch.cat([turn, middle[:, :, None] - turn @ target[:, None]], dim=2)


def arcface_grid(points: Tensor, size: int = 112) -> Grid:
    """The points that insightface's norm_crop(picture, landmarks, size) samples, for size 112 or any multiple; points [n, 5, 2]."""
    return Grid.under(similarity(points, template(ARCFACE_112, 112, points.device)), size)


def ffhq_grid(points: Tensor, size: int = 512) -> Grid:
    """The points of facexlib's aligned FFHQ crop (least squares over all five points, where facexlib takes the least median)."""
    return Grid.under(similarity(points, template(FFHQ_512, 512, points.device)), size)
