"""`likeness evaluate` against the whole application on the embedded models: true LoRA, PuLID and pose, from the command to the files."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
import yaml
from typer.testing import CliRunner

from deployments.errors import InvalidRequest, QueueFull
from deployments.store.migrate import migrate
from deployments.store.settings import StoreSettings
from serve import cli_evaluate
from serve.answers import GenerateResponse
from serve.cli_evaluate import EPILOG, evaluate
from serve.client import Client
from serve.front import routes
from serve.ingress import HandleCalls
from serve.local import local_handle
from serve.problem import MEDIA_TYPE, problem_of
from serve.settings import load_settings
from tests.evaluation_subjects import sample, samples
from tests.lora_serving import ADA, over_a_socket
from training.evaluation.plan import PLANS, load_plan
from training.evaluation.run import Pictures
from training.evaluation.run import evaluate as run

app = typer.Typer()
app.command("evaluate", epilog=EPILOG)(evaluate)


@dataclass(frozen=True)
class Told:
    """What the command printed, and where everything lies. character: Ada's id; lora: that of the LoRA which she has."""

    printed: str
    plan: Path
    out: Path
    character: str
    lora: str


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Of the whole application, with a store of its own."""
    folder = tmp_path_factory.mktemp("store")
    own = {"store": StoreSettings(url=f"sqlite:///{folder}/store.db", folder=folder)}
    settings = load_settings("local").model_copy(update=own)
    migrate(settings.store.database)
    with over_a_socket(routes(HandleCalls(local_handle(settings)), settings)) as address:
        yield address


@pytest.fixture(scope="module")
def told(url: str, tmp_path_factory: pytest.TempPathFactory) -> Told:
    """Every configuration of mini's plan, two prompts, one seed, four steps."""
    folder = tmp_path_factory.mktemp("served")
    content: dict[str, Any] = yaml.safe_load((PLANS / "mini.yaml").read_text())
    content["prompts"] = [prompt for prompt in content["prompts"] if prompt["name"] in ("closeup_park", "forest_hike")]
    content["fields"] |= {"num_inference_steps": 4}
    (folder / "plan.yaml").write_text(yaml.safe_dump(content))
    (folder / "unseen").mkdir()
    (folder / "unseen" / "4.png").write_bytes(sample("ada", 4))
    with Client(url) as client:
        lora, ada = client.loras.add(ADA), client.characters.create("Ada", samples("ada", (1, 2, 3)))
        client.characters.attach_lora(ada.id, lora.id)
    arguments = ["--config", folder / "plan.yaml", "--held-out", folder / "unseen", "--seeds", 1, "--out", folder / "out"]
    named = [*map(str, arguments), "--character", ada.id, "--server", url]
    result = CliRunner().invoke(app, named, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return Told(result.output, folder / "plan.yaml", folder / "out", ada.id, lora.id)


def test_what_brings_the_person_is_seen_in_the_figures(told: Told) -> None:
    found = json.loads((told.out / "summary.json").read_text())
    means = {name: item["all"]["identity"]["mean_no_face_as_0"] for name, item in found["configurations"].items()}
    assert list(means) == ["base", "lora", "pulid", "lora_pulid", "full"] and not found["left_out"]
    assert means["base"] < 0.3 and all(means[name] > means["base"] + 0.3 for name in ("lora", "pulid", "lora_pulid", "full"))
    assert all(gap["pairs"] == 2 for gap in found["differences"])
    pulid, ada = found["configurations"]["pulid"]["all"], found["subjects"]["Ada"]
    assert pulid["adherence"]["scene"] == 1 and pulid["seconds"]["median"] > 0 and pulid["peak_bytes"] > 200 * 2**20
    assert pulid["held_out"]["mean"] > 0.5 and (ada["references"], ada["held_out"]) == (3, 1)
    assert {"flux1-mini", "pulid-mini", "flux1-mini-controlnet-union", "face-judge-mini"} <= found["models"].keys()
    assert all(len(digest) == 64 for digest in found["models"]["pulid-mini"].values())
    assert found["loras"] == {"Ada": sha256(ADA).hexdigest()}
    assert "+ LoRA + PuLID + pose" in told.printed and "grid_small.png" in told.printed


def test_the_folder_is_whole_and_another_run_draws_nothing(url: str, told: Told) -> None:
    def refused(fields: Mapping[str, Any]) -> Pictures:
        raise AssertionError(f"{fields['prompt']} is there already")

    with Client(url) as client:
        subject = cli_evaluate._subject(client, told.character, None, None, None, None, "person", None)
    assert (subject.name, subject.lora, subject.trigger, len(subject.references)) == ("Ada", told.lora, "ada", 3)
    assert subject.identity == {"character_id": told.character}
    again = run(load_plan(str(told.plan)).but(seeds=(11,)), [subject], refused, told.out)
    assert again.drawn == 0 and len(again.rows) == 10
    for name in ("table.md", "grid.png", "grid_small.png", "plot.png"):
        assert (told.out / name).stat().st_size > 0
    assert {row.key.configuration for row in again.rows if "flux1-mini-controlnet-union" in row.models} == {"full"}


def test_a_folder_of_pictures_and_a_lora_by_its_id(url: str, told: Told, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"{number}.png").write_bytes(sample("ada", number))
    with Client(url) as client:
        subject = cli_evaluate._subject(client, None, tmp_path, None, told.lora, None, "woman", "F")
        assert (subject.name, subject.lora, subject.trigger, subject.sex) == (tmp_path.name, told.lora, "ada", "F")
        assert subject.references == samples("ada", (1, 2)) and not subject.identity
        with pytest.raises(InvalidRequest, match="holds no picture"):
            cli_evaluate._subject(client, None, tmp_path / "nothing", None, None, None, "woman", None)


def test_the_help_teaches() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    assert "--held-out" in shown and "goes on where it stopped" in " ".join(shown.split())


def test_a_busy_server_is_waited_for_a_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second time it has room; when it never has, that is said."""
    monkeypatch.setattr(cli_evaluate, "_PATIENCE_S", (0.0, 0.0))
    answers: list[httpx.Response] = []
    busy = problem_of(QueueFull("There is no room."))
    drawn = GenerateResponse(created=1, model="flux1-mini", data=[], timings={"total": 1.5}, models=["flux1-mini"], licences=[], request={})

    def answer(request: httpx.Request) -> httpx.Response:
        answers.append(httpx.Response(429, content=busy.model_dump_json(), headers={"content-type": MEDIA_TYPE}))
        return httpx.Response(200, content=drawn.model_dump_json()) if len(answers) == 2 else answers[-1]

    with Client(transport=httpx.MockTransport(answer)) as client:
        draw = cli_evaluate.drawn_by(client)
        assert draw({"prompt": "x"}) == Pictures([], 1.5, ("flux1-mini",)) and len(answers) == 2
        with pytest.raises(QueueFull, match="no room"):
            draw({"prompt": "x"})
    assert len(answers) == 2 + 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "Whose pictures"),
        (["--character", "character_1", "--references", "samples"], "Whose pictures"),
        (["--config", "nothing", "--references", "samples"], "no plan"),
        (["--only", "nobody", "--references", "samples"], "no configuration nobody"),
    ],
)
def test_what_is_wrong_is_said_before_anything_starts(tmp_path: Path, arguments: list[str], said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)], catch_exceptions=False)
    assert not list(tmp_path.iterdir())
