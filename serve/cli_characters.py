"""`likeness characters`: people by name, on a server or in the store of this machine. Loads face models only to look at pictures here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from deployments.errors import InvalidRequest
from deployments.store.settings import EVERYBODY
from serve.character_answers import CharacterDeleted, CharacterEntry, CharacterItem, CharactersResponse
from serve.cli_output import ERR, OUT, table, waiting
from serve.client import Client
from serve.client_characters import Characters

if TYPE_CHECKING:
    from deployments.curation import Curated
    from deployments.face_server import FaceServer
    from deployments.store.character_values import PictureFacts
    from serve.characters import CharacterDesk

_HELP = """People by name: keep pictures of one, then name the person in requests.

    likeness characters add Ada ada/*.jpg

looks at each picture, sets aside what is of no use (no face, several people, blurred, somebody else) and says why, then prints an id;
requests say `character_id: character_...` wherever reference pictures may stand.

One good picture is enough to begin with: sharp, close, from the front. Ten from several sides make a better likeness, and a LoRA.

These are people's faces: `remove` deletes pictures and embeddings for good."""
characters = typer.Typer(help=_HELP, no_args_is_help=True)

_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp"})

Server = Annotated[
    str | None,
    typer.Option(
        "--server", envvar="LIKENESS_SERVER", help="Address of a server; without one, the store of this machine ($LIKENESS_STORE)."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything that is known, as JSON.")]
Id = Annotated[str, typer.Argument(help="The id of one: character_..., see `likeness characters list`.", show_default=False)]


@characters.command("list")
def list_characters(as_json: AsJson = False, server: Server = None) -> None:
    """Whom you have, the newest first."""
    with _characters(server) as mine:
        answer = mine.list()
    if as_json:
        OUT.print_json(answer.model_dump_json())
        return
    lines = table("id", "name", "pictures", "added")
    for entry in answer.data:
        said = "face model" if entry.from_face_model else f"{entry.kept} of {entry.pictures} used"
        lines.add_row(entry.id, escape(entry.name), said, _added(entry.created))
    OUT.print(lines if answer.data else "No character yet: likeness characters add NAME PICTURES")


@characters.command()
def add(
    name: Annotated[str, typer.Argument(help="What you call them, or the id of a character that gets more pictures.", show_default=False)],
    pictures: Annotated[list[Path], typer.Argument(help="Pictures, or folders of them: PNG, JPEG, WebP; 50 at most.", show_default=False)],
    as_json: AsJson = False,
    server: Server = None,
) -> None:
    """Make a character of pictures, or add pictures to one. Prints its id."""
    files = _files(pictures)
    more = name.startswith("character_")
    with _characters(server) as mine, waiting(f"looking at {len(files)} picture{'s' if len(files) > 1 else ''}"):
        item = mine.add(name, files) if more else mine.create(name, files)
    if as_json:
        OUT.print_json(item.model_dump_json())
        return
    OUT.print(item.id, markup=False)
    for file, picture in zip(files, item.pictures[-len(files) :], strict=True):
        if not picture.kept:
            ERR.print(f"{file}: set aside. {picture.says}", markup=False)
    _tell(item)


@characters.command()
def show(id: Id, as_json: AsJson = False, server: Server = None) -> None:
    """The pictures of one, how good each is and how much they are alike."""
    with _characters(server) as mine:
        item = mine.get(id)
    if as_json:
        OUT.print_json(item.model_dump_json())
        return
    OUT.print(f"{item.name}{', of a face model' if item.from_face_model else ''}, added {_added(item.created)}", markup=False)
    lines = table("picture", "used", "quality", "sharp", "pixels", "turned", "compressed", "likeness")
    for picture in item.pictures:
        used = "best" if picture.id == item.best else f"no. {picture.rank + 1}" if picture.rank is not None else f"no: {picture.reason}"
        quality = picture.quality
        measures = ("", "", "", "", "")
        if quality is not None:
            turned, lost = f"{quality.yaw:+.0f} degrees", f"{quality.compression:.0%}"
            measures = (f"{quality.overall:.2f}", f"{quality.sharpness:.0f}", f"{quality.size:.0f}", turned, lost)
        lines.add_row(picture.id, used, *measures, "" if picture.cosine is None else f"{picture.cosine:.3f}")
    if item.pictures:
        OUT.print(lines)
    if item.lora is not None:
        OUT.print(f"LoRA {item.lora.id}" + (f", called up by {item.lora.trigger_word!r}" if item.lora.trigger_word else ""), markup=False)
    _tell(item)


@characters.command("set-best")
def set_best(
    id: Id,
    picture: Annotated[str | None, typer.Argument(help="picture_...; left out, the best is chosen by quality again.")] = None,
    server: Server = None,
) -> None:
    """Choose the picture that is used where only one can be. Whoever it shows is the person."""
    with _characters(server) as mine:
        item = mine.set_best(id, picture)
    OUT.print(f"{item.best} is the best picture of {item.name}.", markup=False)
    _tell(item)


@characters.command()
def remove(id: Id, server: Server = None) -> None:
    """Delete one for good: pictures and embeddings. LoRAs that were trained on it stay; see `likeness loras remove`."""
    with _characters(server) as mine:
        mine.delete(id)
    OUT.print(f"{id} is deleted.", markup=False)


@characters.command()
def export(
    id: Id,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The file; by default <id>.safetensors.")] = None,
    server: Server = None,
) -> None:
    """Write one as a face model that ComfyUI-ReActor reads: a mean embedding, no picture."""
    with _characters(server) as mine:
        content = mine.export(id)
    path = out if out is not None else Path(f"{id}.safetensors")
    try:
        path.write_bytes(content)
    except OSError as error:
        raise InvalidRequest(f"The file {path} cannot be written: {error.strerror}.", "Choose another place with --out.") from error
    OUT.print(str(path), markup=False)


@characters.command("import")
def import_face_model(
    file: Annotated[Path, typer.Argument(help="A face model, safetensors, as ComfyUI-ReActor saves it.", show_default=False)],
    name: Annotated[str | None, typer.Option(help="What you call them; by default the file's name.")] = None,
    as_json: AsJson = False,
    server: Server = None,
) -> None:
    """Make a character of a face model. It has no picture: only what needs none can use it. Prints its id."""
    with _characters(server) as mine:
        item = mine.import_face_model(file, name)
    if as_json:
        OUT.print_json(item.model_dump_json())
        return
    OUT.print(item.id, markup=False)
    _tell(item)


@contextmanager
def _characters(server: str | None) -> Iterator[Characters | _Here]:
    if server is not None:
        with Client(server) as client:
            yield client.characters
        return
    here = _Here()
    try:
        yield here
    finally:
        here.close()


class _Here:
    """The same in this process, for the owner that a server has where it tells nobody apart."""

    def __init__(self) -> None:
        from deployments.store.characters import CharacterStore
        from deployments.store.migrate import migrate
        from serve.characters import CharacterDesk
        from serve.settings import load_settings

        self._settings = load_settings()
        self._faces: FaceServer | None = None
        migrate(self._settings.store.database)
        self._store = CharacterStore(self._settings.store.database, self._settings.store.files)
        self._desk = CharacterDesk(self._store, self._curate)

    def create(self, name: str, pictures: Sequence[Path]) -> CharacterItem:
        return self._item(lambda desk: desk.create(EVERYBODY, name, _read(pictures)))

    def add(self, id: str, pictures: Sequence[Path]) -> CharacterItem:
        return self._item(lambda desk: desk.add(id, EVERYBODY, _read(pictures)))

    def list(self) -> CharactersResponse:
        return CharactersResponse(data=[CharacterEntry.of(summary) for summary in self._store.list(EVERYBODY)])

    def get(self, id: str) -> CharacterItem:
        return CharacterItem.of(self._store.get(id, EVERYBODY))

    def set_best(self, id: str, picture: str | None) -> CharacterItem:
        return self._item(lambda desk: desk.update(id, EVERYBODY, None, picture, picture is None))

    def delete(self, id: str) -> CharacterDeleted:
        self._store.delete(id, EVERYBODY)
        return CharacterDeleted(id=id)

    def export(self, id: str) -> bytes:
        return asyncio.run(self._desk.face_model(id, EVERYBODY))

    def import_face_model(self, file: Path, name: str | None) -> CharacterItem:
        (content,) = _read([file])
        return self._item(lambda desk: desk.import_face_model(EVERYBODY, name or file.stem, content))

    def close(self) -> None:
        self._store.close()

    def _item(self, ask: Callable[[CharacterDesk], Coroutine[Any, Any, Any]]) -> CharacterItem:
        return CharacterItem.of(asyncio.run(ask(self._desk)))

    async def _curate(self, pictures: Sequence[bytes], known: Sequence[PictureFacts], best: int | None) -> Curated:
        if self._faces is None:
            from deployments.face_server import FaceServer

            self._faces = FaceServer(self._settings.faces.models, self._settings.limits.value)
        return await asyncio.to_thread(self._faces.curate, pictures, known, best)


def _tell(item: CharacterItem) -> None:
    used = sum(picture.kept for picture in item.pictures)
    if item.spread is not None:
        alike = f"likeness to their mean {item.spread.mean:.3f}, at least {item.spread.least:.3f}"
        ERR.print(f"{used} of {len(item.pictures)} pictures used, {alike} ({item.judge}).", markup=False)
    for warning in item.warnings:
        ERR.print(f"warning ({warning.code}): {warning.message}", markup=False)
        if warning.code == "two_people":
            for number, group in enumerate(warning.pictures):
                ERR.print(f"  person {number}: {', '.join(group)}", markup=False)


def _files(paths: Sequence[Path]) -> list[Path]:
    """The pictures themselves; of a folder those that lie in it."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
            if not inside:
                raise InvalidRequest(f"The folder {path} holds no picture.", f"Pictures end in {', '.join(sorted(_SUFFIXES))}.")
            found += inside
        else:
            found.append(path)
    return found


def _read(paths: Sequence[Path]) -> list[bytes]:
    contents = []
    for path in paths:
        try:
            contents.append(path.read_bytes())
        except OSError as error:
            raise InvalidRequest(f"The file {path} cannot be read: {error.strerror}.", "Check the path.") from error
    return contents


def _added(created: int) -> str:
    return datetime.fromtimestamp(created).strftime("%Y-%m-%d %H:%M")
