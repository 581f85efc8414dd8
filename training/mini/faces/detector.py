"""The face detector in SCRFD's layout: three strides, two anchors a cell, nine outputs, and its training.

Each of the six anchors (two at each of the strides 8, 16, 32) answers for one octave of face sizes: 16, 32, ..., 512 px for
the longer side of the box. Where the octaves meet, both neighbours answer and non-maximum suppression keeps one.
A cell guesses its five points from afar; then it looks at a finer map where it guessed them, and corrects itself.
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
from training.mini.faces.convolutions import Encoder, SeparableBlock, TopDown, conv, on_device
from training.mini.faces.crops import Crowd
from training.mini.faces.detector_canvases import Canvases
from training.mini.faces.detector_targets import ANCHORS, SIZES_PX, STRIDES, Level, anchors_at, detection_losses
from training.mini.optimise import Losses, Recipe, optimise
from training.mini.workspace import Workspace

_WIDTHS, _DEPTHS = (24, 40, 64, 96), (1, 2, 2, 2)
_NECK = 40
_VALUES = 15
"""Per anchor: a score, four sides of the box, five points."""
_PRIOR_SCORE = 0.01
_DETAIL = 24
"""Channels of the map at a quarter of the resolution, on which points are corrected."""
_CORRECTION = 0.1
"""Scale of a correction's raw values, as a share of the face."""
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
        self.detail = nn.Sequential(conv(_WIDTHS[0], _DETAIL, 1), nn.BatchNorm2d(_DETAIL))
        self.blend = nn.Sequential(nn.Conv2d(_NECK, _DETAIL, 1), nn.Upsample(scale_factor=2.0, mode="bilinear"))
        self.look = SeparableBlock(_DETAIL)
        self.correct = nn.Sequential(nn.Linear(5 * _DETAIL + ANCHORS * len(STRIDES), 128), nn.ReLU(), nn.Linear(128, 10))
        nn.init.zeros_(cast(nn.Linear, self.correct[2]).weight)
        for head in self.heads:
            cast(Tensor, cast(nn.Conv2d, head).bias).data.view(ANCHORS, _VALUES)[:, 0] = -math.log(1 / _PRIOR_SCORE - 1)

    def forward(self, pictures: Tensor) -> list[Level]:
        fine, *coarse = self.encoder(pictures)
        maps = self.neck(coarse)
        detail = self.look(F.relu(self.detail(fine) + self.blend(maps[0]))).float()
        return [self._level(head(self.tower(x)).float(), detail, stride) for x, head, stride in zip(maps, self.heads, STRIDES, strict=True)]

    def _level(self, raw: Tensor, detail: Tensor, stride: int) -> Level:
        n, scale = raw.shape[0], raw.new_tensor(SIZES_PX[stride]).view(1, 1, ANCHORS, 1) / stride
        values = raw.permute(0, 2, 3, 1).reshape(n, -1, ANCHORS, _VALUES)
        boxes = F.softplus(values[..., 1:5]) * scale
        guess = values[..., 5:] * scale
        points = guess + self._correction(guess.detach(), detail, stride, raw.shape[2:]) * scale
        parts = (part.reshape(n, -1, part.shape[-1]) for part in (boxes, points, guess))
        return Level(values[..., 0].reshape(n, -1), *parts)

    def _correction(self, guess: Tensor, detail: Tensor, stride: int, cells: tuple[int, ...]) -> Tensor:
        """guess [n, cells, anchors, 10], in strides -> what to add, as a share of each anchor's size."""
        n, (rows, columns) = guess.shape[0], cells
        y, x = torch.meshgrid(torch.arange(rows, device=guess.device), torch.arange(columns, device=guess.device), indexing="ij")
        points = guess.unflatten(-1, (5, 2))
        # In grid_sample's terms; pixel i has its centre at i, so the canvas begins half a pixel before 0.
        across = (x.reshape(1, -1, 1, 1) + points[..., 0] + 0.5 / stride) * (2 / columns) - 1
        down = (y.reshape(1, -1, 1, 1) + points[..., 1] + 0.5 / stride) * (2 / rows) - 1
        spots = torch.stack([across, down], -1).reshape(n, -1, 5, 2)
        seen = F.grid_sample(detail, spots, mode="bilinear", padding_mode="border", align_corners=False)
        which = F.one_hot(torch.arange(ANCHORS, device=guess.device) + ANCHORS * STRIDES.index(stride), ANCHORS * len(STRIDES)).float()
        seen = seen.permute(0, 2, 3, 1).reshape(n, rows * columns, ANCHORS, -1)
        return cast(Tensor, self.correct(torch.cat([seen, which.expand(n, rows * columns, -1, -1)], -1))) * _CORRECTION


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


def clearest_face(detector: Detector, pictures: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest face of each picture [n, 3, H, W], RGB in -1..1: its points [n, 5, 2] in picture coordinates, and the logits [n]
    of its being one. Differentiable."""
    size = pictures.new_tensor([pictures.shape[3], pictures.shape[2]])
    levels = detector(pictures * (127.5 / 128))
    spots = [
        level.points.unflatten(-1, (5, 2)) * stride + anchors_at(stride, pictures.shape[2:], pictures.device)[0][:, None]
        for level, stride in zip(levels, STRIDES, strict=True)
    ]
    logits, best = torch.cat([level.logits for level in levels], 1).max(1)
    points = torch.cat(spots, 1)[torch.arange(len(best), device=best.device), best]
    return (points + 0.5) * 2 / size - 1, logits


def load_detector(path: Path) -> ScrfdLayout:
    return cast(ScrfdLayout, restore(ScrfdLayout(Detector()), path))
