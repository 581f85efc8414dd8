"""Everything about a picture that is not identity: place, clothes, colour, expression, light, framing, arms, pose of the head.

Factors are drawn independently of one another and of the person, on the CPU from one seed, so that a scene is the same on
every device. Knows no drawing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

SCENES = (
    "in an office", "in a cafe", "on a beach at sunset", "in a forest", "in snowy mountains",
    "in a desert", "in a city at night", "in a photo studio", "in a library", "in a park",
)  # fmt: skip
CLOTHES = ("t-shirt", "suit", "hoodie", "striped sweater", "turtleneck")
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "purple", "orange")
EXPRESSIONS = ("neutral", "smiling", "laughing", "surprised", "sad")
LIGHTS = ("soft daylight", "warm light", "cool blue light", "dramatic side light")
FRAMINGS = ("close-up portrait", "portrait", "full body photo")
ARMS = ("arms down", "left arm raised", "right arm raised", "both arms raised", "hands on hips")
CLOSE_UP, PORTRAIT, FULL_BODY = 0, 1, 2

# Head size (picture coordinates per head unit; a head is about 2 units tall) and head centre, per framing.
_HEAD_SIZE = (0.52, 0.39, 0.29)
_HEAD_SIZE_SPREAD = 0.08
_HEAD_X_SPREAD = (0.08, 0.14, 0.14)
_HEAD_Y = (-0.04, -0.20, -0.46)
_HEAD_Y_SPREAD = (0.05, 0.06, 0.04)
_FRAMING_SHARE = (0.35, 0.40, 0.25)
YAW_RAD, PITCH_RAD, ROLL_RAD = 0.32, 0.14, 0.12


@dataclass(frozen=True, eq=False)
class Scene:
    """A batch of scenes. Every field is [n] unless it says otherwise.

    scene, clothes, colour, expression, light, framing, arms: long, indices into the tuples above.
    "left" and "right" arms are the person's own, as OpenPose names them;
    the person faces the viewer, so their left arm is at the picture's right.
    yaw (positive: the nose moves to the picture's right), pitch (positive: the nose moves up), roll (positive: clockwise): radians.
    head_x, head_y: centre of the head, head_size: length of one head unit, all in picture coordinates (-1..1).
    variation: [n, 8] in 0..1, what may vary in a place (where the sun stands, which trees). jitter: [n, 4] in 0..1, small
    variations of the person that belong to the moment (side of the light, gaze).
    """

    scene: Tensor
    clothes: Tensor
    colour: Tensor
    expression: Tensor
    light: Tensor
    framing: Tensor
    arms: Tensor
    yaw: Tensor
    pitch: Tensor
    roll: Tensor
    head_x: Tensor
    head_y: Tensor
    head_size: Tensor
    variation: Tensor
    jitter: Tensor

    def __len__(self) -> int:
        return int(self.scene.shape[0])

    def take(self, index: Tensor) -> Scene:
        return Scene(**{f.name: getattr(self, f.name)[index] for f in fields(self)})

    def to(self, device: torch.device | str) -> Scene:
        return Scene(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})

    def but(self, **changes: Tensor) -> Scene:
        """The same scenes with some fields replaced."""
        return replace(self, **changes)


def sample_scenes(n: int, seed: int | torch.Generator, device: torch.device | str = "cpu", **fixed: int) -> Scene:
    """n independent scenes. fixed: any of the categorical fields by index (`framing=FULL_BODY`), the same for the whole batch."""
    g = seed if isinstance(seed, torch.Generator) else torch.Generator().manual_seed(seed)

    def pick(name: str, count: int) -> Tensor:
        drawn = torch.randint(0, count, (n,), generator=g)
        return torch.full_like(drawn, fixed[name]) if name in fixed else drawn

    def around(spread: Tensor | float) -> Tensor:
        return (torch.rand(n, generator=g) * 2 - 1) * spread

    shares = torch.tensor(_FRAMING_SHARE).cumsum(0)[:-1]
    framing = torch.bucketize(torch.rand(n, generator=g), shares, right=True)
    if "framing" in fixed:
        framing = torch.full_like(framing, fixed["framing"])
    return Scene(
        scene=pick("scene", len(SCENES)),
        clothes=pick("clothes", len(CLOTHES)),
        colour=pick("colour", len(COLOURS)),
        expression=pick("expression", len(EXPRESSIONS)),
        light=pick("light", len(LIGHTS)),
        framing=framing,
        arms=pick("arms", len(ARMS)),
        yaw=around(YAW_RAD),
        pitch=around(PITCH_RAD),
        roll=around(ROLL_RAD),
        head_x=around(torch.tensor(_HEAD_X_SPREAD)[framing]),
        head_y=torch.tensor(_HEAD_Y)[framing] + around(torch.tensor(_HEAD_Y_SPREAD)[framing]),
        head_size=torch.tensor(_HEAD_SIZE)[framing] * (1 + around(_HEAD_SIZE_SPREAD)),
        variation=torch.rand(n, 8, generator=g),
        jitter=torch.rand(n, 4, generator=g),
    ).to(device)
