"""`python benchmarks/serve_overhead.py`: what Ray Serve costs a request, against the same work done in this process without Ray.

The same servers' classes, called one after the other (the baseline), then the same requests over HTTP through the whole application.
Prints both medians and their ratio. Needs an otherwise idle machine.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deployments import images
from deployments.catalog import load_catalog
from deployments.contracts import Drawn, Guides
from deployments.denoiser_server import DenoiserServer
from deployments.face_server import FaceServer
from deployments.identity_server import IdentityServer
from deployments.prompt_server import PromptServer
from serve.client import Client
from serve.cluster import serving
from serve.normalise import normalise, recipe
from serve.reports import drawn_with
from serve.settings import AppSettings, load_settings

_REFERENCE = Path(__file__).parents[1] / "samples" / "characters" / "ada-1.png"
_WARM_UP = 3
_ALLOWED = 0.15, 0.050
"""A request may take this share, and this many seconds, longer than its work."""


def body(seed: int) -> dict[str, Any]:
    picture = base64.b64encode(_REFERENCE.read_bytes()).decode()
    prompt = "a portrait of a smiling person wearing a green hoodie in a library with soft daylight, arms down"
    return {"prompt": prompt, "reference_image": picture, "style": "stylized", "seed": seed}


class InProcess:
    """The work alone: the servers' classes without Ray between them."""

    def __init__(self, settings: AppSettings) -> None:
        self.settings, self.catalog = settings, load_catalog()
        self.faces = FaceServer(settings.faces.models, settings.limits.value)
        self.prompts = PromptServer(settings.base, settings.prompts.torch)
        self.identity = IdentityServer(settings.methods, settings.identity.torch)
        self.denoiser = DenoiserServer(settings.base, settings.methods, settings.controlnets, settings.store, settings.denoiser.torch)

    async def draw(self, seed: int) -> bytes:
        wanted = normalise("flux-pulid", body(seed), self.catalog, self.settings.base)
        (spec,), persons = wanted.specs, wanted.people
        people = self.faces.people(persons, ("aligned", "embedding", "judge"))
        identities = self.identity.encode(people, spec.identities)
        prompts = self.prompts.encode((spec.prompt,), spec.max_sequence_length)
        events = [event async for event in self.denoiser.generate(spec, identities, prompts, Guides())]
        drawn = events[-1]
        assert isinstance(drawn, Drawn)
        self.faces.scores(drawn.picture, people)
        return images.encode(drawn.picture, "png", recipe(wanted, drawn_with(self.settings)))


def medians_s(sides: Sequence[Callable[[int], object]], count: int) -> list[float]:
    """Of each side, taking turns, so that whatever the machine does meanwhile meets both."""
    seconds: list[list[float]] = [[] for _ in sides]
    for seed in range(_WARM_UP + count):
        for draw, spent in zip(sides, seconds, strict=True):
            started = time.perf_counter()
            draw(seed)
            spent.append(time.perf_counter() - started)
    return [statistics.median(spent[_WARM_UP:]) for spent in seconds]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=9, help="requests on each side (default 9)")
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures")
    options = parser.parse_args()
    count = options.count
    settings = load_settings("local")
    here = InProcess(settings)
    started = time.perf_counter()
    with serving(settings, port=8765) as url, Client(url) as client:
        ready = time.perf_counter() - started

        def served_picture(seed: int) -> bytes:
            return client.generate(workflow="flux-pulid", **body(seed)).data[0].content

        alone, served = medians_s([lambda seed: asyncio.run(here.draw(seed)), served_picture], count)
        same = served_picture(1) == asyncio.run(here.draw(1))
    share, fixed = _ALLOWED
    facts = {
        "in_process_s": round(alone, 3), "served_s": round(served, 3), "ratio": round(served / alone, 3), "ready_s": round(ready, 1),
        "same_pixels": same, "within_the_bar": served <= alone * (1 + share) + fixed,
    }  # fmt: skip
    print(json.dumps(facts))
    if options.write is not None:
        options.write.write_text(_page(facts), encoding="utf-8")


def _page(facts: Mapping[str, Any]) -> str:
    return f"""# What Serve costs, measured

Written by `python benchmarks/serve_overhead.py --write docs/serve_overhead.md`: /flux-pulid with the embedded models, two CPU threads.

| what | measured |
|---|---|
| a request over HTTP / the same work in one process without Ray | {facts["ratio"]} ({facts["served_s"]} s / {facts["in_process_s"]} s) |
| the same pixels | {"yes" if facts["same_pixels"] else "no"} |
| within 15 % + 50 ms | {"yes" if facts["within_the_bar"] else "no"} |
| the server is ready after | {facts["ready_s"]} s |
"""


if __name__ == "__main__":
    main()
