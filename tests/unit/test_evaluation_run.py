"""Whole evaluations over a service that is exact, the world's renderer: figures that must come out, files, and runs that were stopped."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deployments.errors import InvalidRequest, QueueFull
from deployments.images import decode
from tests.evaluation_subjects import Renderer, samples
from training.evaluation.cases import Subject
from training.evaluation.plan import Plan, load_plan
from training.evaluation.rows import RowFile
from training.evaluation.run import Bench, Evaluation, Pictures, bench_of, evaluate
from training.evaluation.selection import Checkpoint, select
from training.evaluation.summary import files, summary, write

PROMPTS = ("closeup_park", "portrait_office", "forest_hike")


def _plan(**changes: Any) -> Plan:
    """Who is drawn: a stranger, Ada, and where faces are small nobody at all."""
    mini = load_plan("mini")
    configurations = [
        {"name": "base", "label": "a stranger", "fields": {"who": "Bruno"}},
        {"name": "lora", "label": "the person", "uses": ["lora"], "fields": {"who": "Ada"}},
        {"name": "shy", "label": "no full bodies", "fields": {"who": "Ada"}, "by_framing": {"full": {"who": "nobody"}}},
    ]
    prompts = tuple(prompt for prompt in mini.prompts if prompt.name in PROMPTS)
    return mini.but(**({"configurations": configurations, "prompts": prompts, "seeds": (3, 4), "fields": {}} | changes))


def _ada(**changes: Any) -> Subject:
    return Subject(
        **({"name": "Ada", "references": samples("ada", (1, 2, 3)), "held_out": samples("ada", (4,)), "lora": "lora_1"} | changes)
    )


@pytest.fixture(scope="module")
def bench() -> Bench:
    return bench_of(_plan())


@pytest.fixture(scope="module")
def done(bench: Bench, tmp_path_factory: pytest.TempPathFactory) -> Evaluation:
    found = evaluate(_plan(), [_ada()], Renderer().draw, tmp_path_factory.mktemp("evaluation"), bench)
    write(found)
    return found


@pytest.fixture(scope="module")
def found(done: Evaluation) -> dict[str, Any]:
    return summary(done)


def test_the_person_is_told_from_a_stranger_and_from_nobody(done: Evaluation, found: dict[str, Any]) -> None:
    base, own, shy = (found["configurations"][name]["all"] for name in ("base", "lora", "shy"))
    assert done.drawn == 18 and [item["pictures"] for item in (base, own, shy)] == [6, 6, 6]
    assert base["identity"]["mean_of_faces"] < 0.3 < 0.8 < own["identity"]["mean_of_faces"]
    assert own["above_threshold"] == 1 and base["above_threshold"] < 0.5
    assert own["held_out"]["mean"] > 0.8 and 0.8 < own["relative_identity"] < 1.1
    assert own["adherence"]["scene"] == 1 and own["seconds"] == {"mean": 0.25, "median": 0.25}
    assert own["peak_bytes"] is None
    assert found["models"]["face-judge-mini"].keys() == {"judge/arcface_judge.onnx"} and "flux1-mini" in found["models"]
    assert found["subjects"]["Ada"]["sex"] == "F"


def test_no_face_counts_in_one_mean_and_not_in_the_other(found: dict[str, Any]) -> None:
    shy = found["configurations"]["shy"]["all"]
    assert shy["no_face_rate"] == pytest.approx(2 / 6) and shy["above_threshold"] == pytest.approx(4 / 6)
    identity = shy["identity"]
    assert identity["mean_no_face_as_0"] == pytest.approx(identity["mean_of_faces"] * 4 / 6)


def test_differences_are_in_pairs_and_count_no_face_as_nobody(found: dict[str, Any]) -> None:
    gaps = {(gap["of"], gap["than"]): gap for gap in found["differences"]}
    assert gaps.keys() == {("lora", "base"), ("shy", "base"), ("shy", "lora")}
    means = {name: item["all"]["identity"]["mean_no_face_as_0"] for name, item in found["configurations"].items()}
    for (of, than), gap in gaps.items():
        assert gap["mean"] == pytest.approx(means[of] - means[than]) and gap["pairs"] == 6
    full = {(gap["of"], gap["than"]): gap for gap in found["differences_by_framing"]["full"]}
    assert full["shy", "lora"]["pairs"] == 2 and full["shy", "lora"]["mean"] == pytest.approx(3 * gaps["shy", "lora"]["mean"])
    assert gaps["lora", "base"]["clear"] and gaps["shy", "lora"]["mean"] < 0


def test_every_score_is_there_by_framing_turn_and_sex(found: dict[str, Any]) -> None:
    own = found["configurations"]["lora"]
    assert list(own["framing"]) == ["close_up", "portrait", "full"] and list(own["sex"]) == ["F"]
    assert sum(part["pictures"] for part in own["framing"].values()) == sum(part["pictures"] for part in own["yaw"].values()) == 6
    assert {"front", "turned"} >= set(own["yaw"])
    assert all(part.keys() == own["all"].keys() for part in own["framing"].values())


def test_the_files_that_are_left(done: Evaluation, found: dict[str, Any]) -> None:
    assert all(path.stat().st_size for path in files(done.folder))
    with (done.folder / "scores.csv").open(newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert len(lines) == 18 and all((done.folder / line["picture"]).is_file() for line in lines)
    assert json.loads((done.folder / "summary.json").read_text()) == json.loads(json.dumps(found))
    table = (done.folder / "table.md").read_text()
    assert table.count("| a stranger |") == 3 and "| 33.3% |" in table and "By framing" in table  # one line, and twice in differences
    grid, small, plot = (decode((done.folder / name).read_bytes()) for name in ("grid.png", "grid_small.png", "plot.png"))
    assert grid.shape[1] == 4 * 200 + 8 and small.shape[1] <= 1100 and plot.shape[1] == 900
    second = np.asarray(decode((done.folder / "pictures/Ada/base/closeup_park-3.png").read_bytes()))
    assert (grid[8:200, 208:400] == second).all()  # the first picture beside the reference


def test_a_second_run_draws_nothing_and_finds_the_same(done: Evaluation, bench: Bench, found: dict[str, Any]) -> None:
    service, told = Renderer(), list[tuple[int, int]]()
    again = evaluate(_plan(), [_ada()], service.draw, done.folder, bench, lambda *progress: told.append(progress))
    assert service.asked == [] and again.drawn == 0 and told == [(18, 18)]
    read = summary(again)
    for name in found["configurations"]:
        one, other = (each["configurations"][name]["all"]["identity"]["mean_of_faces"] for each in (found, read))
        assert one == pytest.approx(other, abs=1e-5)  # six digits are written
    assert summary(evaluate(_plan(), [_ada()], service.draw, done.folder, bench)) == read


def test_a_run_that_was_stopped_goes_on_where_it_was(bench: Bench, tmp_path: Path) -> None:
    service = Renderer()

    def draw(fields: Mapping[str, Any]) -> Pictures:
        if len(service.asked) == 5:
            raise QueueFull("Five are enough for now.")
        return service.draw(fields)

    with pytest.raises(QueueFull):
        evaluate(_plan(), [_ada()], draw, tmp_path, bench)
    rows = RowFile.of(tmp_path, ("scene", "clothes")).rows
    assert len(rows) == 5
    (tmp_path / rows[0].picture).unlink()
    with (tmp_path / "scores.csv").open("a") as stream:
        stream.write("Ada,F,base,closeup_pa")  # and the machine went down
    rest = Renderer()
    found = evaluate(_plan(), [_ada()], rest.draw, tmp_path, bench)
    assert found.drawn == len(rest.asked) == 14 and len(found.rows) == 18  # 13, and the one whose picture is gone
    lines = (tmp_path / "scores.csv").read_text().splitlines()
    assert len(lines) == 1 + 5 + 14 and "closeup_pa" not in {line.split(",")[3] for line in lines}
    assert len({row.key for row in found.rows}) == 18


def test_a_file_of_before_memory_was_measured_goes_on(done: Evaluation, bench: Bench, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(done.folder, folder)
    path = folder / "scores.csv"
    new = path.read_text()
    with path.open(newline="") as stream:
        lines = [{name: value for name, value in line.items() if name != "peak_bytes"} for line in csv.DictReader(stream)]
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines[:-1])
        stream.write("Ada,F,base,closeup_pa")  # and the machine went down
    service = Renderer()
    found = evaluate(_plan(), [_ada()], service.draw, folder, bench)
    assert found.drawn == len(service.asked) == 1 and len(found.rows) == 18
    assert path.read_text().splitlines()[:-1] == new.splitlines()[:-1] and len(path.read_text().splitlines()) == 19
    assert not list(folder.glob("*.part"))


def test_what_is_asked_otherwise_is_drawn_again(bench: Bench, tmp_path: Path) -> None:
    two = _plan(seeds=(3,)).only(("base", "lora"))
    evaluate(two, [_ada()], Renderer().draw, tmp_path, bench)
    service = Renderer()
    evaluate(two, [_ada(trigger="ada")], service.draw, tmp_path, bench)
    assert len(service.asked) == 3 and all(fields["prompt"].startswith("ada, ") for fields in service.asked)


def test_other_measures_need_another_folder(done: Evaluation, bench: Bench) -> None:
    fewer = Bench(bench.look, (), bench.faces)
    with pytest.raises(InvalidRequest, match="other columns"):
        evaluate(_plan(), [_ada()], Renderer().draw, done.folder, fewer)


def test_two_people_are_told_apart(bench: Bench, tmp_path: Path) -> None:
    bruno = Subject(name="Bruno", references=samples("bruno"))
    plan = _plan(seeds=(3,)).only(("base",))
    found = summary(evaluate(plan, [_ada(), bruno], Renderer().draw, tmp_path, bench))
    by_sex = found["configurations"]["base"]["sex"]
    assert by_sex["M"]["identity"]["mean_of_faces"] > 0.8 > 0.3 > by_sex["F"]["identity"]["mean_of_faces"]


def test_the_best_checkpoint_is_chosen_and_scored_again_with_fresh_seeds(bench: Bench, tmp_path: Path) -> None:
    service = Renderer()
    who = {"lora_early": "Chiyo", "lora_best": "Ada", "lora_late": "Bruno"}

    def draw(fields: Mapping[str, Any]) -> Pictures:
        return service.draw({**fields, "who": who[fields["loras"][0]["id"]]})

    checkpoints = [Checkpoint("step-25", "lora_early"), Checkpoint("step-50", "lora_best"), Checkpoint("step-75", "lora_late")]
    found = select(_plan(seeds=(3,)), _ada(), checkpoints, draw, tmp_path, (103, 104), bench)
    assert found.winner == checkpoints[1] and found.selected == max(found.means.values())
    assert found.gaps.keys() == {"step-25", "step-75"} and found.not_told_apart == []
    assert all(gap.mean == pytest.approx(found.selected - found.means[name]) for name, gap in found.gaps.items())
    fresh = [fields for fields in service.asked if fields["seed"] in (103, 104)]
    assert len(service.asked) == 3 * 3 + 3 * 2 and len(fresh) == 6 and {fields["who"] for fields in fresh} == {"Ada"}
    assert found.fresh > 0.8 and found.fresh != found.selected
    again = Renderer()
    assert (
        select(_plan(seeds=(3,)), _ada(), checkpoints, again.draw, tmp_path, (103, 104), bench).winner == found.winner and not again.asked
    )


@pytest.mark.parametrize(("seeds", "names"), [((3, 9), ["a"]), ((), ["a"]), ((9,), [])])
def test_who_chose_does_not_confirm(bench: Bench, tmp_path: Path, seeds: tuple[int, ...], names: list[str]) -> None:
    service = Renderer()
    with pytest.raises(InvalidRequest):
        select(_plan(), _ada(), [Checkpoint(name, name) for name in names], service.draw, tmp_path, seeds, bench)
    assert not service.asked
