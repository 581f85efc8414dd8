"""`likeness dataset`: pictures of a person made into what a LoRA is trained on, on this machine. Loads face models only to look at them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from deployments.errors import InvalidRequest
from serve.cli_output import ERR, OUT, table

if TYPE_CHECKING:
    from training.dataset.curate import Progress, Stage
    from training.dataset.report import Report
    from training.dataset.settings import CurationSettings

_HELP = """Pictures for a LoRA: which of a folder are of use, cut, captioned and explained.

    likeness dataset curate holiday/ --out ada --trigger ohwx --class-word woman

finds the person who is in most of the pictures (or whom `--reference` shows), sets aside what would spoil a LoRA (somebody else, too small
or too far away, blurred, twice the same, faces that cannot be cropped away), cuts other people off, and writes a caption beside each.
`ada/report.html` shows every picture, what became of it and why.

Twenty pictures in different clothes, places and light make a good LoRA: most of them close, some whole figures, some from the side. Run it
again after adding some: what was looked at before is not looked at again.

These are people's faces: the folder holds their pictures, and embeddings in `analysis/`. Delete it when it is no longer needed."""
dataset = typer.Typer(help=_HELP, no_args_is_help=True)

_STAGES: dict[Stage, str] = {"looking": "looking at pictures", "writing": "cutting and captioning"}
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]


@dataset.command()
def curate(
    folder: Annotated[Path, typer.Argument(help="The pictures, and folders of them: PNG, JPEG, WebP.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Where the dataset goes; one of an earlier run is brought up to date.")],
    reference: Annotated[
        Path | None, typer.Option(help="A picture of the person alone; without one it is whoever is in most pictures.", show_default=False)
    ] = None,
    trigger: Annotated[str, typer.Option(help="The word that will call the person up in prompts.")] = "ohwx",
    class_word: Annotated[str | None, typer.Option(help="What the person is: man, woman; by default person.", show_default=False)] = None,
    captions: Annotated[
        str | None, typer.Option(help="A style of configs/training/captions.yaml; by default that of the face models.", show_default=False)
    ] = None,
    captioner: Annotated[
        str | None, typer.Option(help="module:object that says what else is in a picture; by default the style's.", show_default=False)
    ] = None,
    smallest_face: Annotated[
        float | None, typer.Option(help="Pixels that a face needs across; by default what the face models ask for.", show_default=False)
    ] = None,
    mask_weight: Annotated[float, typer.Option(help="How much other people's heads count in the loss where they reach in.")] = 0.1,
    blur_others: Annotated[bool, typer.Option("--blur-others", help="Blur those heads. A LoRA may learn the blur; masks do not.")] = False,
    upscale: Annotated[
        int | None,
        typer.Option(help="Enlarge to this shorter side (1024). What enlarging invents is learned as well.", show_default=False),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=64, help="Threads.")] = 2,
    config: Annotated[str, typer.Option(help="Whose face models: a name in configs/serve/, or a YAML file like those.")] = "local",
    as_json: AsJson = False,
) -> None:
    """Choose, crop and caption the pictures of one person."""
    chosen = _settings(
        trigger=trigger,
        class_word=class_word,
        captions=captions,
        captioner=captioner,
        smallest_face_px=smallest_face,
        mask_weight=mask_weight,
        blur_others=blur_others,
        upscale_px=upscale,
        workers=workers,
    )
    report = _curated(folder, out, reference, chosen, config)
    _tell(report, out, as_json)


@dataset.command("report")
def tell(
    folder: Annotated[Path, typer.Argument(help="A dataset that `curate` made.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Show what became of each picture, and draw the page and the contact sheet anew."""
    from training.dataset.report import rewrite_report

    _tell(rewrite_report(folder), folder, as_json)


def _settings(**values: object) -> CurationSettings:
    from pydantic import ValidationError

    from training.dataset.settings import CurationSettings

    try:
        return CurationSettings.model_validate(values)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors())
        raise InvalidRequest(f"The options do not fit: {said}.", "See `likeness dataset curate --help`.") from error


def _curated(folder: Path, out: Path, reference: Path | None, chosen: CurationSettings, config: str) -> Report:
    from serve.settings import load_settings
    from training.dataset.curate import curate as run
    from training.dataset.search import FaceFinder
    from training.dataset.sources import from_folder

    if out.resolve() == folder.resolve() or folder.resolve() in out.resolve().parents:
        raise InvalidRequest(f"{out} lies in {folder}, whose pictures are read.", "Choose a place outside with --out.")
    sources, shown = from_folder(folder), None if reference is None else _read(reference)
    settings = load_settings(config)
    finder = FaceFinder.of(settings.faces.models, settings.limits.value)
    with _bar() as progress:
        return run(sources, out, finder, chosen, shown, progress, settings.limits.value).report


def _tell(report: Report, folder: Path, as_json: bool) -> None:
    if as_json:
        OUT.print_json(report.model_dump_json())
        return
    from training.dataset.values import REASONS

    if report.reasons:
        lines = table("rejected", "reason", "")
        for reason, count in report.reasons.items():
            lines.add_row(str(count), reason, REASONS[reason])
        OUT.print(lines)
    for notice in report.notices:
        named = f" ({', '.join(notice.pictures)})" if notice.pictures else ""
        ERR.print(f"warning ({notice.code}): {notice.message}{named}", markup=False)
    OUT.print(f"{report.accepted} of {len(report.pictures)} pictures accepted. {escape(str(folder / 'report.html'))} says why.")


@contextmanager
def _bar() -> Iterator[Progress]:
    """A bar a stage, on the terminal's error stream; nothing where that is no terminal."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Bar(*columns, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        tasks = {stage: bar.add_task(text, total=None, start=False, visible=False) for stage, text in _STAGES.items()}

        def report(stage: Stage, done: int, total: int) -> None:
            bar.start_task(tasks[stage])
            bar.update(tasks[stage], completed=done, total=total, visible=True)

        yield report


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"The file {path} cannot be read: {error.strerror}.", "Check the path.") from error
