"""`python benchmarks/job_overhead.py`: what a job costs a picture, against the direct call of the same workflow (the baseline).

Both go over HTTP to the same server with its store in SQLite, taking turns. A job's time is from before its submission to the end that
the store wrote down, so that a client's polling is not in it; nobody asks about it meanwhile. That end is taken just before the
transaction waits for the disk, so one such wait, measured in the same folder, is added. The picture is small and has few steps, so that
what a job adds is not lost among them. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from benchmarks.serve_overhead import body
from deployments.store.settings import StoreSettings
from serve.client import Client
from serve.cluster import serving
from serve.job_answers import JobResult
from serve.settings import load_settings

_WARM_UP, _SYNCS = 5, 50
_QUICK: dict[str, Any] = {"steps": 4, "width": 64, "height": 64, "scores": False}
_ALLOWED_MS = 30.0
"""A job may take so much longer than the direct call, at the median."""
_PARTS = {
    "direct": "the direct call, beside its drawing",
    "submitted": "a job, from its submission to its row",
    "begun": "from its row to its start",
    "ended": "from its start to its end, beside its drawing",
}


class Sides:
    """The same picture, three ways. Each returns the seconds that it took. parts: of each turn, where they went."""

    def __init__(self, client: Client, url: str) -> None:
        self._client, self._jobs, self._http = client, client.jobs, httpx.Client(base_url=url, timeout=60)
        self.pause = 0.0
        self.parts: dict[str, list[float]] = {name: [] for name in _PARTS}

    def direct(self, seed: int) -> float:
        began = time.perf_counter()
        answer = self._client.generate(workflow="flux-pulid", **body(seed), **_QUICK)
        spent = time.perf_counter() - began
        self.parts["direct"].append(spent - answer.timings["total"])
        self.pause = max(self.pause, spent)
        return spent

    def job(self, seed: int) -> float:
        began = time.time()
        job = self._jobs.submit(workflow="flux-pulid", **body(seed), **_QUICK)
        time.sleep(1.2 * self.pause)
        item = job.wait(timeout=60)
        assert item.status == "succeeded" and item.started is not None and item.finished is not None
        assert isinstance(item.result, JobResult)
        self.parts["submitted"].append(item.created - began)
        self.parts["begun"].append(item.started - item.created)
        self.parts["ended"].append(item.finished - item.started - item.result.timings["total"])
        return item.finished - began

    def awaited(self, seed: int) -> float:
        """`Prefer: wait`: until the client has the answer, without the picture."""
        began = time.perf_counter()
        answer = self._http.post("/flux-pulid", json={**body(seed), **_QUICK}, headers={"prefer": "wait=60"})
        assert answer.status_code == 200
        return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=40, help="pictures on each side (default 40)")
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = StoreSettings(url=f"sqlite:///{folder}/store.db", folder=Path(folder))
        settings = load_settings("local").model_copy(update={"store": store})
        with serving(settings, port=8766) as url, Client(url) as client:
            facts = measured(Sides(client, url), options.count, sync_s(Path(folder)))
    print(json.dumps(facts))
    if options.write is not None:
        options.write.write_text(_page(facts), encoding="utf-8")


def sync_s(folder: Path) -> float:
    """Median seconds until a page that is appended to a file is on the disk: what a transaction waits for at its end."""
    seconds = []
    with (folder / "synced").open("wb") as file:
        for _ in range(_SYNCS):
            file.write(bytes(4096))
            file.flush()
            began = time.perf_counter()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def measured(sides: Sides, count: int, sync: float) -> dict[str, Any]:
    """Medians in milliseconds, of turns on a machine that does other things too. sync: seconds that a commit waits for the disk."""
    spent: dict[str, list[float]] = {"direct": [], "job": [], "awaited": []}
    for seed in range(_WARM_UP + count):
        for name, seconds in spent.items():
            seconds.append(getattr(sides, name)(seed))
    kept = {name: [1000 * second for second in seconds[_WARM_UP:]] for name, seconds in spent.items()}
    direct, job, awaited = (statistics.median(kept[name]) for name in ("direct", "job", "awaited"))
    # Of neighbours in time, so that what the machine does meanwhile meets both.
    apart = statistics.median(late - early for early, late in zip(kept["direct"], kept["job"], strict=True))
    overhead = apart + 1000 * sync
    parts = {name: round(1000 * statistics.median(seconds[_WARM_UP:]), 1) for name, seconds in sides.parts.items()}
    return {
        "direct_ms": round(direct, 1), "job_ms": round(job, 1), "awaited_ms": round(awaited, 1),
        "overhead_ms": round(overhead, 1), "sync_ms": round(1000 * sync, 2), "parts_ms": parts,
        "ratio": round(job / direct, 3), "within_the_bar": overhead <= _ALLOWED_MS, "count": count,
    }  # fmt: skip


def _page(facts: Mapping[str, Any]) -> str:
    parts = "\n".join(f"| {text} | {facts['parts_ms'][name]} ms |" for name, text in _PARTS.items())
    return f"""# What a job costs, measured

Written by `python benchmarks/job_overhead.py --write docs/job_overhead.md`: /flux-pulid with the embedded models on two CPU threads,
{_QUICK["steps"]} steps at {_QUICK["width"]} x {_QUICK["height"]}, the store in SQLite, {facts["count"]} pictures on each side.

| what | median |
|---|---|
| the direct call | {facts["direct_ms"]} ms |
| a job, from its submission to its end in the store | {facts["job_ms"]} ms |
| the disk's wait at the end of a transaction | {facts["sync_ms"]} ms |
| a job longer than the direct call, with one such wait | {facts["overhead_ms"]} ms (ratio {facts["ratio"]}) |
| within {_ALLOWED_MS:g} ms | {"yes" if facts["within_the_bar"] else "no"} |
| `Prefer: wait`, until the client has the answer | {facts["awaited_ms"]} ms |
{parts}
"""


if __name__ == "__main__":
    main()
