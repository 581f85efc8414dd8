"""`python benchmarks/main_job.py [--write docs/main_job.md]`: the main job through HTTP, on this machine, in figures.

Starts the server of configs/serve/local.yaml and measures: memory, how soon the denoiser is free when a client goes away, and whose face
comes (base, XLabs, PuLID; the judge's cosine). `serve_overhead.py` beside it measures what Serve costs. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve.client import Client
from serve.cluster import serving
from serve.settings import load_settings

_CHARACTERS = sorted((Path(__file__).parents[1] / "samples" / "characters").glob("*-1.png"))
_PROMPTS = (
    "a close-up portrait of a neutral person wearing a green hoodie in a forest with soft daylight",
    "a portrait of a smiling person wearing a blue suit in a library with warm light, arms down",
)
_QUICK: Mapping[str, Any] = {"prompt": _PROMPTS[0], "num_inference_steps": 1, "width": 64, "height": 64, "seed": 1}
_LONG: Mapping[str, Any] = {"prompt": _PROMPTS[0], "num_inference_steps": 100, "seed": 1}
_METHODS: Mapping[str, Mapping[str, Any]] = {
    "base": {"workflow": "flux-pulid", "weight": 0},
    "XLabs IP-Adapter, weight 1": {"workflow": "flux-ipadapter-faceid", "weight": 1},
    "PuLID, weight 1": {"workflow": "flux-pulid", "style": "stylized"},
}


def identity(client: Client) -> dict[str, dict[str, float]]:
    """Mean cosine of eight sample characters in two framings each, with its standard error; no face counts as 0."""
    figures = {}
    for method, fields in _METHODS.items():
        cosines = []
        for seed, character in enumerate(_CHARACTERS):
            for prompt in _PROMPTS:
                answer = client.generate(prompt=prompt, reference_image=character, seed=seed, **fields)
                cosines.append(answer.data[0].scores[0].cosine or 0.0)
        error = statistics.stdev(cosines) / len(cosines) ** 0.5
        figures[method] = {"mean": round(statistics.mean(cosines), 3), "standard_error": round(error, 3), "n": len(cosines)}
    return figures


def leaving(url: str, client: Client) -> dict[str, float]:
    """A client asks for 100 steps and goes away after a second; seconds until a small picture, asked for at once, is there, beyond what it
    takes on an idle server: the wait for the denoiser. Beside it, the length of one step of the long picture."""
    alone = statistics.median(_seconds(client) for _ in range(5))
    started = time.perf_counter()
    client.generate(**{**_LONG, "num_inference_steps": 20})
    step = (time.perf_counter() - started) / 20
    waits = []
    for _ in range(5):
        try:
            httpx.post(f"{url}/v1/generate", json=dict(_LONG), timeout=1.0)
        except httpx.ReadTimeout:
            waits.append(_seconds(client) - alone)
    return {"wait_s": round(statistics.median(waits), 3), "longest_wait_s": round(max(waits), 3), "step_s": round(step, 3)}


def _seconds(client: Client) -> float:
    started = time.perf_counter()
    client.generate(**_QUICK)
    return time.perf_counter() - started


def memory_mib() -> int:
    """Of this process and everything that Ray started below it, shared pages counted once (USS)."""
    mine = psutil.Process()
    return round(sum(process.memory_full_info().uss for process in (mine, *mine.children(recursive=True))) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures")
    write = parser.parse_args().write
    started = time.perf_counter()
    with serving(load_settings("local"), port=8766) as url, Client(url) as client:
        ready = round(time.perf_counter() - started, 1)
        figures = {"ready_s": ready, "identity": identity(client), "leaving": leaving(url, client), "memory_mib": memory_mib()}
    print(json.dumps(figures))
    if write is not None:
        write.write_text(_page(figures), encoding="utf-8")


def _page(figures: Mapping[str, Any]) -> str:
    leaving, lines = figures["leaving"], []
    waited = f"{leaving['wait_s']} s ({leaving['longest_wait_s']} s)"
    for method, found in figures["identity"].items():
        lines.append(f"| likeness, {method} (n = {found['n']}, ± standard error) | {found['mean']:.3f} ± {found['standard_error']:.3f} |")
    return f"""# The main job, measured

Written by `python benchmarks/main_job.py --write docs/main_job.md`: `configs/serve/local.yaml`, the embedded models, over HTTP.

| what | measured |
|---|---|
| ready after | {figures["ready_s"]} s |
| memory of all processes, Ray's included | {figures["memory_mib"] / 1024:.2f} GiB |
{chr(10).join(lines)}
| a client goes away: wait of the next request for the denoiser, median (longest) of 5 | {waited} |
| one step of what it had asked for, for comparison | {leaving["step_s"]} s |
"""


if __name__ == "__main__":
    main()
