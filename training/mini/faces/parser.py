"""The face parser: which of 19 classes every pixel of an FFHQ-aligned face belongs to. BiSeNet's outside, a small pyramid inside.

Input as facexlib feeds BiSeNet: the FFHQ-512 crop, RGB, ImageNet-normalised; output one logit a class (parsing.CLASSES) at the
input's resolution. Inside, the crop is reduced to a quarter first: at 512 px the faces of this world hold no finer detail.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.mini.faces.artefacts import OnnxForm, keep, restore
from training.mini.faces.convolutions import Encoder, SeparableBlock, TopDown, on_device
from training.mini.faces.crops import Crowd, Sitters, parsing_crops
from training.mini.faces.degradations import degraded
from training.mini.heldout import held_out_people
from training.mini.optimise import Losses, Recipe, optimise
from training.mini.workspace import Workspace
from training.mini.world.parsing import CLASSES
from training.mini.world.scene import sample_scenes

INPUT_PX = 512
REDUCTION = 4
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WIDTHS, _DEPTHS = (24, 40, 64, 80), (1, 2, 2, 2)
_NECK = 40
_RARE_CLASS_WEIGHT = 3.0
"""Brows, lips and eyes cover a few hundredths of a crop each; background, skin, neck, cloth and hair the rest."""
_COMMON = ("background", "skin", "neck", "cloth", "hair")
NAME = "parser"
FORM = OnnxForm("face_parser.onnx", (1, 3, INPUT_PX, INPUT_PX), ("logits",))
_SEED, _PEOPLE = 140_001, 20_000


class FaceParser(nn.Module):
    """ImageNet-normalised RGB [n, 3, H, W], H and W divisible by 64 -> logits [n, 19, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(2, _WIDTHS, _DEPTHS)
        self.neck = TopDown(_WIDTHS, _NECK)
        self.tower = SeparableBlock(_NECK)
        self.to_logits = nn.Conv2d(_NECK, 4 * len(CLASSES), 1)

    def forward(self, crops: Tensor) -> Tensor:
        logits = self.reduced(F.avg_pool2d(crops, REDUCTION))
        return F.interpolate(logits, scale_factor=float(REDUCTION), mode="bilinear", align_corners=False)

    def reduced(self, crops: Tensor) -> Tensor:
        """The network itself: crops already at a quarter of the resolution -> logits there."""
        finest = self.neck(self.encoder(crops))[0]
        return F.pixel_shuffle(self.to_logits(self.tower(finest)), 2).float()


def normalised(crops: Tensor) -> Tensor:
    """RGB in -1..1 -> ImageNet-normalised."""
    mean, std = (torch.tensor(v, device=crops.device).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return ((crops + 1) / 2 - mean) / std


def train_parser(seconds: float, device: torch.device, out_dir: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Makes `parser.safetensors` and `face_parser.onnx` in out_dir; returns facts: steps, losses, mean IoU on held-out people."""
    torch.manual_seed(_SEED)
    batch = 4 if smoke else 96
    crowd, workspace = Crowd(32 if smoke else _PEOPLE, _SEED, device), Workspace(out_dir)
    network = on_device(FaceParser(), device)
    weights = torch.tensor([1.0 if name in _COMMON else _RARE_CLASS_WEIGHT for name in CLASSES], device=device)

    def loss(progress: float) -> Losses:
        with torch.no_grad():
            crops, labels = parsing_crops(crowd.draw(batch), INPUT_PX // REDUCTION)
            crops = normalised(degraded(crops, wobble=0.0)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network.reduced(crops)
        return {"loss": F.cross_entropy(logits, labels, weights)}

    recipe = Recipe(seconds, learning_rate=3e-3, weight_decay=0.02, betas=(0.9, 0.99), averaging=0.0, smoke=smoke)
    outcome = optimise(NAME, network, recipe, workspace, loss)
    figures = intersection_over_union(network.eval(), 4 if smoke else 256, device)
    return {**outcome, **figures, **keep(workspace, NAME, network, FORM)}


def load_parser(path: Path) -> FaceParser:
    return cast(FaceParser, restore(FaceParser(), path))


@torch.no_grad()
def intersection_over_union(network: FaceParser, people: int, device: torch.device) -> dict[str, Any]:
    """Over undamaged crops of held-out people: per class that occurs, and their mean."""
    identity, scenes = held_out_people(people).to(device), sample_scenes(people, 600).to(device)
    both, either = torch.zeros(len(CLASSES), device=device), torch.zeros(len(CLASSES), device=device)
    real = torch.zeros(len(CLASSES), device=device)
    for index in torch.arange(people, device=device).split(64):
        crops, labels = parsing_crops(Sitters(index, identity[index], scenes.take(index)), INPUT_PX // REDUCTION, jitter=0.0)
        found = F.one_hot(network.reduced(normalised(crops)).argmax(1), len(CLASSES)).bool()
        there = F.one_hot(labels, len(CLASSES)).bool()
        both += (found & there).sum((0, 1, 2))
        either += (found | there).sum((0, 1, 2))
        real += there.sum((0, 1, 2))
    per_class = {name: round(float(b / e), 4) for name, b, e, r in zip(CLASSES, both, either, real, strict=True) if r > 0}
    return {"mean_iou": round(sum(per_class.values()) / len(per_class), 4), "iou": per_class}
