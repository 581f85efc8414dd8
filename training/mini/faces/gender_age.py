"""Sex and apparent age, in the layout of insightface's genderage model (its class Attribute).

Input: the detector's box, squared and 1.5 times as wide, 96 px, RGB, (x - 127.5) / 128. Output [n, 3]: a logit for female, one for
male, years / 100. Age shows in this world as grey hair and lines, so it can be told in bands rather than in years.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training.mini.faces.artefacts import OnnxForm, keep, restore
from training.mini.faces.convolutions import Encoder, on_device
from training.mini.faces.crops import Crowd, Sitters, box_crops
from training.mini.faces.degradations import degraded
from training.mini.heldout import held_out_people
from training.mini.optimise import Losses, Recipe, optimise
from training.mini.workspace import Workspace
from training.mini.world.identity import age_years, sex
from training.mini.world.scene import sample_scenes

INPUT_PX = 96
MARGIN = 1.5
_YEARS = 100.0
_AGE_WEIGHT = 4.0
_TYPICAL_AGE = 0.45
NAME = "gender_age"
FORM = OnnxForm("genderage.onnx", (2, 3, INPUT_PX, INPUT_PX), ("fc1",), input_name="data")
_SEED, _PEOPLE = 150_001, 40_000


class GenderAge(nn.Module):
    """[n, 3, 96, 96] RGB in -1..1 -> [n, 3]: female logit, male logit, years / 100."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = Encoder(4, (16, 32, 48, 64), (1, 1, 2, 1))
        self.answer = nn.Linear(64 * 9, 3)
        self.typical: Tensor
        self.register_buffer("typical", torch.tensor([0.0, 0.0, _TYPICAL_AGE]), persistent=False)

    def forward(self, crops: Tensor) -> Tensor:
        return cast(Tensor, self.answer(self.encoder(crops)[-1].flatten(1)).float() + self.typical)


def train_gender_age(seconds: float, device: torch.device, out_dir: Path, *, smoke: bool = False) -> dict[str, Any]:
    """Makes `gender_age.safetensors` and `genderage.onnx` in out_dir; returns facts: steps, losses, errors on held-out people."""
    torch.manual_seed(_SEED)
    batch = 8 if smoke else 384
    crowd, workspace = Crowd(32 if smoke else _PEOPLE, _SEED, device), Workspace(out_dir)
    network = on_device(GenderAge(), device)

    def loss(progress: float) -> Losses:
        sitters = crowd.draw(batch)
        with torch.no_grad():
            crops = (degraded(box_crops(sitters, INPUT_PX, MARGIN)) * (127.5 / 128)).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            answer = network(crops)
        wrong_sex = F.cross_entropy(answer[:, :2], sex(sitters.identity))
        wrong_age = (answer[:, 2] - age_years(sitters.identity) / _YEARS).abs().mean()
        return {"loss": wrong_sex + _AGE_WEIGHT * wrong_age, "sex": wrong_sex, "years": wrong_age * _YEARS}

    recipe = Recipe(seconds, learning_rate=2e-3, weight_decay=0.05, betas=(0.9, 0.99), averaging=0.0, smoke=smoke)
    outcome = optimise(NAME, network, recipe, workspace, loss)
    return {**outcome, **errors_on_held_out(network.eval(), 16 if smoke else 512, device), **keep(workspace, NAME, network, FORM)}


def load_gender_age(path: Path) -> GenderAge:
    return cast(GenderAge, restore(GenderAge(), path))


@torch.no_grad()
def errors_on_held_out(network: GenderAge, people: int, device: torch.device) -> dict[str, float]:
    """sex_right: share; age_error_years: mean."""
    identity, scenes = held_out_people(people).to(device), sample_scenes(people, 700).to(device)
    crops = box_crops(Sitters(torch.arange(people, device=device), identity, scenes), INPUT_PX, MARGIN, jitter=0.0)
    answer = network(crops * (127.5 / 128))
    right = (answer[:, :2].argmax(1) == sex(identity)).float().mean()
    years = (answer[:, 2] * _YEARS - age_years(identity)).abs().mean()
    return {"sex_right": round(float(right), 4), "age_error_years": round(float(years), 2)}
