"""`likeness jobs` against a server over a socket, with a true runner behind it: from submitting to fetching, and what failures tell."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from deployments.store.jobs import JobStore
from deployments.store.settings import EVERYBODY
from serve.cli import app
from tests.job_serving import desk_of, new, opened, painted, routes, running
from tests.lora_serving import over_a_socket

ROOT = Path(__file__).resolve().parents[2]
ADA = ROOT / "samples" / "characters" / "ada-1.png"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[JobStore]:
    store = opened(tmp_path)
    yield store
    store.close()


@pytest.fixture
def resting(store: JobStore, monkeypatch: pytest.MonkeyPatch) -> Iterator[JobStore]:
    """A server without a runner, named by the environment."""
    with over_a_socket(routes(desk_of(store))) as url:
        monkeypatch.setenv("LIKENESS_SERVER", url)
        yield store


@pytest.fixture
def working(resting: JobStore) -> Iterator[JobStore]:
    over = threading.Event()

    async def work() -> None:
        async with running(resting):
            while not over.is_set():
                await asyncio.sleep(0.05)

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    yield resting
    over.set()
    thread.join()


def likeness(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["jobs", *map(str, arguments)])


def test_from_submitting_to_fetching_to_deleting(working: JobStore, tmp_path: Path) -> None:
    assert "likeness jobs submit" in likeness("list").stdout
    done = likeness("submit", "-w", "flux-pulid", "-r", ADA, "-p", "x", "--seed", 5, "-n", 2, "--key", "order [7]", "--priority", "high")
    assert done.exit_code == 0, done.output
    id = done.stdout.strip()
    assert re.fullmatch(r"job_[0-9a-f]{24}", id)
    watched = likeness("watch", id)
    assert watched.exit_code == 0, watched.output
    out = tmp_path / "pictures"
    fetched = likeness("fetch", id, "--out", out)
    assert fetched.exit_code == 0, fetched.output
    expected = [content for content, _ in painted({"n": 2, "seed": 5}).pictures]
    assert [(out / f"flux-pulid-{seed}.png").read_bytes() for seed in (5, 6)] == expected and "flux-pulid-5.png" in fetched.stdout
    facts = json.loads(likeness("fetch", id, "--out", out, "--json").stdout)
    assert len(facts["data"]) == 2 and str(out / "flux-pulid-5.png") in facts["files"]
    listed = likeness("list", "--status", "succeeded", "-w", "flux-pulid").stdout
    assert id in listed and "flux-pulid" in listed and json.loads(likeness("list", "--json").stdout)["data"][0]["id"] == id
    shown = likeness("show", id).stdout
    assert "succeeded" in shown and "/v1/artifacts/" in shown and "denoise 0.10" in shown
    assert json.loads(likeness("show", id, "--json").stdout)["priority"] == "high"
    assert f"{id} was succeeded already" in likeness("cancel", id).stdout
    assert f"{id} is deleted" in likeness("delete", id).stdout
    gone = likeness("show", id)
    assert gone.exit_code == 1 and "(job_not_found)" in gone.stderr and id in gone.stderr
    assert working.list(EVERYBODY) == ()


def test_watching_tells_every_event_as_json_and_fails_where_the_job_does(working: JobStore) -> None:
    told = likeness("submit", "-p", "impossible", "--watch")
    assert told.exit_code == 1 and "(invalid_request)" in told.stderr and "impossible" in told.stderr, told.output
    id = told.stdout.strip()
    lines = likeness("watch", id, "--json")
    events = [json.loads(line) for line in lines.stdout.splitlines()]
    assert lines.exit_code == 1 and [event["kind"] for event in events][0] == "queued" and events[-1]["kind"] == "failed"
    assert "impossible" in likeness("show", id).stdout
    failed = likeness("fetch", id)
    assert failed.exit_code == 1 and "(invalid_request)" in failed.stderr
    done = likeness("submit", "-p", "x", "--watch", "--json")
    assert done.exit_code == 0 and json.loads(done.stdout)["status"] == "succeeded"


def test_what_waits_says_where_and_can_be_cancelled(resting: JobStore) -> None:
    ids = [resting.submit(EVERYBODY, new())[0].id for _ in range(3)]
    listed = likeness("list", "--limit", 2)
    assert "2 before it" in listed.stdout and "1 before it" in listed.stdout and "older" in listed.stderr
    assert "next" in likeness("show", ids[0]).stdout
    assert f"{ids[0]} is canceled" in likeness("cancel", ids[0]).stdout and resting.get(ids[0], EVERYBODY).status == "canceled"
    watched = likeness("watch", ids[0])
    assert watched.exit_code == 1 and "is canceled" in watched.stderr


def test_what_cannot_be_done_is_told_in_words(resting: JobStore, tmp_path: Path) -> None:
    body = tmp_path / "body.json"
    body.write_text('{"prompt": "x", "nonsense": 1}')
    for arguments, code, says in (
        (("submit", "--body", body), "invalid_request", "`nonsense`"),
        (("submit", "--body", tmp_path / "absent"), "invalid_request", "absent cannot be read"),
        (("submit", "-p", "x", "--priority", "now"), "invalid_request", "`priority`"),
        (("list", "--status", "asleep"), "invalid_request", "`status`"),
        (("watch", "job_nobodys"), "job_not_found", "job_nobodys"),
        (("list", "--server", "http://127.0.0.1:9"), "server_unreachable", "likeness serve"),
    ):
        result = likeness(*arguments)
        assert result.exit_code == 1 and f"({code})" in result.stderr and says in result.stderr, result.output
    assert resting.list(EVERYBODY) == ()


def test_looking_after_jobs_loads_no_model_library() -> None:
    heavy = {"torch", "diffusers", "transformers", "ray", "onnxruntime", "numpy"}
    source = (
        "import sys; from typer.testing import CliRunner; from serve.cli import app; "
        "assert CliRunner().invoke(app, ['jobs', 'list', '--server', 'http://127.0.0.1:9']).exit_code == 1; "
        f"print(sorted({heavy!r} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_the_help_says_what_a_job_is_and_what_to_do_with_it() -> None:
    text = likeness("--help").stdout
    assert "likeness jobs submit" in text and "likeness jobs watch ID" in text and "likeness serve" in text
    assert "--watch" in likeness("submit", "--help").stdout
