"""Two face recognisers in ArcFace's layout: one conditions the generator, the other judges it and never does.

They differ in architecture, in training people and in seed, so that a picture that pleases the first by accident does not please
the second. Both are trained with CosFace (Wang et al. 2018) to tell thousands of people apart whatever the scene. Embeddings are
raw: their length (about 16 here, 20 in ArcFace's published models) means nothing, but PuLID takes them un-normalised.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.mini.faces.artefacts import OnnxForm, keep, restore
from training.mini.faces.convolutions import conv, on_device
from training.mini.faces.crops import Crowd, Sitters, recognition_crops
from training.mini.faces.degradations import degraded
from training.mini.heldout import held_out_people
from training.mini.optimise import Losses, Recipe, optimise
from training.mini.workspace import Workspace
from training.mini.world.scene import CLOSE_UP, FRAMINGS, FULL_BODY, PORTRAIT, sample_scenes

CROP_PX = 112
EMBEDDING = 512
_LENGTH = 16.0
_COSFACE_SCALE, _COSFACE_MARGIN = 32.0, 0.35
_MARGIN_FULL_FROM = 0.3
"""Progress at which the margin has grown to its full size: from the start it would stop the network from learning at all."""


class ResidualBlock(nn.Module):
    """IResNet's block (Duta et al. 2020, as ArcFace uses it): normalise, convolve, PReLU, convolve with the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.BatchNorm2d(inputs), conv(inputs, outputs, 3), nn.BatchNorm2d(outputs), nn.PReLU(outputs),
            conv(outputs, outputs, 3, stride), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        same = stride == 1 and inputs == outputs
        self.shortcut = nn.Identity() if same else nn.Sequential(conv(inputs, outputs, 1, stride), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.body(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """MobileFaceNet's inverted residual (Chen et al. 2018): expand, depthwise with the stride, project, no activation at the end."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.body = nn.Sequential(
            conv(inputs, wide, 1), nn.BatchNorm2d(wide), nn.PReLU(wide),
            conv(wide, wide, 3, stride, groups=wide), nn.BatchNorm2d(wide), nn.PReLU(wide),
            conv(wide, outputs, 1), nn.BatchNorm2d(outputs),
        )  # fmt: skip
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = cast(Tensor, self.body(x))
        return x + y if self.residual else y


class Recogniser(nn.Module):
    """crops [n, 3, 112, 112] RGB in -1..1, aligned by norm_crop -> raw embeddings [n, 512]; differentiable.

    features: a network to [n, width, 7, 7]. The head is MobileFaceNet's: every place of the face has its own weight per channel.
    """

    def __init__(self, features: nn.Module, width: int, channels: int) -> None:
        super().__init__()
        self.features = features
        self.head = nn.Sequential(
            conv(width, channels, 1), nn.BatchNorm2d(channels), nn.PReLU(channels),
            nn.Conv2d(channels, channels, 7, groups=channels, bias=False), nn.BatchNorm2d(channels),
            nn.Flatten(1), nn.Linear(channels, EMBEDDING, bias=False),
        )  # fmt: skip
        self.normalise = nn.BatchNorm1d(EMBEDDING)
        # As in ArcFace the last normalisation's scale is fixed; it sets the embeddings' length.
        nn.init.constant_(self.normalise.weight, _LENGTH / EMBEDDING**0.5)
        self.normalise.weight.requires_grad_(False)

    def forward(self, crops: Tensor) -> Tensor:
        return cast(Tensor, self.normalise(self.head(self.features(crops)).float()))


def residual_recogniser() -> Recogniser:
    """The conditioning one: 1.3 M parameters, full convolutions."""
    layers: list[nn.Module] = [conv(3, 24, 3, 2), nn.BatchNorm2d(24), nn.PReLU(24), ResidualBlock(24, 24)]
    for inputs, outputs in ((24, 40), (40, 80), (80, 144)):
        layers += [ResidualBlock(inputs, outputs, 2), ResidualBlock(outputs, outputs)]
    return Recogniser(nn.Sequential(*layers), 144, EMBEDDING)


def mobile_recogniser() -> Recogniser:
    """The judge: 0.6 M parameters, depthwise convolutions."""
    layers: list[nn.Module] = [
        conv(3, 32, 3, 2),
        nn.BatchNorm2d(32),
        nn.PReLU(32),
        conv(32, 32, 3, groups=32),
        nn.BatchNorm2d(32),
        nn.PReLU(32),
    ]
    for inputs, outputs, depth in ((32, 48, 2), (48, 80, 3), (80, 112, 2)):
        layers.append(Bottleneck(inputs, outputs, 2, 3))
        layers += [Bottleneck(outputs, outputs, 1, 3) for _ in range(depth)]
    return Recogniser(nn.Sequential(*layers), 112, 320)


class CosFace(nn.Module):
    """Cross-entropy of scaled cosines to one centre a person, the right one's reduced by a margin."""

    def __init__(self, people: int) -> None:
        super().__init__()
        # Only the direction of a centre counts, so a smaller start makes the common learning rate larger for the centres.
        self.centres = nn.Parameter(torch.randn(people, EMBEDDING) * 0.004)

    def forward(self, embeddings: Tensor, person: Tensor, margin: float) -> Tensor:
        with torch.autocast(embeddings.device.type, enabled=False):  # bf16 would blur the margin: cosines near 1 in steps of 0.004
            cosines = F.normalize(embeddings.float(), dim=1) @ F.normalize(self.centres, dim=1).T
        ours = torch.arange(len(person), device=person.device)
        cosines = cosines.index_put((ours, person), cosines[ours, person] - margin)
        return F.cross_entropy(_COSFACE_SCALE * cosines, person)


_BATCHES_DRAWN_TOGETHER = 4
_DRAWN_PX = (64, 88, CROP_PX)
"""The face of a full body spans about 57 px of its picture, a portrait's 75, a close-up's 110."""


@dataclass(frozen=True)
class _Plan:
    name: str
    build: Callable[[], Recogniser]
    form: OnnxForm
    seed: int
    people: int = 40_000
    batch: int = 512


def _form(file: str) -> OnnxForm:
    return OnnxForm(file, (2, 3, CROP_PX, CROP_PX), ("embedding",), input_name="input.1")


CONDITIONING = _Plan("recogniser", residual_recogniser, _form("arcface.onnx"), seed=110_001)
JUDGE = _Plan("judge", mobile_recogniser, _form("arcface_judge.onnx"), seed=120_001)


def train_recogniser(seconds: float, device: torch.device, out_dir: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Makes `recogniser.safetensors` and `arcface.onnx` in out_dir; returns facts: steps, losses, separation of held-out people."""
    return _train(CONDITIONING, seconds, device, out_dir, smoke)


def train_judge(seconds: float, device: torch.device, out_dir: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Makes `judge.safetensors` and `arcface_judge.onnx`; as train_recogniser, on other people."""
    return _train(JUDGE, seconds, device, out_dir, smoke)


def load_recogniser(path: Path) -> nn.Module:
    """The conditioning recogniser from its safetensors: fp32, eval mode, differentiable."""
    return restore(residual_recogniser(), path)


def load_judge(path: Path) -> nn.Module:
    return restore(mobile_recogniser(), path)


def _train(plan: _Plan, seconds: float, device: torch.device, out_dir: Path, smoke: bool) -> dict[str, Any]:
    torch.manual_seed(plan.seed)
    people, batch = (32, 8) if smoke else (plan.people, plan.batch)
    workspace, crowd = Workspace(out_dir), Crowd(people, plan.seed, device)
    network = on_device(plan.build(), device)
    centres = CosFace(people).to(device)

    batches = _batches(crowd, batch)

    def loss(progress: float) -> Losses:
        index, crops = next(batches)
        margin = _COSFACE_MARGIN * min(1.0, progress / _MARGIN_FULL_FROM)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return {"loss": centres(network(crops), index, margin)}

    recipe = Recipe(seconds, learning_rate=2e-3, weight_decay=0.05, betas=(0.9, 0.99), averaging=0.0, clip=5.0, smoke=smoke)
    outcome = optimise(plan.name, nn.ModuleList([network, centres]), recipe, workspace, loss)
    return {
        **outcome,
        **separation_of_held_out(network.eval(), 16 if smoke else 400, device),
        **keep(workspace, plan.name, network, plan.form),
    }


def _batches(crowd: Crowd, n: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (index of the person [n], crops [n, 3, 112, 112]). Drawn several batches at a time, since painting is thousands of
    small operations, and at one of several resolutions, as faces of several sizes would be."""
    while True:
        sitters = crowd.draw(n * _BATCHES_DRAWN_TOGETHER)
        drawn_px = _DRAWN_PX[int(torch.randint(0, len(_DRAWN_PX), ()))]
        with torch.no_grad():
            drawn = recognition_crops(sitters, drawn_px)
            crops = [degraded(_enlarged(part)).contiguous(memory_format=torch.channels_last) for part in drawn.split(n)]
        yield from zip(sitters.index.split(n), crops, strict=True)


def _enlarged(crops: Tensor) -> Tensor:
    return F.interpolate(crops, size=(CROP_PX, CROP_PX), mode="bilinear", align_corners=False) if crops.shape[-1] != CROP_PX else crops


@torch.no_grad()
def separation_of_held_out(network: nn.Module, people: int, device: torch.device) -> dict[str, Any]:
    """Per framing, how well pictures of people never trained on match a close-up of theirs; crops by true landmarks, undamaged."""
    identity = held_out_people(people).to(device)
    embeddings = []
    for number, framing in enumerate((CLOSE_UP, CLOSE_UP, PORTRAIT, FULL_BODY)):
        scenes = sample_scenes(people, 500 + number, framing=framing).to(device)
        index = torch.arange(people, device=device)
        parts = [recognition_crops(Sitters(i, identity[i], scenes.take(i)), jitter=0.0) for i in index.split(128)]
        embeddings.append(F.normalize(torch.cat([network(part) for part in parts]), dim=1))
    names = [FRAMINGS[framing].removesuffix(" portrait").removesuffix(" photo") for framing in (CLOSE_UP, PORTRAIT, FULL_BODY)]
    return {f"held_out {name}": separation(embeddings[0], other) for name, other in zip(names, embeddings[1:], strict=True)}


def separation(first: Tensor, second: Tensor, false_accepts: float = 1e-3) -> dict[str, float]:
    """Unit embeddings [n, d] of n people, twice -> means of the cosines of the same and of different people, their spread, and TAR:
    the share of same-person pairs above the threshold that `false_accepts` of the different-person pairs exceed."""
    cosines = (first.float() @ second.float().T).cpu()
    same = cosines.diagonal()
    different = cosines[~torch.eye(len(cosines), dtype=torch.bool)]
    rank = max(1, round(false_accepts * len(different)))
    threshold = different.topk(rank).values[-1]
    figures = {
        "same": same.mean(), "same_10th_percentile": same.quantile(0.1), "different": different.mean(), "different_spread": different.std(),
        "threshold": threshold, "tar": (same > threshold).float().mean(),
    }  # fmt: skip
    return {key: round(float(value), 4) for key, value in figures.items()}
