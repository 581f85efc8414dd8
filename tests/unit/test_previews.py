"""Previews: which steps show one, how small, that they come nearer to the picture, and that the picture does not know of them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import cv2
import numpy as np
import pytest
import torch

from deployments.contracts import RGB, Drawn, Guides, Identities, Progress, Prompts
from deployments.denoiser_server import DenoiserServer, DenoiserSettings
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.denoisers.latents import Grid, pack
from deployments.denoisers.previews import LONGEST_SIDE, Previews, preview_steps, shrunk
from deployments.hardware import MemoryMode
from deployments.store.settings import StoreSettings
from tests.mini_drawing import PULID, XLABS, denoiser, forwards, pulid_person, request, spec, texts, xlabs_person

MODES: Sequence[MemoryMode] = get_args(MemoryMode)


@pytest.fixture(scope="module")
def flux() -> Flux1Denoiser:
    return denoiser(PULID, XLABS)


def watched(
    flux: Flux1Denoiser, previews: int, *identities: str, guides: Guides | None = None, **changes: object
) -> tuple[RGB, dict[int, RGB]]:
    """The picture, and the previews by their steps."""
    seen: dict[int, RGB] = {}

    def on_step(progress: Progress) -> None:
        if progress.preview is not None:
            seen[progress.step] = progress.preview

    who = {PULID: pulid_person, XLABS: xlabs_person}
    wanted = spec(*(request(model) for model in identities), **changes)
    people = [who[model]("Ada") for model in identities]
    drawn = flux.draw(wanted, texts(), people, *([guides] if guides else []), on_step=on_step, previews=previews)
    return drawn.picture, seen


def likeness(preview: RGB, picture: RGB) -> float:
    """Cosine between two pictures, each less its own mean colour, at the preview's size."""
    height, width = preview.shape[:2]
    sides = [preview, cv2.resize(picture, (width, height), interpolation=cv2.INTER_AREA)]
    first, second = (side.astype(np.float64) - side.mean((0, 1)) for side in sides)
    return float((first * second).sum() / np.sqrt((first**2).sum() * (second**2).sum()))


@pytest.mark.parametrize("total", range(1, 31))
def test_as_many_steps_as_asked_for_evenly_spread_and_never_the_last(total: int) -> None:
    for most in range(-1, 35):
        steps = sorted(preview_steps(total, most))
        assert len(steps) == max(0, min(most, total - 1))
        assert all(1 <= step < total for step in steps)
        gaps = np.diff([0, *steps, total])
        assert not steps or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(("height", "width"), [(128, 128), (168, 128), (24, 400), (32, 33)])
def test_a_preview_is_never_larger_than_its_bound_and_keeps_its_shape(height: int, width: int) -> None:
    made = shrunk(torch.rand(1, 16, height, width), 8)
    rows, columns = made.shape[-2:]
    assert max(rows, columns) == LONGEST_SIDE // 8
    assert abs(rows / columns - height / width) <= max(1 / rows, 1 / columns) * height / width


def test_latents_that_are_small_enough_are_left_as_they_are() -> None:
    latents = torch.rand(1, 16, 32, 20)
    assert shrunk(latents, 8) is latents


def test_the_mean_colour_survives_shrinking() -> None:
    latents = torch.rand(1, 4, 128, 96)
    assert torch.allclose(shrunk(latents, 8).mean((-2, -1)), latents.mean((-2, -1)), atol=1e-3)


@pytest.mark.parametrize("identities", [(), (PULID,), (XLABS, PULID)])
def test_the_picture_is_the_same_bit_for_bit(flux: Flux1Denoiser, identities: tuple[str, ...]) -> None:
    plain, nothing = watched(flux, 0, *identities)
    picture, seen = watched(flux, 9, *identities)
    assert not nothing and len(seen) == spec().steps - 1
    assert np.array_equal(picture, plain)


def test_also_with_true_cfg_and_from_a_picture(flux: Flux1Denoiser) -> None:
    begin = Guides(begin=np.full((64, 64, 3), 120, np.uint8))
    for guides, changes in ((None, {"true_cfg_scale": 2.0}), (begin, {"strength": 0.5, "steps": 6})):
        plain, _ = watched(flux, 0, guides=guides, **changes)
        picture, seen = watched(flux, 2, guides=guides, **changes)
        # A strength of a half leaves three of six steps, of which the last shows none.
        assert np.array_equal(picture, plain) and len(seen) == 2


def test_each_preview_is_nearer_to_the_picture_than_the_one_before(flux: Flux1Denoiser) -> None:
    for seed in (3, 11):
        picture, seen = watched(flux, 4, PULID, seed=seed, steps=10, width=192, height=192)
        nearness = [likeness(seen[step], picture) for step in sorted(seen)]
        assert len(nearness) == 4 and nearness == sorted(nearness), nearness
        assert nearness[-1] > 0.95 and nearness[-1] - nearness[0] > 0.02, nearness


def test_a_large_picture_has_small_previews_which_look_like_it(flux: Flux1Denoiser) -> None:
    picture, seen = watched(flux, 1, width=384, height=320, steps=2)
    ((step, preview),) = seen.items()
    assert step == 1 and preview.shape == (212, 256, 3)
    assert likeness(preview, picture) > 0.5


def test_a_small_picture_has_previews_of_its_own_size(flux: Flux1Denoiser) -> None:
    picture, seen = watched(flux, 2)
    assert {preview.shape for preview in seen.values()} == {picture.shape}


@pytest.mark.parametrize("mode", MODES)
def test_every_memory_mode_shows_them_and_draws_what_it_draws_without(mode: MemoryMode) -> None:
    flux = denoiser(memory=mode)
    plain, _ = watched(flux, 0, steps=3)
    picture, seen = watched(flux, 2, steps=3)
    assert np.array_equal(picture, plain) and sorted(seen) == [1, 2]


def test_the_first_block_cache_does_not_see_them() -> None:
    flux = denoiser(cache_threshold=0.3)
    plain, _ = watched(flux, 0, steps=8)
    picture, seen = watched(flux, 3, steps=8)
    assert np.array_equal(picture, plain) and len(seen) == 3


def test_none_costs_a_forward(flux: Flux1Denoiser) -> None:
    with forwards(flux) as started:
        watched(flux, 3)
    assert len(started) == spec().steps


def test_the_server_hands_them_on(tmp_path: Path) -> None:
    server = DenoiserServer("flux1-mini", [], [], StoreSettings(url=f"sqlite:///{tmp_path}/s.db", folder=tmp_path), DenoiserSettings())

    async def events(previews: int) -> list[Progress | Drawn]:
        stream = server.generate(spec(), Identities(), Prompts(texts(), {"prompts": 0.1}), Guides(), previews)
        return [event async for event in stream]

    *plain, last = asyncio.run(events(0))
    *shown, same = asyncio.run(events(2))
    assert isinstance(last, Drawn) and isinstance(same, Drawn) and np.array_equal(last.picture, same.picture)
    seen = [event.step for event in shown if isinstance(event, Progress) and event.preview is not None]
    assert seen == [1, 2] and len(plain) == len(shown) == spec().steps + 1


def test_where_there_is_no_room_the_drawing_goes_on_without(caplog: pytest.LogCaptureFixture) -> None:
    asked: list[torch.Size] = []

    def full(latents: torch.Tensor) -> RGB:
        asked.append(latents.shape)
        raise torch.OutOfMemoryError("no room")

    previews = Previews(frozenset({1, 2}), Grid(4, 4, 16), 8, full)
    clean = pack(torch.zeros(1, 16, 8, 8))
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            previews.look(step, clean)
            assert previews.of(step) is None
    assert asked == [torch.Size([1, 16, 8, 8])] and "without" in caplog.text
