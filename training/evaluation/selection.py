"""Which checkpoint of a training is the best: all of them with the same prompts and seeds, the winner again with seeds that chose nobody.

The best of several equal ones looks better than it is, by what chance gave it: of ten with 36 pictures each by about 0.03, of ten with 9 by
0.05 (an sd of 0.1). So the figure that is reported is the second one. Trains nothing and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deployments.errors import InvalidRequest
from training.evaluation.cases import Subject
from training.evaluation.plan import Configuration, Plan
from training.evaluation.rows import Row
from training.evaluation.run import Bench, Draw, Evaluation, Told, evaluate
from training.evaluation.statistics import Difference, difference


class Checkpoint(NamedTuple):
    """name: like `step-1750`. lora: its id, as the service knows it."""

    name: str
    lora: str


@dataclass(frozen=True, eq=False)
class Selection:
    """winner: the checkpoint of the highest mean identity, no face as 0; of equal ones the first. means: of every checkpoint, with the
    seeds that chose. gaps: of every other one, winner less it, in pairs; where the interval reaches zero the two are not told apart.
    fresh: of the winner alone, with fresh seeds; selected - fresh is what chance gave."""

    winner: Checkpoint
    means: dict[str, float]
    gaps: dict[str, Difference]
    fresh: float
    candidates: Evaluation
    confirmation: Evaluation

    @property
    def selected(self) -> float:
        return self.means[self.winner.name]

    @property
    def not_told_apart(self) -> list[str]:
        """Checkpoints that may be as good."""
        return [name for name, gap in self.gaps.items() if not gap.clear]


def select(
    plan: Plan,
    subject: Subject,
    checkpoints: Sequence[Checkpoint],
    draw: Draw,
    folder: Path,
    fresh_seeds: Sequence[int],
    bench: Bench | None = None,
    told: Told | None = None,
) -> Selection:
    """plan: its prompts, its seeds and its first configuration that uses a LoRA alone. Resumes, as `evaluate` does, in folders below
    `folder`. Raises InvalidRequest for no checkpoints, for seeds of which some would choose and confirm, and as `evaluate`."""
    both = sorted(set(plan.seeds) & set(fresh_seeds))
    if both or not fresh_seeds:
        raise InvalidRequest(
            f"Fresh seeds must be some that chose nobody; {', '.join(map(str, both)) or 'none'} were given.", "Use others."
        )
    if not checkpoints:
        raise InvalidRequest("There is no checkpoint to choose from.", "Give at least one.")
    base = _with_lora(plan)
    compared = plan.but(configurations=tuple(_drawing(base, checkpoint) for checkpoint in checkpoints))
    candidates = evaluate(compared, [subject], draw, folder / "candidates", bench, told)
    rows = {checkpoint.name: _rows(candidates, checkpoint) for checkpoint in checkpoints}
    means = {name: _mean(found) for name, found in rows.items()}
    winner = max(checkpoints, key=lambda checkpoint: means[checkpoint.name])
    again = plan.but(configurations=(_drawing(base, winner),), seeds=tuple(fresh_seeds))
    confirmation = evaluate(again, [subject], draw, folder / "winner", bench, told)
    gaps = {name: _gap(found, rows[winner.name]) for name, found in rows.items() if name != winner.name}
    return Selection(winner, means, gaps, _mean(_rows(confirmation, winner)), candidates, confirmation)


def _with_lora(plan: Plan) -> Configuration:
    found = next((item for item in plan.configurations if item.uses == ("lora",)), None)
    if found is None:
        raise InvalidRequest("The plan has no configuration with a LoRA alone.", "Add one with `uses: [lora]`.")
    return found


def _drawing(base: Configuration, checkpoint: Checkpoint) -> Configuration:
    changes = {"name": checkpoint.name, "label": checkpoint.name, "lora": checkpoint.lora}
    return Configuration.model_validate({**{name: getattr(base, name) for name in type(base).model_fields}, **changes})


def _rows(evaluation: Evaluation, checkpoint: Checkpoint) -> list[Row]:
    return [row for row in evaluation.rows if row.key.configuration == checkpoint.name]


def _mean(rows: Sequence[Row]) -> float:
    return float(np.mean([row.identity_or_zero for row in rows]))


def _gap(one: Sequence[Row], other: Sequence[Row]) -> Difference:
    less, more = ({row.pair: row.identity_or_zero for row in rows} for rows in (one, other))
    gap = difference(less, more, {row.pair: row.cluster for row in other})
    assert gap is not None  # the same prompts and seeds, by construction
    return gap
