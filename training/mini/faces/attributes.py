"""Reads from a picture what its prompt asked for: place, clothes, their colour, framing, expression. The judge of prompts.

Input [n, 3, 192, 192] RGB in 0..1; five outputs of logits, named and ordered as `LABELS`. Trained on smeared, blurred and noisy
pictures, so that it judges what a generator drew rather than how sharply.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.mini.faces.artefacts import OnnxForm, keep, restore
from training.mini.faces.convolutions import Encoder, SeparableBlock, on_device
from training.mini.faces.crops import Crowd
from training.mini.faces.degradations import degraded
from training.mini.heldout import held_out_people
from training.mini.optimise import Losses, Recipe, optimise
from training.mini.workspace import Workspace
from training.mini.world.render import PICTURE_SIZE_PX, render
from training.mini.world.scene import CLOTHES, COLOURS, EXPRESSIONS, FRAMINGS, SCENES, Scene, sample_scenes

LABELS: Final = {"scene": SCENES, "clothes": CLOTHES, "colour": COLOURS, "framing": FRAMINGS, "expression": EXPRESSIONS}
"""Output name, which is also the field of Scene -> what its logits stand for."""
_WIDTHS, _DEPTHS = (32, 56, 80, 96), (1, 2, 2, 2)
_COLOUR_SPREAD = 0.04
"""Less than elsewhere: yellow clothes must not become orange ones."""
NAME = "attributes"
FORM = OnnxForm("attributes.onnx", (2, 3, PICTURE_SIZE_PX, PICTURE_SIZE_PX), tuple(LABELS), unit_range=True)
_SEED, _PEOPLE = 170_001, 20_000


class Attributes(nn.Module):
    """[n, 3, 192, 192] RGB in 0..1 -> five [n, classes], in the order of LABELS.

    Each answer looks where it wants: a softmax over the 12 x 12 places weighs the features that it reads (the mouth for the expression,
    the shoulders for the clothes), beside their mean over the picture.
    """

    def __init__(self) -> None:
        super().__init__()
        width = _WIDTHS[-1]
        self.encoder = Encoder(4, _WIDTHS, _DEPTHS)
        self.finer = nn.Conv2d(_WIDTHS[-2], width, 1)
        self.merge = SeparableBlock(width)
        self.gaze = nn.Conv2d(width, len(LABELS), 1)
        self.answers = nn.ModuleList(nn.Linear(2 * width, len(names)) for names in LABELS.values())

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        *_, fine, coarse = self.encoder(pictures * 2 - 1)
        features = self.merge(self.finer(fine) + F.interpolate(coarse, scale_factor=2.0, mode="nearest"))
        weights = self.gaze(features).flatten(2).float().softmax(-1)
        places = features.flatten(2).float().transpose(1, 2)
        looked_at, mean = weights @ places, places.mean(1)
        return tuple(answer(torch.cat([looked_at[:, k], mean], 1)).float() for k, answer in enumerate(self.answers))


def truths(scene: Scene) -> list[Tensor]:
    """[n] long per label, in the order of LABELS."""
    return [getattr(scene, name) for name in LABELS]


def train_attributes(seconds: float, device: torch.device, out_dir: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Makes `attributes.safetensors` and `attributes.onnx` in out_dir; returns facts: steps, losses, accuracies on held-out people."""
    torch.manual_seed(_SEED)
    batch = 4 if smoke else 128
    crowd, workspace = Crowd(32 if smoke else _PEOPLE, _SEED, device), Workspace(out_dir)
    network = on_device(Attributes(), device)

    def loss(progress: float) -> Losses:
        sitters = crowd.draw(batch)
        with torch.no_grad():
            pictures = degraded(render(sitters.identity, sitters.scene), colour=_COLOUR_SPREAD)
            pictures = ((pictures + 1) / 2).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network(pictures)
        parts = {k: F.cross_entropy(a, b) for k, a, b in zip(LABELS, logits, truths(sitters.scene), strict=True)}
        return {"loss": torch.stack(list(parts.values())).sum(), **parts}

    recipe = Recipe(seconds, learning_rate=2e-3, weight_decay=0.05, betas=(0.9, 0.99), averaging=0.0, smoke=smoke)
    outcome = optimise(NAME, network, recipe, workspace, loss)
    figures = accuracy_on_held_out(network.eval(), 8 if smoke else 512, device)
    return {**outcome, "accuracy": figures, **keep(workspace, NAME, network, FORM)}


def load_attributes(path: Path) -> Attributes:
    return cast(Attributes, restore(Attributes(), path))


@torch.no_grad()
def accuracy_on_held_out(network: nn.Module, people: int, device: torch.device) -> dict[str, float]:
    """Per label the share of right answers on undamaged pictures, all framings."""
    identity, scenes = held_out_people(people).to(device), sample_scenes(people, 900).to(device)
    parts = torch.arange(people, device=device).split(64)
    logits = [network((render(identity[i], scenes.take(i)) + 1) / 2) for i in parts]
    return accuracy([torch.cat(part) for part in zip(*logits, strict=True)], scenes)


def accuracy(logits: list[Tensor], scene: Scene) -> dict[str, float]:
    right = ((a.argmax(1) == b).float().mean() for a, b in zip(logits, truths(scene), strict=True))
    return {name: round(float(share), 4) for name, share in zip(LABELS, right, strict=True)}
