"""`likeness loras`: what you have on a server, or in the store of this machine. Loads torch only to check a file in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from deployments.errors import InvalidRequest, StoreUnavailable
from deployments.store.settings import EVERYBODY
from serve.answers import LoraDeleted, LoraItem, LorasResponse
from serve.cli_output import ERR, OUT, moving, table
from serve.client import Client
from serve.client_downloads import Download, Progress
from serve.client_loras import Loras, destination

_HELP = """Your LoRAs: keep one, then name it in requests.

    likeness loras add ada.safetensors --trigger-word "ada person"

prints an id; requests say `loras: [{id: lora_..., scale: 0.8}]`, and the trigger word in the prompt. `likeness loras download ID`
writes the file of one, also of one that the server trained.

Files of diffusers, peft, ai-toolkit, kohya, ComfyUI, OneTrainer, XLabs, Black Forest Labs and LyCORIS are read. One that would not wholly
apply to the base model is refused, with the names of its keys."""
_PIECE_BYTES = 2**20
loras = typer.Typer(
    help=_HELP,
    no_args_is_help=True,
)

Server = Annotated[
    str | None,
    typer.Option(
        "--server", envvar="LIKENESS_SERVER", help="Address of a server; without one, the store of this machine ($LIKENESS_STORE)."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything that is known, as JSON.")]
Id = Annotated[str, typer.Argument(help="The id of one: lora_..., see `likeness loras list`.", show_default=False)]


@loras.command("list")
def list_loras(as_json: AsJson = False, server: Server = None) -> None:
    """What you have, the newest first."""
    with _loras(server) as mine:
        answer = mine.list()
    if as_json:
        OUT.print_json(answer.model_dump_json())
        return
    lines = table("id", "name", "trigger word", "base", "format", "rank", "size", "added")
    for item in answer.data:
        said = (item.name, item.trigger_word or "", item.base, item.format)
        lines.add_row(item.id, *(escape(text) for text in said), _rank(item), _size(item.bytes), _added(item))
    OUT.print(lines if answer.data else "No LoRA yet: likeness loras add FILE")


@loras.command()
def add(
    file: Annotated[Path, typer.Argument(help="A safetensors file.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="What you call it; by default the file's name.")] = None,
    trigger_word: Annotated[str | None, typer.Option(help="What calls it up in a prompt; by default what the file says.")] = None,
    description: Annotated[str | None, typer.Option(help="Whatever else is to be known of it.")] = None,
    as_json: AsJson = False,
    server: Server = None,
) -> None:
    """Keep a LoRA. All of it is fitted to the base model first. Prints its id."""
    with _loras(server) as mine, moving(file.name, ", checked by the server") as progress:
        item = mine.add(file, name=name, trigger_word=trigger_word, description=description, progress=progress)
    if as_json:
        OUT.print_json(item.model_dump_json())
        return
    OUT.print(item.id, markup=False)
    ERR.print(f"{item.name}: {item.format}, rank {_rank(item)}, {item.keys} keys, each of them fits {item.base}.", markup=False)
    if item.error:
        ERR.print(f"Brought to a low rank with a relative error of {item.error:.2%} at most.", markup=False)
    if item.trigger_word:
        ERR.print(f"Say {item.trigger_word!r} in the prompt.", markup=False)


@loras.command()
def show(id: Id, as_json: AsJson = False, server: Server = None) -> None:
    """Everything that is known of one."""
    with _loras(server) as mine:
        item = mine.get(id)
    if as_json:
        OUT.print_json(item.model_dump_json())
        return
    facts = item.model_dump(mode="json", exclude={"metadata", "created"}) | {"added": _added(item)}
    lines = table("", "")
    lines.show_header = False
    for field, value in [*facts.items(), *((f"file: {key}", value) for key, value in item.metadata.items())]:
        lines.add_row(escape(field.replace("_", " ")), "" if value is None else escape(str(value)))
    OUT.print(lines)


@loras.command()
def download(
    id: Id,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A file (*.safetensors), or a folder for one that is called as the LoRA is.")
    ] = Path("out"),
    server: Server = None,
) -> None:
    """Write the file of one, in place of what is there. Prints where it is."""
    with _loras(server) as mine, moving(id) as progress:
        path = mine.download(id, out, progress=progress)
    OUT.print(str(path), markup=False)


@loras.command()
def remove(id: Id, server: Server = None) -> None:
    """Delete one, and its file. Pictures that were drawn with it stay as they are, and cannot be made again without it."""
    with _loras(server) as mine:
        mine.delete(id)
    OUT.print(f"{id} is deleted.", markup=False)


@contextmanager
def _loras(server: str | None) -> Iterator[Loras | _Here]:
    if server is None:
        yield _Here()
        return
    with Client(server) as client:
        yield client.loras


class _Here:
    """The same in this process, for the owner that a server has where it tells nobody apart. No model is loaded."""

    def __init__(self) -> None:
        from deployments.lora_server import LoraServer
        from serve.settings import load_settings

        settings = load_settings()
        self._server = LoraServer(settings.base, settings.store, settings.max_lora_bytes)

    def add(self, file: Path, *, name: str | None, trigger_word: str | None, description: str | None, progress: Progress) -> LoraItem:
        try:
            content = file.read_bytes()
        except OSError as error:
            raise InvalidRequest(f"The file {file} cannot be read: {error.strerror}.", "Check the path.") from error
        progress(len(content), len(content))
        called = file.name.removesuffix(".safetensors") if name is None else name
        return LoraItem.of(self._server.add(content, called, EVERYBODY, trigger_word, description or ""))

    def list(self) -> LorasResponse:
        return LorasResponse(data=[LoraItem.of(info) for info in self._server.list(EVERYBODY)])

    def get(self, id: str) -> LoraItem:
        return LoraItem.of(self._server.get(id, EVERYBODY))

    def download(self, id: str, path: Path, *, progress: Progress) -> bytes | Path:
        info = self._server.get(id, EVERYBODY)
        try:
            kept = self._server.path(info.sha256).open("rb")
        except OSError as error:
            raise StoreUnavailable(f"The file of {id} cannot be read: {error.strerror}.") from error
        with kept as file, Download(destination(path, info.name), progress) as download:
            download.begin(info.bytes)
            for piece in iter(partial(file.read, _PIECE_BYTES), b""):
                download.add(piece)
            return download.keep()

    def delete(self, id: str) -> LoraDeleted:
        self._server.delete(id, EVERYBODY)
        return LoraDeleted(id=id)


def _added(item: LoraItem) -> str:
    return datetime.fromtimestamp(item.created).strftime("%Y-%m-%d %H:%M")


def _rank(item: LoraItem) -> str:
    return str(item.rank_low) if item.rank_low == item.rank_high else f"{item.rank_low} to {item.rank_high}"


def _size(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
