"""The pose bank and the words of framings: every pose shows what its framing says, and a broken bank is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

from deployments.controls.framing import Framing, framing_of
from deployments.controls.pose_bank import POSES_PATH, Figure, load_pose_bank
from deployments.controls.skeleton import JOINTS, arm_angle, crown
from deployments.errors import InvalidCatalog, InvalidRequest
from training.mini.heldout import held_out_people
from training.mini.world.captions import caption, varied_captions
from training.mini.world.scene import ARMS, CLOSE_UP, FULL_BODY, PORTRAIT, sample_scenes
from training.mini.world.skeleton import keypoints

BANK = load_pose_bank()
FRAMINGS: tuple[Framing, ...] = get_args(Framing)
FIGURES: tuple[Figure, ...] = get_args(Figure)
OF_WORLD = {CLOSE_UP: "headshot", PORTRAIT: "half", FULL_BODY: "full"}


def _shown(name: str, figure: Figure) -> set[str]:
    return {joint for joint, seen in zip(JOINTS, BANK.skeleton(name, figure).visible, strict=True) if seen}


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("name", BANK.names())
def test_every_pose_shows_what_its_framing_promises(name: str, figure: Figure) -> None:
    framing, shown = BANK.poses[name].framing, _shown(name, figure)
    assert {"nose", "neck", "left_eye", "right_eye", "left_shoulder", "right_shoulder"} <= shown
    assert ({"left_ankle", "right_ankle"} <= shown) == (framing == "full")
    assert ({"left_hip", "right_hip"} <= shown) == (framing != "headshot")
    if framing != "headshot":
        assert {f"{side}_{part}" for side in ("left", "right") for part in ("elbow", "wrist")} <= shown
    assert crown(BANK.skeleton(name, figure))[1] > 0
    assert BANK.poses[name].description.endswith(".")


@pytest.mark.parametrize("figure", FIGURES)
def test_the_names_keep_their_word(figure: Figure) -> None:
    for name in BANK.names("full"):
        skeleton = BANK.skeleton(name, figure)
        for side, raised in (
            ("left", {"full-left-arm-raised", "full-arms-raised"}),
            ("right", {"full-right-arm-raised", "full-arms-raised"}),
        ):
            hand_is_up = skeleton.joint(f"{side}_wrist")[1] < skeleton.joint("nose")[1]
            assert hand_is_up == (name in raised), (name, side)
    # The seed's pose: the arm high, 18 % of the picture above the head.
    seed = BANK.skeleton("full-left-arm-raised")
    assert arm_angle(seed, "left") == pytest.approx(160, abs=0.1) and crown(seed)[1] == pytest.approx(0.18, abs=1e-3)
    assert seed.aspect == pytest.approx(896 / 1216, abs=1e-3)


@pytest.mark.parametrize(
    ("name", "framing", "arms"),
    [
        ("full-standing", FULL_BODY, "arms down"),
        ("full-left-arm-raised", FULL_BODY, "left arm raised"),
        ("full-right-arm-raised", FULL_BODY, "right arm raised"),
        ("full-arms-raised", FULL_BODY, "both arms raised"),
        ("full-hands-on-hips", FULL_BODY, "hands on hips"),
        ("half-front", PORTRAIT, "arms down"),
        ("half-left-arm-raised", PORTRAIT, "left arm raised"),
        ("half-hands-on-hips", PORTRAIT, "hands on hips"),
        ("headshot-front", CLOSE_UP, "arms down"),
    ],
)
def test_the_packs_figure_stands_as_its_people_do(name: str, framing: int, arms: str) -> None:
    """Within the spread of one pose in the training's own pictures: a ControlNet obeys what it has seen."""
    points, _ = keypoints(held_out_people(64), sample_scenes(64, 5, framing=framing, arms=ARMS.index(arms)))
    middle = ((points + 1) / 2).mean(0).numpy()
    skeleton = BANK.skeleton(name, "character-world")
    assert skeleton.aspect == pytest.approx(1.0, abs=0.01)
    distance = np.linalg.norm(skeleton.points - middle, axis=1)[skeleton.visible]
    assert distance.max() < 0.04, dict(zip(JOINTS, distance.round(3), strict=False))


def test_auto_goes_by_the_framing_and_a_name_by_itself() -> None:
    for framing in FRAMINGS:
        assert BANK.poses[BANK.choose(framing)].framing == framing
        assert BANK.choose(framing, "auto") == BANK.choose(framing) and BANK.poses[BANK.choose(framing)].default
    assert BANK.choose("headshot", "full-arms-raised") == "full-arms-raised"
    assert set(BANK.names()) == {name for framing in FRAMINGS for name in BANK.names(framing)}


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(InvalidRequest, match="Did you mean full-standing") as refused:
        BANK.choose("full", "full-standin")
    assert "half-front" in refused.value.remedy
    with pytest.raises(InvalidRequest, match="names none"):
        BANK.choose(None)


@pytest.mark.parametrize(
    ("prompt", "framing"),
    [
        ("full-body photo of ohwx man on a forest hike", "full"),
        ("A full length portrait, studio", "full"),
        ("wide shot of a woman in a desert", "full"),
        ("seen from head to toe", "full"),
        ("close-up portrait of an old sailor", "headshot"),
        ("closeup, freckles", "headshot"),
        ("professional headshot, grey backdrop", "headshot"),
        ("a selfie in the mountains", "headshot"),
        ("Portrait of a queen", "half"),
        ("waist-up shot of a chef", "half"),
        ("medium shot, office", "half"),
        ("portrait orientation, a castle", None),
        ("a bodybuilder lifts a portraitist's easel", None),
        ("", None),
    ],
)
def test_a_prompts_words_say_the_framing(prompt: str, framing: Framing | None) -> None:
    assert framing_of(prompt) == framing


def test_the_packs_own_captions_are_understood() -> None:
    for framing, meant in OF_WORLD.items():
        scenes = sample_scenes(24, 11, framing=framing)
        assert {framing_of(text) for text in caption(scenes)} == {meant}
        # Varied captions leave the framing out at times, and call a portrait a mere photo.
        assert {framing_of(text) for text in varied_captions(scenes, torch.Generator().manual_seed(1))} <= {meant, None}


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("half-front", "default: true", "default: false", "half: none"),
        ("full-hands-on-hips", "framing: full", "framing: full\ndefault: true", "full: full-hands-on-hips, full-standing"),
        ("half-front", "like: full-standing", "like: nobody", "nobody"),
        ("full-standing", "figures:", "likes:", "likes"),
        ("half-front", "like: full-standing", "like: half-left-arm-raised", "half-"),
        ("full-standing", "left_ear:", "left_horn:", "left_horn"),
        ("full-standing", "      left_elbow: [0.656, 0.410]\n", "", "left elbow"),
        ("headshot-front", "{crop: [0.340,", "{crop: [0.940,", "no inside"),
        ("full-hands-on-hips", "bend: -93", "band: -93", "band"),
    ],
)
def test_a_broken_bank_is_refused_and_the_pose_named(tmp_path: Path, name: str, old: str, new: str, said: str) -> None:
    folder = Path(shutil.copytree(POSES_PATH, tmp_path / "poses"))
    text = (folder / f"{name}.yaml").read_text()
    assert old in text
    (folder / f"{name}.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(InvalidCatalog, match=said):
        load_pose_bank(folder)
