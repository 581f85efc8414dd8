"""Windows: which steps of a schedule something acts in, when it was asked for in percents of it.

Plain arithmetic, without torch, since a request is refused by the same rule by which the denoise loop acts. Knows no model.
"""

from __future__ import annotations

import math

# In steps. A window that was meant as 4/28 and written with six digits begins at step 4, for up to 200 steps.
_EPSILON = 1e-4


def active_steps(steps: int, start: float, end: float) -> range:
    """Those of the steps 0..steps-1 that lie wholly in the window start..end, percents of the schedule (0..1); there may be none.

    Step i covers i / steps to (i + 1) / steps, hence ceil(start steps) <= i < floor(end steps).
    """
    return range(math.ceil(start * steps - _EPSILON), math.floor(end * steps + _EPSILON))


def first_step(steps: int, strength: float) -> int:
    """The step from which a share `strength` of the schedule is left, at least one of them (FluxImg2ImgPipeline.get_timesteps)."""
    return min(math.floor(max(steps - steps * strength, 0) + _EPSILON), steps - 1)


def active(step: int, steps: int, start: float, end: float) -> bool:
    """Whether step 0..steps-1 lies in the window start..end."""
    return step in active_steps(steps, start, end)
