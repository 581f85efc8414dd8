"""`likeness evaluate`: what a person's LoRA, their pictures and a pose are worth, measured on a server or in this process.

Everything is drawn through the SDK, as anybody's requests are; what is measured stands in training/evaluation/.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from deployments.errors import InvalidRequest, QueueFull, QuotaExceeded, RateLimited, ReplicaLost
from serve.answers import GenerateResponse
from serve.cli_output import ERR, OUT, table, waiting
from serve.client import Client

if TYPE_CHECKING:
    from training.evaluation.cases import Subject
    from training.evaluation.plan import Plan
    from training.evaluation.run import Draw

EPILOG = """likeness evaluate --character character_... --out out/ada --server http://127.0.0.1:8000

draws every configuration of the plan with the same prompts and seeds, asks a recogniser that had no part in the drawing whose face it is,
and writes table.md, summary.json, scores.csv (one row a picture), grid.png, grid_small.png and plot.png.

What was drawn is kept: the same command again goes on where it stopped, and measures nothing twice.

Read differences before means: they are in pairs of the same prompt and seed, with an interval. Nine pictures a configuration tell apart
what differs by 0.05, 36 by 0.03; more seeds: --seeds 8."""

_PATIENCE_S = (2.0, 10.0, 30.0)
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})


def evaluate(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures and figures; what is there already is kept.")],
    config: Annotated[
        str, typer.Option("--config", help="A plan of configs/evaluation/ (character, mini), or a file of your own.")
    ] = "character",
    character: Annotated[str | None, typer.Option(help="A character of yours: its pictures, and its LoRA unless --lora names one.")] = None,
    references: Annotated[Path | None, typer.Option(help="A folder of pictures of the person, in place of a character.")] = None,
    held_out: Annotated[
        Path | None, typer.Option(help="A folder of pictures of the person that neither LoRA nor request has seen: the honest target.")
    ] = None,
    lora: Annotated[str | None, typer.Option(help="The LoRA of the person: lora_..., see `likeness loras list`.")] = None,
    trigger: Annotated[str | None, typer.Option(help="What calls the LoRA up; by default what is kept with it.")] = None,
    noun: Annotated[str, typer.Option(help="What the person is in prompts without a LoRA: person, man, woman.")] = "person",
    sex: Annotated[str | None, typer.Option(help="F or M; by default what the face models say of the references.")] = None,
    only: Annotated[
        list[str] | None, typer.Option(help="A configuration of the plan; give it again for more. All of them by default.")
    ] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="How many seeds a prompt, from the plan's first one on.")] = None,
    clip: Annotated[Path | None, typer.Option(help="A folder with a CLIP, to measure how prompts are followed.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
    server: Annotated[
        str | None,
        typer.Option("--server", envvar="LIKENESS_SERVER", help="Address of a server; without one everything runs in this process."),
    ] = None,
) -> None:
    """Measure how like a person the pictures are: the base model, a LoRA, their pictures, a pose."""
    from training.evaluation.plan import load_plan

    plan = _plan(load_plan(config), only, seeds, clip)
    if (character is None) == (references is None):
        raise InvalidRequest("Whose pictures are they?", "Give either --character or --references.")
    with _client(server) as client:
        subject = _subject(client, character, references, held_out, lora, trigger, noun, _sex(sex))
        _report(plan, subject, drawn_by(client), out, as_json)


def _report(plan: Plan, subject: Subject, draw: Draw, out: Path, as_json: bool) -> None:
    from training.evaluation.run import bench_of
    from training.evaluation.run import evaluate as run
    from training.evaluation.summary import files, write

    with waiting("opening the judges"):
        bench = bench_of(plan)
    with _bar() as told:
        evaluation = run(plan, [subject], draw, out, bench, told)
    with waiting("summing up"):
        found = write(evaluation)
    if as_json:
        OUT.print_json(data=found)
        return
    _print(found)
    for path in files(out):
        OUT.print(str(path), markup=False)


def _print(found: Mapping[str, Any]) -> None:
    lines = table("configuration", "mean (95 %)", "median", "std", "no face", "no face as 0", "same person", "s a picture")
    for item in found["configurations"].values():
        figures, identity = item["all"], item["all"]["identity"]
        low, high = identity["interval"] or (None, None)
        lines.add_row(
            item["label"], f"{_said(identity['mean_of_faces'])} ({_said(low)} to {_said(high)})", _said(identity["median"]),
            _said(identity["std"]), f"{figures['no_face_rate']:.1%}", _said(identity["mean_no_face_as_0"]),
            f"{figures['above_threshold']:.1%}", f"{figures['seconds']['median']:.1f}",
        )  # fmt: skip
    OUT.print(lines)
    for name, why in found["left_out"].items():
        ERR.print(f"{name} was not drawn: {why}.", markup=False)


def _subject(
    client: Client,
    character: str | None,
    references: Path | None,
    held_out: Path | None,
    lora: str | None,
    trigger: str | None,
    noun: str,
    sex: Literal["F", "M"] | None,
) -> Subject:
    from training.evaluation.cases import Subject

    name, pictures, identity = references.resolve().name if references is not None else "", [], {}
    if character is not None:
        item = client.characters.get(character)
        kept = sorted((picture for picture in item.pictures if picture.rank is not None), key=lambda picture: picture.rank or 0)
        name, pictures = item.name, [client.characters.picture(character, picture.id) for picture in kept]
        identity = {"character_id": character}
        if item.lora is not None and lora is None:
            lora, trigger = item.lora.id, trigger or item.lora.trigger_word
    elif references is not None:
        pictures = _pictures(references)
    known = client.loras.get(lora) if lora is not None else None
    return Subject(
        name=name,
        references=pictures,
        held_out=_pictures(held_out) if held_out is not None else (),
        identity=identity,
        lora=lora,
        lora_sha256=known.sha256 if known is not None else None,
        trigger=trigger or (known.trigger_word if known is not None else None),
        noun=noun,
        sex=sex,
    )


def _plan(plan: Plan, only: list[str] | None, seeds: int | None, clip: Path | None) -> Plan:
    chosen = plan.only(tuple(only)) if only else plan
    changes: dict[str, Any] = {} if clip is None else {"clip": clip}
    if seeds is not None:
        further = range(max(plan.seeds) + 1, max(plan.seeds) + 1 + seeds)
        changes["seeds"] = (*plan.seeds, *further)[:seeds]
    return chosen.but(**changes)


def drawn_by(client: Client) -> Draw:
    from training.evaluation.run import Pictures

    def draw(fields: Mapping[str, Any]) -> Pictures:
        answer = _patiently(client, fields)
        return Pictures([item.content for item in answer.data], answer.timings.get("total"), tuple(answer.models), answer.peak_bytes)

    return draw


def _patiently(client: Client, fields: Mapping[str, Any]) -> GenerateResponse:
    """An evaluation takes long, and others have requests too: what passes by itself is waited for, a little."""
    for seconds in _PATIENCE_S:
        try:
            return client.generate(**fields)
        except (QueueFull, RateLimited, QuotaExceeded, ReplicaLost):
            time.sleep(seconds)
    return client.generate(**fields)


def _pictures(folder: Path) -> list[bytes]:
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if not files:
        raise InvalidRequest(f"The folder {folder} holds no picture.", f"Pictures end in {', '.join(sorted(_SUFFIXES))}.")
    return [file.read_bytes() for file in files]


def _sex(said: str | None) -> Literal["F", "M"] | None:
    known: dict[str | None, Literal["F", "M"] | None] = {None: None, "F": "F", "M": "M"}
    if said in known:
        return known[said]
    raise InvalidRequest(f"--sex is {said!r}.", "Give F or M, or leave it out.")


@contextmanager
def _client(server: str | None) -> Iterator[Client]:
    if server is not None:
        with Client(server) as client:
            yield client
        return
    from serve.local import local_client

    with ExitStack() as opened:
        with waiting("starting"):
            client = opened.enter_context(local_client())
        yield client


@contextmanager
def _bar() -> Iterator[Callable[[int, int], None]]:
    columns = (
        SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn()
    )  # fmt: skip
    with Progress(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as progress:
        task = progress.add_task("drawing and judging", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _said(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"
