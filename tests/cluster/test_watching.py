"""What is seen of a running server: one id on every hop's lines, the figures of all processes on one page, and who is ready."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families as parse

from serve.client import Client
from tests.cluster.test_serve import CHARACTERS, LONG, body
from tests.ray_processes import replicas

_PATIENCE_S = 25.0


def lines_about(request: str) -> list[dict[str, Any]]:
    """What every process wrote on its stderr about a request; Ray keeps a file of it for each."""
    import ray

    node: Any = ray._private.worker._global_node
    folder = Path(node.get_logs_dir_path())
    written = (line for file in folder.glob("worker-*.err") for line in file.read_text(errors="replace").splitlines())
    return [json.loads(line) for line in written if line.startswith("{") and request in line]


def figure(url: str, name: str, **labels: str) -> float:
    """The sum over all samples of the page that have these labels."""
    families = parse(httpx.get(f"{url}/metrics").raise_for_status().text)
    samples = (sample for family in families for sample in family.samples)
    return sum(sample.value for sample in samples if sample.name == name and labels.items() <= sample.labels.items())


def waited_for(found: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + _PATIENCE_S
    while not found():
        assert time.monotonic() < until, what
        time.sleep(0.1)


@pytest.mark.parametrize("given", ["a-request-of-mine", None])
def test_the_lines_of_every_hop_carry_the_requests_id(url: str, given: str | None) -> None:
    headers = {"x-request-id": given} if given else {}
    answer = httpx.post(f"{url}/v1/generate", json=body(CHARACTERS[0], seed=1, scores=True), headers=headers, timeout=60)
    id = answer.headers["x-request-id"]
    assert answer.status_code == 200 and (given is None or id == given)
    hops = {"Ingress", "Workflows", "FaceServer", "PromptServer", "IdentityServer", "DenoiserServer"}
    waited_for(lambda: hops <= {line["deployment"] for line in lines_about(id)}, "a hop wrote no line")
    lines = lines_about(id)
    assert {line["request_id"] for line in lines} == {id}
    assert all({"time", "level", "logger", "message", "replica"} <= set(line) for line in lines)
    (drawn,) = [line for line in lines if line["logger"] == "likeness.denoiser"]
    assert drawn["seconds"]["denoise"] > 0 and drawn["deployment"] == "DenoiserServer"
    (access,) = [line for line in lines if line["logger"] == "likeness.access"]
    assert access["status"] == 200 and access["endpoint"] == "/v1/generate"


def test_a_refusal_is_a_line_and_a_figure(url: str) -> None:
    before = figure(url, "likeness_errors_total", code="invalid_request")
    assert httpx.post(f"{url}/v1/generate", json={"prompt": 7, "nonsense": 1}, headers={"x-request-id": "refused.1"}).status_code == 422
    waited_for(lambda: any(line.get("status") == 422 for line in lines_about("refused.1")), "no line")
    assert figure(url, "likeness_errors_total", code="invalid_request") == before + 1


def test_the_page_shows_what_every_process_counted(url: str) -> None:
    names = ["likeness_gpu_seconds_total", "likeness_pictures_total", "likeness_identity_cosine_count", "likeness_identity_no_face_total"]
    before = [figure(url, name) for name in names]
    texts = figure(url, "likeness_prompt_cache_total")
    with Client(url) as client:
        answer = client.generate(**body(CHARACTERS[0], seed=2, scores=True, steps=4, width=128, height=128))
    gpu, pictures, cosines, no_face = (figure(url, name) - was for name, was in zip(names, before, strict=True))
    assert gpu == pytest.approx(answer.timings["denoise"] + answer.timings["decode"], abs=1e-3)
    # PromptServer counts in another process than Workflows, and both than the ingress that shows the page.
    assert pictures == 1 and cosines + no_face == 1 and figure(url, "likeness_prompt_cache_total") == texts + 1
    for stage in ("faces", "identity", "prompts", "denoise", "decode", "scores", "encode"):
        assert figure(url, "likeness_stage_seconds_count", workflow="flux-pulid", stage=stage) >= 1
    assert figure(url, "likeness_requests_total", endpoint="/v1/generate", status="200") >= 1


def test_a_drawing_that_is_left_is_counted_with_what_it_cost(url: str) -> None:
    names = {"likeness_cancels_total": {"where": "drawing"}, "likeness_gpu_seconds_total": {"workflow": "generate"}}
    before = {name: figure(url, name, **labels) for name, labels in names.items()}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/generate", json=LONG, timeout=1.5)
    waited_for(lambda: figure(url, "likeness_cancels_total", where="drawing") == before["likeness_cancels_total"] + 1, "not counted")
    assert 0 < figure(url, "likeness_gpu_seconds_total", workflow="generate") - before["likeness_gpu_seconds_total"] < 5


def test_a_full_queue_is_ready_and_answers_at_once(url: str) -> None:
    async def main() -> list[tuple[int, float]]:
        async with httpx.AsyncClient(base_url=url, timeout=4, limits=httpx.Limits(max_connections=None)) as client:
            crowd = [asyncio.create_task(client.post("/v1/generate", json=LONG | {"seed": k})) for k in range(70)]
            await asyncio.sleep(2)
            seen = []
            for _ in range(3):
                started = time.perf_counter()
                seen.append(((await client.get("/readyz")).status_code, time.perf_counter() - started))
            answers = await asyncio.gather(*crowd, return_exceptions=True)
        assert any(isinstance(answer, httpx.Response) and answer.status_code == 429 for answer in answers)
        return seen

    seen = asyncio.run(main())
    assert all(status == 200 and seconds < 2 for status, seconds in seen), seen


def test_a_part_without_a_replica_is_named_until_it_has_one(url: str) -> None:
    def state() -> str:
        started = time.perf_counter()
        answer = httpx.get(f"{url}/readyz", timeout=5)
        assert time.perf_counter() - started < 2
        said = answer.json()
        assert answer.status_code == (200 if said["ready"] else 503)
        assert said["ready"] == (said["parts"]["ControlServer"]["state"] in ("ready", "degraded"))
        found: str = said["parts"]["ControlServer"]["state"]
        return found

    (process,) = replicas("ControlServer")
    assert state() == "ready"
    os.kill(process.pid, signal.SIGKILL)
    waited_for(lambda: state() in ("starting", "broken"), "nobody saw that the replica died")
    waited_for(lambda: state() == "ready", "the replica did not come back")
