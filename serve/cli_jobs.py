"""`likeness jobs`: submit work to a server, look after it, fetch what it made. Loads no model: everything is the server's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from serve.cli_options import command, read_body
from serve.cli_output import ERR, OUT, print_answer, table, write_answer
from serve.client import DEFAULT_URL, Client
from serve.client_jobs import Jobs, answered
from serve.job_answers import JobEvent, JobItem, JobPicture, JobResult
from serve.problem import error_of
from serve.schemas import GenerateRequest
from serve.training_answers import EvaluationFound, ResultFile, TrainedLora

_HELP = """Work that a server does when there is room for it, and that no crash loses.

    likeness jobs submit --workflow flux-pulid -r me.jpg -p "a portrait in a library"

prints an id. Then

    likeness jobs watch ID      a bar, until it ends (ctrl-C leaves the job alone)

    likeness jobs fetch ID      its pictures, a contact sheet and the scores

A job needs a server (`likeness serve`), because it outlives the command that made it. Where the server wants an API key, set
$LIKENESS_KEY."""
jobs = typer.Typer(help=_HELP, no_args_is_help=True)

Server = Annotated[str, typer.Option("--server", envvar="LIKENESS_SERVER", help="Address of a server.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything that is known, as JSON.")]
Id = Annotated[str, typer.Argument(help="The id of one: job_..., see `likeness jobs list`.", show_default=False)]
Out = Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures, contact sheet and scores.")]
_EXTRA: dict[str, tuple[Any, Any]] = {
    "body": (
        Annotated[Path | None, typer.Option("--body", help="A JSON or YAML file with further fields, `identities` for several people.")],
        None,
    ),
    "webhook_url": (Annotated[str | None, typer.Option(help="Where the job is posted to, signed, once it has ended.")], None),
    "idempotency_key": (Annotated[str | None, typer.Option("--key", help="The same request with the same key is the same job.")], None),
    "priority": (Annotated[str | None, typer.Option(help="low, normal or high. [default: normal]", show_default=False)], None),
    "watch_it": (Annotated[bool, typer.Option("--watch", help="Stay and show a bar until it ends.")], False),
    "as_json": (AsJson, False),
    "server": (Server, DEFAULT_URL),
}
_COLOURS = {"succeeded": "green", "failed": "red", "moderated": "red", "canceled": "yellow", "running": "cyan"}


def _submit(values: dict[str, Any]) -> None:
    server, as_json, watched = values.pop("server"), values.pop("as_json"), values.pop("watch_it")
    body = values.pop("body", None)
    fields = {**(read_body(body) if body is not None else {}), **values}
    with Client(server) as client:
        mine = client.jobs
        item = mine.submit(**fields).item
        if not as_json:
            OUT.print(item.id, markup=False)
        if watched:
            item = _watched(mine, item)
    if as_json:
        OUT.print_json(item.model_dump_json())
    _leave(item)


jobs.command("submit", help="Submit a job: every option of `likeness generate`. Prints its id.")(command(GenerateRequest, _submit, _EXTRA))


@jobs.command("list")
def list_jobs(
    status: Annotated[str | None, typer.Option(help="Only those: queued, running, succeeded, failed, canceled, moderated.")] = None,
    workflow: Annotated[str | None, typer.Option("--workflow", "-w", help="Only those of this workflow.")] = None,
    limit: Annotated[int, typer.Option(help="How many.")] = 20,
    as_json: AsJson = False,
    server: Server = DEFAULT_URL,
) -> None:
    """Your jobs, the newest first."""
    with _jobs(server) as mine:
        answer = mine.list(status=status, workflow=workflow, limit=limit)
    if as_json:
        OUT.print_json(answer.model_dump_json())
        return
    lines = table("id", "status", "workflow", "progress", "created", "took")
    for item in answer.data:
        lines.add_row(item.id, _status(item), escape(item.workflow or item.kind), _how_far(item), _when(item.created), _took(item))
    OUT.print(lines if answer.data else "No job: likeness jobs submit --help")
    if answer.next is not None:
        ERR.print("There are older ones: --limit.", style="dim")


@jobs.command()
def show(id: Id, as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """Everything that is known of one."""
    with _jobs(server) as mine:
        item = mine.get(id)
    if as_json:
        OUT.print_json(item.model_dump_json())
        return
    lines = table("", "")
    lines.show_header = False
    for name, value in _facts(item).items():
        lines.add_row(name, value)
    OUT.print(lines)


@jobs.command()
def watch(id: Id, as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """A bar until it ends; with --json a line for each event. Ends with status 1 where the job did not succeed."""
    with _jobs(server) as mine:
        if as_json:
            for event in mine.events(id):
                OUT.print(event.model_dump_json(), markup=False)
            item = mine.get(id)
        else:
            item = _watched(mine, mine.get(id))
    _leave(item)


@jobs.command()
def cancel(id: Id, server: Server = DEFAULT_URL) -> None:
    """End one that waits or runs."""
    with _jobs(server) as mine:
        answer = mine.cancel(id)
    OUT.print(f"{id} is canceled." if answer.cancelled else f"{id} was {answer.status} already.", markup=False)


@jobs.command()
def fetch(id: Id, out: Out = Path("out"), as_json: AsJson = False, server: Server = DEFAULT_URL) -> None:
    """Wait for its end, and write its pictures and their scores; of a training or an evaluation what it left."""
    with _jobs(server) as mine:
        item = _watched(mine, mine.get(id))
        files = item.result.data if item.result is not None else []
        contents = [mine.artifact(file.artifact) for file in files if file.artifact is not None]
    if item.result is not None and not isinstance(item.result, JobResult):
        _write(item.result, contents, out)
        return
    answer = answered(item, contents)
    written = write_answer(answer, out, item.workflow or answer.model)
    if as_json:
        facts = answer.model_dump(mode="json", exclude={"data": {"__all__": {"b64_json"}}})
        OUT.print_json(json.dumps({**facts, "files": [str(path) for path in written]}))
    else:
        print_answer(answer, written)


@jobs.command()
def delete(id: Id, server: Server = DEFAULT_URL) -> None:
    """Forget one, with its pictures. One that waits or runs is cancelled."""
    with _jobs(server) as mine:
        mine.delete(id)
    OUT.print(f"{id} is deleted.", markup=False)


def _write(result: TrainedLora | EvaluationFound, contents: list[bytes], out: Path) -> None:
    """The files by their names, and what else the job says of itself as result.json."""
    out.mkdir(parents=True, exist_ok=True)
    for file, content in zip(result.data, contents, strict=True):
        (out / Path(file.name).name).write_bytes(content)
        OUT.print(str(out / Path(file.name).name), markup=False)
    (out / "result.json").write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    OUT.print(str(out / "result.json"), markup=False)


@contextmanager
def _jobs(server: str) -> Iterator[Jobs]:
    with Client(server) as client:
        yield client.jobs


def _watched(mine: Jobs, item: JobItem) -> JobItem:
    """The job when it has ended; a bar meanwhile, on the terminal's error stream."""
    if item.ended:
        return item
    columns = TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[steps]}")
    times = TimeElapsedColumn(), TimeRemainingColumn()
    with Bar(*columns, *times, console=ERR, transient=True, disable=not ERR.is_terminal) as bar:
        task = bar.add_task(_waits(item), total=None, steps="")
        for event in mine.events(item.id):
            if event.kind == "queued":
                bar.update(task, description=_waits(mine.get(item.id)))
            elif event.kind in ("started", "requeued"):
                bar.update(task, description="running" if event.kind == "started" else "waits to be tried again", total=None, steps="")
            elif event.kind == "progress":
                _advance(bar, task, event)
    return mine.get(item.id)


def _advance(bar: Bar, task: Any, event: JobEvent) -> None:
    step, steps = event.data["step"], event.data["steps"]
    pictures = f", picture {event.data['picture'] + 1} of {event.data['pictures']}" if event.data["pictures"] > 1 else ""
    stage = event.data.get("stage", "drawing")
    bar.update(task, completed=step, total=steps, description=stage, steps=f"step {step} of {steps}{pictures}")


def _leave(item: JobItem) -> None:
    """Raises what the job failed with."""
    if item.ended and item.status != "succeeded":
        if item.error is not None:
            raise error_of(item.error)
        ERR.print(f"{item.id} is {item.status}.", markup=False)
        raise typer.Exit(1)


def _waits(item: JobItem) -> str:
    if item.queue_position is None:
        return "running" if item.status == "running" else item.status
    if item.waiting_for is not None:
        return f"for a runner of {item.waiting_for}: this server has none"
    return "next" if item.queue_position == 0 else f"{item.queue_position} before it"


def _facts(item: JobItem) -> dict[str, str]:
    said = {
        "id": item.id,
        "status": _status(item),
        "workflow": escape(item.workflow or item.kind),
        "progress": _how_far(item),
        "created": _when(item.created),
        "took": _took(item),
        "attempt": str(item.attempt),
        "expires": _when(item.expires) if item.expires is not None else "",
        "error": escape(f"{item.error.code}: {item.error.detail}") if item.error is not None else "",
        "seconds": ", ".join(f"{stage} {value:.2f}" for stage, value in item.timings.items()),
        "files": "\n".join(_place(file) for file in item.result.data) if item.result is not None else "",
    }
    return {name: text for name, text in said.items() if text}


def _place(file: JobPicture | ResultFile) -> str:
    return file.url or (file.path if isinstance(file, JobPicture) else None) or ""


def _status(item: JobItem) -> str:
    colour = _COLOURS.get(item.status)
    return f"[{colour}]{item.status}[/]" if colour else item.status


def _how_far(item: JobItem) -> str:
    if item.queue_position is not None:
        return _waits(item)
    return f"{item.progress.percent:.0f} %" if item.progress is not None and not item.ended else ""


def _took(item: JobItem) -> str:
    if item.finished is not None:
        return f"{item.finished - item.created:.1f} s"
    return f"about {item.eta_s:.0f} s more" if item.eta_s is not None else ""


def _when(at: float) -> str:
    return datetime.fromtimestamp(at).strftime("%Y-%m-%d %H:%M:%S")
