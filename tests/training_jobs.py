"""Trainings of a few steps on few small pictures, and who watches them: what tests of training under Ray share."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.ray_processes import title
from training.placement import Placement
from training.ray_jobs import RayTrainings
from training.settings import preset
from training.tasks import TrainingProgress, TrainingResult, TrainingTask, prepared

SAMPLES = Path(__file__).resolve().parents[1] / "samples" / "characters"
PLACEMENTS = {
    "local": Placement(device="cpu", cpus=0.5, driver_cpus=0.1, nice=5),
    "pair": Placement(device="cpu", cpus=0.5, driver_cpus=0.1, nice=5, workers=2),
    # GPUs are reserved, and nothing is computed on them: there are none.
    "a6000": Placement(device="cpu", gpus=1, driver_cpus=0.1, nice=5, labels={"gpu-class": "a6000"}),
    "a100": Placement(device="cpu", gpus=1, driver_cpus=0.1, nice=5, labels={"gpu-class": "a100"}),
}


def task(placement: str = "local", **changes: Any) -> TrainingTask:
    """Six steps of one picture of 64 pixels, and a checkpoint every other."""
    usual = {"steps": 6, "batch": 1, "resolutions": [64], "checkpoint_every": 2, "warm_up_steps": 0, "rank": 8, "alpha": 8, "held_out": 1}
    settings = preset("mini", **(usual | changes))
    return TrainingTask(trigger_word="ohwx", class_word="woman", settings=settings, placement=placement)


def pictures(who: str = "ada") -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(SAMPLES.glob(f"{who}-*.png"))}


@dataclass
class Watched:
    """A training that is followed, and what it told."""

    trainings: RayTrainings
    job: str
    folder: Path
    told: list[TrainingProgress] = field(default_factory=list)

    def prepare(self, task: TrainingTask) -> Watched:
        prepared(self.folder, task, pictures())
        return self

    async def follow(self) -> TrainingResult:
        return await self.trainings.follow(self.job, self.folder, self.told.append)

    def begin(self) -> asyncio.Task[TrainingResult]:
        return asyncio.create_task(self.follow())

    async def until_step(self, step: int, seconds: float = 300) -> None:
        await until(lambda: bool(self.told) and self.told[-1].step >= step, seconds, f"step {step} of {self.job}")

    @property
    def steps(self) -> list[int]:
        """That were told of while it was trained, in the order in which they came."""
        return [told.step for told in self.told if told.stage == "training"]

    def driver(self) -> list[psutil.Process]:
        """Processes of the driver, in whichever Ray this process has started."""
        return ours(f"{sys.executable} -m training.job {self.folder}")


def ours(beginning: str) -> list[psutil.Process]:
    return [process for process in psutil.Process().children(recursive=True) if title(process).startswith(beginning)]


async def until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"{what} has not come within {seconds:g} s"
        await asyncio.sleep(0.1)
