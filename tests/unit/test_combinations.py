"""The table of combinations, pair by pair on mini: what is allowed works together, and what is refused is refused; and its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import save_file

from deployments.catalog import Combination, load_catalog
from deployments.contracts import RGB, ControlRequest, Guides, IdentityRequest, IdentityTokens, LoraRequest, Mask
from deployments.denoisers.flux1 import Attach, Flux1Denoiser
from deployments.denoisers.flux1_controlnet import UnionControl
from deployments.errors import UnsupportedCombination
from deployments.identity.redux import ReduxAdapter, ReduxProjection
from serve.combinations import page
from tests.mini_drawing import ATTACH, FLUX, PACK, SIZE, instantx_person, pulid_person, spec, texts, xlabs_person
from tests.named_weights import fill, named_tensor
from training.mini.generator.sizes import REDUX

CATALOG = load_catalog()
RULES = [rule for rule in CATALOG.combinations if rule.base_family == "flux1"]
METHODS = ("pulid", "xlabs-ip-adapter-v2", "instantx-ip-adapter", "redux")
FEATURES = (*METHODS, "loras", "controls", "image", "true_cfg", "people", "masks")
PAGE = Path(__file__).parents[2] / "docs" / "combinations.md"
NET = "flux1-mini-controlnet-union"


@dataclass
class Asked:
    """A request as it is put together of features."""

    people: list[tuple[IdentityRequest, IdentityTokens]] = field(default_factory=list)
    fields: dict[str, Any] = field(default_factory=dict)
    guides: Guides = field(default_factory=Guides)


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Flux1Denoiser:
    """With every method (Redux, which the pack has not, of drawn weights), the pose ControlNet and the sample LoRA."""
    redux, path = ReduxProjection(REDUX), tmp_path_factory.mktemp("redux") / "redux.safetensors"
    fill(redux)
    save_file({key: tensor.contiguous() for key, tensor in redux.state_dict().items()}, path)
    attach: dict[str, Attach] = {**ATTACH, "redux": partial(ReduxAdapter, path=path)}
    nets = {NET: partial(UnionControl, folder=PACK / "flux1-controlnet-union", modes={"pose": 4})}
    return Flux1Denoiser(FLUX, attach, controls=nets, loras=lambda sha256: PACK / "loras" / "ada.safetensors", torch_threads=1)


def person(method: str, name: str) -> tuple[IdentityRequest, IdentityTokens]:
    return IdentityRequest(method=method), _TOKENS[method](name)


def _redux(name: str) -> IdentityTokens:
    words = named_tensor(f"{name}'s words", 1, 64, REDUX.text_dim)
    return IdentityTokens("redux", words, words[:, :0])


_TOKENS: dict[str, Callable[[str], IdentityTokens]] = {
    "pulid": pulid_person, "xlabs-ip-adapter-v2": xlabs_person, "instantx-ip-adapter": instantx_person, "redux": _redux,
}  # fmt: skip


@cache
def picture(seed: int) -> RGB:
    return np.random.default_rng(seed).integers(0, 256, (SIZE, SIZE, 3), np.uint8)


def half(left: bool) -> Mask:
    return Mask(2, 1, bytes([255, 0] if left else [0, 255]))


def with_(asked: Asked, feature: str, by: str = "pulid") -> Asked:
    """The request with one feature more. `people` and `masks` need somebody, whom `by` brings where nobody else is."""
    if feature in METHODS:
        return replace(asked, people=[*asked.people, person(feature, "Ada")])
    if feature in ("people", "masks"):
        first = asked.people or [person(by, "Ada")]
        if feature == "people":
            return replace(asked, people=[*first, person(first[0][0].method, "Bruno")])
        halves = [(replace(request, mask=half(place % 2 == 0)), tokens) for place, (request, tokens) in enumerate(first)]
        return replace(asked, people=halves)
    if feature == "controls":
        control = ControlRequest(model=NET, mode="pose", scale=1.0)
        return replace(asked, fields={**asked.fields, "controls": (control,)}, guides=replace(asked.guides, controls=(picture(1),)))
    if feature == "image":
        return replace(asked, fields={**asked.fields, "strength": 0.5}, guides=replace(asked.guides, begin=picture(2)))
    changes: dict[str, dict[str, Any]] = {
        "loras": {"loras": (LoraRequest(id="a", sha256="0" * 64),)},
        "true_cfg": {"true_cfg_scale": 3.0},
    }
    return replace(asked, fields={**asked.fields, **changes[feature]})


def draw(mini: Flux1Denoiser, asked: Asked) -> RGB:
    requests = tuple(request for request, _ in asked.people)
    return mini.draw(spec(*requests, **{"steps": 2, **asked.fields}), texts(), [tokens for _, tokens in asked.people], asked.guides).picture


def test_every_pair_is_said_once() -> None:
    assert sorted(sorted(rule.pair) for rule in RULES) == sorted(sorted(pair) for pair in combinations(FEATURES, 2))
    assert {rule.pair for rule in RULES if not rule.works} == {frozenset(("redux", "people")), frozenset(("redux", "masks"))}


@pytest.fixture(scope="module")
def alone(mini: Flux1Denoiser) -> Callable[..., RGB]:
    """What is drawn with one feature alone, or with none; drawn once."""
    return cache(lambda *feature: draw(mini, with_(Asked(), *feature) if feature else Asked()))


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule.works], ids=lambda rule: f"{rule.first}+{rule.second}")
def test_an_allowed_pair_acts_together_and_leaves_nothing_behind(mini: Flux1Denoiser, alone: Callable[..., RGB], rule: Combination) -> None:
    base = alone()
    # Methods first: masks and people are of somebody.
    order = sorted((rule.first, rule.second), key=FEATURES.index)
    other_method = "xlabs-ip-adapter-v2" if order[0] == "pulid" else "pulid"
    both = draw(mini, with_(with_(Asked(), order[0]), order[1]))
    for other in (base, *(alone(feature, other_method) for feature in order)):
        assert not np.array_equal(both, other)
    assert np.array_equal(draw(mini, with_(with_(Asked(), order[0]), order[1])), both)
    assert np.array_equal(draw(mini, Asked()), base)


@pytest.mark.parametrize("rule", [rule for rule in RULES if not rule.works], ids=lambda rule: f"{rule.first}+{rule.second}")
def test_a_refused_pair_is_refused_with_the_reason_and_the_way_out(rule: Combination) -> None:
    with pytest.raises(UnsupportedCombination, match="do not go together") as caught:
        CATALOG.refuse_combination("flux1", {rule.first, rule.second, "loras"})
    assert caught.value.remedy == rule.instead
    CATALOG.refuse_combination("flux1", {rule.first, "loras"})


def test_everything_at_once(mini: Flux1Denoiser) -> None:
    """LoRA, PuLID, XLabs, InstantX, control, a picture to begin from, true CFG: each of them still counts."""
    features = ["pulid", "xlabs-ip-adapter-v2", "instantx-ip-adapter", "loras", "controls", "image", "true_cfg"]

    def of(wanted: list[str]) -> RGB:
        asked = Asked()
        for feature in wanted:
            asked = with_(asked, feature)
        return draw(mini, asked)

    whole = of(features)
    for feature in features:
        assert not np.array_equal(of([other for other in features if other != feature]), whole), feature


def test_the_page_is_the_catalogue() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(CATALOG), "python -m serve.combinations > docs/combinations.md"
