"""The command `likeness`: one shell over the SDK. Without --server the same application runs in this process.

Every workflow of configs/workflows/ is a subcommand, made from its request type. Errors are told in words, with what to do, and end with
status 1. Draws and checks nothing itself.
"""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from deployments.errors import LikenessError
from serve.cli_characters import characters
from serve.cli_dataset import dataset
from serve.cli_evaluate import EPILOG as EVALUATE_EPILOG
from serve.cli_evaluate import evaluate
from serve.cli_jobs import jobs
from serve.cli_keys import keys
from serve.cli_loras import loras
from serve.cli_models import models
from serve.cli_options import command, read_body
from serve.cli_output import ERR, OUT, drawing, print_answer, report_error, table, waiting, write_answer
from serve.cli_train import EPILOG as TRAIN_EPILOG
from serve.cli_train import train
from serve.client import Client
from serve.presets import Preset, load_presets
from serve.schemas import GenerateRequest

DEFAULT_WORKFLOW = "flux-pulid"
"""What `likeness generate` draws with where there is a reference picture and no workflow is named."""


class _Telling(TyperGroup):
    """Errors of ours in words, without a traceback; anything else is a bug and keeps its own."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except LikenessError as error:
            report_error(error)
            raise typer.Exit(1) from error


app = typer.Typer(
    name="likeness",
    cls=_Telling,
    help="Pictures of the same person, again and again.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
app.add_typer(models, name="models")
app.add_typer(loras, name="loras")
app.add_typer(characters, name="characters")
app.add_typer(jobs, name="jobs")
app.add_typer(keys, name="keys")
app.add_typer(dataset, name="dataset")
app.command("train", epilog=TRAIN_EPILOG)(train)
app.command("evaluate", epilog=EVALUATE_EPILOG)(evaluate)

Server = Annotated[
    str | None, typer.Option("--server", envvar="LIKENESS_SERVER", help="Address of a server; without one everything runs in this process.")
]
_OUTPUT: Mapping[str, tuple[Any, Any]] = {
    "out": (Annotated[Path, typer.Option("--out", "-o", help="Folder for pictures, contact sheet and scores.")], Path("out")),
    "body": (
        Annotated[Path | None, typer.Option("--body", help="A JSON or YAML file with further fields, `identities` for several people.")],
        None,
    ),
    "as_json": (Annotated[bool, typer.Option("--json", help="Print the answer as JSON, without the pictures.")], False),
    "server": (Server, None),
}


@contextmanager
def client_for(server: str | None) -> Iterator[Client]:
    """The one way to whatever answers: a server over HTTP, or the application in this process."""
    if server is not None:
        with Client(server) as client:
            yield client
        return
    from serve.local import local_client

    with waiting("starting"), local_client() as client:
        yield client


def draw(workflow: str | None, values: dict[str, Any]) -> None:
    """Asks for pictures, writes them and prints where they are and how like. workflow: None leaves the choice to the fields."""
    out, server, as_json = values.pop("out"), values.pop("server", None), values.pop("as_json")
    body = values.pop("body", None)
    fields = {**(read_body(body) if body is not None else {}), **values}
    chosen = workflow or fields.get("workflow") or (DEFAULT_WORKFLOW if fields.keys() & {"reference_image", "reference_images"} else None)
    with client_for(server) as client, waiting("drawing"):
        answer = client.generate(**{**fields, "workflow": chosen})
    written = write_answer(answer, out, chosen or answer.model)
    if as_json:
        facts = answer.model_dump(mode="json", exclude={"data": {"__all__": {"b64_json"}}})
        OUT.print_json(json.dumps({**facts, "files": [str(path) for path in written]}))
    else:
        print_answer(answer, written)


def _with(workflow: str | None) -> Callable[[dict[str, Any]], None]:
    return lambda values: draw(workflow, values)


def _register(presets: Mapping[str, Preset]) -> None:
    """`generate`, which takes every field, and a subcommand for each workflow, which takes its own."""
    text = f"Draw pictures: with any workflow, by default {DEFAULT_WORKFLOW} where there is a reference picture, else the base model alone."
    advice = _paragraphs(presets[DEFAULT_WORKFLOW].advice) if DEFAULT_WORKFLOW in presets else ""
    app.command("generate", help=text, epilog=advice)(command(GenerateRequest, _with(None), _OUTPUT))
    for preset in presets.values():
        make = app.command(preset.name, help=preset.description, epilog=_paragraphs(preset.advice), rich_help_panel="Workflows")
        make(command(preset.request_type, _with(preset.name), _OUTPUT))


def _paragraphs(advice: str) -> str:
    """Advice as the help shows it: fields by the names of their options."""
    options = {name: f"--{name.replace('_', '-')}" for name in GenerateRequest.model_fields if "_" in name}
    for name, option in options.items():
        advice = advice.replace(name, option)
    return f"Which option to change when:\n\n{advice}" if advice else ""


_register(load_presets())


@app.command()
def analyze(
    image: Annotated[Path, typer.Argument(help="A picture.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that is known, as JSON.")] = False,
    server: Server = None,
) -> None:
    """The faces of a picture, in the order that --face-index counts them."""
    with client_for(server) as client:
        answer = client.analyze(image)
    if as_json:
        OUT.print_json(answer.model_dump_json())
        return
    lines = table("face", "box (x0 y0 x1 y1)", "sure", "age", "sex")
    for face in answer.faces:
        box = " ".join(f"{edge:.0f}" for edge in face.box)
        lines.add_row(str(face.index), box, f"{face.score:.2f}", str(face.age if face.age is not None else "?"), face.sex or "?")
    OUT.print(lines if answer.faces else "No face was found.")


@app.command()
def compare(
    first: Annotated[Path, typer.Argument(help="A picture.")],
    second: Annotated[Path, typer.Argument(help="Another picture.")],
    threshold: Annotated[float, typer.Option(help="Cosine from which two faces count as the same person.")] = 0.3,
    server: Server = None,
) -> None:
    """Whether two pictures show the same person: the cosine of the judge recogniser, and the verdict at the threshold."""
    with client_for(server) as client:
        answer = client.compare(first, second, threshold=threshold)
    OUT.print(f"{answer.verdict}: cosine {answer.cosine:.3f}, threshold {answer.threshold:g} ({answer.model})", markup=False)


@app.command()
def workflows(server: Server = None) -> None:
    """What can be asked for: every workflow, its base models and its defaults."""
    with client_for(server) as client:
        answer = client.workflows()
    for workflow in answer.workflows:
        OUT.print(f"[bold]{workflow.name}[/]  on {', '.join(workflow.bases)}" + (f", by {workflow.method}" if workflow.method else ""))
        OUT.print(f"  {workflow.description}", markup=False)
        OUT.print(f"  {', '.join(f'{name} {value}' for name, value in workflow.defaults.items())}", markup=False, style="dim")


@app.command()
def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the pictures.")] = Path("out/demo"),
    server: Server = None,
) -> None:
    """One sample character in four scenes: pictures, a contact sheet, and how much each is the same person."""
    from serve.demo import SCENES, show

    with client_for(server) as client, drawing(len(SCENES)) as done:
        shown = show(client, out, done)
    for picture, cosine in zip(shown.pictures, shown.cosines, strict=True):
        OUT.print(f"{picture}  {'no face' if cosine is None else f'likeness {cosine:.3f}'}", markup=False)
    OUT.print(f"{shown.sheet}\n{shown.scores}", markup=False)


@app.command()
def serve(
    config: Annotated[str, typer.Option(help="A name in configs/serve/, or a YAML file like those.")] = "local",
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
) -> None:
    """Run the server with Ray Serve on this machine, until it is interrupted. The documentation of its routes is at /docs."""
    from serve.cluster import serving
    from serve.settings import load_settings

    settings = load_settings(config)
    # A supervisor asks with SIGTERM for what a person asks with ctrl-C: leaving in order.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with serving(settings, host, port) as address:
        OUT.print(f"ready at {address}, documented at {address}/docs", markup=False)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            ERR.print("stopping")


def main() -> None:
    """The entry point."""
    app()


if __name__ == "__main__":
    main()
