"""How often in a row a training has died without getting any further: a file of its folder, since Ray forgets.

Knows no Ray: whoever follows a training says which submission has died (ray_jobs.py).
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from deployments.errors import LikenessError
from training.tasks import PROGRESS, TrainingProgress, put, read

DEATHS = "deaths.json"
MOST = 3
"""Deaths with no checkpoint in between: what comes of chance seldom comes three times at one place."""


class Deaths(BaseModel):
    """checkpoint: the step of the last one, 0 before the first. names: of the submissions that died since it was written."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    checkpoint: int = 0
    names: tuple[str, ...] = ()


def refuse_the_third(folder: Path, name: str, says: str) -> None:
    """Notes that a submission has died; it counts once, whoever notes it. says: its last words.

    Raises LikenessError, which is not retryable, where it is the third with the same last checkpoint.
    """
    if not folder.is_dir():
        return  # nobody wants it any more
    progress, known = read(folder / PROGRESS, TrainingProgress), read(folder / DEATHS, Deaths) or Deaths()
    step = (progress.checkpoint if progress is not None else None) or 0
    if name not in known.names:
        before = known.names if step <= known.checkpoint else ()
        known = Deaths(checkpoint=max(step, known.checkpoint), names=(*before, name))
        put(folder / DEATHS, known)
    if len(known.names) >= MOST:
        where = f"after the checkpoint of step {known.checkpoint}" if known.checkpoint else "before its first checkpoint"
        remedy = "What it dies of comes again each time: tell the operator, whose log has more of it, and submit the training anew then."
        raise LikenessError(f"The training died {len(known.names)} times at the same step, {where}: {says}", remedy)
