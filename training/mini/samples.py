"""`python -m training.mini.samples`: the pictures in samples/, drawn by the renderer. Held-out people: no model was trained on them."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from training.mini.heldout import SAMPLE_CHARACTERS, character_identity
from training.mini.world.groups import paint_group, sample_group
from training.mini.world.render import render
from training.mini.world.scene import ARMS, CLOSE_UP, FULL_BODY, PORTRAIT, sample_scenes
from training.mini.world.skeleton import draw_skeleton, keypoints

_REFERENCE_FRAMINGS = (CLOSE_UP, CLOSE_UP, PORTRAIT, PORTRAIT)
_GROUPS = (("Ada", "Bruno"), ("Chiyo", "Dario", "Esi"))
_SEED = 920_000
_LICENCE = """# Samples

Eight characters (four reference pictures each), two group pictures and four pose skeletons, to try Likeness on.

Nobody here exists: every picture was drawn by this project's own renderer (`python -m training.mini.samples`), and no model of
the embedded pack was trained on these characters. They may be used for any purpose, without conditions (CC0 1.0).
"""


def main() -> None:
    parser = argparse.ArgumentParser("training.mini.samples", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("samples"))
    out = parser.parse_args().out
    written = [*_characters(out / "characters"), *_groups(out / "groups"), *_poses(out / "poses")]
    (out / "README.md").write_text(_LICENCE)
    print(f"{len(written)} pictures in {out}")


def _characters(folder: Path) -> list[Path]:
    paths = []
    for number, name in enumerate(SAMPLE_CHARACTERS):
        for k, framing in enumerate(_REFERENCE_FRAMINGS):
            scene = sample_scenes(1, _SEED + 10 * number + k, framing=framing, light=0)
            picture = render(character_identity(name), scene)
            paths.append(_save(picture[0], folder / f"{name.lower()}-{k + 1}.png"))
    return paths


def _groups(folder: Path) -> list[Path]:
    paths = []
    for number, names in enumerate(_GROUPS):
        people = torch.cat([character_identity(name) for name in names])[None]
        picture = paint_group(people, sample_group(1, len(names), _SEED + 500 + number, light=0)).picture
        paths.append(_save(picture[0], folder / f"{'-'.join(name.lower() for name in names)}.png"))
    return paths


def _poses(folder: Path) -> list[Path]:
    """One skeleton per raised-arm pose, and hands on hips."""
    paths = []
    for arms in range(1, len(ARMS)):
        scene = sample_scenes(1, _SEED + 600, framing=FULL_BODY, arms=arms)
        points, visible = keypoints(character_identity(SAMPLE_CHARACTERS[0]), scene)
        paths.append(_save(draw_skeleton(points, visible)[0], folder / f"{ARMS[arms].replace(' ', '-')}.png"))
    return paths


def _save(picture: Tensor, path: Path) -> Path:
    """picture: [3, h, w] in -1..1."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, optimize=True)
    return path


if __name__ == "__main__":
    main()
