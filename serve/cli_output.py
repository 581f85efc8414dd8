"""What the command line leaves behind and prints: picture files, a contact sheet, the scores as JSON and as a table."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table

from deployments.errors import LikenessError
from serve.answers import GenerateResponse, Score

_UNBOUND = 200
"""Columns of a table that nobody looks at through a window."""
# Soft wrapping leaves paths whole where they are longer than the window, for whoever copies or pipes them.
OUT = Console(soft_wrap=True, highlight=False, width=None if sys.stdout.isatty() else _UNBOUND)
ERR = Console(stderr=True, soft_wrap=True, highlight=False)


def table(*headers: str) -> Table:
    """Columns that fold where the window is narrow: what is cut off cannot be copied."""
    return Table(*(Column(header, overflow="fold") for header in headers), box=None, pad_edge=False)


@contextmanager
def waiting(text: str) -> Iterator[None]:
    """A turning sign with the time that passes, on the terminal's error stream; nothing where that is no terminal."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        progress.add_task(text, total=None)
        yield


@contextmanager
def drawing(pictures: int) -> Iterator[Callable[[int], None]]:
    """A bar over several pictures; what it yields is told how many are done."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        task = progress.add_task("drawing", total=pictures)
        yield lambda done: progress.update(task, completed=done)


@contextmanager
def moving(name: str, then: str = "") -> Iterator[Callable[[int, int], object]]:
    """A bar over the bytes of a file; what it yields is told how many of how many have gone or come. then: what happens after the last."""
    columns = TextColumn("{task.description}", markup=False), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeElapsedColumn()
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        task = progress.add_task(name, total=None)

        def report(done: int, total: int) -> None:
            progress.update(task, completed=done, total=total, description=f"{name}{then}" if done == total else name)

        yield report


def report_error(error: LikenessError) -> None:
    """What is wrong, and what to do; no traceback."""
    ERR.print(f"[bold red]error[/] ({error.code}): ", end="")
    ERR.print(error.message, markup=False)
    if error.remedy:
        ERR.print(error.remedy, markup=False)


def write_answer(answer: GenerateResponse, folder: Path, name: str) -> list[Path]:
    """Writes `<name>-<seed>.<format>` for each picture, `<name>-<first seed>.json` and, for several, a contact sheet; returns the paths.

    The JSON holds everything of the answer but the pictures, with each picture's file in its place.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w.-]+", "-", name)
    pictures = [item.save(folder / f"{stem}-{item.seed}.{item.format}") for item in answer.data]
    first = f"{stem}-{answer.data[0].seed}" if answer.data else stem
    written = list(pictures)
    if len(pictures) > 1:
        written.append(_sheet(answer, folder / f"{first}-sheet.png"))
    facts = answer.model_dump(mode="json")
    for item, path in zip(facts["data"], pictures, strict=True):
        item.update(b64_json=None, path=path.name)
    scores = folder / f"{first}.json"
    scores.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return [*written, scores]


def print_answer(answer: GenerateResponse, written: list[Path]) -> None:
    """A line for each picture with its likeness to each reference, then the other files, warnings and licences."""
    lines = table("picture", "seed", "likeness to each reference")
    for item, path in zip(answer.data, written, strict=False):
        lines.add_row(str(path), str(item.seed), said(item.scores))
    OUT.print(lines)
    for path in written[len(answer.data) :]:
        OUT.print(str(path), markup=False)
    for warning in answer.warnings:
        ERR.print(f"warning: {warning}", markup=False)
    restricted = sorted({f"{licence.model} ({licence.name})" for licence in answer.licences if not licence.commercial})
    if restricted:
        ERR.print(f"Not for commercial use, by the licences of {', '.join(restricted)}.", markup=False)
    spent = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in answer.timings.items())
    if spent:
        ERR.print(spent, markup=False, style="dim")


def said(scores: list[Score]) -> str:
    """The cosines in the order of the references, grouped by person where there are several."""
    if not scores:
        return "not measured"
    people = sorted({score.person for score in scores})
    groups = [" ".join("no face" if s.cosine is None else f"{s.cosine:.3f} {s.verdict}" for s in scores if s.person == p) for p in people]
    return groups[0] if len(groups) == 1 else "; ".join(f"person {p}: {group}" for p, group in zip(people, groups, strict=True))


def _sheet(answer: GenerateResponse, path: Path) -> Path:
    from deployments.contact_sheet import contact_sheet
    from deployments.images import decode, encode

    captions = [f"seed {item.seed}  {said(item.scores)}" for item in answer.data]
    path.write_bytes(encode(contact_sheet([decode(item.content) for item in answer.data], captions)))
    return path
