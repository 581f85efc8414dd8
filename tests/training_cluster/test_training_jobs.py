"""Trainings as Ray Jobs on a real Ray of several nodes: where they go, and what happens when anything of them dies."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from deployments.errors import Cancelled, LikenessError, NoFaceDetected, ReplicaLost, UnknownModel
from tests.ray_processes import named
from tests.training_cluster.conftest import Nodes
from tests.training_jobs import PLACEMENTS, Watched, task, until
from training.ray_jobs import RayTrainings
from training.tasks import STOPPING, TrainingResult, prepared

Folder = Callable[[str], Path]
_WORKER = "ray::RayTrainWorker"
_EVERY = 5
LONG: dict[str, Any] = {"steps": 40, "checkpoint_every": _EVERY}
"""Some seconds of steps: time to be killed in."""


@pytest.mark.slow
def test_from_pictures_to_a_lora(trainings: RayTrainings, folder: Folder) -> None:
    """Curated, trained and told of, by one submission; asked for again it is there."""
    job = Watched(trainings, "job_short", folder("job_short")).prepare(task())
    result = asyncio.run(job.follow())
    assert (result.steps, sorted(result.checkpoints), result.pictures.accepted) == (6, [2, 4, 6], 4)
    assert set(result.held_out) == {2, 4, 6} and any("only 4 pictures" in warning for warning in result.warnings)
    assert load_file(job.folder / result.lora).keys() == load_file(job.folder / result.checkpoints[6]).keys()
    stages = list(dict.fromkeys(told.stage for told in job.told))
    assert stages[-1] == "done" and "training" in stages and job.told[-1].step == 6
    assert asyncio.run(trainings.alive()) == frozenset()
    before = len(job.told)
    assert asyncio.run(job.follow()) == result and len(job.told) == before, "what has ended is not submitted again"
    assert submissions(trainings) == ["job_short-1"]


def submissions(trainings: RayTrainings, job: str = "job_short") -> list[str]:
    """Of one job, as Ray knows them."""
    import ray
    from ray.job_submission import JobSubmissionClient

    found = JobSubmissionClient(ray.get_runtime_context().gcs_address).list_jobs()
    return sorted(str(each.submission_id) for each in found if (each.metadata or {}).get("likeness-training") == job)


def groups() -> list[dict[str, Any]]:
    """The placement groups that there are now."""
    from ray.util.placement_group import placement_group_table

    return [group for group in placement_group_table().values() if group["state"] == "CREATED"]


def gpu_classes() -> dict[str, str | None]:
    """By node."""
    import ray

    return {node["NodeID"]: node["Labels"].get("gpu-class") for node in cast(Any, ray).nodes()}


@pytest.fixture(scope="package")
def undisturbed(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The LoRA of the long training, of which nothing died."""
    job = Watched(RayTrainings(placements=PLACEMENTS), "job_calm", tmp_path_factory.mktemp("calm")).prepare(task(**LONG))
    return (job.folder / asyncio.run(job.follow()).lora).read_bytes()


def same(job: Watched, result: TrainingResult, undisturbed: bytes) -> None:
    """To the last byte what comes of it when nothing dies."""
    assert result.steps == LONG["steps"] and (job.folder / result.lora).read_bytes() == undisturbed


def gone_on(before: int, after: list[int]) -> None:
    """No step is lost beyond one interval of checkpoints; `after` are the steps that were told of since."""
    assert after and before - _EVERY < min(after), f"step {before} was done, and then {min(after)} was told of"


@pytest.mark.slow
def test_two_at_once_land_where_they_should(nodes: Nodes, trainings: RayTrainings, folder: Folder) -> None:
    jobs = [Watched(trainings, f"job_{name}", folder(name)).prepare(task(name, **LONG)) for name in ("a6000", "a100")]

    async def both() -> tuple[list[dict[str, Any]], list[TrainingResult]]:
        running = [job.begin() for job in jobs]
        await asyncio.gather(*(job.until_step(1) for job in jobs))
        return groups(), await asyncio.gather(*running)

    live, results = asyncio.run(both())
    classes = gpu_classes()
    placed = [[classes[node] for node in group["bundles_to_node_id"].values()] for group in live]
    assert sorted(placed) == [["a100"], ["a6000"]], "one bundle each, on a node of its class"
    assert all(group["bundles"] == {0: {"CPU": 1.0, "GPU": 1.0}} and group["strategy"] == "PACK" for group in live)
    assert [result.steps for result in results] == [LONG["steps"]] * 2
    assert not groups(), "what was reserved is free again"


@pytest.mark.slow
def test_a_killed_process_is_begun_again_by_ray(trainings: RayTrainings, folder: Folder, undisturbed: bytes) -> None:
    job = Watched(trainings, "job_worker", folder("job_worker")).prepare(task(**LONG))

    async def broken() -> tuple[int, int, TrainingResult]:
        running = job.begin()
        await job.until_step(_EVERY + 2)
        (worker,) = named(_WORKER)
        worker.send_signal(signal.SIGKILL)
        told, before = len(job.told), job.told[-1].step
        return told, before, await running

    told, before, result = asyncio.run(broken())
    same(job, result, undisturbed)
    gone_on(before, [each.step for each in job.told[told:] if each.stage == "training"])
    assert submissions(trainings, "job_worker") == ["job_worker-1"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGTERM])
def test_after_its_driver_the_next_submission_goes_on(
    trainings: RayTrainings, folder: Folder, undisturbed: bytes, kind: signal.Signals
) -> None:
    name = f"job_driver_{kind.name.lower()}"
    job = Watched(trainings, name, folder(name)).prepare(task(**LONG))

    async def broken() -> tuple[int, int, TrainingResult]:
        running = job.begin()
        await job.until_step(_EVERY + 2)
        for driver in job.driver():
            driver.send_signal(kind)
        with pytest.raises(ReplicaLost, match=r"failed"):
            await running
        assert (job.folder / STOPPING).exists() == (kind == signal.SIGTERM)
        told, before = len(job.told), job.told[-1].step
        return told, before, await job.follow()

    told, before, result = asyncio.run(broken())
    same(job, result, undisturbed)
    gone_on(before, [each.step for each in job.told[told:] if each.stage == "training" and each.step != before])
    assert submissions(trainings, name) == [f"{name}-1", f"{name}-2"]


@pytest.mark.slow
def test_whoever_comes_next_follows_on(trainings: RayTrainings, folder: Folder, undisturbed: bytes) -> None:
    """The dispatcher is gone, the training is not; two that follow it at once see one training."""
    job = Watched(trainings, "job_followed", folder("job_followed")).prepare(task(**LONG))

    async def left() -> list[TrainingResult]:
        running = job.begin()
        await job.until_step(2)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        others = [Watched(RayTrainings(placements=PLACEMENTS), job.job, job.folder) for _ in range(2)]
        assert await others[0].trainings.alive() == {"job_followed"}
        return await asyncio.gather(*(other.follow() for other in others))

    first, second = asyncio.run(left())
    same(job, first, undisturbed)
    assert first == second and submissions(trainings, "job_followed") == ["job_followed-1"]


@pytest.mark.slow
def test_two_that_submit_at_once_mean_the_same_training(trainings: RayTrainings, folder: Folder) -> None:
    jobs = [Watched(RayTrainings(placements=PLACEMENTS), "job_twice", folder("job_twice")).prepare(task()) for _ in range(2)]

    async def both() -> list[TrainingResult]:
        return await asyncio.gather(*(job.follow() for job in jobs))

    first, second = asyncio.run(both())
    assert first == second and submissions(trainings, "job_twice") == ["job_twice-1"]


@pytest.mark.slow
def test_a_killed_node_moves_its_training(nodes: Nodes, trainings: RayTrainings, folder: Folder, undisturbed: bytes) -> None:
    at_head = PLACEMENTS["a100"].model_copy(update={"driver_cpus": 0.0})
    job = Watched(RayTrainings(placements={"a100": at_head}), "job_moved", folder("job_moved")).prepare(task("a100", **LONG))
    nodes.add("a100")

    def where() -> str:
        (group,) = groups()
        return str(group["bundles_to_node_id"][0])

    async def broken() -> tuple[str, str, int, int, TrainingResult]:
        running = job.begin()
        await job.until_step(_EVERY + 2)
        first = where()
        doomed = next(node for node in nodes.cluster.worker_nodes if node.node_id == first)
        told, before = len(job.told), job.told[-1].step
        await asyncio.to_thread(nodes.kill, doomed)
        await until(lambda: any(each.stage == "training" for each in job.told[told + 2 :]), 300, "a step after the node's death")
        second = where()
        return first, second, told, before, await running

    first, second, _, before, result = asyncio.run(broken())
    same(job, result, undisturbed)
    assert first != second and gpu_classes()[second] == "a100"
    assert submissions(trainings, "job_moved") == ["job_moved-1"]


@pytest.mark.slow
def test_a_training_is_stopped_in_order_and_for_good(trainings: RayTrainings, folder: Folder) -> None:
    job = Watched(trainings, "job_stopped", folder("job_stopped")).prepare(task(steps=4000, checkpoint_every=1000))

    async def stopped() -> None:
        running = job.begin()
        await job.until_step(3)
        await trainings.stop("job_stopped", job.folder)
        with pytest.raises(Cancelled):
            await running
        assert await trainings.alive() == frozenset()
        with pytest.raises(Cancelled):
            await job.follow()
        await trainings.stop("job_stopped", job.folder)
        await trainings.stop("job_never_was", job.folder)

    asyncio.run(stopped())
    assert list((job.folder / "checkpoints").glob("step-*/state.pt")), "it was asked before it was killed"
    assert not (job.folder / "lora.safetensors").exists() or job.told[-1].stage != "done"
    assert submissions(trainings, "job_stopped") == ["job_stopped-1"]


@pytest.mark.slow
def test_a_training_that_waits_for_room_ends_as_soon_as_it_is_cancelled_and_ray_forgets_it(trainings: RayTrainings, folder: Folder) -> None:
    nowhere = PLACEMENTS["local"].model_copy(update={"labels": {"gpu-class": "none has it"}})
    waiting = RayTrainings(placements={"local": nowhere}, stop_s=60.0)
    job = Watched(waiting, "job_waiting", folder("job_waiting")).prepare(task())

    async def stopped() -> float:
        running = job.begin()
        await until(lambda: any(told.stage == "waiting" and told.accepted for told in job.told), 120, "the end of its curation")
        await asyncio.sleep(8)  # Ray Train is brought up, and waits
        began = time.monotonic()
        await waiting.stop("job_waiting", job.folder)
        took = time.monotonic() - began
        with pytest.raises(Cancelled):
            await running
        return took

    assert asyncio.run(stopped()) < 20, "it was not the patience of a placement group that ended it"
    assert not (job.folder / STOPPING).exists(), "nor a signal"
    assert submissions(trainings, "job_waiting") == ["job_waiting-1"]
    asyncio.run(trainings.forget(["job_waiting"]))
    assert submissions(trainings, "job_waiting") == []


@pytest.mark.slow
def test_one_whose_folder_is_gone_is_killed(trainings: RayTrainings, folder: Folder) -> None:
    job = Watched(trainings, "job_orphan", folder("job_orphan")).prepare(task(steps=4000, checkpoint_every=1000))

    async def orphaned() -> None:
        running = job.begin()
        await job.until_step(2)
        running.cancel()
        job.folder.rename(job.folder.with_name("elsewhere"))
        await trainings.stop("job_orphan", job.folder)
        assert await trainings.alive() == frozenset()
        await until(lambda: not named(_WORKER) and not job.driver(), 60, "the end of its processes")

    asyncio.run(orphaned())


@pytest.mark.slow
def test_two_processes_train_what_one_does(trainings: RayTrainings, folder: Folder) -> None:
    """Their losses, and their LoRAs but for a few of 356,352 numbers: Adam moves one whose gradient is nothing but rounding by the whole
    rate, this way or that."""
    one = Watched(trainings, "job_one", folder("job_one")).prepare(task(batch=2, steps=8))
    two = Watched(trainings, "job_two", folder("job_two")).prepare(task("pair", batch=1, steps=8))
    results = [asyncio.run(job.follow()) for job in (one, two)]
    for step, loss in results[0].held_out.items():
        assert abs(loss - results[1].held_out[step]) <= 1e-5
    loras = [load_file(job.folder / result.lora) for job, result in zip((one, two), results, strict=True)]
    assert loras[0].keys() == loras[1].keys()
    apart = torch.cat([(loras[0][name] - loras[1][name]).abs().flatten() for name in loras[0]])
    moved = max(float(value.abs().max()) for name, value in loras[0].items() if "lora_B" in name)
    assert float((apart <= 1e-5).float().mean()) >= 0.9999 and float(apart.max()) < one_step() < moved


def one_step() -> float:
    """What a number of the LoRA moves by, at the most, in one step."""
    return task().settings.learning_rate


@pytest.fixture(params=["no pictures of anybody", "an unknown base", "an unknown base for two processes"])
def refused(request: pytest.FixtureRequest, trainings: RayTrainings, folder: Folder) -> Iterator[tuple[Watched, type[LikenessError]]]:
    name = f"job_refused_{len(request.param)}"
    job = Watched(trainings, name, folder(name))
    if request.param == "no pictures of anybody":
        prepared(job.folder, task(), {"torn.png": b"\x89PNG torn"})
        yield job, NoFaceDetected
    else:
        yield job.prepare(task("pair" if "two" in request.param else "local", base="flux1-minus")), UnknownModel


@pytest.mark.slow
def test_what_is_wrong_is_told_by_its_name_and_tried_once(refused: tuple[Watched, type[LikenessError]], trainings: RayTrainings) -> None:
    job, kind = refused
    for _ in range(2):
        with pytest.raises(kind) as raised:
            asyncio.run(job.follow())
        assert raised.value.remedy and not raised.value.retryable
    assert submissions(trainings, job.job) == [f"{job.job}-1"]
