"""`python -m benchmarks.first_block_cache [--people 8]`: what the first-block cache saves, and what it does to a likeness, with PuLID on.

On the embedded base, on a CPU; writes docs/first_block_cache.md. The baseline is the same drawing without a cache, timed in turns.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from benchmarks.likeness_studio import Drawings, Studio, compared

_THRESHOLDS = (0.0, 0.05, 0.1, 0.15, 0.25, 0.4)
_PAGE = Path(__file__).parents[1] / "docs" / "first_block_cache.md"
_HEAD = """# The first-block cache, with PuLID

Written by `python -m benchmarks.first_block_cache`: {people} held-out people of the embedded world, a close-up of each, 20 steps, PuLID at
weight 1, on a CPU. **It changes pixels.** `cache_threshold` is a setting of the denoiser (`configs/serve/*.yaml`, `denoiser: torch:`), 0 by
default. Likeness: the judge's mean cosine; change: from no cache, with its standard error; pixels: mean absolute difference, of 255; time:
of drawing, against no cache.

| threshold | time | likeness | change | pixels |
|---|---|---|---|---|
"""
_TAIL = """
The identity is added inside the blocks, under the cache's hooks (deployments/denoisers/first_block_cache.py): put over them, it would be
counted twice. A drawing with a control or with Redux skips nothing: what a control adds would be counted twice, and Redux may change the
length of the text.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    studio = Studio(options.people)
    denoisers = {threshold: studio.denoiser(cache_threshold=threshold) for threshold in _THRESHOLDS}
    drawn: dict[float, Drawings] = {}
    seconds: dict[float, float] = {}
    for threshold, denoiser in denoisers.items():
        studio.draw(denoiser)  # once to warm up
        started = time.perf_counter()
        pictures = studio.draw(denoiser)
        seconds[threshold] = time.perf_counter() - started
        drawn[threshold] = Drawings(pictures, studio.cosines(pictures))
    rows = []
    for threshold in _THRESHOLDS:
        figures = compared(drawn[threshold], drawn[0.0])
        change = f"{figures['change']:+.3f} ± {figures['standard_error']:.3f}" if threshold else "–"
        name = f"{threshold:g}" if threshold else "none"
        rows.append(
            f"| {name} | {seconds[threshold] / seconds[0.0]:.2f} | {figures['likeness']:.3f} | {change} | {figures['pixels']:.1f} |\n"
        )
    page = _HEAD.format(people=options.people) + "".join(rows) + _TAIL
    print(page)
    _PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
