"""Places, bodies, skeletons and groups of the character world: what is asked for is what is drawn, and where."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from training.mini.world.backgrounds import paint_background
from training.mini.world.body import paint_body
from training.mini.world.canvas import Canvas, Grid
from training.mini.world.groups import paint_group, sample_group
from training.mini.world.identity import sample_identities
from training.mini.world.joints import arms_shown, joints_of, to_picture
from training.mini.world.parsing import BACKGROUND, CLOTH, LEFT_EAR, NECK, RIGHT_EAR, SKIN
from training.mini.world.render import parsing_map
from training.mini.world.scene import ARMS, CLOSE_UP, CLOTHES, COLOURS, FULL_BODY, PORTRAIT, SCENES, Scene, sample_scenes
from training.mini.world.skeleton import COLOURS_RGB255, KEYPOINTS, draw_skeleton, keypoints
from training.mini.world.traits import traits_of

SIZE = 96
GREY = 0.5
# What the names of scene.COLOURS mean to anybody.
NAMED_COLOURS = (
    (0.8, 0.1, 0.1), (0.1, 0.3, 0.9), (0.1, 0.6, 0.2), (1.0, 0.9, 0.1), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.1, 0.7), (1.0, 0.5, 0.0),
)  # fmt: skip


def body_alone(identity: Tensor, scene: Scene, size: int = SIZE) -> Canvas:
    """A body on plain grey, without head or place."""
    grid = Grid.whole(len(scene), size)
    canvas = Canvas(torch.full((len(scene), 3, size, size), GREY))
    paint_body(canvas, identity, scene, grid)
    return canvas


def at(picture: Tensor, points: Tensor) -> Tensor:
    """The pixels of [n, ..., H, W] that hold points [n, 2] in picture coordinates."""
    size = picture.shape[-1]
    column, row = ((points + 1) / 2 * size).long().clamp(0, size - 1).unbind(-1)
    return picture[torch.arange(len(points)), ..., row, column]


def joint(name: str, identity: Tensor, scene: Scene) -> Tensor:
    points, visible = keypoints(identity, scene)
    assert visible[:, KEYPOINTS.index(name)].all(), f"{name} lies outside of the picture"
    return points[:, KEYPOINTS.index(name)]


@pytest.fixture(scope="module")
def people() -> Tensor:
    return sample_identities(16, seed=7)


@pytest.mark.parametrize("framing", [PORTRAIT, FULL_BODY])
@pytest.mark.parametrize(("arms", "raised", "lowered"), [(1, "left", "right"), (2, "right", "left")])
def test_the_raised_arm_is_the_person_s_own_and_ends_in_a_hand_beside_the_head(
    people: Tensor, framing: int, arms: int, raised: str, lowered: str
) -> None:
    scene = sample_scenes(16, 1, framing=framing, arms=arms)
    up, down = joint(f"{raised}_wrist", people, scene), joint(f"{lowered}_shoulder", people, scene)
    assert (up[:, 1] < down[:, 1] - scene.head_size).all()
    outwards = (up[:, 0] - scene.head_x) / scene.head_size
    assert ((outwards if raised == "left" else -outwards) > 1.0).all()
    hand = up + torch.stack((torch.zeros(16), -0.15 * scene.head_size), dim=-1)
    canvas = body_alone(people, scene)
    assert (at(canvas.labels, hand) == SKIN).all()
    skin, painted = traits_of(people).skin[:, :, 0, 0], at(canvas.rgb, hand)
    cosine = torch.nn.functional.cosine_similarity(skin, painted, dim=1)
    assert cosine.min() > 0.97


def test_a_close_up_keeps_the_arms_down(people: Tensor) -> None:
    scene = sample_scenes(16, 2, framing=CLOSE_UP, arms=ARMS.index("both arms raised"))
    assert (arms_shown(scene) == 0).all()
    labels = body_alone(people, scene).labels
    assert (labels[:, : SIZE // 2] == BACKGROUND).all()


def test_only_a_t_shirt_bares_the_forearms(people: Tensor) -> None:
    for kind, name in enumerate(CLOTHES):
        scene = sample_scenes(16, 3, framing=FULL_BODY, arms=0, clothes=kind)
        joints = joints_of(people, scene)
        middle = to_picture((joints.elbows + joints.wrists) / 2, scene)
        labels = at(body_alone(people, scene).labels, middle[:, 1])
        assert (labels == (SKIN if name == "t-shirt" else CLOTH)).all(), name


def test_a_turtleneck_hides_the_neck_and_the_others_show_it(people: Tensor) -> None:
    for kind, name in enumerate(CLOTHES):
        scene = sample_scenes(16, 4, framing=CLOSE_UP, clothes=kind)
        middle = to_picture(torch.tensor([[[0.0, 1.08]]]).expand(16, 1, 2), scene)[:, 0]
        labels = at(body_alone(people, scene).labels, middle)
        assert (labels == (CLOTH if name == "turtleneck" else NECK)).all(), name


def test_clothes_are_told_apart_by_the_collar_alone(people: Tensor) -> None:
    """Everything equal but the kind of top: a close-up differs visibly between any two kinds."""
    scene = sample_scenes(16, 5, framing=CLOSE_UP)
    tops = [body_alone(people, scene.but(clothes=torch.full((16,), kind))).rgb for kind in range(len(CLOTHES))]
    worn = body_alone(people, scene).labels != BACKGROUND
    for first in range(len(tops)):
        for second in range(first):
            changed = ((tops[first] - tops[second]).abs().amax(1) > 0.08) & worn
            assert (changed.sum((1, 2)) > 0.05 * worn.sum((1, 2))).all(), (CLOTHES[first], CLOTHES[second])


def test_the_colour_of_the_top_is_the_colour_asked_for(people: Tensor) -> None:
    """Under neutral light the chest of a turtleneck is nearest to the named colour."""
    named = torch.tensor(NAMED_COLOURS)
    for colour, name in enumerate(COLOURS):
        scene = sample_scenes(16, 6, framing=PORTRAIT, arms=0, clothes=CLOTHES.index("turtleneck"), light=0, colour=colour)
        chest = to_picture(torch.tensor([[[0.0, 2.0]]]).expand(16, 1, 2), scene)[:, 0]
        painted = at(body_alone(people, scene).rgb, chest)
        assert (torch.cdist(painted, named).argmin(1) == colour).all(), name


def test_a_full_figure_stands_inside_its_picture(people: Tensor) -> None:
    scene = sample_scenes(16, 8, framing=FULL_BODY).but(head_x=torch.zeros(16))
    for name in KEYPOINTS:
        joint(name, people, scene)
    labels = body_alone(people, scene).labels
    assert (labels[:, -1:] == BACKGROUND).all()


def test_the_side_of_the_light_is_brighter(people: Tensor) -> None:
    scene = sample_scenes(16, 9, framing=FULL_BODY, arms=0, light=3, clothes=CLOTHES.index("turtleneck"))
    joints = joints_of(people, scene)
    forearms = to_picture((joints.elbows + joints.wrists) / 2, scene)
    rgb = body_alone(people, scene).rgb
    right, left = (at(rgb, forearms[:, side]).sum(1) for side in (0, 1))
    from_left = scene.jitter[:, 0] > 0.5
    assert ((left > right) == from_left).all()


def test_every_joint_of_the_arms_and_legs_lies_on_the_body(people: Tensor) -> None:
    for arms, name in enumerate(ARMS):
        scene = sample_scenes(16, 10, framing=FULL_BODY, arms=arms).but(head_x=torch.zeros(16))
        labels = body_alone(people, scene, 192).labels
        for number, part in enumerate(KEYPOINTS[2:14], start=2):
            assert (at(labels, keypoints(people, scene)[0][:, number]) != BACKGROUND).all(), (name, part)


def test_ears_and_eyes_of_the_skeleton_are_where_they_are_drawn() -> None:
    people = sample_identities(80, seed=11)
    scene = sample_scenes(80, 11, framing=CLOSE_UP)
    labels, (points, _) = parsing_map(people, scene), keypoints(people, scene)
    for name, label in (("right_ear", RIGHT_EAR), ("left_ear", LEFT_EAR)):
        free = (labels == label).flatten(1).sum(1) > 60
        assert free.sum() >= 10
        assert (at(labels, points[:, KEYPOINTS.index(name)])[free] == label).float().mean() > 0.9
    assert (points[:, KEYPOINTS.index("right_eye"), 0] < points[:, KEYPOINTS.index("left_eye"), 0]).all()


def test_a_skeleton_shows_each_visible_joint_in_its_colour_and_no_other(people: Tensor) -> None:
    scene = sample_scenes(16, 12, framing=PORTRAIT, arms=ARMS.index("both arms raised"))
    points, visible = keypoints(people, scene)
    picture = (draw_skeleton(points, visible, 192) + 1) / 2
    for number in (KEYPOINTS.index("right_wrist"), KEYPOINTS.index("left_wrist"), KEYPOINTS.index("left_elbow")):
        colour = torch.tensor(COLOURS_RGB255[number]) / 255
        assert (at(picture, points[:, number]) - colour).abs().max() < 0.15, KEYPOINTS[number]
    ankles = torch.tensor(COLOURS_RGB255[KEYPOINTS.index("right_ankle")]) / 255
    assert not visible[:, KEYPOINTS.index("right_ankle")].any()
    assert ((picture - ankles.view(1, 3, 1, 1)).abs().amax(1) > 0.1).all(), "a joint outside of the picture was drawn"
    assert (draw_skeleton(points, torch.zeros_like(visible)) == -1).all()


def test_a_skeleton_scales_with_its_picture(people: Tensor) -> None:
    points, visible = keypoints(people[:4], sample_scenes(4, 13, framing=FULL_BODY))
    large = torch.nn.functional.avg_pool2d(draw_skeleton(points, visible, 384), 2)
    assert (large - draw_skeleton(points, visible, 192)).abs().mean() < 0.005


def test_places_differ_from_one_another_and_vary_in_themselves() -> None:
    variations = 6
    scene = sample_scenes(len(SCENES) * variations, 14).but(scene=torch.arange(len(SCENES)).repeat_interleave(variations))
    pictures = paint_background(scene, Grid.whole(len(scene), 48))
    assert pictures.min() >= 0
    assert pictures.max() <= 1
    flat = torch.nn.functional.avg_pool2d(pictures, 8).flatten(1)
    distance = torch.cdist(flat, flat)
    same = scene.scene[:, None] == scene.scene[None]
    own = torch.where(same, distance, 0).amax(1)
    assert (own > 0.1).all(), "a place never varies"
    nearest = (distance + torch.eye(len(scene)) * 99).argmin(1)
    assert (scene.scene[nearest] == scene.scene).float().mean() > 0.95


def test_a_batch_paints_each_picture_as_if_it_were_alone(people: Tensor) -> None:
    scene = sample_scenes(16, 15)
    together = body_alone(people, scene).rgb
    places = paint_background(scene, Grid.whole(16, SIZE))
    for number in (0, 7, 15):
        index = torch.tensor([number])
        assert torch.allclose(body_alone(people[index], scene.take(index)).rgb[0], together[number], atol=1e-5)
        assert torch.allclose(paint_background(scene.take(index), Grid.whole(1, SIZE))[0], places[number], atol=1e-5)


def test_painting_is_deterministic_and_hardly_depends_on_rounding(people: Tensor) -> None:
    """Coordinates off by about one unit in the last place, as on another device, change no pixel by 1/255."""
    scene = sample_scenes(16, 16)
    exact = Grid.whole(16, SIZE)
    shaken = Grid(exact.x * (1 + 2e-7), exact.y * (1 - 2e-7), exact.pixel)

    def painted(grid: Grid) -> Tensor:
        canvas = Canvas(paint_background(scene, grid))
        paint_body(canvas, people, scene, grid)
        return canvas.rgb

    assert torch.equal(painted(exact), painted(exact))
    assert (painted(exact) - painted(shaken)).abs().max() < 1 / 255


def test_a_body_is_painted_without_looking_at_the_data(people: Tensor) -> None:
    """One graph, without a break: what makes the world fast on a GPU."""
    scene = sample_scenes(2, 18)
    compiled = torch.compile(body_alone, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(people[:2], scene).rgb, body_alone(people[:2], scene).rgb, atol=1e-6)


@pytest.mark.parametrize("count", [2, 3])
def test_a_group_stands_side_by_side_in_one_place(count: int) -> None:
    identities = sample_identities(8 * count, seed=17).view(8, count, -1)
    scenes = sample_group(8, count, seed=17)
    group = paint_group(identities, scenes, SIZE)
    assert group.picture.shape == (8, 3, SIZE, SIZE)
    assert group.boxes.abs().max() <= 1
    assert (group.boxes[:, 1:, 0] > group.boxes[:, :-1, 2]).all(), "faces overlap"
    centre = (group.boxes[..., :2] + group.boxes[..., 2:]) / 2
    assert (centre - group.landmarks.mean(2)).abs().max() < 0.1
    other = paint_group(identities.flip(1), scenes, SIZE)
    assert (other.picture - group.picture).abs().amax((1, 2, 3)).min() > 0.2, "who stands where has no effect"


def test_a_group_of_four_is_refused() -> None:
    with pytest.raises(ValueError, match="4 people do not fit"):
        sample_group(1, 4, seed=0)
