"""The face detector in SCRFD's layout: three strides, two anchors a cell, nine outputs, and its training.

Each of the six anchors (two at each of the strides 8, 16, 32) answers for one octave of face sizes: 16, 32, ..., 512 px for
the longer side of the box. Where the octaves meet, both neighbours answer and non-maximum suppression keeps one.
What it is shown, and what it should answer, is the business of detector_canvases.py and detector_targets.py.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.mini.faces.artefacts import OnnxForm, keep, restore
from training.mini.faces.convolutions import Encoder, SeparableBlock, TopDown, on_device
from training.mini.faces.crops import Crowd
from training.mini.faces.detector_canvases import Canvases
from training.mini.faces.detector_targets import ANCHORS, SIZES_PX, STRIDES, Level, detection_losses
from training.mini.optimise import Losses, Recipe, optimise
from training.mini.workspace import Workspace

_WIDTHS, _DEPTHS = (24, 40, 64, 96), (1, 2, 2, 2)
_NECK = 40
_VALUES = 15
"""Per anchor: a score, four sides of the box, five points."""
_PRIOR_SCORE = 0.01
NAME = "detector"
FORM = OnnxForm(
    "scrfd.onnx", (1, 3, 192, 192), tuple(f"{kind}_{stride}" for kind in ("score", "bbox", "kps") for stride in STRIDES),
    input_name="input.1", dynamic={2: "height", 3: "width"}, multiple=32,
)  # fmt: skip
_SEED, _PEOPLE = 130_001, 20_000


class Detector(nn.Module):
    """pictures [n, 3, H, W], H and W divisible by 32, RGB, (x - 127.5) / 128 -> per stride a Level."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(4, _WIDTHS, _DEPTHS)
        self.neck = TopDown(_WIDTHS[1:], _NECK)
        self.tower = nn.Sequential(SeparableBlock(_NECK, 3), SeparableBlock(_NECK, 5))
        self.heads = nn.ModuleList(nn.Conv2d(_NECK, ANCHORS * _VALUES, 1) for _ in STRIDES)
        for head in self.heads:
            cast(Tensor, cast(nn.Conv2d, head).bias).data.view(ANCHORS, _VALUES)[:, 0] = -math.log(1 / _PRIOR_SCORE - 1)

    def forward(self, pictures: Tensor) -> list[Level]:
        maps = self.neck(self.encoder(pictures)[1:])
        return [self._level(head(self.tower(x)).float(), stride) for x, head, stride in zip(maps, self.heads, STRIDES, strict=True)]

    def _level(self, raw: Tensor, stride: int) -> Level:
        n, scale = raw.shape[0], raw.new_tensor(SIZES_PX[stride]).view(1, 1, ANCHORS, 1) / stride
        values = raw.permute(0, 2, 3, 1).reshape(n, -1, ANCHORS, _VALUES)
        boxes = F.softplus(values[..., 1:5]) * scale
        points = values[..., 5:] * scale
        return Level(values[..., 0].reshape(n, -1), boxes.reshape(n, -1, 4), points.reshape(n, -1, 10))


class ScrfdLayout(nn.Module):
    """The exported face of a Detector: one picture in, nine tensors out, [anchors, 1 | 4 | 10] each, as insightface's SCRFD reads
    them: scores after the sigmoid, boxes as left, top, right, bottom and points as x, y, in strides from the cell's top left."""

    def __init__(self, detector: Detector) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, picture: Tensor) -> tuple[Tensor, ...]:
        levels = self.detector(picture)
        scores = [level.logits.sigmoid().reshape(-1, 1) for level in levels]
        return (*scores, *(level.boxes.reshape(-1, 4) for level in levels), *(level.points.reshape(-1, 10) for level in levels))


def train_detector(seconds: float, device: torch.device, out_dir: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Makes `detector.safetensors` and `scrfd.onnx` in out_dir; returns facts: steps and last losses."""
    torch.manual_seed(_SEED)
    canvases = Canvases(Crowd(32 if smoke else _PEOPLE, _SEED, device), reduced=smoke)
    network = on_device(Detector(), device)

    def loss(progress: float) -> Losses:
        with torch.no_grad():
            shown = canvases.draw()
            pictures = (shown.pictures * (127.5 / 128)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            levels = network(pictures)
        return detection_losses(levels, shown.faces, shown.pictures.shape[2:])

    recipe = Recipe(seconds, learning_rate=2e-3, weight_decay=0.02, betas=(0.9, 0.99), averaging=0.0, clip=5.0, smoke=smoke)
    workspace = Workspace(out_dir)
    outcome = optimise(NAME, network, recipe, workspace, loss)
    return {**outcome, **keep(workspace, NAME, ScrfdLayout(network), FORM)}


def load_detector(path: Path) -> ScrfdLayout:
    return cast(ScrfdLayout, restore(ScrfdLayout(Detector()), path))
