"""The first-block cache over PuLID: it saves blocks, keeps the identity, forgets between requests, and leaves nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import pytest

from deployments.contracts import ControlRequest, Guides
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.denoisers.flux1_controlnet import UnionControl
from tests.mini_drawing import PACK, PULID, SIZE, denoiser, pulid_person, request, spec, texts

STEPS = 10


@contextmanager
def last_blocks(flux: Flux1Denoiser) -> Iterator[list[int]]:
    """Grows by one whenever the last block truly computes."""
    model: Any = flux.transformer
    called: list[int] = []
    handle = model.single_transformer_blocks[-1].proj_out.register_forward_pre_hook(lambda module, args: called.append(1))
    try:
        yield called
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def plain() -> Flux1Denoiser:
    return denoiser(PULID)


def test_steps_are_skipped_and_the_identity_stays(plain: Flux1Denoiser) -> None:
    flux = denoiser(PULID, cache_threshold=0.15)
    asked, ada = spec(request(PULID), steps=STEPS), [pulid_person("Ada")]
    with last_blocks(flux) as computed:
        drawn = flux.draw(asked, texts(), ada).picture.astype(float)
    assert 0 < len(computed) < STEPS
    exact, nobody = plain.draw(asked, texts(), ada).picture, plain.draw(spec(steps=STEPS), texts()).picture
    assert np.abs(drawn - exact).mean() < np.abs(drawn - nobody).mean() / 3
    assert np.array_equal(flux.draw(asked, texts(), ada).picture, drawn)


def test_no_request_sees_the_one_before_and_two_passes_keep_apart() -> None:
    flux = denoiser(PULID, cache_threshold=0.15)
    asked = spec(request(PULID), steps=STEPS, true_cfg_scale=2.0)
    first = flux.draw(asked, texts(), [pulid_person("Ada")]).picture
    flux.draw(spec(request(PULID), seed=9, steps=STEPS), texts(), [pulid_person("Bruno")])
    assert np.array_equal(flux.draw(asked, texts(), [pulid_person("Ada")]).picture, first)


def test_with_a_control_nothing_is_skipped() -> None:
    """What a control adds would lie in the cache and be added once more."""
    nets = {"union": partial(UnionControl, folder=PACK / "flux1-controlnet-union", modes={"pose": 4})}
    asked = spec(steps=STEPS, controls=(ControlRequest(model="union", mode="pose", scale=1.0),))
    guides = Guides(controls=(np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), np.uint8),))
    cached, exact = (
        denoiser(controls=nets, cache_threshold=threshold).draw(asked, texts(), (), guides).picture for threshold in (0.4, 0.0)
    )
    assert np.abs(cached.astype(int) - exact).max() <= 1


def test_a_threshold_that_nothing_stays_below_changes_no_pixel_and_ejecting_leaves_the_base(plain: Flux1Denoiser) -> None:
    flux = denoiser(PULID, cache_threshold=1e-9)
    asked, ada = spec(request(PULID), steps=STEPS), [pulid_person("Ada")]
    exact = plain.draw(asked, texts(), ada).picture
    assert np.abs(flux.draw(asked, texts(), ada).picture.astype(int) - exact).max() <= 1
    base = flux.draw(spec(), texts()).picture
    flux.eject()
    assert np.array_equal(flux.draw(spec(), texts()).picture, denoiser().draw(spec(), texts()).picture)
    assert np.abs(base.astype(int) - flux.draw(spec(), texts()).picture).max() <= 1
