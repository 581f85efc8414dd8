"""One person's pose as OpenPose's 18 joints, and its edits: arms moved, mirrored, cut out, room made above the head.

An edit never changes a skeleton, it returns another. Knows no pixels (skeleton_picture.py draws), no model and no file.

Left and right are the person's own: the left arm of someone who faces the viewer is at the picture's right.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import atan2, cos, degrees, hypot, radians, sin
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from deployments.contracts import Floats
from deployments.errors import InvalidRequest

JOINTS: Final = (
    "nose", "neck", "right_shoulder", "right_elbow", "right_wrist", "left_shoulder", "left_elbow", "left_wrist", "right_hip",
    "right_knee", "right_ankle", "left_hip", "left_knee", "left_ankle", "right_eye", "left_eye", "right_ear", "left_ear",
)  # fmt: skip
"""COCO-18 in OpenPose's order (CMU-Perceptual-Computing-Lab/openpose, doc/02_output.md, POSE_COCO_BODY_PARTS)."""

Side = Literal["left", "right"]

_INDEX: Final = {name: number for number, name in enumerate(JOINTS)}
_SWAP: Final = {"left": "right", "right": "left"}
_MIRROR: Final = [_INDEX[_SWAP[side] + "_" + part] if part else _INDEX[side] for side, _, part in (name.partition("_") for name in JOINTS)]
# From the middle of the eyes to the crown, in distances between the ears, and from neck to eyes. Of an adult the eyes are 0.064 of the
# stature below the crown and 0.118 above the shoulders (Winter, Biomechanics and Motor Control of Human Movement, figure 4.1), the ears
# about 0.084 apart. Ears come together where a head turns, the neck comes closer where it nods: the longer of both is right.
_CROWN_OF_EARS, _CROWN_OF_NECK = 0.75, 0.54


@dataclass(frozen=True, eq=False)
class Skeleton:
    """points: [18, 2] x, y in the order of JOINTS, 0..1 of the picture's width and height, origin at the top left. A joint beyond
    that lies outside of the picture; NaN: nobody knows where it is. aspect: width / height of the picture, without which a
    direction means nothing.

    Raises ValueError for another shape or an aspect that is none.
    """

    points: Floats
    aspect: float

    def __post_init__(self) -> None:
        if self.points.shape != (len(JOINTS), 2):
            raise ValueError(f"A skeleton has points [{len(JOINTS)}, 2], not {list(self.points.shape)}.")
        if not (np.isfinite(self.aspect) and self.aspect > 0):
            raise ValueError(f"The aspect of a skeleton is width / height of its picture, not {self.aspect}.")

    @property
    def visible(self) -> NDArray[np.bool_]:
        """[18]: which joints are known and inside the picture."""
        with np.errstate(invalid="ignore"):
            return np.asarray(((self.points >= 0) & (self.points <= 1)).all(-1))

    def joint(self, name: str) -> Floats:
        """[2], in heights of the picture, so that lengths and angles are true. Raises InvalidRequest if it is not known."""
        point = self.points[_INDEX[name]]
        if not np.isfinite(point).all():
            raise InvalidRequest(
                f"The skeleton does not say where the {name.replace('_', ' ')} is.", "Use a picture or a pose that shows it."
            )
        return np.asarray(point * (self.aspect, 1), np.float32)

    def knows(self, *names: str) -> bool:
        return bool(np.isfinite(self.points[[_INDEX[name] for name in names]]).all())

    def moved(self, **joints: tuple[float, float]) -> Skeleton:
        """The same with some joints put elsewhere, in heights of the picture."""
        points = self.points.copy()
        for name, (x, y) in joints.items():
            points[_INDEX[name]] = x / self.aspect, y
        return replace(self, points=points)

    def shifted(self, joints: Mapping[str, tuple[float, float]]) -> Skeleton:
        """The same with some joints shifted by a share of the picture's width and height. Raises InvalidRequest for a name that is none."""
        unknown = sorted(joints.keys() - _INDEX.keys())
        if unknown:
            raise InvalidRequest(f"There is no joint {', '.join(unknown)}.", f"Use {', '.join(JOINTS)}.")
        points = self.points.copy()
        for name, shift in joints.items():
            points[_INDEX[name]] += shift
        return replace(self, points=points)


def arm_at(skeleton: Skeleton, side: Side, angle: float, bend: float | None = None, reach: float = 1.0) -> Skeleton:
    """Turns one arm about its shoulder; nothing else moves.

    angle: of the upper arm in degrees, 0 hanging, 90 straight out to its side, 180 straight up. bend: of the forearm against the upper
    arm, degrees in the same sense; None keeps the elbow as it is. reach: factor of both lengths, below 1 for an arm that points at the
    viewer. Raises InvalidRequest if shoulder, elbow or wrist of that side is not known.
    """
    shoulder, elbow, wrist = (skeleton.joint(f"{side}_{part}") for part in ("shoulder", "elbow", "wrist"))
    outward = _outward(skeleton, side)
    held = _angle(elbow, wrist, outward) - _angle(shoulder, elbow, outward) if bend is None else bend
    upper, fore = (reach * hypot(*(end - start)) for start, end in ((shoulder, elbow), (elbow, wrist)))
    new_elbow = _from(shoulder, angle, upper, outward)
    new_wrist = _from(new_elbow, angle + held, fore, outward)
    return skeleton.moved(**{f"{side}_elbow": new_elbow, f"{side}_wrist": new_wrist})


def arm_angle(skeleton: Skeleton, side: Side) -> float:
    """Of the upper arm, as `arm_at` takes it, -180..180. Raises InvalidRequest if it is not known."""
    return _angle(skeleton.joint(f"{side}_shoulder"), skeleton.joint(f"{side}_elbow"), _outward(skeleton, side))


def mirrored(skeleton: Skeleton) -> Skeleton:
    """As in a mirror: what the left arm did, the right one does."""
    points = skeleton.points[_MIRROR].copy()
    points[:, 0] = 1 - points[:, 0]
    return replace(skeleton, points=points)


def cropped(skeleton: Skeleton, x0: float, y0: float, x1: float, y1: float) -> Skeleton:
    """The rectangle (0..1 of the picture; beyond it there is empty paper) becomes the picture, with the rectangle's aspect.

    Raises InvalidRequest for a rectangle without an inside.
    """
    if not (x1 > x0 and y1 > y0):
        raise InvalidRequest(
            f"The rectangle ({x0}, {y0}) to ({x1}, {y1}) has no inside.", "Give left, top, right and bottom in this order."
        )
    points = (skeleton.points - (x0, y0)) / (x1 - x0, y1 - y0)
    return Skeleton(points.astype(np.float32), skeleton.aspect * (x1 - x0) / (y1 - y0))


def scaled(skeleton: Skeleton, factor: float, about: tuple[float, float] = (0.5, 0.5)) -> Skeleton:
    """Larger or smaller about a point of the picture (0..1), which stays. Raises InvalidRequest for a factor of 0 or less."""
    if not factor > 0:
        raise InvalidRequest(f"A skeleton cannot be scaled by {factor}.", "Give a factor above 0.")
    points = (skeleton.points - about) * factor + about
    return replace(skeleton, points=points.astype(np.float32))


def head_room(skeleton: Skeleton, share: float) -> Skeleton:
    """At least `share` (0..1) of the picture's height left free above the head: smaller about the middle of the lower edge, as if paper
    were added above; as it is where there is room. Raises InvalidRequest if neither eyes nor nose, or no measure of the head, is known.
    """
    if not 0 <= share < 1:
        raise InvalidRequest(f"The room above a head is a share of the picture's height from 0 to below 1, not {share}.")
    top = crown(skeleton)[1]
    # A crown below the picture (nothing of the person in it) has room enough; nothing is ever enlarged.
    return skeleton if top >= share else scaled(skeleton, (1 - share) / (1 - top), about=(0.5, 1.0))


def reframed(skeleton: Skeleton, aspect: float) -> Skeleton:
    """The whole picture in the middle of one of another aspect (width / height): paper is added, nothing is stretched or cut."""
    wider = aspect / skeleton.aspect
    x, y = max(0.0, wider - 1) / 2, max(0.0, 1 / wider - 1) / 2
    return cropped(skeleton, -x, -y, 1 + x, 1 + y)


def fitted(skeleton: Skeleton, aspect: float, margin: float = 0.05) -> Skeleton:
    """The person (its visible joints and the crown) in the middle of a picture of this aspect, as large as `margin` allows: the share of
    width and height that stays free at each edge. Joints outside of the old picture are forgotten, lest they show up in the new one.

    Raises InvalidRequest if fewer than two joints are visible, or the margin leaves no room.
    """
    seen = skeleton.points[skeleton.visible]
    if len(seen) < 2 or not 0 <= margin < 0.5:
        raise InvalidRequest(f"{len(seen)} visible joints cannot be fitted into a picture with a margin of {margin}.")
    body = np.vstack([seen, crown(skeleton) / (skeleton.aspect, 1)]) if _head_is_known(skeleton) else seen
    low, high = body.min(0), body.max(0)
    middle, size = (low + high) / 2, (high - low) * (skeleton.aspect, 1)
    height = float(max(size[1], size[0] / aspect, 1e-3)) / (1 - 2 * margin)
    half = np.array([height * aspect / skeleton.aspect, height]) / 2
    points = np.where(skeleton.visible[:, None], skeleton.points, np.nan).astype(np.float32)
    x0, y0, x1, y1 = (float(value) for value in (*(middle - half), *(middle + half)))
    return cropped(replace(skeleton, points=points), x0, y0, x1, y1)


def crown(skeleton: Skeleton) -> Floats:
    """[2] the top of the head with its hair, in heights of the picture: COCO-18 has no joint there, so it is judged from the others.

    Raises InvalidRequest where eyes and nose, or ears and neck, are unknown.
    """
    eyes = skeleton.knows("right_eye", "left_eye")
    face = (skeleton.joint("right_eye") + skeleton.joint("left_eye")) / 2 if eyes else skeleton.joint("nose")
    ears = _across_the_ears(skeleton)
    rise = _CROWN_OF_EARS * hypot(*ears)
    if skeleton.knows("neck") or not rise:
        up = face - skeleton.joint("neck")
        rise = max(rise, _CROWN_OF_NECK * hypot(*up))
    else:
        up = np.array([ears[1], -ears[0]], np.float32)
    return np.asarray(face + up / max(hypot(*up), 1e-6) * rise, np.float32)


def _across_the_ears(skeleton: Skeleton) -> Floats:
    """[2] from the ear at the picture's left to the other one; nothing where one of them is unknown."""
    if not skeleton.knows("left_ear", "right_ear"):
        return np.zeros(2, np.float32)
    ears = skeleton.joint("left_ear") - skeleton.joint("right_ear")
    return ears if ears[0] >= 0 else -ears


def _head_is_known(skeleton: Skeleton) -> bool:
    face = skeleton.knows("nose") or skeleton.knows("right_eye", "left_eye")
    return face and (skeleton.knows("neck") or skeleton.knows("right_ear", "left_ear"))


def _outward(skeleton: Skeleton, side: Side) -> float:
    """1 where away from the body is the picture's right: for the left arm, unless the person is seen from behind."""
    facing = 1.0
    if skeleton.knows("left_shoulder", "right_shoulder"):
        facing = 1.0 if skeleton.joint("left_shoulder")[0] >= skeleton.joint("right_shoulder")[0] else -1.0
    return facing if side == "left" else -facing


def _angle(start: Floats, end: Floats, outward: float) -> float:
    """Degrees from hanging, outwards."""
    x, y = end - start
    return degrees(atan2(outward * x, y))


def _from(start: Floats | tuple[float, float], angle: float, length: float, outward: float) -> tuple[float, float]:
    return start[0] + outward * sin(radians(angle)) * length, start[1] + cos(radians(angle)) * length
