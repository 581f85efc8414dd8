"""Windows, noise levels and latents: the pure functions beneath the denoise loop, against stock FluxPipeline's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from deployments.denoisers.latents import Grid, noise, pack, positions, to_picture, unpack
from deployments.denoisers.schedule import sampler
from deployments.denoisers.windows import active, active_steps
from tests.named_weights import named_tensor

DEV = {
    "use_dynamic_shifting": True,
    "shift": 3.0,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "base_shift": 0.5,
    "max_shift": 1.15,
}
STATIC = {"use_dynamic_shifting": False, "shift": 2.0}
GRID = Grid(rows=3, columns=5, channels=16)


@pytest.mark.parametrize(
    ("start", "end", "steps", "first", "last"),
    [
        (0.0, 1.0, 4, 0, 3),
        (0.2, 1.0, 20, 4, 19),
        (4 / 28, 1.0, 28, 4, 27),
        (0.142857, 1.0, 28, 4, 27),
        (0.143, 1.0, 28, 5, 27),
        (0.0, 0.65, 28, 0, 17),
        (1 / 3, 2 / 3, 3, 1, 1),
        (0.1 + 0.2, 0.7, 10, 3, 6),
    ],
)
def test_a_window_in_percents_is_these_steps(start: float, end: float, steps: int, first: int, last: int) -> None:
    assert active_steps(steps, start, end) == range(first, last + 1)
    assert [step for step in range(steps) if active(step, steps, start, end)] == list(range(first, last + 1))


@pytest.mark.parametrize("steps", [1, 4, 20, 28, 50])
def test_any_start_step_written_with_six_digits_begins_at_that_step(steps: int) -> None:
    for first in range(steps):
        assert [step for step in range(steps) if active(step, steps, round(first / steps, 6), 1.0)][0] == first


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.8, 0.2)])
def test_an_empty_window_holds_no_step(start: float, end: float) -> None:
    assert not any(active(step, 20, start, end) for step in range(20))
    assert not active_steps(20, start, end)


def test_adjoining_windows_share_no_step_and_leave_none_out() -> None:
    for steps in range(1, 40):
        for cut in (0.1, 0.25, 1 / 3, 0.5, 0.9):
            sides = [(active(step, steps, 0, cut), active(step, steps, cut, 1)) for step in range(steps)]
            assert not any(all(side) for side in sides)
            # A step that the cut goes through belongs to neither.
            assert sum(not any(side) for side in sides) <= 1


@pytest.mark.parametrize("config", [DEV, STATIC, {"use_dynamic_shifting": True}])
@pytest.mark.parametrize(("steps", "tokens"), [(4, 64), (28, 4096), (50, 4032), (1, 576)])
def test_noise_levels_are_those_of_stock_fluxpipeline(config: Mapping[str, Any], steps: int, tokens: int) -> None:
    stock = FlowMatchEulerDiscreteScheduler.from_config(config)
    names = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")
    shift = calculate_shift(tokens, *(stock.config.get(name, usual) for name, usual in zip(names, (256, 4096, 0.5, 1.15), strict=True)))
    retrieve_timesteps(stock, steps, "cpu", sigmas=np.linspace(1.0, 1 / steps, steps), mu=shift)
    ours = sampler(config, steps, tokens)
    assert torch.equal(ours.sigmas, stock.sigmas) and torch.equal(ours.timesteps, stock.timesteps)
    assert len(ours.timesteps) == steps and ours.sigmas[-1] == 0


def test_a_sampler_is_made_anew_for_every_request() -> None:
    first, second = sampler(STATIC, 4, 64), sampler(STATIC, 4, 64)
    first.step(torch.zeros(1, 1), first.timesteps[0], torch.zeros(1, 1))
    assert (first.step_index, second.step_index) == (1, None)


def test_noise_is_what_stock_fluxpipeline_draws_and_depends_on_the_seed_alone() -> None:
    pipe = object.__new__(FluxPipeline)
    pipe.vae_scale_factor = 8
    stock, ids = pipe.prepare_latents(1, 16, 48, 80, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(11))
    torch.manual_seed(123)
    assert torch.equal(noise(GRID, torch.Generator().manual_seed(11)), stock)
    assert torch.equal(positions(GRID), ids)
    assert not torch.equal(noise(GRID, torch.Generator().manual_seed(12)), stock)


def test_packing_is_stocks_and_unpacking_undoes_it() -> None:
    latents = named_tensor("latents", 2, 16, 6, 10)
    packed = pack(latents)
    assert torch.equal(packed, FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    assert torch.equal(unpack(packed, GRID), latents)
    assert packed.shape == (2, GRID.tokens, 64)


def test_pixels_are_rounded_and_cut_off_at_both_ends() -> None:
    decoded = torch.tensor([-3.0, -1.0, 0.0, 0.5, 1.0, 3.0]).view(1, 3, 1, 2)
    picture = to_picture(decoded)
    assert picture.dtype == np.uint8 and picture.shape == (1, 2, 3)
    assert picture.tolist() == [[[0, 128, 255], [0, 191, 255]]]
