"""One optimisation by the clock: AdamW, averaged weights, checkpoints, progress; on one GPU, on several (torchrun), or on a CPU.

A stage hands in a module and a function from progress (0..1) to losses; everything else that stages share is here. Knows
nothing of what is learnt.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from training.mini.schedule import TimedSchedule
from training.mini.storage import fake_quantise
from training.mini.workspace import Workspace

Losses = Mapping[str, Tensor]
_CHECKPOINT_EVERY_S = 40.0
_REPORT_EVERY_STEPS = 100


@dataclass(frozen=True)
class Recipe:
    """How to optimise. learning_rate: the peak; averaging: decay of the weights' moving average; quantise_from: progress from
    which the forward pass sees the matrices as fp8 e4m3 stores them (the gradients go to the full-precision ones)."""

    seconds: float
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.95)
    averaging: float = 0.999
    quantise_from: float = 0.6
    clip: float = 1.0
    smoke: bool = False

    def but(self, **changes: float) -> Recipe:
        return replace(self, **changes)  # type: ignore[arg-type]


Outcome = dict[str, Any]
"""steps taken, seconds spent on them, the number of processes (one a GPU), and the last reported losses: facts for the card."""


def optimise(
    name: str, module: nn.Module, recipe: Recipe, workspace: Workspace, loss: Callable[[float], Losses], rounded: nn.Module | None = None
) -> Outcome:
    """Minimises loss(progress)["loss"] over the module's trainable parameters and leaves their moving average in them.

    rounded: the part of the module whose matrices will be stored as fp8; from recipe.quantise_from on the loss sees them so.
    Resumes from the workspace's checkpoint of the same name. Raises FloatingPointError when the loss is no longer finite.
    """
    run = _Run(name, module, recipe, workspace, rounded)
    done = False
    bar = tqdm(total=100, desc=name, unit="%", disable=None, bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    while not done:
        losses, done = run.step(loss)
        if run.schedule.steps % _REPORT_EVERY_STEPS == 1 or done:
            run.report(losses, bar)
    bar.close()
    return run.finish()


class _Run:
    def __init__(self, name: str, module: nn.Module, recipe: Recipe, workspace: Workspace, rounded: nn.Module | None) -> None:
        self.name, self.recipe, self.workspace = name, recipe, workspace
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        self.matrices = [p for p in rounded.parameters() if p.requires_grad and p.ndim == 2] if rounded is not None else []
        _same_everywhere(self.parameters)
        self.average = [p.detach().clone() for p in self.parameters]
        fused = self.parameters[0].is_cuda
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=recipe.learning_rate, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=fused
        )
        self.schedule = TimedSchedule(self.optimizer, recipe.seconds, smoke=recipe.smoke)
        self.losses: dict[str, float] = {}
        self.started = self.saved = time.monotonic()
        self._resume()

    def step(self, loss: Callable[[float], Losses]) -> tuple[Losses, bool]:
        progress = self.schedule.fraction()
        quantised = bool(self.matrices) and (progress >= self.recipe.quantise_from or self.recipe.smoke)
        with _as_stored(self.matrices) if quantised else _unchanged():
            losses = loss(progress)
            self.optimizer.zero_grad(set_to_none=True)
            losses["loss"].backward()
        _mean_everywhere(self.parameters)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        self.optimizer.step()
        done = _agreed(self.schedule.step(), self.optimizer)
        steps = self.schedule.steps
        decay = min(self.recipe.averaging, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        if time.monotonic() - self.saved > _CHECKPOINT_EVERY_S and not done:
            self._checkpoint()
        return losses, done

    def report(self, losses: Losses, bar: tqdm[None]) -> None:
        self.losses = {key: float(value.detach()) for key, value in losses.items()}
        if not all(value == value and abs(value) != float("inf") for value in self.losses.values()):
            raise FloatingPointError(f"stage {self.name}: the loss is no longer finite after {self.schedule.steps} steps: {self.losses}")
        text = "  ".join(f"{key} {value:.4f}" for key, value in self.losses.items())
        bar.n = round(100 * self.schedule.fraction())
        bar.set_postfix_str(f"step {self.schedule.steps}  {text}")
        if bar.disable and main_process():
            took = 1000 * (time.monotonic() - self.started) / self.schedule.steps
            print(
                f"{self.name:>12} {100 * self.schedule.fraction():5.1f} %  step {self.schedule.steps:6d}  {took:6.1f} ms  {text}",
                flush=True,
            )

    def finish(self) -> Outcome:
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.parameters), self.average)
        self.workspace.forget(self.name)
        return {"steps": self.schedule.steps, "seconds": round(self.schedule.elapsed(), 1), "devices": processes(), **self.losses}

    def _checkpoint(self) -> None:
        self.saved = time.monotonic()
        if main_process():
            tensors = {"parameters": [p.detach() for p in self.parameters], "average": self.average}
            self.workspace.checkpoint(
                self.name, {**tensors, "optimizer": self.optimizer.state_dict(), "schedule": dict(self.schedule.state_dict())}
            )

    def _resume(self) -> None:
        state = self.workspace.resumable(self.name, self.parameters[0].device)
        if state is None:
            return
        with torch.no_grad():
            torch._foreach_copy_(list[Tensor](self.parameters), state["parameters"])
            torch._foreach_copy_(self.average, state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


@contextmanager
def _as_stored(matrices: list[nn.Parameter]) -> Iterator[None]:
    """Inside, the matrices hold what storage would give back; their full-precision values return afterwards (straight-through)."""
    with torch.no_grad():
        kept = [p.detach().clone() for p in matrices]
        torch._foreach_copy_(list[Tensor](matrices), [fake_quantise(p) for p in kept])
    yield
    with torch.no_grad():
        torch._foreach_copy_(list[Tensor](matrices), kept)


@contextmanager
def _unchanged() -> Iterator[None]:
    yield


def main_process() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def processes() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _same_everywhere(parameters: list[nn.Parameter]) -> None:
    if dist.is_initialized():
        for p in parameters:
            dist.broadcast(p.data, 0)


def _mean_everywhere(parameters: list[nn.Parameter]) -> None:
    """Averages the gradients over the processes, in one message."""
    if not dist.is_initialized():
        return
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat, dist.ReduceOp.SUM)
    flat /= dist.get_world_size()
    for p, part in zip(parameters, flat.split([g.numel() for g in gradients]), strict=True):
        p.grad = part.view_as(p)


def _agreed(done: bool, optimizer: torch.optim.Optimizer) -> bool:
    """Clocks differ between processes; rates and the end must not. The first process's count (sent over the CPU: no GPU waits)."""
    if not dist.is_initialized():
        return done
    said = torch.tensor([float(done), *(group["lr"] for group in optimizer.param_groups)], dtype=torch.float64)
    dist.broadcast(said, 0)
    for group, rate in zip(optimizer.param_groups, said[1:].tolist(), strict=True):
        group["lr"] = rate
    return bool(said[0])
