"""The folder of a training, where trainings run, and what their submissions are called: all that is known without Ray."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from pydantic import ValidationError

from deployments.errors import InvalidCatalog, InvalidRequest, LikenessError, NoFaceDetected, NotEnoughMemory
from tests.planted_folder import png
from training.deaths import MOST, refuse_the_third
from training.job import _heeded_while_it_waits, main
from training.placement import Placement, load_placements, placement_of, pool_of
from training.ray_jobs import Submission, next_name, submission_of
from training.settings import preset
from training.tasks import (
    CANCEL,
    FAULT,
    PLACEMENT,
    PROGRESS,
    RESULT,
    STOPPING,
    TASK,
    ProgressFile,
    TrainingFault,
    TrainingProgress,
    TrainingTask,
    pictures_of,
    prepared,
    put,
    read,
    task_of,
    wanted,
)
from training.worker import Now


def task(**changes: object) -> TrainingTask:
    return TrainingTask.model_validate(
        {"trigger_word": "ohwx", "class_word": "woman", "settings": preset("mini", steps=6, warm_up_steps=0), **changes}
    )


def test_a_prepared_folder_gives_the_task_and_the_pictures_by_their_names(tmp_path: Path) -> None:
    pictures = {"images/1": b"one", "images/0": b"two", "../up.png": b"three"}
    prepared(tmp_path / "t", task(), pictures, b"who")
    assert task_of(tmp_path / "t") == task()
    assert [(source.name, source.read()) for source in pictures_of(tmp_path / "t")] == list(pictures.items())
    assert (tmp_path / "t" / "reference.png").read_bytes() == b"who"
    assert [path.name for path in tmp_path.iterdir()] == ["t"], "a picture's name is no path"
    assert not list((tmp_path / "t").rglob(".*")), "nothing half-written is left"


def test_the_first_preparation_stands(tmp_path: Path) -> None:
    prepared(tmp_path, task(), {"a": b"1"})
    prepared(tmp_path, task(trigger_word="other"), {"a": b"2"})
    assert task_of(tmp_path).trigger_word == "ohwx" and pictures_of(tmp_path)[0].read() == b"1"


def test_a_preparation_that_was_broken_off_is_made_whole(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "0000").write_bytes(b"old")
    prepared(tmp_path, task(), {"a": b"new"})
    assert pictures_of(tmp_path)[0].read() == b"new"


@pytest.mark.parametrize("content", [None, b"", b'{"trigger_word": "ohwx"}', b"[1"])
def test_a_folder_without_a_task_is_refused_by_name(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / TASK).write_bytes(content)
    with pytest.raises(InvalidRequest, match=str(tmp_path)):
        task_of(tmp_path)


def test_unknown_fields_and_bad_trigger_words_are_refused() -> None:
    for wrong in ({"surprise": 1}, {"trigger_word": ""}, {"trigger_word": "a\nb"}, {"settings": {"base": "flux1-mini", "rank": 33}}):
        with pytest.raises(ValidationError):
            task(**wrong)


def test_curation_is_told_the_trigger_word_of_the_task() -> None:
    curation = task(curate={"trigger": "another", "mask_weight": 0.2}).curation
    assert (curation.trigger, curation.class_word, curation.mask_weight) == ("ohwx", "woman", 0.2)


@pytest.mark.parametrize("error", [NoFaceDetected("None."), NotEnoughMemory("Much.", "Less.", {"needed_bytes": 3}), LikenessError("Odd.")])
def test_an_error_comes_back_as_what_it_was(tmp_path: Path, error: LikenessError) -> None:
    put(tmp_path / FAULT, TrainingFault.of(error))
    fault = read(tmp_path / FAULT, TrainingFault)
    assert fault is not None
    again = fault.error
    assert (type(again), again.args, again.retryable) == (type(error), (error.message, error.remedy, error.details), error.retryable)


def test_details_that_are_no_json_are_told_in_words(tmp_path: Path) -> None:
    assert TrainingFault.of(InvalidRequest("x", details={"path": tmp_path})).details == {"path": str(tmp_path)}


def test_progress_is_written_seldom_and_what_weighs_always(tmp_path: Path) -> None:
    told = ProgressFile(tmp_path, every_s=3600, steps=9)
    for step in range(1, 4):
        told.tell(stage="training", step=step)
    assert json.loads((tmp_path / PROGRESS).read_bytes())["step"] == 1
    told.tell(weighty=True, step=4, checkpoint=4)
    assert read(tmp_path / PROGRESS, TrainingProgress) == TrainingProgress(stage="training", step=4, steps=9, checkpoint=4)
    assert [path.name for path in tmp_path.iterdir()] == [PROGRESS]


def test_who_goes_on_does_not_forget_the_steps_that_were_done(tmp_path: Path) -> None:
    ProgressFile(tmp_path).tell(stage="training", step=7, steps=9, loss=0.5)
    ProgressFile(tmp_path).tell(stage="curating", of=3)
    assert read(tmp_path / PROGRESS, TrainingProgress) == TrainingProgress(stage="curating", of=3, step=7, steps=9, loss=0.5)


@pytest.mark.parametrize("name", [CANCEL, STOPPING])
def test_whoever_asks_a_training_to_end_is_heard(tmp_path: Path, name: str) -> None:
    clock = iter([0.0, 0.0, 0.1, 0.2, 0.9, 0.9])
    now = Now(tmp_path, every_s=0.5, clock=lambda: next(clock))
    assert wanted(tmp_path) and not now.unwanted()
    (tmp_path / name).touch()
    assert not wanted(tmp_path)
    assert [now.unwanted() for _ in range(3)] == [False, False, True], "asked of the folder no oftener than it was told to"
    (tmp_path / name).unlink()
    assert now.unwanted(), "what was heard once stands"


def test_the_table_of_placements_is_sound() -> None:
    table = load_placements()
    assert {"local", "a6000", "a100"} <= set(table)
    assert table["a6000"].labels == {"gpu-class": "a6000"} and table["a6000"].resources["GPU"] == 1 and table["a6000"].joined_by == "nccl"
    assert table["local"].device == "cpu" and table["local"].nice > 0 and "GPU" not in table["local"].resources
    assert pool_of("a100") == "train-a100"
    with pytest.raises(InvalidRequest, match="a600") as raised:
        placement_of("a600", table)
    assert "a6000" in raised.value.remedy


@pytest.mark.parametrize("wrong", [{"device": "cpu", "backend": "nccl"}, {"device": "cuda", "gpus": 0}, {"device": "cpu", "worker": 2}])
def test_a_placement_that_cannot_be_meant_is_refused(tmp_path: Path, wrong: dict[str, object]) -> None:
    path = tmp_path / "placement.yaml"
    path.write_text(json.dumps({"odd": wrong}))
    with pytest.raises(InvalidCatalog, match="placement.yaml"):
        load_placements(path)


def test_logical_gpus_may_be_reserved_for_work_on_the_cpu() -> None:
    placement = Placement(device="cpu", gpus=1)
    assert placement.resources == {"CPU": 1.0, "GPU": 1} and placement.joined_by == "gloo"


def test_the_third_death_without_a_new_checkpoint_is_the_last(tmp_path: Path) -> None:
    for step in (None, 2, 4):  # it gets further each time
        ProgressFile(tmp_path).tell(weighty=True, stage="training", checkpoint=step)
        for number in range(1, MOST):
            for _ in range(2):  # two follow it
                refuse_the_third(tmp_path, f"job_1-{step}-{number}", "Killed")
    with pytest.raises(LikenessError, match=r"died 3 times at the same step, after the checkpoint of step 4: Killed") as raised:
        refuse_the_third(tmp_path, "job_1-last", "Killed")
    assert not raised.value.retryable and raised.value.remedy
    refuse_the_third(tmp_path / "gone", "job_2-1", "Killed")
    assert not (tmp_path / "gone").exists()


def test_what_never_began_or_was_told_to_go_has_not_died() -> None:
    ends = {None: False, 3: False, 1: True, -9: True, 0: True}
    assert {code: Submission("job_1-1", "FAILED", "", code).died for code in ends} == ends
    assert not Submission("job_1-1", "RUNNING", "", None).died


@pytest.mark.parametrize("name", [CANCEL, STOPPING])
def test_a_driver_that_waits_for_room_hears_that_nobody_waits_for_it(tmp_path: Path, name: str) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    ProgressFile(tmp_path).tell(stage="waiting")
    threading.Timer(0.2, (tmp_path / name).touch).start()
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt), _heeded_while_it_waits(tmp_path):
            time.sleep(30)
        assert time.monotonic() - began < 20
        ProgressFile(tmp_path).tell(stage="training", step=1)
        with _heeded_while_it_waits(tmp_path):
            time.sleep(1.2)  # whoever trains looks for itself, and leaves a checkpoint
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_submission_is_called_by_its_job_and_how_many_have_ended() -> None:
    assert next_name("job_1a-2", None) == "job_1a-2-1"
    assert next_name("job_1a-2", Submission("job_1a-2-9", "FAILED", "")) == "job_1a-2-10"


def test_what_is_submitted_quotes_its_folder_and_says_where_the_driver_goes(tmp_path: Path) -> None:
    asked = submission_of(tmp_path / "a b; rm", Placement(device="cpu", driver_cpus=0.5, driver_labels={"pool": "train"}))
    assert asked["entrypoint"].startswith("exec ") and asked["entrypoint"].endswith(f"-m training.job '{tmp_path}/a b; rm'")
    assert submission_of(tmp_path, Placement(device="cpu"), "10.0.0.1:6379")["entrypoint"].endswith(f"{tmp_path} --ray 10.0.0.1:6379")
    assert asked["entrypoint_num_cpus"] == 0.5 and asked["entrypoint_label_selector"] == {"pool": "train"}
    assert "entrypoint_num_cpus" not in submission_of(tmp_path, Placement(device="cpu", driver_cpus=0))


@pytest.fixture
def terminated() -> Iterator[None]:
    """A driver takes the signal for itself; tests keep theirs."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.usefixtures("terminated")
def test_pictures_that_show_nobody_fail_with_their_reason_before_anything_is_placed(tmp_path: Path) -> None:
    """The driver itself, in this process; it gets nowhere near Ray."""
    prepared(tmp_path, task(), {"grey.png": png(Image.new("RGB", (192, 192), (90, 90, 90))), "torn.png": b"\x89PNG torn"})
    put(tmp_path / PLACEMENT, Placement(device="cpu"))
    assert main([str(tmp_path)]) == 1
    fault = read(tmp_path / FAULT, TrainingFault)
    assert fault is not None and fault.error.status == 422 and not fault.error.retryable
    assert not (tmp_path / RESULT).exists()


@pytest.mark.usefixtures("terminated")
def test_a_training_that_is_not_wanted_any_more_ends_before_it_begins(tmp_path: Path) -> None:
    prepared(tmp_path, task(), {"a.png": b"x"})
    put(tmp_path / PLACEMENT, Placement(device="cpu"))
    (tmp_path / CANCEL).touch()
    assert main([str(tmp_path)]) == 3 and not (tmp_path / FAULT).exists()


def test_a_training_whose_folder_is_gone_makes_no_new_one(tmp_path: Path) -> None:
    assert main([str(tmp_path / "gone")]) == 3 and not (tmp_path / "gone").exists()


@pytest.mark.usefixtures("terminated")
def test_a_driver_that_is_told_to_go_leaves_word_for_its_processes(tmp_path: Path) -> None:
    prepared(tmp_path, task(), {"a.png": b"x"})
    put(tmp_path / PLACEMENT, Placement(device="cpu"))
    (tmp_path / CANCEL).touch()
    main([str(tmp_path)])
    os.kill(os.getpid(), signal.SIGTERM)
    assert (tmp_path / STOPPING).exists()
