"""What only a real Ray shows: processes, queues, cancellation. (What a request does: tests/graph.)"""

from __future__ import annotations

import asyncio
import base64
import os
import random
import subprocess
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.images import decode
from serve.client import AsyncClient, Client
from serve.local import local_client
from serve.settings import AppSettings
from tests.ray_processes import replicas, title

CHARACTERS = sorted((Path(__file__).parents[2] / "samples" / "characters").glob("*-1.png"))
PORTRAIT = "a portrait of a smiling person wearing a green hoodie in a library with soft daylight, arms down"
QUICK: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "scores": False}
LONG: dict[str, Any] = {"prompt": PORTRAIT, "steps": 100, "width": 192, "height": 192, "seed": 1}


def body(character: Path, **fields: Any) -> dict[str, Any]:
    picture = base64.b64encode(character.read_bytes()).decode()
    return {"workflow": "flux-pulid", "prompt": PORTRAIT, "reference_image": picture, "style": "stylized", **QUICK, **fields}


def run(main: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(main)


def test_the_server_draws_what_one_process_draws(url: str) -> None:
    with Client(url) as server, local_client() as here:
        asked = body(CHARACTERS[0], seed=21)
        assert server.ready()
        assert server.generate(**asked).data[0].content == here.generate(**asked).data[0].content


@pytest.mark.parametrize("count", [20, pytest.param(50, marks=pytest.mark.slow)])
def test_interleaved_requests_are_each_what_they_are_alone(url: str, count: int) -> None:
    asked = [body(CHARACTERS[k % len(CHARACTERS)], seed=k, weight=0.5 + k % 3) for k in range(count)]

    async def together() -> list[bytes]:
        async with AsyncClient(url) as client:
            order = list(range(count))
            random.Random(0).shuffle(order)
            answers = dict(zip(order, await asyncio.gather(*(client.generate(**asked[k]) for k in order)), strict=True))
            return [answers[k].data[0].content for k in range(count)]

    found = run(together())
    with Client(url) as client:
        assert found == [client.generate(**one).data[0].content for one in asked]
    assert len(set(found)) == count


def test_a_client_that_goes_away_frees_the_denoiser_and_the_next_request_is_right(url: str) -> None:
    quick = body(CHARACTERS[1], seed=5)
    with Client(url) as client:
        expected = client.generate(**quick).data[0].content
        started = time.perf_counter()
        client.generate(**(LONG | {"steps": 20}))
        whole = (time.perf_counter() - started) * 5
        for _ in range(3):
            with httpx.Client(base_url=url, timeout=1.0) as impatient:
                try:
                    impatient.post("/v1/generate", json=LONG)
                except httpx.ReadTimeout:
                    pass
                else:
                    raise AssertionError("a picture of 100 steps came within a second")
            left = time.perf_counter()
            assert client.generate(**quick).data[0].content == expected
            # Had it been drawn to its end, what was left of the long one would have come first.
            assert time.perf_counter() - left < whole / 3


def test_more_than_may_wait_are_told_to_come_again_and_a_crowd_that_leaves_blocks_nobody(url: str, settings: AppSettings) -> None:
    crowd = settings.denoiser.pool.max_queued_requests + 20

    async def all_at_once() -> list[httpx.Response | BaseException]:
        async with httpx.AsyncClient(base_url=url, timeout=8, limits=httpx.Limits(max_connections=None)) as client:
            asked = [client.post("/v1/generate", json=LONG | {"seed": k}) for k in range(crowd)]
            return await asyncio.gather(*asked, return_exceptions=True)

    answers = run(all_at_once())
    told = [answer for answer in answers if isinstance(answer, httpx.Response)]
    assert told and {(answer.status_code, answer.json()["code"]) for answer in told} == {(429, "queue_full")}
    assert all(int(answer.headers["retry-after"]) > 0 for answer in told)
    started = time.perf_counter()
    with Client(url) as client:
        assert client.generate(**body(CHARACTERS[0], seed=1)).data[0].seed == 1
    # Those who waited in vain have left the queue: what they asked for would take minutes.
    assert time.perf_counter() - started < 60


def test_only_the_processes_that_compute_with_torch_load_it(url: str) -> None:
    """The face server's process never imports torch, and the ingress holds no model at all."""
    memory = {}
    for process in replicas():
        memory[title(process).rsplit(":", 1)[1].partition(".")[0].strip()] = {Path(entry.path).name for entry in process.memory_maps()}
    assert {"FaceServer", "Workflows", "Ingress", "DenoiserServer"} <= set(memory)
    for server in ("FaceServer", "Workflows", "Ingress"):
        assert not any(name.startswith("libtorch") for name in memory[server]), server
    assert any(name.startswith("libtorch") for name in memory["DenoiserServer"])


def test_the_same_pixels_at_full_size(url: str) -> None:
    with Client(url) as server, local_client() as here:
        asked = body(CHARACTERS[2], seed=8) | {"steps": 4, "width": 192, "height": 192}
        assert np.array_equal(decode(server.generate(**asked).data[0].content), decode(here.generate(**asked).data[0].content))


def test_another_ray_program_uses_the_handle(url: str, tmp_path: Path) -> None:
    import ray

    example = Path(__file__).parents[2] / "docs" / "examples" / "handle.py"
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address, "PYTHONPATH": str(example.parents[2])}
    run = subprocess.run([sys.executable, example, tmp_path], env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert len(list(tmp_path.glob("handle-*.png"))) == 2 and "likeness 0." in run.stdout


def test_the_command_line_gives_the_pixels_that_http_gives(url: str, tmp_path: Path) -> None:
    likeness = Path(sys.executable).parent / "likeness"
    told = ["--out", str(tmp_path), "--prompt", PORTRAIT, "--reference-image", str(CHARACTERS[0])]
    command = [str(likeness), "flux-pulid", "--server", url, *told]
    options = ["--seed", "4", "--steps", "2", "--size", "64x64", "--style", "stylized"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    with Client(url) as client:
        expected = client.generate(**body(CHARACTERS[0], seed=4)).data[0].content
    assert (tmp_path / "flux-pulid-4.png").read_bytes() == expected
