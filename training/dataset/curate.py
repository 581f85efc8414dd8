"""From pictures to a dataset, whole: look, choose, cut, caption, write, report. One call, for the command line and for a training job."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from deployments.errors import InvalidRequest
from deployments.images import DEFAULT_LIMITS, Limits
from training.dataset.analyse import Memory, analyse, analysed
from training.dataset.caption import captioner_of, style_of
from training.dataset.dataset import DATASET, Dataset, Maker, write_dataset
from training.dataset.files import KeptAnalyses
from training.dataset.notices import notices
from training.dataset.report import Report, ReportPicture, numbers, write_report
from training.dataset.search import FaceFinder
from training.dataset.select import select, subject_of
from training.dataset.settings import CurationSettings
from training.dataset.sources import PictureSource
from training.dataset.values import FaceFacts, PictureAnalysis, Verdict

Stage = Literal["looking", "writing"]
Progress = Callable[[Stage, int, int], object]
"""Is told at which stage how many of how many pictures are done."""


@dataclass(frozen=True, eq=False)
class Curation:
    """dataset: as it was written, whose notices stand in the report."""

    dataset: Dataset
    report: Report


def curate(
    sources: Sequence[PictureSource],
    folder: Path,
    finder: FaceFinder,
    settings: CurationSettings | None = None,
    reference: bytes | None = None,
    progress: Progress | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Curation:
    """Writes the dataset and its report into `folder`, which may hold those of an earlier run: what is known is not looked at again.

    reference: a picture of the subject alone; without one whoever is in most of the pictures is the subject.
    Raises InvalidRequest, NoFaceDetected, MultipleFaces where there is no subject, and InvalidRequest, once the report is written, where no
    picture is accepted.
    """
    chosen = settings or CurationSettings()
    style = style_of(chosen, finder.faces)
    models = finder.faces, finder.judge
    memory = KeptAnalyses(folder, models)
    looked = None if progress is None else _at("looking", progress)
    given = None if reference is None else analysed(reference, finder, limits)
    found = analyse(sources, finder, workers=chosen.workers, memory=memory, progress=looked, limits=limits)
    smallest = finder.smallest_px if chosen.smallest_face_px is None else chosen.smallest_face_px
    names = [source.name for source in sources]
    verdicts = select(names, found, subject_of(found, chosen, smallest, given), chosen, smallest)
    if all(verdict.reason is not None for verdict in verdicts):
        report = _report(names, found, verdicts, None, chosen, models)
        (folder / DATASET).unlink(missing_ok=True)
        write_report(folder, report, _thumbnails(found, memory))
        counts: dict[str, object] = dict(report.reasons.items())
        said = ", ".join(f"{count} {reason}" for reason, count in counts.items())
        raise InvalidRequest(f"None of the {len(sources)} pictures can be used: {said}.", f"See {folder}; add better pictures.", counts)
    maker = Maker(folder, chosen, style, captioner_of(chosen, style), limits)
    dataset = write_dataset(maker, sources, found, verdicts, models, None if progress is None else _at("writing", progress))
    report = _report(names, found, verdicts, dataset, chosen, models)
    write_report(folder, report, _thumbnails(found, memory))
    return Curation(dataset, report)


def _at(stage: Stage, progress: Progress) -> Callable[[int, int], object]:
    return lambda done, total: progress(stage, done, total)


def _thumbnails(found: Sequence[PictureAnalysis], memory: Memory) -> Callable[[str], PictureAnalysis | None]:
    known = {analysis.sha256: analysis for analysis in found}
    return lambda name: known.get(name) or memory.get(name)


def _report(
    names: Sequence[str],
    found: Sequence[PictureAnalysis],
    verdicts: Sequence[Verdict],
    dataset: Dataset | None,
    settings: CurationSettings,
    models: tuple[str, str],
) -> Report:
    made = {picture.source: picture for picture in dataset.pictures} if dataset is not None else {}
    faces: dict[str, FaceFacts] = {
        name: analysis.faces[verdict.face]
        for name, analysis, verdict in zip(names, found, verdicts, strict=True)
        if name in made and verdict.face is not None
    }
    pictures = []
    for name, analysis, verdict in zip(names, found, verdicts, strict=True):
        written = made.get(name)
        pictures.append(
            ReportPicture(
                name=name,
                sha256=analysis.sha256,
                width=analysis.width,
                height=analysis.height,
                faces=len(analysis.faces),
                verdict=verdict,
                numbers=numbers(analysis, verdict),
                file=None if written is None else written.file,
                caption=None if written is None else written.caption,
                composition=None if written is None else written.composition,
            )
        )
    said = () if dataset is None else notices(dataset, faces, settings)
    content = None if dataset is None else dataset.content_sha256
    return Report(models=models, settings=settings, content_sha256=content, notices=said, pictures=tuple(pictures))
