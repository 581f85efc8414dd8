"""`likeness train`: a folder of pictures becomes a LoRA, by a server as a job, or in this process. Decides nothing about trainings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from deployments.errors import InvalidRequest, LikenessError
from serve.cli_output import ERR, OUT, moving, table
from serve.client import Client
from serve.client_downloads import Download
from serve.problem import error_of
from serve.training_answers import TrainedLora

if TYPE_CHECKING:
    from serve.job_answers import JobEvent
    from training.character_lora import Trained

EPILOG = """likeness train holiday/ --trigger-word ohwx --class-word woman --server http://127.0.0.1:8000

sends the pictures, shows the steps as they are done (ctrl-C leaves the training alone, `likeness jobs watch ID` comes back to it), and
prints the id of the LoRA, which the server keeps; --out FOLDER writes its file as well. Draw with it:

likeness generate --lora lora_... -p "ohwx woman, a portrait in a library"

Without --server the pictures are curated and trained on in this process, into --out, and the same command goes on where it stopped.

Ten to thirty pictures: different clothes, places and light, most of them close, sharp, the one person large in each. `likeness dataset
curate` shows what would become of each picture, before anything is trained.

--set steps=1000 --set rank=16 replaces fields of the preset (docs/training.md)."""

_STAGES: Mapping[str, str] = {
    "waiting": "waiting for its place",
    "curating": "looking at pictures",
    "looking": "looking at pictures",
    "writing": "cutting and captioning",
    "encoding": "encoding",
    "training": "training",
    "selecting": "choosing the checkpoint",
    "done": "done",
}
_OUT = Path("out/lora")
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})
# As training.dataset.dataset calls it, which needs OpenCV.
_DATASET = "dataset.json"
Tell = Callable[[str, int, int, str], None]
"""(stage, done, of, what else)."""


def train(
    folder: Annotated[
        Path, typer.Argument(help="The pictures; without --server also a dataset that `dataset curate` made.", show_default=False)
    ],
    trigger_word: Annotated[str, typer.Option("--trigger-word", "-t", help="What will call the person up: short, and no word yet.")],
    class_word: Annotated[str, typer.Option(help="What the person is: woman, man.")] = "person",
    character: Annotated[
        str | None, typer.Option(help="With a server: who receives the LoRA, by id or name; of a new name one is made.")
    ] = None,
    reference: Annotated[Path | None, typer.Option(help="A picture of the person alone; else who is in most pictures is meant.")] = None,
    preset: Annotated[str | None, typer.Option(help="Of configs/training: mini, flux-a6000, flux-a100. By default the server's.")] = None,
    changes: Annotated[list[str] | None, typer.Option("--set", help="FIELD=VALUE of the preset; give it again for more.")] = None,
    select: Annotated[bool, typer.Option("--select/--no-select", help="With a server: choose the checkpoint by what it draws.")] = True,
    name: Annotated[str | None, typer.Option(help="With a server: what the LoRA is called.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="With a server: the same request with the same key is the same job.")] = None,
    webhook_url: Annotated[str | None, typer.Option(help="With a server: where the job is posted to once it has ended.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            help="Without a server: where everything goes, by default out/lora. With one: a folder for the LoRA and the candidates' grid.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what came of it as JSON.")] = False,
    server: Annotated[
        str | None, typer.Option("--server", envvar="LIKENESS_SERVER", help="Address of a server; without one it is trained here.")
    ] = None,
) -> None:
    """Train a LoRA of a person on a folder of pictures."""
    settings = _changes(changes)
    if server is None:
        for option, said in (("character", character), ("name", name), ("key", key), ("webhook-url", webhook_url)):
            if said is not None:
                raise InvalidRequest(f"--{option} is for a server, and none is named.", "Name it with --server, or leave the option out.")
        trained = _here(folder, trigger_word, class_word, reference, preset or "mini", settings, out or _OUT)
        _tell_here(trained, as_json)
        return
    if out is not None and out.exists() and not out.is_dir():  # told now, and not when all is done
        raise InvalidRequest(f"{out} is no folder.", "Name a folder with --out, or leave it out.")
    files = _pictures(folder)
    sent = {
        "trigger_word": trigger_word, "class_word": class_word, "images": files, "character_id": character, "reference_image": reference,
        "preset": preset, "settings": settings or None, "select": select, "name": name or folder.resolve().name, "webhook_url": webhook_url,
    }  # fmt: skip
    with Client(server) as client:
        job = client.training.submit(idempotency_key=key, **sent)
        ERR.print(job.id, markup=False, style="dim")
        with _bar() as tell:
            for event in job.events():
                _told(event, tell)
        item = job.refresh()
        if not isinstance(item.result, TrainedLora):
            raise error_of(item.error) if item.error is not None else LikenessError(f"{item.id} is {item.status}.", "Train it again.")
        _tell(item.result, as_json, {f"images[{number}]": str(file) for number, file in enumerate(files)})
        if out is not None:
            _fetch(client, item.result, out)


def _here(
    folder: Path, trigger: str, class_word: str, reference: Path | None, preset_name: str, changes: Mapping[str, Any], out: Path
) -> Trained:
    import torch

    from training.character_lora import curated, train_lora
    from training.dataset.dataset import DATASET
    from training.settings import preset

    settings = preset(preset_name, **changes)
    with _bar() as tell:
        dataset = folder if (folder / DATASET).is_file() else _curated(folder, trigger, class_word, reference, out / "dataset", tell)
        examples, word = curated(dataset)
        if word != trigger:
            raise InvalidRequest(f"The captions of {dataset} say {word!r}, not {trigger!r}.", f"Use --trigger-word {word}.")
        return train_lora(
            settings,
            examples,
            trigger,
            out,
            out / "cache",
            torch.device("cuda" if torch.cuda.is_available() and settings.dtype == "bfloat16" else "cpu"),
            report=lambda step: tell("training", step.step, step.steps, f"loss {step.loss:.4f}"),
            told=lambda what, done, of: tell("encoding", done, of, what),
        )


def _curated(folder: Path, trigger: str, class_word: str, reference: Path | None, out: Path, tell: Tell) -> Path:
    from serve.settings import load_settings
    from training.dataset.curate import curate
    from training.dataset.search import FaceFinder
    from training.dataset.settings import CurationSettings
    from training.dataset.sources import from_folder

    settings = load_settings()
    finder = FaceFinder.of(settings.faces.models, settings.limits.value)
    chosen = CurationSettings(trigger=trigger, class_word=class_word)
    shown = reference.read_bytes() if reference is not None else None
    curate(from_folder(folder), out, finder, chosen, shown, lambda stage, done, of: tell(stage, done, of, ""), settings.limits.value)
    return out


def _told(event: JobEvent, tell: Tell) -> None:
    data = event.data
    if event.kind == "progress":
        stage = str(data.get("stage", "training"))
        loss = f"loss {data['loss']:.4f}" if data.get("loss") is not None else ""
        done, of = (data["done"], data["of"]) if data.get("of") else (data["step"], data["steps"])
        tell(stage, done, of, loss if stage == "training" else "")
    elif event.kind in ("queued", "requeued"):
        tell("waiting", 0, 0, "")


def _tell(result: TrainedLora, as_json: bool, files: Mapping[str, str]) -> None:
    """files: what the pictures are called here, by their places in the request."""
    if as_json:
        OUT.print_json(result.model_dump_json())
        return
    if result.candidates:
        lines = table("step", "identity", "")
        for candidate in result.candidates:
            said = "taken" if candidate.step == result.step else "surely worse" if candidate.told_apart else ""
            lines.add_row(str(candidate.step), f"{candidate.identity:.3f}", said)
        ERR.print(lines)
    for rejected in result.pictures.rejected:
        ERR.print(f"not trained on: {files.get(rejected.name, rejected.name)}: {rejected.says or rejected.reason}", markup=False)
    for warning in result.warnings:
        ERR.print(f"warning: {warning}", markup=False)
    if result.character_id is not None:
        ERR.print(f"It is the LoRA of {result.character_id} now.", markup=False)
    used = f"{result.pictures.accepted} pictures, step {result.step} of {result.steps}"
    ERR.print(f"{used}. Say {result.trigger_word!r} in the prompt.", markup=False)
    OUT.print(result.lora_id, markup=False)


def _fetch(client: Client, result: TrainedLora, out: Path) -> None:
    """Into a folder: the LoRA, and what the job left. After its id was told: if this fails, the LoRA is there all the same."""
    with moving(result.lora_id) as progress:
        path = client.loras.download(result.lora_id, out, progress=progress)
    ERR.print(f"written: {path}", markup=False)
    for file in result.data:
        if file.artifact is not None:
            content, beside = client.jobs.artifact(file.artifact), path.parent / Path(file.name).name
            with Download(beside) as download:
                download.begin(len(content))
                download.add(content)
                download.keep()
            ERR.print(f"written: {beside}", markup=False)


def _tell_here(trained: Trained, as_json: bool) -> None:
    if as_json:
        checkpoints = {str(step): str(path) for step, path in trained.checkpoints.items()}
        OUT.print_json(data={"lora": str(trained.lora), "checkpoints": checkpoints, "warnings": list(trained.warnings)})
        return
    for warning in trained.warnings:
        ERR.print(f"warning: {warning}", markup=False)
    OUT.print(str(trained.lora), markup=False)


def _changes(said: list[str] | None) -> dict[str, Any]:
    """FIELD=VALUE; values as YAML reads them."""
    import yaml

    found: dict[str, Any] = {}
    for item in said or []:
        field, mark, value = item.partition("=")
        if not mark:
            raise typer.BadParameter(f"{item!r} is not FIELD=VALUE, like steps=1000", param_hint="--set")
        try:
            found[field] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise typer.BadParameter(f"{item!r}: {' '.join(str(error).split())}", param_hint="--set") from error
    return found


def _pictures(folder: Path) -> list[Path]:
    if (folder / _DATASET).is_file():
        remedy = "Give the folder of the pictures that it was made of; or train on it here, without --server."
        raise InvalidRequest(f"{folder} is a curated dataset, and a server curates pictures itself.", remedy)
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES) if folder.is_dir() else []
    if not files:
        raise InvalidRequest(f"The folder {folder} holds no picture.", f"Pictures end in {', '.join(sorted(_SUFFIXES))}.")
    return files


@contextmanager
def _bar() -> Iterator[Tell]:
    """One bar, on the terminal's error stream: of the stage that is under way."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TextColumn("{task.fields[more]}"),
    )
    times = TimeElapsedColumn(), TimeRemainingColumn()
    with Bar(*columns, *times, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task(_STAGES["waiting"], total=None, count="", more="")

        def tell(stage: str, done: int, of: int, more: str) -> None:
            count = f"{done} of {of}" if of else ""
            bar.update(task, description=_STAGES.get(stage, stage), completed=done, total=of or None, count=count, more=more)

        yield tell
