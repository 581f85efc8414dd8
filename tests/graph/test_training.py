"""From pictures to a LoRA that draws, as jobs over the whole application; and that whatever does not end well leaves nothing behind."""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from sqlalchemy import select

from deployments.errors import TooLarge
from deployments.images import encode
from deployments.store.character_tables import CharacterRow
from deployments.store.characters import CharacterStore
from deployments.store.engine import Database
from deployments.store.jobs import JobStore
from deployments.store.loras import LoraStore
from deployments.store.tables import LoraRow
from serve.client import Client
from serve.settings import AppSettings
from serve.training_answers import EvaluationFound, TrainedLora
from tests.job_serving import running_with, until
from tests.training_here import SLOTS, TrainingsHere, crew
from tests.training_jobs import pictures
from tests.whole_application import DOOR, Whole, whole
from training.orders import TRAINING
from training.tasks import TrainingProgress, TrainingResult

SENT = [base64.b64encode(content).decode() for content in pictures().values()]
SHORT = {"steps": 2, "checkpoint_every": 1, "batch": 1, "resolutions": [64], "warm_up_steps": 0, "rank": 4, "alpha": 4}
PROMPT = {"prompt": "ohwx, a close-up portrait of a person in a park", "steps": 2, "width": 64, "height": 64, "seed": 3, "scores": False}


@pytest.fixture(scope="module")
def served(handle: Any, settings: AppSettings) -> Iterator[Whole]:
    """Behind its door, where keys have owners."""
    with whole(handle, settings.model_copy(update={"door": DOOR})) as found:
        yield found


def submitted(served: Whole, key: dict[str, str], path: str = "/v1/training/jobs", **fields: Any) -> dict[str, Any]:
    answer = served.http.post(path, json=fields, headers=key)
    assert answer.status_code == 202, answer.text
    found: dict[str, Any] = answer.json()
    return found


def shown(served: Whole, key: dict[str, str], id: str) -> dict[str, Any]:
    found: dict[str, Any] = served.http.get(f"/v1/jobs/{id}", headers=key).raise_for_status().json()
    return found


def belongings(settings: AppSettings) -> tuple[list[str], list[str], set[str]]:
    """Everything that anybody has: LoRAs and characters by their owners, and files."""
    database, root = Database(settings.store.database), settings.store.files
    with database.reading() as session:
        loras, characters = (sorted(session.scalars(select(column))) for column in (LoraRow.owner, CharacterRow.owner))
    database.close()
    files = {str(path.relative_to(root)) for folder in ("loras", "characters") for path in (root / folder).rglob("*") if path.is_file()}
    return loras, characters, files


async def done(store: JobStore, *ids: str, seconds: float = 60) -> None:
    await until(lambda: not store.live(ids), seconds)


def test_pictures_become_a_lora_of_a_new_character_that_draws_at_once(handle: Any, settings: AppSettings, served: Whole) -> None:
    key = served.key("trainer")
    fields: dict[str, Any] = {
        "trigger_word": "ohwx", "images": SENT, "character_id": "Ada", "settings": SHORT | {"held_out": 1}, "job_id": "42", "name": "ada",
    }  # fmt: skip
    begun = submitted(served, key, **fields)
    again = served.http.post("/v1/training/jobs", json=fields, headers=key | {"idempotency-key": "42"})
    assert (again.status_code, again.json()["id"]) == (200, begun["id"])
    seen: list[dict[str, Any]] = []

    async def main() -> None:
        _, executors = crew(handle, settings, served.jobs, TrainingsHere())
        async with running_with(served.jobs, executors, SLOTS):
            while served.jobs.live([begun["id"]]):
                seen.append(await asyncio.to_thread(shown, served, key, begun["id"]))
                await asyncio.sleep(0.05)

    asyncio.run(main())
    item = shown(served, key, begun["id"])
    assert item["status"] == "succeeded", item
    result = TrainedLora.model_validate(item["result"])
    stages = {one["progress"]["stage"] for one in seen if one["progress"]}
    assert {"training", "selecting"} <= stages, stages
    assert any(one["progress"] and one["progress"]["loss"] for one in seen)
    assert result.pictures.accepted >= 3 and any("only" in warning for warning in result.warnings)
    assert [candidate.step for candidate in result.candidates] == [1, 2] and result.step in (1, 2)
    assert not next(candidate for candidate in result.candidates if candidate.step == result.step).told_apart
    assert {"identity", "identity_selected", "held_out_loss"} <= result.scores.keys()
    grid = served.http.get(item["result"]["data"][0]["url"], headers=key)
    assert grid.content.startswith(b"\x89PNG")
    lora = served.http.get(f"/v1/loras/{result.lora_id}", headers=key).raise_for_status().json()
    assert (lora["trigger_word"], lora["base"], lora["sha256"]) == ("ohwx", "flux1-mini", result.sha256)
    assert '"identity"' in lora["metadata"]["scores"]
    character = served.http.get(f"/v1/characters/{result.character_id}", headers=key).raise_for_status().json()
    assert (
        character["name"] == "Ada" and character["lora"]["id"] == result.lora_id and len(character["pictures"]) == result.pictures.accepted
    )
    plain = served.http.post("/v1/generate", json=PROMPT, headers=key).raise_for_status().json()
    drawn = served.http.post("/v1/generate", json=PROMPT | {"loras": [{"id": result.lora_id}]}, headers=key).raise_for_status().json()
    assert plain["data"][0]["b64_json"] != drawn["data"][0]["b64_json"]
    owners = belongings(settings)
    assert not [owner for owner in (*owners[0], *owners[1]) if owner.startswith("making:")]


def test_a_character_is_trained_on_its_own_pictures_after_two_deaths(handle: Any, settings: AppSettings, served: Whole) -> None:
    """The processes of the training die, and the runner that follows it stops in order; it is begun once more each time the former do."""
    key = served.key("trainer")
    made = served.http.post("/v1/characters", json={"name": "Bea", "pictures": SENT}, headers=key).raise_for_status().json()
    begun = submitted(served, key, trigger_word="ohwx", character_id=made["id"], settings=SHORT | {"steps": 24}, select=False)
    trainings = TrainingsHere(break_first=1)

    async def main() -> None:
        _, executors = crew(handle, settings, served.jobs, trainings)
        async with running_with(served.jobs, executors, SLOTS):
            await until(lambda: trainings.begun.get(begun["id"]) == 2 and served.jobs.get(begun["id"], "trainer").step > 0, 60)
        assert served.jobs.get(begun["id"], "trainer").status == "queued", "it goes back, and the training goes on"
        assert await trainings.alive() == {begun["id"]} and not trainings.stopped
        async with running_with(served.jobs, executors, SLOTS):
            await done(served.jobs, begun["id"])

    asyncio.run(main())
    item = shown(served, key, begun["id"])
    assert (item["status"], item["attempt"], trainings.begun[begun["id"]]) == ("succeeded", 2, 2), item
    result = TrainedLora.model_validate(item["result"])
    assert (result.character_id, result.step, result.candidates) == (made["id"], 24, [])
    assert LoraStore(settings.store.database, settings.store.files).get(result.lora_id, "trainer").trigger_word == "ohwx"
    assert CharacterStore(settings.store.database, settings.store.files).lora(made["id"], "trainer") == (result.lora_id, "ohwx")


def test_a_character_that_is_deleted_meanwhile_is_not_said_to_have_the_lora(handle: Any, settings: AppSettings, served: Whole) -> None:
    key = served.key("trainer")
    made = served.http.post("/v1/characters", json={"name": "Cleo", "pictures": SENT}, headers=key).raise_for_status().json()
    begun = submitted(served, key, trigger_word="ohwx", character_id=made["id"], settings=SHORT, select=False)

    class Outlived(TrainingsHere):
        async def follow(self, id: str, folder: Path, report: Callable[[TrainingProgress], None]) -> TrainingResult:
            result = await super().follow(id, folder, report)
            await asyncio.to_thread(served.http.delete, f"/v1/characters/{made['id']}", headers=key)
            return result

    async def main() -> None:
        _, executors = crew(handle, settings, served.jobs, Outlived())
        async with running_with(served.jobs, executors, SLOTS):
            await done(served.jobs, begun["id"])

    asyncio.run(main())
    item = shown(served, key, begun["id"])
    assert item["status"] == "succeeded", item
    result = TrainedLora.model_validate(item["result"])
    assert result.character_id is None and any(f"{made['id']} was deleted" in warning for warning in result.warnings)
    assert served.http.get(f"/v1/loras/{result.lora_id}", headers=key).status_code == 200


def test_photographs_of_more_than_a_request_become_a_job_and_of_more_than_a_set_do_not(handle: Any, settings: AppSettings) -> None:
    """As a phone makes them: large, and of noise that nothing makes smaller."""
    photograph = encode(np.random.default_rng(0).integers(0, 256, (2000, 2000, 3), np.uint8))
    most = 96 * 2**20
    fitting, many = settings.max_body_bytes // len(photograph) + 1, most // len(photograph) + 1
    with whole(handle, settings.model_copy(update={"door": DOOR, "max_set_bytes": most})) as served:
        key = served.key("photographer")
        with Client("http://localhost", transport=httpx.ASGITransport(served.entry), headers=key, timeout=120) as client:
            job = client.training.submit(trigger_word="ohwx", images=[photograph] * fitting)
            kept = served.jobs.pictures(served.jobs.get(job.id, "photographer"))
            assert len(kept) == fitting and set(kept.values()) == {photograph}
            assert sum(map(len, kept.values())) > settings.max_body_bytes
            for submit in (client.training.submit, client.evaluations.submit):
                with pytest.raises(TooLarge, match=str(most)) as caught:
                    submit(trigger_word="ohwx", images=[photograph] * many)
                assert caught.value.status == 413 and "Send smaller pictures" in caught.value.remedy
            job.cancel()
        assert len(served.jobs.list("photographer")) == 1


def test_what_fails_and_what_is_cancelled_leaves_nothing(handle: Any, settings: AppSettings, served: Whole, monkeypatch: Any) -> None:
    key, before = served.key("unlucky"), belongings(settings)
    trainings = TrainingsHere()
    training, executors = crew(handle, settings, served.jobs, trainings)
    lost = submitted(served, key, trigger_word="ohwx", images=[_grey(shade) for shade in (90, 120, 150)], character_id="Nobody")
    long = submitted(
        served, key, trigger_word="ohwx", images=SENT, character_id="Ada", settings=SHORT | {"steps": 500, "checkpoint_every": 50}
    )

    async def main() -> None:
        async with running_with(served.jobs, executors, SLOTS):
            await done(served.jobs, lost["id"])
            await until(lambda: served.jobs.get(long["id"], "unlucky").step > 1, 60)
            served.jobs.cancel(long["id"], "unlucky")
            await until(lambda: trainings.stopped == [long["id"]], 30)
        while await trainings.alive():
            await asyncio.sleep(0.05)
        monkeypatch.setattr("training.executor._ABANDONED_AFTER_S", 0.0)
        await training.sweep()

    asyncio.run(main())
    item = shown(served, key, lost["id"])
    assert (item["status"], item["result"]) == ("failed", None) and item["error"]["code"] in ("no_face_detected", "invalid_request"), item
    assert shown(served, key, long["id"])["status"] == "canceled"
    assert belongings(settings) == before
    assert not list((settings.store.files / "trainings").glob("job_*"))


def test_a_lora_whose_job_was_cancelled_at_the_last_moment_is_swept(handle: Any, settings: AppSettings, served: Whole) -> None:
    """Between the end of the work and its being written down nothing belongs to anybody yet."""
    key, before = served.key("late"), belongings(settings)
    begun = submitted(served, key, trigger_word="ohwx", images=SENT, character_id="Late", settings=SHORT, select=False)
    training, _ = crew(handle, settings, served.jobs, TrainingsHere())

    async def main() -> None:
        lease = served.jobs.lease("a runner", ["train-local"], 600)
        assert lease is not None and lease.job.id == begun["id"] and lease.job.kind == TRAINING
        finished = await training(lease, lambda event: None)
        assert served.owned(key)["/v1/loras"] == [] == served.owned(key)["/v1/characters"]
        served.jobs.cancel(begun["id"], "late")
        assert served.jobs.succeed(lease, finished.answer, finished.pictures, finished.timings, finished.within) is None
        assert belongings(settings) != before
        await training.sweep()

    asyncio.run(main())
    assert belongings(settings) == before and served.owned(key)["/v1/loras"] == []


def test_an_evaluation_leaves_figures_and_files_and_stops_when_it_is_cancelled(handle: Any, settings: AppSettings, served: Whole) -> None:
    key = served.key("judge")
    small = {"steps": 2, "width": 128, "height": 128}
    pulid = small | {"workflow": "flux-pulid", "style": "stylized"}
    fields: dict[str, Any] = {
        "images": SENT[:2], "held_out": SENT[2:], "prompts": ["closeup_park"], "seeds": [1], "name": "ada",
        "configurations": [
            {"name": "base", "label": "base", "fields": small},
            {"name": "pulid", "label": "+ PuLID", "uses": ["references"], "fields": pulid},
        ],
    }  # fmt: skip
    begun = submitted(served, key, "/v1/evaluations", **fields)
    long = submitted(served, key, "/v1/evaluations", **(fields | {"seeds": list(range(90))}))

    async def main() -> float:
        _, executors = crew(handle, settings, served.jobs, TrainingsHere())
        async with running_with(served.jobs, executors, SLOTS) as runner:
            await done(served.jobs, begun["id"])
            await until(lambda: served.jobs.get(long["id"], "judge").step > 0, 60)
            served.jobs.cancel(long["id"], "judge")
            cancelled = time.monotonic()
            await until(lambda: not runner.running, 30)
            return time.monotonic() - cancelled

    assert asyncio.run(main()) < 10
    item = shown(served, key, begun["id"])
    assert item["status"] == "succeeded", item
    found = EvaluationFound.model_validate(item["result"])
    assert found.pictures == 2 and set(found.summary["configurations"]) == {"base", "pulid"}
    files = {file["name"]: served.http.get(file["url"], headers=key).content for file in item["result"]["data"]}
    assert set(files) == {"table.md", "summary.json", "scores.csv", "grid.png", "grid_small.png", "plot.png"}
    assert files["plot.png"].startswith(b"\x89PNG") and files["scores.csv"].count(b"\n") == 3
    listed = served.http.get("/v1/evaluations", headers=key).json()["data"]
    assert [one["id"] for one in listed] == [long["id"], begun["id"]]
    assert served.http.get(f"/v1/training/jobs/{begun['id']}", headers=key).status_code == 404


def _grey(shade: int = 120) -> str:
    return base64.b64encode(encode(np.full((128, 128, 3), shade, np.uint8))).decode()
