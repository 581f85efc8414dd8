"""Windows of identities and of true CFG: where they begin and end, and that one without a step is refused."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from deployments.catalog import Catalog, load_catalog
from deployments.contracts import GenerationSpec, PersonPictures
from deployments.errors import InvalidRequest
from serve.normalise import normalise

ADA = Path(__file__).resolve().parents[2] / "samples" / "characters" / "ada-1.png"
PICTURE = f"data:image/png;base64,{base64.b64encode(ADA.read_bytes()).decode()}"
BODY: dict[str, Any] = {"prompt": "a portrait in a park", "reference_image": PICTURE, "seed": 7}
PERSON: dict[str, Any] = {"method": "pulid", "images": [PICTURE]}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


def asked(
    catalog: Catalog, workflow: str | None, body: dict[str, Any], base: str = "flux1-mini"
) -> tuple[GenerationSpec, list[PersonPictures]]:
    specs, people, *_ = normalise(workflow, body, catalog, base)
    return specs[0], people


@pytest.mark.parametrize(
    ("said", "start"),
    [
        ({}, 0.2),
        ({"style": "photorealistic"}, 0.2),
        ({"style": "stylized"}, 0.0),
        ({"start_step": 2}, 0.1),
        ({"start_step": 2, "style": "stylized"}, 0.1),
        ({"start": 0.35}, 0.35),
        ({"start_at": 0.15}, 0.15),
        ({"steps": 40}, 0.1),
        ({"steps": 4}, 0.5),
        ({"steps": 10, "start_step": 9}, 0.9),
    ],
)
def test_where_identity_begins(catalog: Catalog, said: dict[str, Any], start: float) -> None:
    (identity,) = asked(catalog, "flux-pulid", {**BODY, **said})[0].identities
    assert identity.start == pytest.approx(start)


@pytest.mark.parametrize(
    ("said", "window", "param"),
    [
        ({"steps": 4, "start": 0.9}, r"0\.9 to 1 .* 4 steps", "start"),
        ({"steps": 4, "start": 0.8, "end": 1.0}, r"0\.8 to 1 .* 4 steps", "start"),
        ({"steps": 4, "start": 0.3, "end": 0.7}, r"0\.3 to 0\.7 .* 4 steps", "start"),
        ({"steps": 4, "start_step": 1, "end": 0.49}, r"0\.25 to 0\.49 .* 4 steps", "start_step"),
        ({"steps": 4, "style": "stylized", "end": 0.2}, r"0 to 0\.2 .* 4 steps", "end"),
        ({"end": 0.24}, r"0\.2 to 0\.24 .* 20 steps", "end"),
        ({"steps": 4, "true_cfg_scale": 3, "true_cfg_start": 0.9}, r"True CFG .* 0\.9 to 1 .* 4 steps", "true_cfg_start"),
    ],
)
def test_a_window_that_holds_no_step_is_refused(catalog: Catalog, said: dict[str, Any], window: str, param: str) -> None:
    with pytest.raises(InvalidRequest, match=window) as caught:
        asked(catalog, "flux-pulid", {**BODY, **said})
    assert caught.value.details["param"] == param and "widen the window" in caught.value.remedy


def test_a_window_without_a_step_is_refused_by_the_person_that_has_it(catalog: Catalog) -> None:
    people = [PERSON, {**PERSON, "start": 0.9}]
    with pytest.raises(InvalidRequest, match="4 steps") as caught:
        asked(catalog, None, {"prompt": "x", "steps": 4, "identities": people})
    assert caught.value.details["param"] == "identities[1].start"


@pytest.mark.parametrize(
    "said",
    [
        {"steps": 4, "start": 0.75},
        {"steps": 4, "start": 0.25, "end": 0.5},
        {"steps": 28, "start": 0.142857, "end": 0.178571},
        {"steps": 1},
        {"steps": 4, "start": 0.9, "weight": 0},
        {"steps": 4, "true_cfg_start": 0.9},
        {"steps": 4, "true_cfg_scale": 3, "true_cfg_start": 1},
    ],
)
def test_a_window_with_one_step_and_one_for_what_is_off_are_fine(catalog: Catalog, said: dict[str, Any]) -> None:
    spec, _ = asked(catalog, "flux-pulid", {**BODY, **said})
    (identity,) = spec.identities
    assert (identity.end, spec.true_cfg_start) == (said.get("end", 1.0), said.get("true_cfg_start", 0.0))
    assert identity.start == said["start"] if "start" in said else identity.start < identity.end
