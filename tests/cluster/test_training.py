"""Trainings on a real Ray, from HTTP to a picture: no process that serves is started anew, whoever dies in between."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from typing import Any

import pytest
import ray
from ray.job_submission import JobSubmissionClient

from serve.client import Client
from serve.client_training import Training
from serve.training_answers import TrainedLora
from tests.ray_processes import replicas
from tests.training_jobs import pictures
from training.ray_jobs import RayTrainings

PICTURES = list(pictures().values())
SHORT = {"steps": 10, "checkpoint_every": 5, "batch": 1, "rank": 8, "alpha": 8}
LONG = {"steps": 40, "checkpoint_every": 10, "batch": 1, "rank": 8, "alpha": 8}
PROMPT: dict[str, Any] = {
    "prompt": "ohwx, a close-up portrait of a smiling person wearing a red t-shirt in a park with warm light", "seed": 7, "steps": 8,
}  # fmt: skip


def serving() -> dict[str, int]:
    """The processes that serve, without the one that follows trainings."""
    return {name: process.pid for process in replicas() if "JobServer" not in (name := " ".join(process.cmdline()))}


def submissions(job: str) -> list[str]:
    """Of a training: what Ray was asked to run."""
    found = JobSubmissionClient(ray.get_runtime_context().gcs_address).list_jobs()
    return sorted(str(one.submission_id) for one in found if one.submission_id and one.submission_id.startswith(job))


def until_step(job: Training, step: int) -> None:
    for event in job.events():
        if event.kind == "progress" and event.data.get("stage") == "training" and event.data["step"] >= step:
            return
    raise AssertionError(f"it ended before step {step}: {job.refresh()}")


@pytest.mark.slow
def test_a_training_is_drawn_with_at_once_and_nothing_is_started_anew(url: str) -> None:
    before = serving()
    with Client(url) as client:
        job = client.training.submit(trigger_word="ohwx", images=PICTURES, character_id="Ada", settings=SHORT, job_id="e2e")
        stages = [event.data["stage"] for event in job.events() if event.kind == "progress"]
        result = job.get(timeout=300)
        assert [stage for stage in ("training", "selecting") if stage in stages] == ["training", "selecting"], stages
        assert result.step in (5, 10) and len(result.candidates) == 2 and result.warnings, result
        assert submissions(job.id) == [f"{job.id}-1"]
        plain, drawn = client.generate(**PROMPT), client.generate(**PROMPT, loras=[{"id": result.lora_id}])
        assert plain.data[0].content != drawn.data[0].content
        avatar = client.generate(workflow="flux-avatar", character_id=result.character_id, prompt="a portrait in a park", steps=4)
        assert result.trigger_word in avatar.request["prompt"]
    assert serving() == before


@pytest.mark.slow
def test_who_follows_a_training_is_killed_and_the_training_goes_on(url: str) -> None:
    with Client(url) as client:
        job = client.training.submit(trigger_word="ohwx", images=PICTURES, settings=LONG, select=False)
        until_step(job, 2)
        (process,) = replicas("JobServer")
        os.kill(process.pid, signal.SIGKILL)
        item = job.wait(timeout=300)
        assert item.status == "succeeded" and item.attempt == 2, item
        assert isinstance(item.result, TrainedLora) and item.result.step == LONG["steps"]
        assert submissions(job.id) == [f"{job.id}-1"], "it was begun once"
        events = list(job.events())
        assert [event.kind for event in events].count("succeeded") == 1
        steps = [event.data["step"] for event in events if event.kind == "progress" and event.data["stage"] == "training"]
        assert steps == sorted(steps), "no step was done twice"


@pytest.mark.slow
def test_a_training_that_is_cancelled_ends_and_leaves_nothing(url: str) -> None:
    with Client(url) as client:
        loras = client.loras.list()
        job = client.training.submit(trigger_word="ohwx", images=PICTURES, settings=LONG | {"steps": 2000})
        until_step(job, 2)
        assert job.cancel() and job.refresh().status == "canceled"
        began = time.monotonic()
        while job.id in asyncio.run(RayTrainings().alive()):
            assert time.monotonic() - began < 60, "it goes on"
            time.sleep(0.5)
        assert client.loras.list() == loras


@pytest.mark.slow
def test_an_evaluation_is_drawn_by_the_service_and_leaves_it_free_when_it_is_cancelled(url: str) -> None:
    fields: dict[str, Any] = {"images": PICTURES[:2], "configurations": ["base"], "prompts": ["closeup_park"]}
    with Client(url) as client:
        found = client.evaluations.submit(**fields, seeds=[1]).summary(timeout=200)
        assert found["configurations"]["base"]["all"] and found["judge"] == "face-judge-mini"
        began = time.perf_counter()
        client.generate(**PROMPT)
        alone = time.perf_counter() - began
        long = client.evaluations.submit(**fields, seeds=list(range(50)))
        for event in long.events():
            if event.kind == "progress" and event.data["step"] > 0:
                break
        began = time.perf_counter()
        assert long.cancel()
        client.generate(**PROMPT)
        # Had the picture under way been drawn to its end, all of it would have come first.
        assert time.perf_counter() - began < 2 * alone + 2
        assert long.refresh().status == "canceled"
