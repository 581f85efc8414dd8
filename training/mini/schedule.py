"""Learning rates by the clock: a stage of training fits the seconds that it is given, however fast the machine.

Warms up linearly and falls along half a cosine, both over the fraction of the seconds that have passed. Knows nothing of
models, data or checkpoints: whoever saves one keeps `state_dict()` beside the optimiser's.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TypedDict

import torch

SMOKE_STEPS = 3
_FLOOR = 0.02
"""The rate never falls below this part of its peak: the last steps still average out the noise of the ones before."""


class ScheduleState(TypedDict):
    elapsed: float
    steps: int


class TimedSchedule:
    """Sets the rates of `optimizer` by elapsed time and says when to stop.

    seconds: the budget. warmup: the part of it spent on rising to the rates that the optimiser's groups had when handed in.
    compile_steps: the first steps of a process do not count (torch.compile, cuDNN's choices, memory): the clock starts after
    them, and starts again in the same way after `load_state_dict`. smoke: stop after three steps, whatever the clock says,
    at the peak rate. clock: seconds, monotonic.

    An optimiser that was itself restored from a checkpoint holds decayed rates: build the schedule first, load both after.
    Raises ValueError for a budget or a warm-up that cannot be kept.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        seconds: float,
        *,
        warmup: float = 0.04,
        compile_steps: int = 2,
        smoke: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if seconds <= 0 and not smoke:
            raise ValueError(
                f"a schedule needs a positive number of seconds, not {seconds}; pass smoke=True for a trial run of {SMOKE_STEPS} steps"
            )
        if not 0 <= warmup < 1:
            raise ValueError(f"warmup is the part of the budget spent on rising, 0 <= warmup < 1, not {warmup}")
        self._groups = optimizer.param_groups
        self._peaks = [float(group["lr"]) for group in self._groups]
        self._seconds, self._warmup, self._compile_steps, self._smoke, self._clock = seconds, warmup, compile_steps, smoke, clock
        self._steps, self._steps_here = 0, 0
        self._elapsed_before = 0.0
        self._started: float | None = None
        self._apply()

    @property
    def steps(self) -> int:
        """Steps taken in all, over every resume."""
        return self._steps

    def elapsed(self) -> float:
        """Seconds of the budget that are used up, over every resume."""
        return self._elapsed_before + (self._clock() - self._started if self._started is not None else 0.0)

    def fraction(self) -> float:
        """0 at the start, 1 once the budget is spent (in a smoke run: by steps)."""
        if self._smoke:
            return min(self._steps / SMOKE_STEPS, 1.0)
        return min(self.elapsed() / self._seconds, 1.0)

    def step(self) -> bool:
        """Call after optimizer.step(): sets the rates of the next step. True: the budget is spent, stop."""
        self._steps += 1
        self._steps_here += 1
        if self._started is None and self._steps_here >= self._compile_steps:
            if torch.cuda.is_available():
                torch.cuda.synchronize()  # kernels of the steps that do not count may still be running
            self._started = self._clock()
        self._apply()
        return self._steps >= SMOKE_STEPS if self._smoke else self.fraction() >= 1.0

    def state_dict(self) -> ScheduleState:
        return {"elapsed": self.elapsed(), "steps": self._steps}

    def load_state_dict(self, state: ScheduleState) -> None:
        """Goes on where a schedule of the same budget stopped; the time in between does not count."""
        self._elapsed_before, self._steps = float(state["elapsed"]), int(state["steps"])
        self._started, self._steps_here = None, 0
        self._apply()

    def _apply(self) -> None:
        factor = 1.0 if self._smoke else _factor(self.fraction(), self._warmup)
        for group, peak in zip(self._groups, self._peaks, strict=True):
            group["lr"] = peak * factor


def _factor(fraction: float, warmup: float) -> float:
    """Linear rise to 1 at `warmup`, half a cosine down to the floor at 1."""
    if fraction < warmup:
        return max(fraction / warmup, _FLOOR)
    falling = (fraction - warmup) / (1 - warmup)
    return _FLOOR + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * falling))
