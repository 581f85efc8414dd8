"""Body keypoints: OpenPose's 18 joints of the one person in a picture, as heatmaps.

Input [n, 3, 192, 192] RGB in 0..1. Output [n, 18, 48, 48] in 0..1, joints in the order of skeleton.KEYPOINTS: a Gaussian around each
visible joint, nothing for a joint outside the picture. `joints_from` turns heatmaps into points; whoever serves the ONNX file does
the same in NumPy: the highest cell, refined by a parabola through the logarithms of its neighbours.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from training.mini.faces.artefacts import OnnxForm, keep, restore
from training.mini.faces.convolutions import Encoder, SeparableBlock, TopDown, on_device
from training.mini.faces.crops import Crowd
from training.mini.faces.degradations import degraded
from training.mini.faces.detector_targets import quality_focal_loss
from training.mini.heldout import held_out_people
from training.mini.optimise import Losses, Recipe, optimise
from training.mini.workspace import Workspace
from training.mini.world.render import PICTURE_SIZE_PX, render
from training.mini.world.scene import sample_scenes
from training.mini.world.skeleton import KEYPOINTS, keypoints

CELL_PX = 4
HEATMAP = PICTURE_SIZE_PX // CELL_PX
VISIBLE_FROM = 0.3
"""A peak below this is no joint."""
_SPREAD_CELLS = 1.5
_WIDTHS, _DEPTHS, _NECK = (32, 48, 64, 80), (1, 2, 2, 2), 48
NAME = "body_keypoints"
FORM = OnnxForm("body_keypoints.onnx", (2, 3, PICTURE_SIZE_PX, PICTURE_SIZE_PX), ("heatmaps",), unit_range=True)
_SEED, _PEOPLE = 160_001, 20_000


class BodyKeypoints(nn.Module):
    """[n, 3, 192, 192] RGB in 0..1 -> [n, 18, 48, 48] in 0..1."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(4, _WIDTHS, _DEPTHS)
        self.neck = TopDown(_WIDTHS, _NECK)
        self.to_heatmaps = nn.Sequential(SeparableBlock(_NECK), nn.Conv2d(_NECK, len(KEYPOINTS), 1))
        nn.init.constant_(cast(Tensor, cast(nn.Conv2d, self.to_heatmaps[1]).bias), -4.0)  # almost every cell is empty

    def forward(self, pictures: Tensor) -> Tensor:
        return self.logits(pictures).sigmoid()

    def logits(self, pictures: Tensor) -> Tensor:
        return cast(Tensor, self.to_heatmaps(self.neck(self.encoder(pictures * 2 - 1))[0]).float())


def heatmaps_of(points: Tensor, visible: Tensor) -> Tensor:
    """points [n, 18, 2] in picture coordinates (-1..1), visible [n, 18] -> what the network should draw, [n, 18, 48, 48]."""
    cells = (points + 1) * (HEATMAP / 2) - 0.5
    axis = torch.arange(HEATMAP, device=points.device, dtype=torch.float32)
    x = torch.exp(-0.5 * ((axis - cells[..., :1]) / _SPREAD_CELLS) ** 2)
    y = torch.exp(-0.5 * ((axis - cells[..., 1:]) / _SPREAD_CELLS) ** 2)
    return y[..., :, None] * x[..., None, :] * visible[..., None, None]


def joints_from(heatmaps: Tensor) -> tuple[Tensor, Tensor]:
    """heatmaps [n, 18, 48, 48] in 0..1 -> points [n, 18, 2] in picture coordinates (-1..1) and peaks [n, 18]: visible from 0.3 on."""
    n, k, h, w = heatmaps.shape
    peaks, at = heatmaps.flatten(2).max(-1)
    logarithm = heatmaps.clamp_min(1e-6).log().flatten(2)

    def refined(cell: Tensor, step: int, size: int) -> Tensor:
        inner = (cell > 0) & (cell < size - 1)
        middle = torch.where(inner, at, at.new_full((), w + 1))
        before, here, after = (logarithm.gather(2, (middle + d)[..., None])[..., 0] for d in (-step, 0, step))
        offset = (after - before) / (2 * (2 * here - after - before)).clamp_min(1e-6)
        return cell + torch.where(inner, offset.clamp(-0.5, 0.5), 0.0)

    x, y = refined(at % w, 1, w), refined(torch.div(at, w, rounding_mode="floor"), w, h)
    return (torch.stack([x, y], -1) + 0.5) * 2 / torch.tensor([w, h], device=heatmaps.device) - 1, peaks


def train_body_keypoints(seconds: float, device: torch.device, out_dir: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Makes `body_keypoints.safetensors` and `body_keypoints.onnx` in out_dir; returns facts: steps, losses, errors on held-out people."""
    torch.manual_seed(_SEED)
    batch = 4 if smoke else 128
    crowd, workspace = Crowd(32 if smoke else _PEOPLE, _SEED, device), Workspace(out_dir)
    network = on_device(BodyKeypoints(), device)

    def loss(progress: float) -> Losses:
        sitters = crowd.draw(batch)
        with torch.no_grad():
            pictures = degraded(render(sitters.identity, sitters.scene), wobble=0.0)
            wanted = heatmaps_of(*keypoints(sitters.identity, sitters.scene))
            pictures = ((pictures + 1) / 2).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = network.logits(pictures)
        return {"loss": quality_focal_loss(logits, wanted).sum() / wanted.sum().clamp_min(1.0)}

    recipe = Recipe(seconds, learning_rate=3e-3, weight_decay=0.02, betas=(0.9, 0.99), averaging=0.0, smoke=smoke)
    outcome = optimise(NAME, network, recipe, workspace, loss)
    return {**outcome, **errors_on_held_out(network.eval(), 8 if smoke else 512, device), **keep(workspace, NAME, network, FORM)}


def load_body_keypoints(path: Path) -> BodyKeypoints:
    return cast(BodyKeypoints, restore(BodyKeypoints(), path))


@torch.no_grad()
def errors_on_held_out(network: nn.Module, people: int, device: torch.device) -> dict[str, float]:
    """error_px: mean distance of the visible joints in pixels of 192; found: share of them with a peak; invented: share of the joints
    outside the picture that have one."""
    identity, scenes = held_out_people(people).to(device), sample_scenes(people, 800).to(device)
    points, visible = keypoints(identity, scenes)
    parts = torch.arange(people, device=device).split(64)
    heatmaps = torch.cat([network((render(identity[i], scenes.take(i)) + 1) / 2) for i in parts])
    return keypoint_errors(heatmaps, points, visible)


def keypoint_errors(heatmaps: Tensor, points: Tensor, visible: Tensor) -> dict[str, float]:
    guessed, peaks = joints_from(heatmaps)
    error = (guessed - points).norm(dim=-1)[visible] * (PICTURE_SIZE_PX / 2)
    seen = peaks >= VISIBLE_FROM
    figures = {"error_px": error.mean(), "error_px_95th_percentile": error.quantile(0.95), "found": seen[visible].float().mean()}
    hidden = seen[~visible].float()
    figures["invented"] = hidden.mean() if len(hidden) else hidden.sum()
    return {key: round(float(value), 4) for key, value in figures.items()}
