"""`python -m benchmarks.previews [--runs 5] [--size mini|true|tiny]`: what four previews add to the time of drawing a picture.

mini: the embedded base with PuLID on a CPU, 192 x 192, 20 steps; the pictures are compared bit for bit. true: FLUX.1-dev's own size with
random weights on one GPU in bf16, 1024 x 1024, 20 steps; tiny: the same way on a CPU. Both sides take turns; medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.likeness_studio import Studio
from benchmarks.true_size import SCHEDULER, Maker, Sizes, tiny_sizes, true_sizes
from deployments.contracts import RGB
from deployments.denoisers.flux1_loop import Call, Text, denoise
from deployments.denoisers.latents import PATCH, Grid, positions, to_picture, unpack
from deployments.denoisers.previews import Previews, preview_steps
from deployments.denoisers.schedule import sampler

_PREVIEWS, _STEPS = 4, 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--size", choices=("mini", "true", "tiny"), default="mini")
    options = parser.parse_args()
    if options.size == "true":
        draw = _at(true_sizes(), torch.device("cuda"), torch.bfloat16)
    else:
        torch.set_num_threads(1)
        draw = _mini() if options.size == "mini" else _at(tiny_sizes(), torch.device("cpu"), torch.float32)
    print(json.dumps({"size": options.size, **measured(draw, options.runs)}))


def measured(draw: Callable[[int], RGB], runs: int) -> dict[str, float | bool]:
    """draw: a picture with so many previews."""
    seconds: dict[int, list[float]] = {0: [], _PREVIEWS: []}
    pictures: dict[int, RGB] = {previews: draw(previews) for previews in seconds}  # to warm up
    for _ in range(runs):
        for previews, spent in seconds.items():
            started = time.perf_counter()
            draw(previews)
            spent.append(time.perf_counter() - started)
    plain, shown = (statistics.median(spent) for spent in seconds.values())
    same = bool(np.array_equal(pictures[0], pictures[_PREVIEWS]))
    return {"seconds": round(plain, 4), "with_previews": round(shown, 4), "ratio": round(shown / plain, 4), "same_pixels": same}


def _mini() -> Callable[[int], RGB]:
    studio = Studio(1)
    denoiser = studio.denoiser()

    def draw(previews: int) -> RGB:
        watched: Any = SimpleNamespace(draw=partial(denoiser.draw, previews=previews))
        (picture,) = studio.draw(watched)
        return picture

    return draw


def _at(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> Callable[[int], RGB]:
    make = Maker(sizes, device, dtype)
    transformer, vae = make.transformer(), make.vae()
    scale = 2 ** (len(sizes.vae["block_out_channels"]) - 1)
    side = sizes.pixels // (PATCH * scale)
    grid, config = Grid(side, side, sizes.vae["latent_channels"]), transformer.config
    text = Text(make.random(1, sizes.text, config.joint_attention_dim), make.random(1, config.pooled_projection_dim))
    latents = make.random(1, grid.tokens, config.in_channels).float()
    call = Call(latents=latents, positions=positions(grid).to(device), prompt=text, guidance=3.5)

    def decode(small: Tensor) -> RGB:
        return to_picture(vae.decode(small.to(dtype), return_dict=False)[0])

    def settle(step: int) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    @torch.inference_mode()
    def draw(previews: int) -> RGB:
        seen = Previews(preview_steps(_STEPS, previews), grid, scale, decode)
        scheduler = sampler(SCHEDULER, _STEPS, grid.tokens, device)
        look = seen.look if previews else None
        clean = denoise(transformer, scheduler, call, before_forward=lambda: None, after_step=settle, estimated=look)
        return decode(unpack(clean, grid))

    return draw


if __name__ == "__main__":
    main()
