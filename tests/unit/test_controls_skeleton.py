"""Skeletons: their edits move what they say and nothing else, and their picture is the one that the embedded ControlNet learned from."""

from __future__ import annotations

from math import hypot

import numpy as np
import pytest

from deployments.contracts import Floats
from deployments.controls.pose_bank import load_pose_bank
from deployments.controls.skeleton import (
    JOINTS,
    Side,
    Skeleton,
    arm_angle,
    arm_at,
    cropped,
    crown,
    fitted,
    head_room,
    mirrored,
    reframed,
    scaled,
)
from deployments.controls.skeleton_picture import draw
from deployments.errors import InvalidRequest
from training.mini.heldout import held_out_people
from training.mini.world.scene import sample_scenes
from training.mini.world.skeleton import KEYPOINTS, draw_skeleton, keypoints

STANDING = load_pose_bank().skeleton("full-standing")
ARM = {"left": ("left_elbow", "left_wrist"), "right": ("right_elbow", "right_wrist")}


def _moved(before: Skeleton, after: Skeleton) -> set[str]:
    return {
        name for name, old, new in zip(JOINTS, before.points, after.points, strict=True) if not np.array_equal(old, new, equal_nan=True)
    }


def _length(skeleton: Skeleton, start: str, end: str) -> float:
    return hypot(*(skeleton.joint(end) - skeleton.joint(start)))


def _without(skeleton: Skeleton, *names: str) -> Skeleton:
    points = skeleton.points.copy()
    points[[JOINTS.index(name) for name in names]] = np.nan
    return Skeleton(points, skeleton.aspect)


def test_the_joints_are_those_that_the_pack_was_trained_on() -> None:
    assert JOINTS == KEYPOINTS


@pytest.mark.parametrize("size", [192, 320])
def test_the_picture_is_the_one_that_the_embedded_controlnet_learned_from(size: int) -> None:
    points, visible = keypoints(held_out_people(8), sample_scenes(8, 3))
    wanted = ((draw_skeleton(points, visible, size) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    drawn = [draw([Skeleton(((person + 1) / 2).numpy(), 1.0)], size, size) for person in points]
    assert np.abs(np.stack(drawn) - wanted).max() <= 1
    assert wanted.max() > 200


def test_limbs_thicken_with_the_shorter_side_and_nothing_is_stretched() -> None:
    small, large = draw([STANDING], 448, 608), draw([STANDING], 896, 1216)
    assert (large.any(-1).sum() / small.any(-1).sum()) == pytest.approx(4, rel=0.1)
    wide = draw([STANDING], 1216, 608)
    # Only the sticks differ, by 4 / 512 of the shorter side.
    for axis, offset in ((0, 0), (1, (1216 - 448) / 2)):
        lines, there = (np.flatnonzero(picture.any((1 - axis, 2))) for picture in (small, wide))
        assert (there[0], there[-1]) == pytest.approx((lines[0] + offset, lines[-1] + offset), abs=2.5)


def test_two_people_are_drawn_as_each_alone() -> None:
    left, right = cropped(STANDING, 0, 0, 2, 1), cropped(STANDING, -1, 0, 1, 1)
    both = draw([left, right], 512, 348)
    assert np.array_equal(both, np.maximum(draw([left], 512, 348), draw([right], 512, 348)))


def test_a_limb_needs_both_of_its_ends() -> None:
    black = _without(STANDING, *JOINTS)
    assert not draw([black], 64, 96).any()
    one = _without(STANDING, *(name for name in JOINTS if name != "nose"))
    assert 0 < draw([one], 256, 348).any(-1).sum() < 60


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("angle", [-20.0, 30.0, 90.0, 165.0])
def test_an_arm_is_moved_to_the_angle_and_nothing_else_is(side: Side, angle: float) -> None:
    raised = arm_at(STANDING, side, angle)
    assert _moved(STANDING, raised) == set(ARM[side])
    assert arm_angle(raised, side) == pytest.approx(angle, abs=0.01)
    for bone in ((f"{side}_shoulder", f"{side}_elbow"), (f"{side}_elbow", f"{side}_wrist")):
        assert _length(raised, *bone) == pytest.approx(_length(STANDING, *bone), rel=1e-4)
    assert _length(raised, f"{side}_shoulder", f"{side}_wrist") == pytest.approx(
        _length(STANDING, f"{side}_shoulder", f"{side}_wrist"), rel=1e-4
    )


def test_the_left_arm_is_at_the_right_of_the_picture_unless_the_person_turns_around() -> None:
    level = arm_at(STANDING, "left", 90, bend=0)
    shoulder, elbow, wrist = (level.joint(f"left_{part}") for part in ("shoulder", "elbow", "wrist"))
    assert shoulder[0] < elbow[0] < wrist[0] and shoulder[1] == pytest.approx(wrist[1], abs=1e-5)
    behind = Skeleton(np.asarray((1, 0) + STANDING.points * (-1, 1), np.float32), STANDING.aspect)
    turned = arm_at(behind, "left", 90, bend=0)
    assert turned.joint("left_wrist")[0] < turned.joint("left_elbow")[0] < turned.joint("left_shoulder")[0]


def test_bend_and_reach() -> None:
    arm = arm_at(STANDING, "right", 90, bend=90, reach=0.5)
    elbow, wrist = arm.joint("right_elbow"), arm.joint("right_wrist")
    assert wrist[0] == pytest.approx(elbow[0], abs=1e-5) and wrist[1] < elbow[1]
    assert _length(arm, "right_elbow", "right_wrist") == pytest.approx(_length(STANDING, "right_elbow", "right_wrist") / 2, rel=1e-4)


def test_a_mirror_swaps_the_sides() -> None:
    raised = arm_at(STANDING, "left", 150)
    mirror = mirrored(raised)
    assert arm_angle(mirror, "right") == pytest.approx(150, abs=0.01)
    assert arm_angle(mirror, "left") == pytest.approx(arm_angle(STANDING, "right"), abs=0.01)
    assert np.allclose(mirrored(mirror).points, raised.points, atol=1e-6)
    flipped = draw([raised], 256, 348)[:, ::-1]
    assert np.array_equal(draw([mirror], 256, 348).any(-1), flipped.any(-1))


def test_room_above_the_head_is_made_and_only_where_it_lacks() -> None:
    tight = cropped(STANDING, 0, 0.1, 1, 1)
    roomy = head_room(tight, 0.18)
    assert crown(tight)[1] < 0.02 and crown(roomy)[1] == pytest.approx(0.18, abs=1e-4)
    drawn = draw([roomy], 448, 608)
    assert not drawn[: round(0.18 * 608)].any() and drawn.any()
    assert head_room(roomy, 0.18).points == pytest.approx(roomy.points, abs=1e-4) and head_room(roomy, 0.05) is roomy
    assert arm_angle(roomy, "left") == pytest.approx(arm_angle(tight, "left"), abs=0.01)


@pytest.mark.parametrize("hidden", [(), ("left_ear", "right_ear"), ("neck",), ("left_eye", "right_eye")])
def test_the_crown_is_found_by_what_is_known_of_the_head(hidden: tuple[str, ...]) -> None:
    assert crown(_without(STANDING, *hidden))[1] == pytest.approx(0.1, abs=0.02)


def test_scaling_keeps_the_point_and_the_shape() -> None:
    half = scaled(STANDING, 0.5, about=(0.5, 1.0))
    assert half.joint("left_ankle")[1] == pytest.approx(1 - (1 - STANDING.joint("left_ankle")[1]) / 2)
    assert _length(half, "neck", "left_hip") == pytest.approx(_length(STANDING, "neck", "left_hip") / 2, rel=1e-4)


@pytest.mark.parametrize("aspect", [0.5, 1.0, 2.0])
def test_a_person_fitted_into_a_frame_fills_it_to_the_margin(aspect: float) -> None:
    far = scaled(STANDING, 0.3, about=(0.1, 0.9))
    near = fitted(far, aspect, margin=0.1)
    assert near.aspect == pytest.approx(aspect, rel=1e-5) and near.visible.all()
    body = np.vstack([near.points, crown(near) / (near.aspect, 1)])
    low, high = body.min(0), body.max(0)
    assert low + high == pytest.approx(np.ones(2), abs=1e-3) and (low > 0.0999).all()
    assert low.min() == pytest.approx(0.1, abs=1e-3)
    assert arm_angle(near, "left") == pytest.approx(arm_angle(STANDING, "left"), abs=0.01)


def test_reframing_adds_paper_and_cutting_takes_it_away() -> None:
    wide = reframed(STANDING, 2.0)
    assert wide.aspect == pytest.approx(2.0) and np.allclose(wide.points[:, 1], STANDING.points[:, 1])
    back = cropped(wide, 0.5 - STANDING.aspect / 4, 0, 0.5 + STANDING.aspect / 4, 1)
    assert np.allclose(back.points, STANDING.points, atol=1e-5) and back.aspect == pytest.approx(STANDING.aspect)
    head = cropped(STANDING, 0.3, 0.0, 0.7, 0.4)
    assert head.knows("left_ankle") and not head.visible[JOINTS.index("left_ankle")]


def test_what_cannot_be_done_is_said() -> None:
    armless = _without(STANDING, "left_elbow")
    with pytest.raises(InvalidRequest, match="left elbow"):
        arm_at(armless, "left", 90)
    assert arm_angle(arm_at(armless, "right", 90), "right") == pytest.approx(90, abs=0.01)
    with pytest.raises(InvalidRequest, match="nose"):
        head_room(_without(STANDING, "nose", "left_eye", "right_eye"), 0.18)
    for wrong in (-0.1, 1.0):
        with pytest.raises(InvalidRequest, match="share"):
            head_room(STANDING, wrong)
    with pytest.raises(InvalidRequest, match="no inside"):
        cropped(STANDING, 0.5, 0, 0.5, 1)
    with pytest.raises(InvalidRequest, match="scaled by 0"):
        scaled(STANDING, 0)
    with pytest.raises(InvalidRequest, match="visible joints"):
        fitted(_without(STANDING, *JOINTS), 1.0)
    with pytest.raises(InvalidRequest, match="tail"):
        STANDING.shifted({"tail": (0, 0)})


@pytest.mark.parametrize(("points", "aspect"), [(np.zeros((17, 2), np.float32), 1.0), (np.zeros((18, 2), np.float32), 0.0)])
def test_a_skeleton_is_whole(points: Floats, aspect: float) -> None:
    with pytest.raises(ValueError, match="skeleton"):
        Skeleton(points, aspect)
