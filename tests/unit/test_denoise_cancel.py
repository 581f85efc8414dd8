"""Cancelling, and drawing for several callers at once: no forward after the cancel, nobody's person in another's picture."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from deployments.contracts import RGB, Progress
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.errors import Cancelled
from tests.mini_drawing import PERSON, PULID, STEPS, XLABS, denoiser, forwards, pulid_person, request, spec, texts

_PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def flux() -> Flux1Denoiser:
    return denoiser(PULID, XLABS)


@pytest.fixture(scope="module")
def base(flux: Flux1Denoiser) -> RGB:
    return flux.draw(spec(), texts()).picture


def _from_poll(number: int) -> Callable[[], bool]:
    """Says yes from the given poll on, counted from 1."""
    polls = iter(range(1, 10_000))
    return lambda: next(polls) >= number


@pytest.mark.parametrize("step", range(STEPS + 1))
def test_after_a_cancel_no_forward_starts(flux: Flux1Denoiser, base: RGB, step: int) -> None:
    cancel = threading.Event()
    seen: list[int] = []

    def on_step(progress: Progress) -> None:
        seen.append(progress.step)
        if progress.step == step:
            cancel.set()

    if step == 0:
        cancel.set()
    with forwards(flux) as started, pytest.raises(Cancelled, match="seed 7"):
        flux.draw(spec(), texts(), on_step=on_step, cancelled=cancel.is_set)
    # After the last forward what is left to be spared is the decoding.
    assert len(started) == step and seen == list(range(1, step + 1))
    assert np.array_equal(flux.draw(spec(), texts()).picture, base)


def test_a_cancel_between_the_two_passes_of_true_cfg_spares_the_second(flux: Flux1Denoiser) -> None:
    # Polls: one for the lock, then one before each forward.
    for forward in range(2 * STEPS):
        with forwards(flux) as started, pytest.raises(Cancelled):
            flux.draw(spec(true_cfg_scale=2.0), texts(), cancelled=_from_poll(2 + forward))
        assert len(started) == forward


def test_a_cancel_after_decoding_began_comes_too_late(flux: Flux1Denoiser, base: RGB) -> None:
    cancel = threading.Event()
    drawn = flux.draw(spec(), texts(), on_step=lambda progress: cancel.set() if progress.step > STEPS else None, cancelled=cancel.is_set)
    assert np.array_equal(drawn.picture, base)


def test_a_request_that_is_cancelled_while_it_waits_never_runs(flux: Flux1Denoiser) -> None:
    inside, go_on, cancel = threading.Event(), threading.Event(), threading.Event()

    def hold(progress: Progress) -> None:
        inside.set()
        assert go_on.wait(_PATIENCE_S)

    with forwards(flux) as started, ThreadPoolExecutor(2) as pool:
        first = pool.submit(flux.draw, spec(), texts(), on_step=hold)
        assert inside.wait(_PATIENCE_S)
        second = pool.submit(flux.draw, spec(), texts(), cancelled=cancel.is_set)
        time.sleep(0.1)
        assert not second.done()
        cancel.set()
        with pytest.raises(Cancelled):
            second.result(_PATIENCE_S)
        assert not first.done() and len(started) == 1
        go_on.set()
        assert first.result(_PATIENCE_S).seconds["denoise"] > 0
        assert len(started) == STEPS


def test_an_error_in_the_middle_leaves_the_next_picture_right(flux: Flux1Denoiser, base: RGB) -> None:
    def fail(progress: Progress) -> None:
        raise RuntimeError("the listener has gone")

    with pytest.raises(RuntimeError, match="listener"):
        flux.draw(spec(request(PULID)), texts(), [pulid_person("Ada")], on_step=fail)
    assert np.array_equal(flux.draw(spec(), texts()).picture, base)


def test_people_never_mix_when_many_callers_draw_at_once(flux: Flux1Denoiser) -> None:
    kinds = [(PULID, "Ada"), (XLABS, "Ada"), (PULID, "Bruno"), (XLABS, "Bruno")]

    def draw(index: int) -> RGB:
        model, name = kinds[index % len(kinds)]
        # A window and a weight of its own: what belongs to one request must not show in another.
        wanted = request(model, weight=0.5 + index % 3 / 4, end=0.5 + index % 2 / 2)
        return flux.draw(spec(wanted, seed=index % 5, steps=2), texts(), [PERSON[model](name)]).picture

    alone = [draw(index) for index in range(12)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(draw, range(12)))
    apart = np.array([[_levels_apart(one, other) for other in alone] for one in together])
    # To one level of 255: another thread may be given another kernel, which rounds otherwise. Another request is far from that.
    assert apart.diagonal().max() <= 1, apart
    assert (apart + 255 * np.eye(len(alone), dtype=int)).min() > 10, apart


def _levels_apart(one: RGB, other: RGB) -> int:
    """The largest difference of two pictures, 0..255."""
    return int(np.abs(one.astype(int) - other.astype(int)).max())
