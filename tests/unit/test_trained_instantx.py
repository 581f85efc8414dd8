"""InstantX's adapter of the embedded pack, as it is served: a reference brings its person, whom no model was trained on; a weight, less."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch

from deployments.contracts import Face, IdentityRequest, IdentityTokens, Person
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.identity.instantx_encoder import InstantXEncoder
from tests.mini_drawing import INSTANTX, INSTANTX_FILE, PACK, denoiser, request, spec, texts
from training.mini.faces.verification import Pictures, sample
from training.mini.sitting import Sitting, cosines
from training.mini.world.scene import CLOSE_UP

PEOPLE, OTHERS = 6, 990  # OTHERS: an offset of held-out people
SIDE, STEPS = 192, 8
SOMEBODY = Face(box=np.array([0, 0, 1, 1], np.float32), score=1.0, landmarks=np.zeros((5, 2), np.float32))
"""InstantX sees the whole picture and asks nothing of the face in it."""

Drawn = Callable[[float | None], Pictures]


@pytest.fixture(scope="module")
def sitting() -> Sitting:
    torch.set_num_threads(1)
    return Sitting(PACK)


@pytest.fixture(scope="module")
def references() -> Pictures:
    return sample(PEOPLE, 71, CLOSE_UP, OTHERS).pictures


@pytest.fixture(scope="module")
def drawn(references: Pictures) -> Drawn:
    """One picture a reference at a weight, or with None of the prompt alone; drawn once."""
    flux = denoiser(INSTANTX, torch_threads=1)
    encoder = InstantXEncoder(INSTANTX_FILE, PACK / "siglip-vision", model=INSTANTX)
    tokens = [encoder.encode(Person((SOMEBODY,), (reference,)), request(INSTANTX)) for reference in references]
    return cache(lambda weight: np.stack([_picture(flux, seed, own, weight) for seed, own in enumerate(tokens)]))


def _picture(flux: Flux1Denoiser, seed: int, tokens: IdentityTokens, weight: float | None) -> Pictures:
    asked: tuple[IdentityRequest, ...] = () if weight is None else (request(INSTANTX, weight=weight),)
    size = {"width": SIDE, "height": SIDE, "steps": STEPS, "seed": seed}
    return flux.draw(spec(*asked, **size), texts(), [tokens for _ in asked]).picture


def test_it_brings_the_person_and_half_a_weight_brings_less(drawn: Drawn, sitting: Sitting, references: Pictures) -> None:
    judged = sitting.judged(references)
    nobody, half, whole = (float(np.mean(cosines(sitting.judged(drawn(weight)), judged)[0])) for weight in (None, 0.5, 1.0))
    assert whole > nobody + 0.1 and whole > half


def test_it_brings_this_person_and_no_other(drawn: Drawn, sitting: Sitting, references: Pictures) -> None:
    judged, found = sitting.judged(references), sitting.judged(drawn(1.0))
    own = float(np.mean(cosines(found, judged)[0]))
    others = [float(np.mean(cosines(found, np.roll(judged, turn, axis=0))[0])) for turn in range(1, PEOPLE)]
    assert own > np.mean(others) + 0.1 and own > max(others)


def test_the_picture_moves_with_the_weight(drawn: Drawn) -> None:
    base = drawn(None).astype(int)
    half, whole = (float(np.abs(drawn(weight).astype(int) - base).mean()) for weight in (0.5, 1.0))
    assert 0 < half < whole
