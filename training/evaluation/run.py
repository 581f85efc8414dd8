"""An evaluation: every picture drawn by whoever draws, judged, written down; then the summary, the grid, the plot and the table.

Knows no service: `draw` is a function from a request's fields to pictures (the SDK's `generate` is one, serve/cli_evaluate.py). The same
plan, subjects and folder a second time draw only what is missing.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from deployments.contracts import PictureFaces
from deployments.errors import InvalidRequest, MissingWeights
from deployments.face_server import FaceServer, FaceSettings
from deployments.images import decode
from training.evaluation.adherence import Adherence, measures
from training.evaluation.cases import Case, Subject, cases, lacking
from training.evaluation.likeness import Known, Look, known, measured
from training.evaluation.plan import Plan
from training.evaluation.rows import Row, RowFile


@dataclass(frozen=True)
class Pictures:
    """What was drawn. encoded: files, of which the first counts. seconds: as the service says; the clock's, where it says nothing.
    models: the catalogue's ids of all that took part. peak_bytes: the most memory that the denoiser held; None where it is not known."""

    encoded: Sequence[bytes]
    seconds: float | None = None
    models: tuple[str, ...] = ()
    peak_bytes: int | None = None


Draw = Callable[[Mapping[str, Any]], Pictures]
Told = Callable[[int, int], object]
"""How many pictures are there, of how many."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """rows: one a picture, in the order of the plan. known: the subjects as the judge knows them. left_out: configuration -> why. judges:
    ids of all models that measured. drawn: how many pictures this run drew; the others were there."""

    plan: Plan
    rows: Sequence[Row]
    known: Mapping[str, Known]
    left_out: Mapping[str, str]
    judges: tuple[str, ...]
    folder: Path
    drawn: int


@dataclass(frozen=True, eq=False)
class Bench:
    """What pictures are measured with, opened once. look: finds and judges faces; faces: ids of the models behind it."""

    look: Look
    adherence: Sequence[Adherence]
    faces: FaceSettings

    @property
    def models(self) -> tuple[str, ...]:
        return (self.faces.faces, self.faces.judge, *(model for measure in self.adherence for model in measure.models))


def bench_of(plan: Plan) -> Bench:
    """Raises MissingWeights, LicenseRefused, InvalidRequest."""
    return Bench(looking(plan.faces), measures(plan), plan.faces)


def looking(settings: FaceSettings) -> Look:
    """The face models of the catalogue, in this process."""
    server = FaceServer(settings)

    def look(pictures: Sequence[bytes]) -> Sequence[PictureFaces]:
        try:
            return server.analyze(pictures, ("judge", "attributes"))
        except MissingWeights:  # face models without one for age and sex, which are then not known
            return server.analyze(pictures, ("judge",))

    return look


def evaluate(
    plan: Plan, subjects: Sequence[Subject], draw: Draw, folder: Path, bench: Bench | None = None, told: Told | None = None
) -> Evaluation:
    """Draws what is missing in the folder and measures it. bench: opened for the plan unless given. What `draw` raises is raised here; the
    rows until then are kept. Raises InvalidRequest, NoFaceDetected (of references), and as bench_of."""
    wanted = cases(plan, subjects)
    opened = bench if bench is not None else bench_of(plan)
    people = {subject.name: known(subject, opened.look) for subject in subjects}
    file = RowFile.of(folder, [name for measure in opened.adherence for name in measure.names])
    there = {row.key: row for row in file.rows if (folder / row.picture).is_file()}
    missing = [case for case in wanted if case.key not in there or there[case.key].asked != case.asked]
    tell = told if told is not None else _nobody
    tell(len(wanted) - len(missing), len(wanted))
    for number, case in enumerate(missing, 1):
        row = _drawn(case, draw, folder, people[case.subject.name], opened)
        file.append(row)
        there[case.key] = row
        tell(len(wanted) - len(missing) + number, len(wanted))
    rows = [replace(there[case.key], sex=people[case.subject.name].sex) for case in wanted]
    return Evaluation(plan, rows, people, lacking(plan, subjects), opened.models, folder, len(missing))


def _drawn(case: Case, draw: Draw, folder: Path, person: Known, bench: Bench) -> Row:
    started = time.perf_counter()
    drawn = draw(case.fields)
    spent = time.perf_counter() - started
    if not drawn.encoded:
        raise InvalidRequest(f"Nothing was drawn for {' / '.join(map(str, case.key))}.", "Look into the service's log.")
    picture = decode(drawn.encoded[0])
    (found,) = bench.look([drawn.encoded[0]])
    followed: dict[str, float] = {}
    for measure in bench.adherence:
        followed |= measure.scores(picture, case.prompt, case.subject)
    place = f"pictures/{case.subject.slug}/{case.key.configuration}/{case.key.prompt}-{case.key.seed}{_suffix(drawn.encoded[0])}"
    _kept(folder / place, drawn.encoded[0])
    return Row(
        key=case.key,
        framing=case.prompt.framing,
        sex=person.sex,
        asked=case.asked,
        measured=measured(found, person),
        seconds=spent if drawn.seconds is None else drawn.seconds,
        models=drawn.models,
        picture=place,
        peak_bytes=drawn.peak_bytes,
        adherence=followed,
    )


def _suffix(data: bytes) -> str:
    """Of the file as it came, its recipe inside."""
    kinds = ((b"\x89PNG", ".png"), (b"\xff\xd8", ".jpeg"))
    return next((suffix for opening, suffix in kinds if data.startswith(opening)), ".webp")


def _kept(path: Path, content: bytes) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".part")
    with beside.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    beside.replace(path)


def _nobody(done: int, total: int) -> None:
    """Nobody wants to be told."""
