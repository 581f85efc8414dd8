"""What the tests of evaluations share: sample people, and a service that is fast and exact: the world's own renderer, which draws the
person of a request's `who` as the prompt's words say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from deployments.contracts import RGB
from deployments.face_server import FaceSettings
from deployments.images import encode
from training.evaluation.run import Draw, Pictures
from training.mini.heldout import character_identity
from training.mini.world.captions import MEANINGS
from training.mini.world.render import render
from training.mini.world.scene import sample_scenes

FACES = FaceSettings(faces="faces-mini", judge="face-judge-mini", parser="face-parser-mini")
_SAMPLES = Path(__file__).resolve().parents[1] / "samples" / "characters"


def sample(name: str, number: int) -> bytes:
    """A picture of a sample character: 1 and 2 are close-ups, 3 and 4 portraits."""
    return (_SAMPLES / f"{name}-{number}.png").read_bytes()


def samples(name: str, numbers: Sequence[int] = (1, 2, 3, 4)) -> list[bytes]:
    return [sample(name, number) for number in numbers]


def flat() -> RGB:
    """A picture of nobody."""
    return np.full((192, 192, 3), 127, np.uint8)


def rendered(text: str, seed: int, who: str) -> RGB:
    """[192, 192, 3]: a sample character as the words of a prompt say, everything else by the seed."""
    said = dict(MEANINGS[phrase] for phrase in sorted(MEANINGS, key=len) if phrase in text)
    picture = render(character_identity(who), sample_scenes(1, seed, "cpu", **said))[0]
    return np.asarray(((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy())


class Renderer:
    """asked: the fields of every request, in order. `who` among them is a sample character's name, or `nobody`."""

    def __init__(self) -> None:
        self.asked: list[Mapping[str, Any]] = []

    @property
    def draw(self) -> Draw:
        return self._draw

    def _draw(self, fields: Mapping[str, Any]) -> Pictures:
        self.asked.append(fields)
        who = str(fields["who"])
        picture = flat() if who == "nobody" else rendered(fields["prompt"], int(fields["seed"]), who)
        return Pictures([encode(picture)], 0.25, ("flux1-mini",))
