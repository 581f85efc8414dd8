"""One process of a training under Ray Train: trains what the folder says, tells how far it is, and leaves word of why it could not.

What a training depends on lies in the folder (tasks.py), the exact checkpoints too: Ray Train begins a lost group of processes again, and
this finds where it was. Ray keeps nothing. Imports no torch until it trains: the driver, which only names `work`, has no use for it.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deployments.errors import Cancelled, LikenessError, NotEnoughMemory
from training.placement import Placement
from training.settings import TrainingSettings
from training.tasks import CACHE, FAULT, ProgressFile, TrainingFault, put, task_of, wanted

if TYPE_CHECKING:
    import torch

    from training.character_lora import Trained
    from training.loop import Progress

_ASK_EVERY_S = 0.5


def work(config: Mapping[str, str]) -> dict[str, Any] | None:
    """config: `folder` of the training, `dataset` of its pictures, `placement` as JSON. Returns, in the first process, the fields of a
    TrainingResult that are known here; None where the training was stopped or refused: then the folder says which."""
    import ray.train
    import torch

    folder, placement = Path(config["folder"]), Placement.model_validate_json(config["placement"])
    if not folder.is_dir() or (folder / FAULT).exists():
        return None  # Nobody wants it any more; or it was refused, and begun again by Ray Train it would be refused again.
    lower_priority(placement.nice)
    torch.set_num_threads(placement.threads)
    try:
        trained = _trained(folder, Path(config["dataset"]), placement)
    except Cancelled:
        return None
    except LikenessError as error:
        put(folder / FAULT, TrainingFault.of(error))
        if ray.train.get_context().get_world_size() == 1:
            return None
        raise  # The others wait for this one in the middle of a step: they have to be torn down.
    if trained.outcome.stopped or ray.train.get_context().get_world_rank() != 0:
        return None
    return _said(trained, folder)


def _trained(folder: Path, dataset: Path, placement: Placement) -> Trained:
    import ray.train
    import torch

    from training.character_lora import curated, train_lora

    task = task_of(folder)
    examples, _ = curated(dataset)
    teller = _Teller(folder, task.settings, len(examples), speaks=ray.train.get_context().get_world_rank() == 0)
    device = _device(placement)
    try:
        return train_lora(
            task.settings, examples, task.trigger_word, folder, folder / CACHE, device,
            report=teller.step, cancelled=Now(folder).unwanted, told=teller.encoding,
        )  # fmt: skip
    except torch.OutOfMemoryError as error:
        raise NotEnoughMemory(f"Training with {task.settings.base} ran out of the memory of {device}: {error}") from error


def _device(placement: Placement) -> torch.device:
    import torch
    from ray.train.torch import get_device

    if placement.device == "cpu":
        return torch.device("cpu")

    device: torch.device = get_device()
    torch.cuda.set_device(device)
    return device


class _Teller:
    """speaks: whether it is this process that writes the progress down."""

    def __init__(self, folder: Path, settings: TrainingSettings, accepted: int, *, speaks: bool) -> None:
        self._settings, self._look = settings, Now(folder)
        self._file = ProgressFile(folder, steps=settings.steps, accepted=accepted) if speaks else None

    def encoding(self, what: str, done: int, of: int) -> None:
        """Raises Cancelled: until the first step nothing is lost."""
        if self._look.unwanted():
            raise Cancelled("The training was stopped while pictures were encoded.")
        self._tell(stage="encoding", done=done, of=of)

    def step(self, progress: Progress) -> None:
        import ray.train

        last = progress.step == progress.steps
        said: dict[str, Any] = {"step": progress.step, "loss": progress.loss, "step_s": round(progress.seconds, 4)}
        if progress.held_out is not None:
            said["held_out"] = progress.held_out
        if progress.checkpoint is not None:
            said["checkpoint"] = progress.step
        self._tell(weighty=progress.checkpoint is not None or last, stage="training", done=0, of=0, **said)
        # Ray's own report waits for the controller (one is taken a turn), and every process has to make the same ones.
        if last or progress.step % self._settings.checkpoint_every == 0:
            ray.train.report({"step": progress.step, "loss": progress.loss})

    def _tell(self, *, weighty: bool = False, **said: Any) -> None:
        if self._file is not None:
            self._file.tell(weighty=weighty, **said)


class Now:
    """Whether a training is still wanted, asked of its folder no oftener than need be."""

    def __init__(self, folder: Path, every_s: float = _ASK_EVERY_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._folder, self._every_s, self._clock = folder, every_s, clock
        self._asked, self._wanted = -float("inf"), True

    def unwanted(self) -> bool:
        if self._wanted and self._clock() - self._asked >= self._every_s:
            self._asked, self._wanted = self._clock(), wanted(self._folder)
        return not self._wanted


def lower_priority(nice: int) -> None:
    """Of this thread and what it starts, to a niceness of at least so much; Ray may have lowered it already."""
    os.nice(max(nice - os.nice(0), 0))


def _said(trained: Trained, folder: Path) -> dict[str, Any]:
    losses = {step: loss for step, path in trained.checkpoints.items() if (loss := _held_out(path)) is not None}
    return {
        "lora": str(trained.lora.relative_to(folder)),
        "steps": trained.outcome.step,
        "checkpoints": {step: str(path.relative_to(folder)) for step, path in trained.checkpoints.items()},
        "held_out": losses,
        "dataset_sha256": trained.dataset,
        "warnings": trained.warnings,
    }


def _held_out(path: Path) -> float | None:
    """The loss that the header of a checkpoint's LoRA tells: of those before a resume nobody else knows it."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        scores: dict[str, float] = json.loads((file.metadata() or {}).get("scores", "{}"))
    return scores.get("held_out_loss")
