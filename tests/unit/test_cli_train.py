"""`likeness train`: against a server over a socket, with a runner that tells and ends as trainings do; and in this process, for true."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from typer.testing import CliRunner, Result

from deployments.contracts import WorkProgress
from deployments.errors import NoFaceDetected
from deployments.job_runner import Finished, Report, Runner
from deployments.lora_server import LoraServer
from deployments.store.characters import CharacterStore
from deployments.store.job_values import Lease
from deployments.store.jobs import JobStore
from deployments.store.settings import EVERYBODY, StoreSettings
from serve.cli import app
from serve.ingress import Calls, api
from serve.job_answers import problem_json
from serve.settings import load_settings
from serve.training_answers import TrainedLora
from serve.training_desk import TrainingDesk
from tests.job_serving import desk_of, opened
from tests.lora_serving import ADA, LorasOnly, kept, over_a_socket
from tests.training_here import SLOTS

SAMPLES = Path(__file__).resolve().parents[2] / "samples" / "characters"
GRID = b"a grid of candidates"
LORA: dict[str, Any] = {
    "trigger_word": "ohwx", "base": "flux1-mini", "sha256": "0" * 64, "step": 5, "steps": 10,
    "candidates": [{"step": 5, "identity": 0.6, "told_apart": False}, {"step": 10, "identity": 0.4, "told_apart": True}],
    "pictures": {"accepted": 1, "rejected": [{"name": "images[1]", "reason": "blurred", "says": "It is blurred."}]},
    "dataset_sha256": "0" * 64, "warnings": ["There is only 1 picture."],
}  # fmt: skip


async def told(loras: LoraServer, lease: Lease, report: Report) -> Finished:
    """A training as far as whoever watches it can see."""
    if lease.job.input["trigger_word"] == "nobody":
        raise NoFaceDetected("None of the pictures shows a face.")
    for step in range(3):
        report(WorkProgress("training", step, 10, {"loss": 0.5}))
        await asyncio.sleep(0.05)
    lora = await asyncio.to_thread(loras.add, ADA, lease.job.input["name"], EVERYBODY)
    select = lease.job.input["select"]
    data = [{"name": "candidates.png", "media_type": "image/png"}] if select else []
    return Finished(LORA | {"lora_id": lora.id, "data": data}, [(GRID, "image/png")] if select else [])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    found = tmp_path / "ada"
    found.mkdir()
    for number in (1, 2):
        (found / f"{number}.png").write_bytes((SAMPLES / f"ada-{number}.png").read_bytes())
    return found


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    """Of a server that is named by the environment, with a runner."""
    jobs, over = opened(tmp_path), threading.Event()
    place = StoreSettings(url=f"sqlite:///{tmp_path / 'likeness.db'}", folder=tmp_path / "files")
    settings, desk = load_settings("local").model_copy(update={"store": place}), desk_of(jobs)
    characters, loras = CharacterStore(place.database, place.files), LoraServer("flux1-mini", place)
    training = TrainingDesk(settings, desk, characters, lambda ids, owner: asyncio.to_thread(loras.find, ids, owner), desk._check)

    async def work() -> None:
        runner = Runner(jobs, {"training": partial(told, loras)}, SLOTS, problem_json)
        task = asyncio.create_task(runner.run())
        while not over.is_set():
            await asyncio.sleep(0.05)
        runner.stop()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    with over_a_socket(api(cast(Calls, LorasOnly(loras)), 2**22, jobs=desk, training=training)) as url:
        monkeypatch.setenv("LIKENESS_SERVER", url)
        yield jobs
    over.set()
    thread.join()
    for one in (jobs, characters, loras):
        one.close()


def kept_loras() -> list[dict[str, Any]]:
    """As the server lists them."""
    found: list[dict[str, Any]] = json.loads(CliRunner().invoke(app, ["loras", "list", "--json"]).stdout)["data"]
    return found


def likeness(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


def test_a_folder_goes_up_and_the_loras_id_comes_back(store: JobStore, folder: Path) -> None:
    result = likeness(folder, "-t", "ohwx", "--set", "steps=10", "--set", "checkpoint_every=5", "--key", "7", "--no-select")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines() == [item["id"] for item in kept_loras()]
    assert f"not trained on: {folder / '2.png'}: It is blurred." in result.stderr and "taken" in result.stderr
    (job,) = store.list(EVERYBODY)
    assert (job.input["settings"]["steps"], job.input["select"], job.input["name"]) == (10, False, "ada")
    assert len(job.input["images"]) == 2
    again = likeness(folder, "-t", "ohwx", "--set", "steps=10", "--set", "checkpoint_every=5", "--key", "7", "--no-select", "--json")
    assert TrainedLora.model_validate(json.loads(again.stdout)).step == 5 and len(store.list(EVERYBODY)) == 1


def test_with_out_the_lora_and_the_grid_are_written_here_as_well(store: JobStore, folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    result = likeness(folder, "-t", "ohwx", "--out", out)
    assert result.exit_code == 0, result.output
    (lora,) = kept_loras()
    assert result.stdout.splitlines() == [lora["id"]] and f"written: {out / 'ada.safetensors'}" in result.stderr
    assert {path.name: path.read_bytes() for path in kept(out)} == {"ada.safetensors": ADA, "candidates.png": GRID}
    plain = likeness(folder, "-t", "ohwx", "--no-select", "--json", "--out", tmp_path / "plain", "--name", "Ada/2")
    assert TrainedLora.model_validate_json(plain.stdout).data == []
    assert [path.name for path in kept(tmp_path / "plain")] == ["Ada_2.safetensors"]


def test_what_it_failed_of_is_told_in_words(store: JobStore, folder: Path, tmp_path: Path) -> None:
    failed = likeness(folder, "-t", "nobody")
    assert failed.exit_code == 1 and "None of the pictures shows a face." in failed.stderr
    refused = likeness(folder, "-t", "ohwx", "--set", "rank=7")
    assert refused.exit_code == 1 and "rank" in refused.stderr
    assert likeness(folder, "-t", "nobody", "--out", tmp_path / "out").exit_code == 1 and not (tmp_path / "out").exists()
    no_folder = likeness(folder, "-t", "ohwx", "--out", folder / "1.png")
    assert no_folder.exit_code == 1 and "1.png is no folder" in no_folder.stderr
    empty = likeness(tmp_path / "files", "-t", "ohwx")
    assert empty.exit_code == 1 and "holds no picture" in empty.stderr
    for wrong in ("rank", "rank=["):
        assert likeness(folder, "-t", "ohwx", "--set", wrong).exit_code == 2
    (folder / "dataset.json").write_text("{}")
    dataset = likeness(folder, "-t", "ohwx")
    assert dataset.exit_code == 1 and "is a curated dataset" in dataset.stderr and len(store.list(EVERYBODY)) == 2


def test_without_a_server_it_is_trained_here(folder: Path, tmp_path: Path) -> None:
    small = ("steps=2", "checkpoint_every=1", "resolutions=[64]", "batch=1", "warm_up_steps=0", "rank=4", "alpha=4")
    out = tmp_path / "out"
    result = likeness(folder, "-t", "ohwx", "--out", out, *(part for item in small for part in ("--set", item)))
    assert result.exit_code == 0, result.output
    assert Path(result.stdout.strip()) == out / "lora.safetensors" and (out / "lora.safetensors").is_file()
    assert "only 2 pictures" in result.stderr and (out / "dataset" / "report.html").is_file()
    for_servers = likeness(folder, "-t", "ohwx", "--character", "Ada", "--out", tmp_path / "none")
    assert for_servers.exit_code == 1 and "--character" in for_servers.stderr and not (tmp_path / "none").exists()
    other = likeness(out / "dataset", "-t", "zxcv", "--out", tmp_path / "other")
    assert other.exit_code == 1 and "--trigger-word ohwx" in other.stderr


def test_its_help_teaches() -> None:
    text = " ".join(likeness("--help").stdout.split())
    for word in ("--trigger-word", "likeness generate --lora", "Ten to thirty pictures", "--no-select"):
        assert word in text
