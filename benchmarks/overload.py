"""`python -m benchmarks.overload [--seconds 120] [--write docs/overload.md]`: three times as many requests as the server can draw.

First how much it draws when it is just busy (as many clients as may wait, each asks again when it has its picture); then requests come
three times as fast, whoever is still waiting. Goodput is what is drawn then, beside the first figure. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from serve.cluster import serving
from serve.settings import load_settings

_PROMPT = "a portrait of a smiling person wearing a green hoodie in a library with soft daylight"
# So large that drawing is what takes the time (what refuses, and who asks, share the cores with it), and so small that three times as many
# as can be drawn fill the queue in less than a minute.
_BODY: Mapping[str, Any] = {"prompt": _PROMPT, "width": 192, "height": 192, "steps": 8, "scores": False}
_WARM_S, _TIMES, _CLIENTS = 60.0, 3.0, 4
_PATH = "/v1/generate"


async def capacity(url: str, seconds: float) -> float:
    """Pictures a second, of a few clients that wait for theirs."""
    drawn, until = 0, time.monotonic() + seconds
    async with httpx.AsyncClient(base_url=url, timeout=60) as http:

        async def one() -> None:
            nonlocal drawn
            while time.monotonic() < until:
                answer = await http.post(_PATH, json=_BODY)
                drawn += answer.is_success

        started = time.monotonic()
        await asyncio.gather(*(one() for _ in range(_CLIENTS)))
        return drawn / (time.monotonic() - started)


async def flood(url: str, rate: float, seconds: float) -> dict[str, Any]:
    """Requests at a rate that cares for no answer. Statuses, the seconds of those that were drawn, memory along the way."""
    statuses: Counter[int] = Counter()
    waits: list[float] = []
    lacking = 0
    memory = [_mebibytes()]
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:

        async def one() -> None:
            nonlocal lacking
            started = time.monotonic()
            answer = await http.post(_PATH, json=_BODY)
            statuses[answer.status_code] += 1
            lacking += answer.status_code == 429 and "retry-after" not in answer.headers
            if answer.is_success and time.monotonic() < until:
                waits.append(time.monotonic() - started)

        tasks, started = set(), time.monotonic()
        until, sent, looked = started + seconds, 0, started
        while (now := time.monotonic()) < until:
            while sent < (now - started) * rate:
                task = asyncio.create_task(one())
                tasks.add(task)
                task.add_done_callback(tasks.discard)
                sent += 1
            if now - looked > seconds / 6:
                memory.append(_mebibytes())
                looked = now
            await asyncio.sleep(0.05)
        await asyncio.gather(*tasks)
    memory.append(_mebibytes())
    return {
        "sent": sent,
        "statuses": dict(statuses),
        "without_retry_after": lacking,
        "goodput": len(waits) / seconds,
        "median_s": sorted(waits)[len(waits) // 2] if waits else None,
        "memory_mib": memory,
    }


def _mebibytes() -> int:
    """Of every process of Ray and this one, what no other process shares. (Sharing out what is shared takes a second of CPU.)"""
    mine = [psutil.Process(), *psutil.Process().children(recursive=True)]
    total = 0
    for process in mine:
        try:
            found = process.memory_info()
            total += found.rss - found.shared
        except psutil.Error:
            continue
    return total // 2**20


def measured(seconds: float, port: int) -> dict[str, Any]:
    with serving(load_settings("local"), port=port) as url:
        asyncio.run(capacity(url, _WARM_S / 6))
        drawn = asyncio.run(capacity(url, _WARM_S))
        flooded = asyncio.run(flood(url, drawn * _TIMES, seconds))
        after = asyncio.run(capacity(url, _WARM_S))
    return {"capacity": drawn, "after": after, "ratio": flooded["goodput"] / drawn, **flooded}


def page(figures: Mapping[str, Any], seconds: float) -> str:
    rows = {
        "drawn a second, just busy": f"{figures['capacity']:.2f}",
        f"drawn a second, {_TIMES:g} times as many asking for {seconds:g} s": f"{figures['goodput']:.2f}",
        "ratio": f"{figures['ratio']:.3f}",
        "answers by status": ", ".join(f"{status}: {count}" for status, count in sorted(figures["statuses"].items())),
        "refusals without Retry-After": str(figures["without_retry_after"]),
        "median wait of a picture": f"{figures['median_s']:.1f} s",
        "memory of all processes along the way, MiB": ", ".join(str(value) for value in figures["memory_mib"]),
        "drawn a second, just busy, afterwards": f"{figures['after']:.2f}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    size = f"{_BODY['width']} x {_BODY['height']} pixels in {_BODY['steps']} steps"
    return f"""# Overload

Written by `python -m benchmarks.overload --seconds {seconds:g} --write docs/overload.md`: pictures of {size}, by text,
with the embedded models on two CPU cores, which those who ask share. Goodput: pictures that came while it lasted.

| what | |
|---|---|
{table}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--port", type=int, default=8765)
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures")
    options = parser.parse_args()
    figures = measured(options.seconds, options.port)
    print(json.dumps(figures, indent=1))
    if options.write is not None:
        options.write.write_text(page(figures, options.seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
