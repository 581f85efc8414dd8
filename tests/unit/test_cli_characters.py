"""`likeness characters`: in the store of this machine and against a server over a socket, from adding to removing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer import Typer
from typer.testing import CliRunner, Result

from deployments.face_models import read_face_model
from deployments.face_server import FaceServer
from deployments.store.characters import CharacterStore
from deployments.store.migrate import migrate
from deployments.store.settings import STORE_ROOT_VARIABLE
from serve.characters import CharacterDesk
from serve.cli import _Telling
from serve.cli_characters import characters
from tests.character_serving import ADA, SAMPLES, SETTINGS, Looked, application, sample
from tests.lora_serving import kept, over_a_socket


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[CharacterDesk]:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    store = CharacterStore(url, tmp_path)
    yield CharacterDesk(store, Looked(FaceServer(SETTINGS)))
    store.close()


def command() -> Typer:
    app = Typer(cls=_Telling)
    app.add_typer(characters, name="characters")
    return app


def likeness(*arguments: object) -> Result:
    return CliRunner().invoke(command(), ["characters", *map(str, arguments)])


@pytest.fixture(params=["here", "server"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the store that the command works on."""
    monkeypatch.delenv("LIKENESS_SERVER", raising=False)
    monkeypatch.setenv(STORE_ROOT_VARIABLE, str(tmp_path / "store"))
    if request.param == "here":
        yield tmp_path / "store"
        return
    with over_a_socket(application(request.getfixturevalue("desk"))) as url:
        monkeypatch.setenv("LIKENESS_SERVER", url)
        yield tmp_path


def test_on_the_command_line_from_adding_to_removing(where: Path, tmp_path: Path) -> None:
    folder = tmp_path / "ada [red]"
    folder.mkdir()
    for path in ADA:
        (folder / path.name).write_bytes(path.read_bytes())
    assert "likeness characters add" in likeness("list").stdout
    added = likeness("add", "Ada [bold]", folder, sample("bruno-1"))
    assert added.exit_code == 0, added.output
    id = added.stdout.strip()
    assert "bruno-1.png: set aside. It shows somebody else" in added.stderr and "4 of 5 pictures used" in added.stderr
    assert "warning (two_people)" in added.stderr and "person 1: picture_" in added.stderr
    assert id in likeness("list").stdout and "Ada [bold]" in likeness("list").stdout and "4 of 5 used" in likeness("list").stdout
    item = json.loads(likeness("show", id, "--json").stdout)
    third = item["pictures"][2]["id"]
    assert f"{third} is the best" in likeness("set-best", id, third).stdout
    shown = likeness("show", id).stdout
    assert re.search(rf"{third} +best", shown) and "no: other_person" in shown and "degrees" in shown
    assert third not in likeness("set-best", id).stdout
    more = likeness("add", id, sample("ada-bruno"))
    assert more.exit_code == 0 and "ada-bruno.png: set aside. It shows several people" in more.stderr
    out = tmp_path / "ada.safetensors"
    assert likeness("export", id, "--out", out).stdout.strip() == str(out) and read_face_model(out.read_bytes()).recogniser == "faces-mini"
    imported = likeness("import", out, "--name", "model").stdout.strip()
    assert "face model" in likeness("list").stdout and "of a face model" in likeness("show", imported).stdout
    for each in (id, imported):
        removed = likeness("remove", each)
        assert removed.exit_code == 0 and f"{each} is deleted" in removed.stdout
    assert kept(where / "characters") == [] and json.loads(likeness("list", "--json").stdout) == {"data": []}


def test_on_the_command_line_what_is_wrong_is_told_in_words(where: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, code, says in (
        (("add", "x", tmp_path / "absent.png"), "invalid_", "absent.png cannot be read"),
        (("add", "x", tmp_path / "empty"), "invalid_request", "holds no picture"),
        (("add", "x", sample("ada-bruno")), "no_face_detected", "several people"),
        (("add", " ", ADA[0]), "invalid_request", "`name` is empty"),
        (("show", "character_x"), "character_not_found", "character_x"),
        (("remove", "character_x"), "character_not_found", "character_x"),
        (("import", tmp_path / "absent"), "invalid_request", "cannot be read"),
        (("import", ADA[0]), "invalid_request", "no whole safetensors"),
    ):
        result = likeness(*arguments)
        assert result.exit_code == 1 and f"({code}" in result.stderr and says in result.stderr, result.output


def test_looking_at_the_list_loads_no_model_library(tmp_path: Path) -> None:
    heavy = {"torch", "diffusers", "transformers", "ray", "onnxruntime", "insightface"}
    source = (
        "import sys; from typer.testing import CliRunner; from serve.cli_characters import characters; "
        f"assert CliRunner().invoke(characters, ['list']).exit_code == 0; print(sorted({heavy!r} & set(sys.modules)))"
    )
    environment = {STORE_ROOT_VARIABLE: str(tmp_path), "PATH": ""}
    run = subprocess.run([sys.executable, "-c", source], cwd=SAMPLES.parent, capture_output=True, text=True, env=environment)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_the_help_says_how_a_character_gets_into_a_picture() -> None:
    text = likeness("--help").stdout
    assert "likeness characters add" in text and "character_id: character_" in text and "for good" in text
