"""`python -m benchmarks.job_races [--count 1000] [--write docs/job_races.md]`: jobs that are cancelled as they come, and who goes first.

Races: eight callers at once submit a job and cancel it up to 0.3 s later, wherever it is by then: waiting, being leased, being drawn, just
ending. From each cancel it is taken how long it was until the job had ended; and right after the last one, how long a direct call waits
for the denoiser. Fairness: one key submits its jobs, then another its own; the order in which they were begun is the store's. Everything
goes over HTTP to a server with its door shut. Leaves nothing behind.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx

from deployments.store.keys import KeyStore
from deployments.store.migrate import migrate
from deployments.store.settings import StoreSettings
from serve.callers import SCOPES
from serve.cli_output import drawing
from serve.cluster import serving
from serve.settings import AppSettings, load_settings

_INPUT: Mapping[str, Any] = {
    "prompt": "a portrait of a smiling person wearing a green hoodie", "width": 64, "height": 64, "num_inference_steps": 4, "scores": False,
}  # fmt: skip
_JOBS, _DIRECT = "/v1/jobs", "/v1/generate"
_TERMINAL = frozenset({"succeeded", "failed", "canceled", "moderated"})
_IN_FLIGHT, _LATEST_CANCEL_S, _ALLOWED_S = 8, 0.3, 2.0
_WINDOWS, _ALLOWED_SHARE = (20, 50, 200), 0.1
_PAGE = 200

Told = Callable[[int], None]


async def races(http: httpx.AsyncClient, count: int, seed: int = 0, told: Told = lambda done: None) -> dict[str, Any]:
    """Submits and cancels `count` jobs, 8 in flight. ended_s: for each, from its cancel's sending until it was seen to have ended;
    statuses: of those; free_s: how long a direct call took right after the last; alone_s: how long one takes."""
    draw = random.Random(seed)
    turns = iter([draw.uniform(0, _LATEST_CANCEL_S) for _ in range(count)])
    statuses: Counter[str] = Counter()
    ended: list[float] = []

    async def one_after_another() -> None:
        for pause in turns:
            seconds, status = await _race(http, pause)
            ended.append(seconds)
            statuses[status] += 1
            told(len(ended))

    alone = await _drawn_s(http)
    await asyncio.gather(*(one_after_another() for _ in range(_IN_FLIGHT)))
    free = await _drawn_s(http)
    return {"ended_s": ended, "statuses": dict(statuses), "alone_s": alone, "free_s": free}


async def _race(http: httpx.AsyncClient, pause: float) -> tuple[float, str]:
    job = (await http.post(_JOBS, json={"input": _INPUT})).raise_for_status().json()
    await asyncio.sleep(pause)
    began = time.perf_counter()
    (await http.post(f"{_JOBS}/{job['id']}/cancel")).raise_for_status()
    while (status := (await http.get(f"{_JOBS}/{job['id']}")).raise_for_status().json()["status"]) not in _TERMINAL:
        await asyncio.sleep(0.02)
    return time.perf_counter() - began, status


async def _drawn_s(http: httpx.AsyncClient) -> float:
    """A direct call, which waits its turn for the denoiser. The first of a server may be slow: not the first."""
    began = time.perf_counter()
    (await http.post(_DIRECT, json=_INPUT)).raise_for_status()
    return time.perf_counter() - began


async def shares(first: httpx.AsyncClient, second: httpx.AsyncClient, count: int, told: Told = lambda done: None) -> list[str]:
    """`count` jobs of the first caller, then as many of the second; whose each was, in the order in which they were begun."""
    # So fast that most of the first's are waiting when the second's come.
    ours = await _submitted(first, count) | await _submitted(second, count)
    while waiting := sum([await _unfinished(owner) for owner in (first, second)]):
        told(2 * count - waiting)
        await asyncio.sleep(0.5)
    begun = [
        (job["started"], name)
        for name, owner in (("first", first), ("second", second))
        for job in await _listed(owner)
        if job["id"] in ours
    ]
    return [name for _, name in sorted(begun)]


async def _submitted(http: httpx.AsyncClient, count: int) -> set[str]:
    turns, ids = iter(range(count)), set[str]()

    async def one_after_another() -> None:
        for turn in turns:
            job = (await http.post(_JOBS, json={"input": {**_INPUT, "seed": turn}})).raise_for_status().json()
            ids.add(job["id"])

    await asyncio.gather(*(one_after_another() for _ in range(_IN_FLIGHT)))
    return ids


async def _unfinished(http: httpx.AsyncClient) -> int:
    """At most a page of them: whether there are any, and roughly how many."""
    found = [await _asked(http, {"status": status}) for status in ("queued", "running")]
    return sum(len(page["data"]) for page in found)


async def _listed(http: httpx.AsyncClient) -> list[dict[str, Any]]:
    jobs: list[dict[str, Any]] = []
    before: str | None = None
    while True:
        page = await _asked(http, {} if before is None else {"before": before})
        jobs += page["data"]
        if (before := page["next"]) is None:
            return jobs


async def _asked(http: httpx.AsyncClient, query: Mapping[str, str]) -> dict[str, Any]:
    answer = (await http.get(_JOBS, params={"limit": _PAGE, **query})).raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def unfairness(order: Sequence[str], width: int) -> float | None:
    """Of every so many starts in a row during which both had jobs waiting: how far the shares were apart, at most, as a share of all.
    None where there was no such row."""
    came = order.index("second")
    first_ends, second_ends = (len(order) - 1 - list(reversed(order)).index(name) for name in ("first", "second"))
    both = order[came : min(first_ends, second_ends) + 1]
    apart = [
        abs(2 * sum(name == "first" for name in both[begin : begin + width]) - width) / width for begin in range(len(both) - width + 1)
    ]
    return max(apart, default=None)


def with_keys(folder: Path, settings: AppSettings) -> tuple[AppSettings, list[str]]:
    """The settings with a store in the folder and the door shut, and two keys to it that may do as much as they like."""
    store = StoreSettings(url=f"sqlite:///{folder}/store.db", folder=folder)
    migrate(store.database)
    with closing(KeyStore(store.database)) as keys:
        made = [keys.create(name, name, SCOPES)[1] for name in ("first", "second")]
    door = settings.door.model_copy(update={"auth": "on", "requests_per_minute": 1_000_000, "queued_jobs": 10_000})
    return settings.model_copy(update={"store": store, "door": door}), made


async def measured(url: str, keys: Sequence[str], count: int, each: int) -> dict[str, Any]:
    first, second = (httpx.AsyncClient(base_url=url, timeout=60, headers={"authorization": f"Bearer {key}"}) for key in keys)
    async with first, second:
        for _ in range(3):
            await _drawn_s(first)
        with drawing(count) as told:
            found = await races(first, count, told=told)
        with drawing(2 * each) as told:
            order = await shares(first, second, each, told)
    return {**summary(found), "jobs_each": each, "unfairness": {width: unfairness(order, width) for width in _WINDOWS}}


def summary(found: Mapping[str, Any]) -> dict[str, Any]:
    ended = sorted(found["ended_s"])
    at = {name: round(1000 * ended[min(len(ended) - 1, int(share * len(ended)))], 1) for name, share in (("p50", 0.5), ("p99", 0.99))}
    return {
        "races": len(ended), "statuses": found["statuses"], "ended_ms": {**at, "max": round(1000 * ended[-1], 1)},
        "direct_alone_ms": round(1000 * found["alone_s"], 1), "direct_after_ms": round(1000 * found["free_s"], 1),
    }  # fmt: skip


def page(facts: Mapping[str, Any]) -> str:
    ended = facts["ended_ms"]
    rows = {
        "races": facts["races"],
        "how they ended": ", ".join(f"{count} {status}" for status, count in sorted(facts["statuses"].items())),
        "from a cancel to the job's end, over HTTP: median": f"{ended['p50']} ms",
        "99 of 100": f"{ended['p99']} ms",
        f"the slowest (allowed: {1000 * _ALLOWED_S:g} ms)": f"{ended['max']} ms",
        "a direct call right after the last one": f"{facts['direct_after_ms']} ms",
        "a direct call before": f"{facts['direct_alone_ms']} ms",
    }
    for width, apart in facts["unfairness"].items():
        shown = "there was no such row" if apart is None else f"{100 * apart:.0f} %"
        rows[f"{facts['jobs_each']} jobs each, any {width} starts in a row: shares apart (allowed: {100 * _ALLOWED_SHARE:g} %)"] = shown
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""# Jobs that are cancelled as they come, and who goes first

Written by `python -m benchmarks.job_races --count {facts["races"]} --write docs/job_races.md`: pictures by text with the embedded models,
{_INPUT["num_inference_steps"]} steps at {_INPUT["width"]} x {_INPUT["height"]}, the store in SQLite, the door shut; {_IN_FLIGHT} jobs in
flight, each cancelled after up to {1000 * _LATEST_CANCEL_S:g} ms. For the shares one key submits all of its jobs, then another its own.

| what | |
|---|---|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000, help="races (default 1000)")
    parser.add_argument("--each", type=int, default=250, help="jobs of each of two keys (default 250)")
    parser.add_argument("--port", type=int, default=8767)
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        settings, keys = with_keys(Path(folder), load_settings("local"))
        with serving(settings, port=options.port) as url:
            facts = asyncio.run(measured(url, keys, options.count, options.each))
    print(json.dumps(facts))
    if options.write is not None:
        options.write.write_text(page(facts), encoding="utf-8")


if __name__ == "__main__":
    main()
