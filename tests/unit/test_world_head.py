"""Heads of the character world: what is drawn is where the landmarks say, says what the traits say, and hardly depends on rounding."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from training.mini.world import parsing
from training.mini.world.canvas import Canvas, Grid
from training.mini.world.hair import paint_back_hair
from training.mini.world.hair_styles import HAIR_STYLES, STYLE_SHARES
from training.mini.world.head import paint_head
from training.mini.world.identity import IDENTITY_DIM, age_band, sample_identities, sex
from training.mini.world.landmarks import FFHQ_512, arcface_grid, face_box, landmarks, similarity, template, to_pixels
from training.mini.world.scene import CLOSE_UP, EXPRESSIONS, FULL_BODY, PORTRAIT, ROLL_RAD, Scene, sample_scenes
from training.mini.world.traits import traits_of

N = 24
LEFT_EYE, RIGHT_EYE, NOSE, LEFT_CORNER, RIGHT_CORNER = range(5)
LIPS = (parsing.UPPER_LIP, parsing.LOWER_LIP, parsing.MOUTH)
PLAIN = 0.8


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def drawn(identity: Tensor, scene: Scene, grid: Grid) -> Canvas:
    canvas = Canvas(torch.full((grid.x.shape[0], 3, *grid.x.shape[1:]), PLAIN, dtype=grid.x.dtype))
    paint_back_hair(canvas, identity, scene, grid)
    paint_head(canvas, identity, scene, grid)
    return canvas


def drawn_at(identity: Tensor, scene: Scene, points: Tensor) -> Canvas:
    """The head at a few exact points, [n, k, 2], of a picture so fine that borders have no width: rgb [n, 3, 1, k]."""
    return drawn(identity, scene, Grid(points[:, None, :, 0], points[:, None, :, 1], torch.full((len(points),), 1e-4)))


def people(n: int, seed: int, *, glasses: bool = False, beards: bool = False) -> Tensor:
    """n identities without the glasses and beards that may hide what a test looks at."""
    identity = sample_identities(16 * n, seed)
    traits = traits_of(identity)
    shown = (glasses | (traits.glasses == 0)) & (beards | (traits.moustache == 0)) & (traits.hair.line + traits.hairline < -0.35)
    return identity[shown.flatten()][:n]


def still(scene: Scene) -> Scene:
    zero = torch.zeros_like(scene.yaw)
    return scene.but(yaw=zero, pitch=zero, roll=zero)


@pytest.mark.parametrize("expression", range(len(EXPRESSIONS)), ids=EXPRESSIONS)
def test_landmarks_are_where_the_features_are_drawn(expression: int) -> None:
    identity, scene = people(N, 1), sample_scenes(N, 2, expression=expression)
    canvas = drawn_at(identity, scene, landmarks(identity, scene))
    assert (canvas.labels[:, 0, LEFT_EYE] == parsing.RIGHT_EYE).all(), "the picture's left eye is the person's right one"
    assert (canvas.labels[:, 0, RIGHT_EYE] == parsing.LEFT_EYE).all()
    assert (canvas.labels[:, 0, NOSE] == parsing.NOSE).all()
    assert canvas.rgb[:, :, 0, :2].max() < 0.15, "an eye's landmark is the centre of its pupil"


@pytest.mark.parametrize("expression", range(len(EXPRESSIONS)), ids=EXPRESSIONS)
def test_mouth_corners_end_the_lips(expression: int) -> None:
    identity = people(N, 3)
    scene = still(sample_scenes(N, 4, expression=expression))
    corners = landmarks(identity, scene)[:, LEFT_CORNER:]
    outwards = torch.tensor([[-1.0, 0.0], [1.0, 0.0]]) * scene.head_size[:, None, None]
    down = torch.tensor([0.0, 1.0]) * scene.head_size[:, None, None]
    # Towards its corners a mouth is thin and its line bends: look from a twentieth of a head unit above to one below.
    column = torch.linspace(-0.05, 0.05, 21)[:, None, None, None] * down
    lips, inside, outside = torch.tensor(LIPS), corners - 0.03 * outwards + column, corners + 0.03 * outwards + column
    assert all(torch.isin(drawn_at(identity, scene, inside.transpose(0, 1)[:, :, side]).labels, lips).any(2).all() for side in (0, 1))
    assert not torch.isin(drawn_at(identity, scene, outside.transpose(0, 1).flatten(1, 2)).labels, lips).any()


def test_roll_turns_landmarks_and_drawing_about_the_heads_centre() -> None:
    identity, scene = people(N, 5), sample_scenes(N, 6)
    upright, tilted = (scene.but(roll=torch.full((N,), roll)) for roll in (0.0, ROLL_RAD))
    centre = torch.stack([scene.head_x, scene.head_y], -1)[:, None]
    before, after = landmarks(identity, upright) - centre, landmarks(identity, tilted) - centre
    cos, sin = math.cos(ROLL_RAD), math.sin(ROLL_RAD)
    torch.testing.assert_close(after, before @ torch.tensor([[cos, sin], [-sin, cos]]), atol=1e-6, rtol=0)
    assert (after[:, RIGHT_EYE, 1] > before[:, RIGHT_EYE, 1]).all(), "positive roll is clockwise: the right side goes down"
    assert (drawn_at(identity, tilted, after + centre).labels[:, 0, RIGHT_EYE] == parsing.LEFT_EYE).all()


def test_yaw_and_pitch_move_the_nose_as_scene_promises() -> None:
    identity, scene = people(N, 7), still(sample_scenes(N, 8))
    ahead = landmarks(identity, scene)[:, NOSE]
    aside = landmarks(identity, scene.but(yaw=torch.full((N,), 0.3), pitch=torch.full((N,), 0.1)))[:, NOSE]
    assert (aside[:, 0] > ahead[:, 0] + 0.15 * scene.head_size).all()
    assert (aside[:, 1] < ahead[:, 1] - 0.05 * scene.head_size).all()


def test_every_coordinate_of_an_identity_shows() -> None:
    """Moving any one of the forty numbers changes somebody's picture by at least eight levels of 255."""
    identity, scene = sample_identities(N, 9), still(sample_scenes(N, 10, framing=CLOSE_UP, expression=0))
    grid = Grid.whole(N, 64)
    before = drawn(identity, scene, grid).rgb
    for coordinate in range(IDENTITY_DIM):
        moved = identity.clone()
        moved[:, coordinate] = (moved[:, coordinate] + 0.5) % 1
        change = (drawn(moved, scene, grid).rgb - before).abs().amax((1, 2, 3))
        assert change.max() > 8 / 255, f"coordinate {coordinate} is not visible on any of {N} people"


def test_a_person_keeps_their_skin_in_every_framing() -> None:
    identity = people(N, 11)
    colours = []
    for framing in (CLOSE_UP, PORTRAIT, FULL_BODY):
        scene = sample_scenes(N, 12 + framing, framing=framing, light=0)
        colours.append(drawn_at(identity, scene, landmarks(identity, scene)[:, NOSE : NOSE + 1]).rgb[..., 0, 0])
    # A turned nose may reach the soft border of the shadow.
    torch.testing.assert_close(colours[0], colours[1], atol=0.05, rtol=0)
    torch.testing.assert_close(colours[0], colours[2], atol=0.05, rtol=0)
    assert (torch.cdist(colours[0], colours[0]) + torch.eye(N)).min() > 0.001, "different people have different skins"


def test_sex_and_age_lean_on_the_traits() -> None:
    identity = sample_identities(4000, 13)
    traits, man = traits_of(identity), sex(identity) == 1
    bearded, long_haired = traits.moustache.flatten() > 0, traits.hair.fall.flatten() > 1
    grey = (traits.hair_colour.amax(1) - traits.hair_colour.amin(1)).flatten() < 0.06
    senior = age_band(identity) == 2
    assert not bearded[~man].any()
    assert 0.5 < bearded[man].float().mean() < 0.65
    assert long_haired[~man].float().mean() > 3 * long_haired[man].float().mean() > 0, "more often, but not only, women's"
    assert grey[senior].float().mean() > 0.7
    assert grey[~senior].float().mean() < 0.3
    assert traits.lines.flatten()[age_band(identity) == 0].max() == 0


def test_every_style_is_worn_and_only_the_bald_have_no_hair() -> None:
    rows = torch.tensor(STYLE_SHARES, dtype=torch.float32)
    assert rows.sum(1).tolist() == [100, 100]
    bounds = rows[1].cumsum(0) / 100
    man = people(1, 14).expand(len(HAIR_STYLES), -1).clone()
    man[:, 0], man[:, 4] = 0.9, bounds - rows[1] / 200  # the middle of each style's share
    scene = still(sample_scenes(1, 15, framing=PORTRAIT)).take(torch.zeros(len(HAIR_STYLES), dtype=torch.long))
    canvas = drawn(man, scene, Grid.whole(len(man), 96))
    hair = (canvas.labels == parsing.HAIR).sum((1, 2))
    assert hair[0] == 0
    assert (hair[1:] > 100).all()
    assert len({picture.numpy().tobytes() for picture in canvas.labels}) == len(HAIR_STYLES)


def test_glasses_cover_the_eyes_in_the_map_and_show_them_in_the_picture() -> None:
    identity = people(N * 4, 16, glasses=True)
    identity = identity[traits_of(identity).glasses.flatten() > 0][:N]
    scene = sample_scenes(len(identity), 17)
    canvas = drawn_at(identity, scene, landmarks(identity, scene)[:, :NOSE])
    assert (canvas.labels == parsing.GLASSES).all()
    assert canvas.rgb.max() < 0.35, "a pupil behind glass"


def test_expressions_open_the_mouth() -> None:
    identity = people(len(EXPRESSIONS), 18)[:1].expand(len(EXPRESSIONS), -1)
    scene = still(sample_scenes(1, 19, framing=CLOSE_UP)).take(torch.zeros(len(EXPRESSIONS), dtype=torch.long))
    scene = scene.but(expression=torch.arange(len(EXPRESSIONS)))
    opened = (drawn(identity, scene, Grid.whole(len(EXPRESSIONS), 192)).labels == parsing.MOUTH).sum((1, 2)).tolist()
    share = dict(zip(EXPRESSIONS, opened, strict=True))
    assert share["neutral"] == share["sad"] == 0
    assert share["laughing"] > 1.5 * share["smiling"] > 0
    assert share["surprised"] > 0


def test_the_box_runs_from_forehead_to_chin() -> None:
    identity, scene = sample_identities(N, 20), sample_scenes(N, 21)
    box, points = face_box(identity, scene), landmarks(identity, scene)
    assert ((points > box[:, None, :2]) & (points < box[:, None, 2:])).all()
    labels = drawn(identity, scene, Grid.whole(N, 192)).labels
    for person in range(N):
        rows = ((labels[person] >= parsing.SKIN) & (labels[person] <= parsing.LOWER_LIP)).any(1).nonzero()
        chin = (rows.max() + 1) / 192 * 2 - 1
        assert abs(chin - box[person, 3]) < 0.12 * scene.head_size[person]


def test_arcface_grid_is_where_insightface_samples() -> None:
    face_align = pytest.importorskip("insightface.utils.face_align")
    cv2 = pytest.importorskip("cv2")
    identity, scene = sample_identities(N, 22), sample_scenes(N, 23)
    points = landmarks(identity, scene)
    grid = arcface_grid(points)
    for person in range(N):
        affine = cv2.invertAffineTransform(face_align.estimate_norm(to_pixels(points[person], 192).double().numpy(), 112))
        column, row = np.meshgrid(np.arange(112), np.arange(112))
        sampled = np.einsum("ij,jhw->ihw", affine, np.stack([column, row, np.ones_like(row)]))
        ours = to_pixels(torch.stack([grid.x[person], grid.y[person]]), 192)
        assert np.abs(ours.numpy() - sampled).max() < 1e-3, "pixels"
    assert grid.pixel.shape == (N,)


def test_similarity_recovers_a_known_transform() -> None:
    target = template(FFHQ_512, 512)
    angle, scale, shift = torch.tensor([0.3, -0.5]), torch.tensor([0.4, 1.7]), torch.tensor([[0.1, -0.2], [0.5, 0.6]])
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], -1), torch.stack([angle.sin(), angle.cos()], -1)], 1)
    expected = torch.cat([scale[:, None, None] * turn, shift[:, :, None]], 2)
    points = target @ expected[:, :, :2].transpose(1, 2) + shift[:, None]
    torch.testing.assert_close(similarity(points, target), expected, atol=1e-6, rtol=0)


def test_pixels_follow_cv2() -> None:
    grid = Grid.whole(1, 192)
    torch.testing.assert_close(to_pixels(grid.x[0, 0], 192), torch.arange(192.0), atol=1e-4, rtol=0)


def test_rounding_does_not_show() -> None:
    """Double precision stands in for another device: no channel of any pixel differs by a level of 255."""
    identity, scene = sample_identities(N, 24), sample_scenes(N, 25)
    single = drawn(identity, scene, Grid.whole(N, 128)).rgb
    try:
        torch.set_default_dtype(torch.float64)
        precise = Scene(**{k: v.double() if v.is_floating_point() else v for k, v in vars(scene).items()})
        grid = Grid.whole(N, 128)
        double = drawn(identity.double(), precise, Grid(grid.x.double(), grid.y.double(), grid.pixel.double())).rgb
    finally:
        torch.set_default_dtype(torch.float32)
    assert double.dtype == torch.float64
    assert (single - double).abs().max() < 1 / 255


def test_drawing_has_no_data_dependent_control_flow() -> None:
    identity, scene, grid = sample_identities(2, 26), sample_scenes(2, 27), Grid.whole(2, 32)
    compiled = torch.compile(drawn, fullgraph=True, backend="eager")  # refuses any graph break
    torch.testing.assert_close(compiled(identity, scene, grid).rgb, drawn(identity, scene, grid).rgb, atol=1e-6, rtol=0)
