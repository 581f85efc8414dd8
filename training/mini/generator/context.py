"""What several stages share while one process runs: the device, the workspace, and banks of pictures that are rendered once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn

from training.mini.generator import autoencoder
from training.mini.generator.bank import Bank, BankPlan, fill_bank
from training.mini.workspace import Workspace
from training.mini.world.scene import FULL_BODY

if TYPE_CHECKING:
    from training.mini.faces.detector import Detector

# Seeds of the training people. Held-out people (training.mini.heldout) use seeds from 900,000 on.
_BASE_SEED, _BODY_SEED, _REFERENCE_SEED = 1000, 2000, 3000


@dataclass(frozen=True, eq=False)
class Context:
    """smoke: toy sizes, so that every stage runs on a CPU in seconds. rank: of this process, when several train together;
    each then renders pictures of its own people."""

    workspace: Workspace
    device: torch.device
    smoke: bool = False
    rank: int = 0

    @cached_property
    def vae(self) -> AutoencoderKL:
        return autoencoder.load(self.workspace, self.device)

    @cached_property
    def recogniser(self) -> nn.Module:
        """The conditioning recogniser (never the judge), frozen: crops [n, 3, 112, 112] in -1..1 -> [n, 512]."""
        from training.mini.faces.recognisers import load_recogniser

        return load_recogniser(self.workspace.folder / "recogniser.safetensors").to(self.device).eval().requires_grad_(False)

    @cached_property
    def detector(self) -> Detector:
        """Frozen: finds the face in what the generator draws."""
        from training.mini.faces.detector import load_detector

        return load_detector(self.workspace.folder / "detector.safetensors").detector.to(self.device).requires_grad_(False)

    @cached_property
    def base_bank(self) -> Bank:
        return self._bank(BankPlan(people=16384, per_person=4, seed=_BASE_SEED))

    @cached_property
    def body_bank(self) -> Bank:
        """Full bodies above all: a close-up shows no arms."""
        return self._bank(BankPlan(people=10240, per_person=4, seed=_BODY_SEED, framing=FULL_BODY))

    @cached_property
    def reference_bank(self) -> Bank:
        return self._bank(BankPlan(people=10240, per_person=4, seed=_REFERENCE_SEED, references=True))

    def _bank(self, plan: BankPlan) -> Bank:
        people, pictures = (4, 3) if self.smoke else (plan.people, plan.per_person)
        mine = BankPlan(people, pictures, plan.seed + self.rank, plan.framing, plan.references)
        return fill_bank(mine, self._encode, self._recognise if plan.references else None, self.device)

    def _encode(self, picture: Tensor) -> Tensor:
        return autoencoder.encode(self.vae, picture)

    def _recognise(self, crops: Tensor) -> Tensor:
        with torch.no_grad():
            return self.recogniser(crops)  # type: ignore[no-any-return]
