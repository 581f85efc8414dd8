"""Figures: counted by several processes and shown as one sum, never in the way of the work, and read back from the page itself."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, HTTPException
from prometheus_client import CONTENT_TYPE_LATEST, Counter, Metric
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from starlette.responses import Response, StreamingResponse

from deployments import metrics
from serve.metrics_page import add_metrics_route, page
from serve.watching import Watching

ROOT = Path(__file__).parents[2]


def value(name: str, text: str | None = None, /, **labels: str) -> float:
    """Of one sample of the page; 0 where it is not there."""
    shown = text if text is not None else page()[0].decode()
    found = (sample for family in parse_text(shown) for sample in family.samples)
    return next((sample.value for sample in found if sample.name == name and labels.items() <= sample.labels.items()), 0.0)


def in_processes(folder: Path, *programs: str) -> list[subprocess.Popen[bytes]]:
    """Each program in a process of its own that counts into the folder; it lives until its stdin closes."""
    environment = {**os.environ, metrics.FOLDER_VARIABLE: str(folder), "PYTHONPATH": str(ROOT)}
    head = "import sys\nfrom deployments import metrics\n"
    tail = "\nprint('counted', flush=True)\nsys.stdin.read()\n"
    started = [
        subprocess.Popen([sys.executable, "-c", head + program + tail], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        for program in programs
    ]
    for process in started:
        assert process.stdout is not None and process.stdout.readline() == b"counted\n"
    return started


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in which processes count; the page of this process shows them."""
    folder = tmp_path / "metrics"
    metrics.prepare(folder)
    monkeypatch.setenv(metrics.FOLDER_VARIABLE, str(folder))
    yield folder


def test_what_several_processes_counted_is_one_sum_also_after_they_died(node: Path) -> None:
    requested = "for _ in range(3): metrics.requested('/v1/generate', 200, 0.3)"
    drawn = "metrics.drawn('flux-pulid', 'flux1-mini', {'denoise': 2.0, 'decode': 0.5, 'total': 9.0}, [('pulid', 0.62)])"
    first, second = in_processes(node, requested, f"{requested}\n{drawn}")
    try:
        for _ in range(2):  # while they live, and when they are gone
            shown = page()[0].decode()
            assert value("likeness_requests_total", shown, endpoint="/v1/generate", status="200") == 6
            assert value("likeness_request_seconds_count", shown, endpoint="/v1/generate") == 6
            assert value("likeness_request_seconds_bucket", shown, endpoint="/v1/generate", le="0.25") == 0
            assert value("likeness_request_seconds_bucket", shown, endpoint="/v1/generate", le="0.5") == 6
            assert value("likeness_gpu_seconds_total", shown, workflow="flux-pulid", base="flux1-mini") == 2.5
            for process in (first, second):
                process.kill()
                process.wait(10)
        assert first.returncode == -signal.SIGKILL
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def test_no_process_leaves_a_gauge_behind(node: Path) -> None:
    """Which would say for ever what was the case when it died: of every kind of metric there is, none counts into a gauge's file."""
    everything = """
metrics.requested('/a', 200, 1); metrics.failed('x'); metrics.drawn('w', 'b', {'denoise': 1}, [('m', .5), ('m', None)], 2)
metrics.stopped('w', 'b', 1); metrics.cancelled('waiting'); metrics.swapped('b'); metrics.job_ended('generate', 'w', 'failed', 3)
metrics.prompt_cache().tell({'memory': 1}); metrics.lora_cache().tell({'hit': 1})
"""
    (process,) = in_processes(node, everything)
    process.communicate()
    kinds = {file.name.partition("_")[0] for file in node.iterdir()}
    assert kinds == {"counter", "histogram"}


def test_what_others_count_into_the_folder_is_not_shown(node: Path) -> None:
    """Ray's own processes inherit it."""
    theirs = "from prometheus_client import Gauge\nGauge('ray_component_cpu_percentage', 'Of Ray.').set(7)\nmetrics.failed('queue_full')"
    (process,) = in_processes(node, theirs)
    process.communicate()
    shown = page()[0].decode()
    assert any(file.name.startswith("gauge") for file in node.iterdir())
    assert value("likeness_errors_total", shown, code="queue_full") == 1 and "ray_" not in shown


def test_a_new_server_begins_at_zero(node: Path) -> None:
    (process,) = in_processes(node, "metrics.failed('queue_full')")
    process.communicate()
    assert value("likeness_errors_total", code="queue_full") == 1
    metrics.prepare(node)
    assert value("likeness_errors_total", code="queue_full") == 0 and list(node.iterdir()) == []


def test_a_folder_that_cannot_be_written_costs_figures_and_nothing_else(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    program = "import logging; logging.basicConfig()\nfor _ in range(3): metrics.failed('x'); metrics.requested('/a', 200, 1)"
    environment = {**os.environ, metrics.FOLDER_VARIABLE: str(blocked / "below"), "PYTHONPATH": str(ROOT)}
    run = subprocess.run(
        [sys.executable, "-c", f"from deployments import metrics\n{program}"], env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 0
    # Each function says so once, however often it is called.
    assert run.stderr.count("failed cannot be counted") == 1 and run.stderr.count("requested cannot be counted") == 1


def test_nothing_that_is_counted_raises(caplog: pytest.LogCaptureFixture) -> None:
    broken: Any = object()
    with caplog.at_level(logging.WARNING):
        metrics.drawn(broken, broken, broken)
        metrics.requested("/a", 200, broken)
        metrics.job_ended("generate", "w", "failed", broken)
    assert len(caplog.records) == 3 and all(record.exc_info for record in caplog.records)


def test_counting_is_cheap() -> None:
    started = time.perf_counter()
    for _ in range(1000):
        metrics.drawn("cheap", "b", {"faces": 0.1, "prompts": 0.1, "denoise": 1.0, "decode": 0.1}, [("m", 0.5), ("m", 0.6)])
    assert (time.perf_counter() - started) / 1000 < 0.001


def test_a_drawn_request_says_its_stages_its_device_seconds_and_its_likeness() -> None:
    before = value("likeness_identity_no_face_total", method="pulid-t")
    seconds = {"faces": 0.2, "denoise": 3.0, "decode": 0.5, "encode": 0.1, "total": 4.0}
    metrics.drawn("w1", "b1", seconds, [("pulid-t", 0.71), ("pulid-t", -0.2), ("pulid-t", None)], pictures=2)
    metrics.stopped("w1", "b1", 1.25)
    shown = page()[0].decode()
    assert value("likeness_stage_seconds_sum", shown, workflow="w1", stage="faces") == pytest.approx(0.2)
    assert value("likeness_stage_seconds_count", shown, workflow="w1", stage="total") == 0
    assert value("likeness_gpu_seconds_total", shown, workflow="w1", base="b1") == pytest.approx(4.75)
    assert value("likeness_pictures_total", shown, workflow="w1", base="b1") == 2
    assert value("likeness_identity_cosine_count", shown, method="pulid-t") == 2
    # Below zero no cosine says more than zero does; a sum that falls would be no counter's.
    assert value("likeness_identity_cosine_sum", shown, method="pulid-t") == pytest.approx(0.71)
    assert value("likeness_identity_cosine_bucket", shown, method="pulid-t", le="0.0") == 1
    assert value("likeness_identity_no_face_total", shown, method="pulid-t") == before + 1


def test_totals_are_counted_once_however_often_they_are_told() -> None:
    before = value("likeness_prompt_cache_total", source="memory")
    first, second = metrics.prompt_cache(), metrics.prompt_cache()
    for totals in ({"memory": 1, "encoder": 4}, {"memory": 5, "encoder": 4}, {"memory": 5, "encoder": 4}):
        first.tell(totals)
    second.tell({"memory": 2})
    first.tell({"memory": 6})
    assert value("likeness_prompt_cache_total", source="memory") - before == 8


def test_totals_that_many_threads_tell_are_counted_once() -> None:
    rising = metrics.Rising(Counter("likeness_test_threads", "Of this test.", ["kind"]))

    async def together() -> None:
        await asyncio.gather(*(asyncio.to_thread(rising.tell, {"a": total}) for total in range(200)))

    asyncio.run(together())
    rising.tell({"a": 150})
    assert value("likeness_test_threads_total", kind="a") == 199


def families(text: str, parse: Any = parse_text) -> dict[str, Metric]:
    return {family.name: family for family in parse(text)}


def app(depth: Any = None) -> FastAPI:
    made = FastAPI()
    add_metrics_route(made, depth)

    @made.get("/v1/things/{id}")
    async def thing(id: str) -> str:
        if id == "broken":
            raise HTTPException(418)
        return id

    @made.get("/stream")
    async def stream() -> StreamingResponse:
        async def pieces() -> Any:
            for piece in (b"a", b"b"):
                await asyncio.sleep(0.05)
                yield piece

        return StreamingResponse(pieces())

    return made


def ask(application: Any, path: str, **headers: str) -> httpx.Response:
    async def asked() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(application), base_url="http://likeness.local") as client:
            return await client.get(path, headers=headers)

    return asyncio.run(asked())


def test_the_page_comes_as_text_and_as_openmetrics() -> None:
    metrics.failed("shown")
    depth = {"draw": (3, 12.5), "train": (0, 0.0)}
    plain = ask(app(lambda: depth), "/metrics")
    assert plain.status_code == 200 and plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert plain.headers["cache-control"] == "no-store"
    shown = families(plain.text)
    assert shown["likeness_queue_depth"].type == "gauge" and shown["likeness_errors"].type == "counter"
    assert value("likeness_queue_depth", plain.text, pool="draw") == 3
    assert value("likeness_queue_oldest_seconds", plain.text, pool="draw") == 12.5
    modern = ask(app(lambda: depth), "/metrics", accept="application/openmetrics-text; version=1.0.0")
    assert modern.headers["content-type"].startswith("application/openmetrics-text") and modern.text.endswith("# EOF\n")
    assert {"likeness_errors", "likeness_queue_depth"} <= set(families(modern.text, parse_openmetrics))
    assert "openmetrics" not in CONTENT_TYPE_LATEST


def test_queues_that_cannot_be_read_cost_the_queues_alone() -> None:
    def away() -> Mapping[str, tuple[int, float]]:
        raise OSError("the database is away")

    def slow() -> Mapping[str, tuple[int, float]]:
        time.sleep(2.5)
        return {"draw": (1, 1.0)}

    for depth in (away, slow):
        started = time.perf_counter()
        answer = ask(app(depth), "/metrics")
        assert answer.status_code == 200 and "likeness_errors_total" in answer.text and 'pool="' not in answer.text
        assert time.perf_counter() - started < 4


def test_the_queues_are_those_of_this_moment() -> None:
    waiting = {"draw": (2, 1.0)}
    served = app(lambda: waiting)
    assert value("likeness_queue_depth", ask(served, "/metrics").text, pool="draw") == 2
    waiting.clear()
    assert "pool=" not in ask(served, "/metrics").text


def watching() -> Watching:
    made = app()
    return Watching(made, made.router.routes)


def test_requests_are_counted_by_their_routes_template() -> None:
    watched = watching()
    before = {status: value("likeness_requests_total", endpoint="/v1/things/{id}", status=status) for status in ("200", "418")}
    for id in ("1", "2", "broken"):
        ask(watched, f"/v1/things/{id}")
    shown = page()[0].decode()
    assert value("likeness_requests_total", shown, endpoint="/v1/things/{id}", status="200") == before["200"] + 2
    assert value("likeness_requests_total", shown, endpoint="/v1/things/{id}", status="418") == before["418"] + 1


def test_addresses_that_nobody_serves_are_one_label() -> None:
    watched = watching()
    before = value("likeness_requests_total", endpoint="none", status="404")
    for path in ("/x1", "/x2", "/%00"):
        ask(watched, path)
    assert value("likeness_requests_total", endpoint="none", status="404") == before + 3
    assert "/x1" not in page()[0].decode()


def test_whoever_is_refused_at_the_door_is_counted_by_what_was_asked_for() -> None:
    async def door(scope: Any, receive: Any, send: Any) -> None:
        await Response(status_code=401)(scope, receive, send)

    before = value("likeness_requests_total", endpoint="/v1/things/{id}", status="401")
    ask(Watching(door, app().router.routes), "/v1/things/9")
    assert value("likeness_requests_total", endpoint="/v1/things/{id}", status="401") == before + 1


def test_a_stream_passes_piece_by_piece_and_is_timed_to_its_end() -> None:
    pieces: list[float] = []

    async def main() -> None:
        scope = {"type": "http", "method": "GET", "path": "/stream", "headers": [], "query_string": b"", "raw_path": b"/stream"}

        async def send(message: Any) -> None:
            if message.get("body"):
                pieces.append(time.perf_counter())

        async def receive() -> Any:
            await asyncio.sleep(10)

        await watching()(scope, receive, send)

    asyncio.run(main())
    assert len(pieces) == 2 and pieces[1] - pieces[0] > 0.03
    assert value("likeness_request_seconds_sum", endpoint="/stream") >= 0.09


def test_a_client_that_leaves_is_499() -> None:
    async def waiting(scope: Any, receive: Any, send: Any) -> None:
        await asyncio.sleep(10)

    async def main() -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/things/1", "headers": []}
        nobody: Any = None
        task = asyncio.create_task(Watching(waiting)(scope, nobody, nobody))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    before = value("likeness_requests_total", endpoint="none", status="499")
    asyncio.run(main())
    assert value("likeness_requests_total", endpoint="none", status="499") == before + 1
