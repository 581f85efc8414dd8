"""`likeness loras`: in the store of this machine and against a server over a socket, from adding to removing."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from safetensors.torch import save
from typer.testing import CliRunner, Result

from deployments.lora_server import LoraServer
from deployments.store.settings import STORE_ROOT_VARIABLE, StoreSettings
from serve.cli import app
from tests.lora_serving import ADA, SDXL, kept, over_a_socket, routes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(params=["here", "server"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of the store that the command works on."""
    folder = tmp_path / "store"
    monkeypatch.setenv(STORE_ROOT_VARIABLE, str(folder))
    monkeypatch.delenv("LIKENESS_SERVER", raising=False)
    if request.param == "here":
        yield folder
        return
    monkeypatch.setenv(STORE_ROOT_VARIABLE, str(tmp_path / "not this"))
    server = LoraServer("flux1-mini", StoreSettings(url=f"sqlite:///{folder / 'likeness.db'}", folder=folder))
    with over_a_socket(routes(server)) as url:
        monkeypatch.setenv("LIKENESS_SERVER", url)
        yield folder
    server.close()


def likeness(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["loras", *map(str, arguments)])


def test_from_adding_to_removing(where: Path, tmp_path: Path) -> None:
    file = tmp_path / "ada [red].safetensors"
    file.write_bytes(ADA)
    assert "likeness loras add" in likeness("list").stdout
    added = likeness("add", file, "--description", "[/bold] Twenty pictures.")
    assert added.exit_code == 0, added.output
    id = added.stdout.strip()
    assert re.fullmatch(r"lora_[0-9a-f]{24}", id) and "rank 8" in added.stderr and "'ada'" in added.stderr
    listed = likeness("list").stdout
    assert id in listed and "ada [red]" in listed and "0.3 MiB" in listed
    shown = likeness("show", id).stdout
    assert "[/bold] Twenty pictures." in shown and "file: pictures" in shown
    assert json.loads(likeness("show", id, "--json").stdout)["metadata"]["pictures"] == "20"
    assert json.loads(likeness("list", "--json").stdout)["data"][0]["id"] == id
    assert [path.read_bytes() for path in kept(where / "loras")] == [ADA]
    folder, named = tmp_path / "downloads", tmp_path / "named.safetensors"
    for out, path in ((folder, folder / "ada [red].safetensors"), (named, named)):
        downloaded = likeness("download", id, "--out", out)
        assert downloaded.exit_code == 0 and downloaded.stdout.splitlines() == [str(path)], downloaded.output
        assert path.read_bytes() == ADA
    assert len(kept(folder)) == 1
    removed = likeness("remove", id)
    assert removed.exit_code == 0 and f"{id} is deleted" in removed.stdout
    assert kept(where / "loras") == []


def test_what_is_wrong_is_told_in_words(where: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(save(SDXL))
    for arguments, code, says in (
        (("add", other), "lora_incompatible", "other changes no module"),
        (("add", tmp_path / "absent"), "invalid_request", "absent cannot be read"),
        (("add", tmp_path), "invalid_request", "cannot be read"),
        (("add", other, "--name", " "), "invalid_request", "`name` is empty"),
        (("show", "lora_nobodys"), "lora_not_found", "lora_nobodys"),
        (("remove", "lora_nobodys"), "lora_not_found", "lora_nobodys"),
        (("download", "lora_nobodys", "-o", tmp_path / "none"), "lora_not_found", "lora_nobodys"),
    ):
        result = likeness(*arguments)
        assert result.exit_code == 1 and f"({code})" in result.stderr and says in result.stderr, result.output
    assert not (tmp_path / "none").exists()
    assert kept(where / "loras") == []


def test_looking_at_the_list_loads_no_model_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(STORE_ROOT_VARIABLE, str(tmp_path))
    monkeypatch.delenv("LIKENESS_SERVER", raising=False)
    heavy = {"torch", "diffusers", "transformers", "ray", "onnxruntime"}
    source = (
        "import sys; from typer.testing import CliRunner; from serve.cli import app; "
        f"assert CliRunner().invoke(app, ['loras', 'list']).exit_code == 0; print(sorted({heavy!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_the_help_says_how_a_lora_gets_into_a_picture() -> None:
    text = likeness("--help").stdout
    assert "likeness loras add" in text and "loras: [{id: lora_" in text and "kohya" in text
