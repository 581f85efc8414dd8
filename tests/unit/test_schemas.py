"""Requests: what each spelling means, whose default counts, and that what is wrong is refused by its field before a model is touched."""

from __future__ import annotations

import base64
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.catalog import Catalog, load_catalog
from deployments.contracts import GenerationSpec, PersonPictures
from deployments.errors import (
    InvalidCatalog,
    InvalidImage,
    InvalidRequest,
    LicenseRefused,
    LikenessError,
    MultipleFaces,
    UnknownModel,
    UnsupportedCombination,
)
from deployments.images import DEFAULT_LIMITS, Limits
from serve.normalise import Wanted, normalise, parse, recipe
from serve.presets import WORKFLOWS_PATH, Preset, load_presets
from serve.problem import error_of, problem_of
from serve.schemas import GenerateRequest

ROOT = Path(__file__).resolve().parents[2]
ADA, BRUNO = ((ROOT / "samples" / "characters" / f"{name}-1.png").read_bytes() for name in ("ada", "bruno"))


def uri(data: bytes = ADA) -> str:
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


BODY: dict[str, Any] = {"prompt": "a portrait in a park", "reference_image": uri(), "seed": 7}
PERSON: dict[str, Any] = {"method": "pulid", "images": [uri()]}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


@pytest.fixture(scope="module")
def presets() -> dict[str, Preset]:
    return load_presets()


def asked(
    catalog: Catalog, workflow: str | None, body: dict[str, Any], base: str = "flux1-mini"
) -> tuple[GenerationSpec, list[PersonPictures]]:
    specs, people, *_ = normalise(workflow, body, catalog, base)
    return specs[0], people


def made_of(catalog: Catalog, workflow: str | None, body: dict[str, Any]) -> dict[str, Any]:
    return recipe(normalise(workflow, body, catalog, "flux1-mini"))


def test_mini_keeps_its_own_size_steps_and_guidance(catalog: Catalog) -> None:
    spec, people = asked(catalog, "flux-pulid", BODY)
    assert (spec.width, spec.height, spec.steps, spec.guidance_scale, spec.max_sequence_length) == (192, 192, 20, 2.5, 48)
    assert (spec.true_cfg_scale, spec.seed, spec.prompt) == (1.0, 7, BODY["prompt"])
    assert people[0].pictures == (ADA,) and people[0].face_index is None


def test_flux_dev_gets_what_the_authors_of_pulid_advise(catalog: Catalog) -> None:
    spec, _ = asked(catalog, "flux-pulid", BODY, "flux1-dev")
    assert (spec.width, spec.height, spec.steps, spec.guidance_scale, spec.max_sequence_length) == (896, 1152, 28, 4.0, 128)
    (identity,) = spec.identities
    assert (identity.method, identity.version, identity.weight, identity.end) == ("pulid", "0.9.1", 1.0, 1.0)
    assert identity.start == pytest.approx(4 / 28)


def test_the_ip_adapter_has_weight_0_8_and_a_ramp(catalog: Catalog) -> None:
    for base, ramp in (("flux1-mini", "constant"), ("flux1-dev", "linear")):
        (identity,) = asked(catalog, "flux-ipadapter-faceid", BODY, base)[0].identities
        assert (identity.method, identity.weight, identity.options) == ("xlabs-ip-adapter-v2", 0.8, {"weight_type": ramp})


def test_the_older_weights_are_chosen_by_version(catalog: Catalog) -> None:
    (identity,) = asked(catalog, "flux-pulid", {**BODY, "version": "0.9.0"}, "flux1-dev")[0].identities
    assert identity.version == "0.9.0" and catalog.fitting(identity.method, "flux1-dev").id == "pulid-v0.9.0"
    assert identity.weight == 1.0 and identity.start == pytest.approx(4 / 28)


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("steps", "num_inference_steps", 9),
        ("true_cfg", "true_cfg_scale", 2.5),
        ("end_at", "end", 0.8),
        ("id_weight", "weight", 0.6),
    ],
)
def test_other_spellings_mean_the_same_everywhere(
    catalog: Catalog, presets: dict[str, Preset], alias: str, name: str, value: float
) -> None:
    own, by_alias = ({**BODY, key: value} for key in (name, alias))
    assert asked(catalog, "flux-pulid", own)[0].identities == asked(catalog, "flux-pulid", by_alias)[0].identities
    general = parse(None, {"workflow": "flux-pulid", **by_alias}, presets)
    assert general == parse("flux-pulid", own, presets) and getattr(general, name) == value
    for schema in (GenerateRequest.model_json_schema(), presets["flux-pulid"].request_type.model_json_schema()):
        assert schema["properties"][alias]["deprecated"] is True and name in schema["properties"]
    with pytest.raises(InvalidRequest, match=rf"`{name}` and `{alias}` are the same field"):
        parse("flux-pulid", {**own, alias: value}, presets)


def test_aliases_hold_inside_a_person_too(catalog: Catalog) -> None:
    person = {"method": "pulid", "reference_image": uri(), "start_at": 0.1, "end_at": 0.9, "strength": 0.4}
    (identity,) = asked(catalog, None, {"prompt": "x", "identity": person})[0].identities
    assert (identity.weight, identity.start, identity.end) == (0.4, 0.1, 0.9)


def test_v1_generate_with_a_workflow_is_that_workflow(catalog: Catalog) -> None:
    assert made_of(catalog, None, {"workflow": "flux-pulid", **BODY}) == made_of(catalog, "flux-pulid", BODY)


def test_without_people_the_base_model_draws_alone(catalog: Catalog) -> None:
    spec, people = asked(catalog, None, {"prompt": "a beach", "size": "128x64"})
    assert (spec.identities, people, spec.width, spec.height) == ((), [], 128, 64)


def test_several_people_and_several_methods(catalog: Catalog) -> None:
    both = [
        {**PERSON, "weight": 0.5},
        {"method": "xlabs-ip-adapter-v2", "images": [uri()], "weight_type": "sigmoid"},
        {"method": "pulid", "images": [uri(BRUNO), uri()], "face_index": "largest"},
    ]
    spec, people = asked(catalog, None, {"prompt": "x", "identities": both})
    assert [identity.method for identity in spec.identities] == ["pulid", "xlabs-ip-adapter-v2", "pulid"]
    assert [identity.weight for identity in spec.identities] == [0.5, 1.0, 1.0]
    assert people[0] is people[1] and people[2].pictures == (BRUNO, ADA) and people[2].face_index == "largest"


def test_picture_k_has_the_seed_seed_plus_k(catalog: Catalog) -> None:
    specs, *_ = normalise("flux-pulid", {**BODY, "n": 3}, catalog, "flux1-mini")
    assert [spec.seed for spec in specs] == [7, 8, 9]
    assert recipe(Wanted(specs[1:], [PersonPictures((ADA,))])) == made_of(catalog, "flux-pulid", {**BODY, "seed": 8})


def test_a_seed_is_drawn_where_none_is_given(catalog: Catalog) -> None:
    body = {key: value for key, value in BODY.items() if key != "seed"}
    assert len({asked(catalog, "flux-pulid", body)[0].seed for _ in range(8)}) > 1


def test_the_recipe_holds_every_value_of_the_spec_and_no_picture(catalog: Catalog) -> None:
    spec, people = asked(catalog, "flux-ipadapter-faceid", BODY)
    made = recipe(Wanted([spec], people))
    assert {"base", "prompt", "seed", "steps", "width", "guidance_scale", "max_sequence_length", "true_cfg_start"} <= made.keys()
    (identity,) = made["identities"]
    assert identity["options"] == {"weight_type": "constant"} and len(identity["pictures"][0]) == 64
    assert recipe(Wanted([spec], [PersonPictures((BRUNO,))])) != made


@pytest.mark.parametrize(("ratio", "size"), [("1:1", (192, 192)), ("3:4", (160, 224)), ("16:9", (256, 144)), ("9:16", (144, 256))])
def test_a_shape_keeps_the_number_of_pixels(catalog: Catalog, ratio: str, size: tuple[int, int]) -> None:
    spec, _ = asked(catalog, "flux-pulid", {**BODY, "aspect_ratio": ratio})
    assert (spec.width, spec.height) == size


@pytest.mark.parametrize(
    ("change", "said", "param"),
    [
        ({"prompt": ""}, "prompt", "prompt"),
        ({"prompt": "   "}, "prompt", "prompt"),
        ({"prompt": None}, "prompt", "prompt"),
        ({"colour": "red"}, "no such field", "colour"),
        ({"reference_image": None}, "picture of the person is needed", "reference_image"),
        ({"reference_images": [uri()]}, "say the same thing", None),
        ({"weight": 3.01}, "pulid takes 0 to 3", "weight"),
        ({"weight": -1}, "weight", "weight"),
        ({"weight": "much"}, "weight", "weight"),
        ({"size": "100x128"}, "width is 100.*nearest that is: 96", "size"),
        ({"width": 192, "height": 200}, "height is 200", "height"),
        ({"width": 192}, "belong together", None),
        ({"size": "128x128", "width": 128, "height": 128}, "`size` and `width` say the same", None),
        ({"size": "1024x1024"}, "outside of what flux1-mini draws", "size"),
        ({"size": "32x192"}, "outside of what flux1-mini draws", "size"),
        ({"aspect_ratio": "0:3"}, "aspect_ratio", "aspect_ratio"),
        ({"aspect_ratio": "wide"}, "aspect_ratio", "aspect_ratio"),
        ({"n": 9}, "less than or equal to 8", "n"),
        ({"steps": 0}, "greater than or equal to 1", "num_inference_steps"),
        ({"seed": -1}, "seed", "seed"),
        ({"seed": True}, "`seed` is true", None),
        ({"face_index": True}, "`face_index` is true", None),
        ({"width": 10**400 + 1, "height": 64}, "not a multiple of 16", "width"),
        ({"int": 1}, "`int`: there is no such field", "int"),
        ({"start": 0.5, "start_step": 3}, "say the same thing", None),
        ({"start": 0.5, "end": 0.5}, "is not before", None),
        ({"end": 0.1}, "begin at 0.2 of the schedule and end at 0.1", "end"),
        ({"start_step": 20}, "drawn in 20 steps", "start_step"),
        ({"style": "oil"}, "photorealistic", "style"),
        ({"weight_type": "linear"}, "no such field", "weight_type"),
        ({"face_index": "smallest"}, "face_index", "face_index"),
        ({"denoise": 0.7}, "`strength` below 1", None),
        ({"output_format": "gif"}, "output_format", "output_format"),
        ({"workflow": "flux-pulid"}, "no such field", "workflow"),
    ],
)
def test_what_is_wrong_is_refused_with_its_field(catalog: Catalog, change: dict[str, Any], said: str, param: str | None) -> None:
    body = {key: value for key, value in {**BODY, **change}.items() if value is not None}
    with pytest.raises(InvalidRequest, match=rf"(?s){said}") as caught:
        normalise("flux-pulid", body, catalog, "flux1-mini")
    assert caught.value.remedy and caught.value.details.get("param") == param


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"identities": [{"images": [uri()]}]}, "by which method"),
        ({"identities": [PERSON], "weight": 0.5}, "belongs inside `identities`"),
        ({"identities": [PERSON], "reference_image": uri()}, "say the same thing"),
        ({"identities": []}, "identities"),
        ({"identity": {"method": "pulid", "images": []}}, "either `images` of the person or"),
        ({"identity": {**PERSON, "character_id": "character_1"}}, "either `images` of the person or"),
        ({"reference_image": uri(), "character_id": "character_1", "workflow": "flux-pulid"}, "say the same thing"),
        ({"identity": {**PERSON, "weight_type": "linear"}}, "pulid has none"),
        ({"identity": {"method": "xlabs-ip-adapter-v2", "images": [uri()], "weight_type": "steep"}}, "does not know"),
        ({"identity": {"method": "xlabs-ip-adapter-v2", "images": [uri()], "weight": 1.5}}, "takes 0 to 1"),
        ({"identity": {**PERSON, "image": uri()}}, "both give the pictures"),
        ({"reference_image": uri()}, "by which method"),
        ({"weight": 1}, "needs a person"),
        ({"style": "stylized"}, "names none"),
        ({"workflow": "flux-pulid", "reference_image": uri(), "style": ""}, "no style ''"),
        ({"workflow": "flux-pulld"}, "no workflow 'flux-pulld'.*flux-pulid"),
    ],
)
def test_v1_generate_refuses_what_belongs_together_and_does_not(catalog: Catalog, body: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidRequest, match=rf"(?s){said}"):
        normalise(None, {"prompt": "x", **body}, catalog, "flux1-mini")


@pytest.mark.parametrize(("method", "way_out"), [("instantid", "/sdxl-instantid"), ("faceid", "/sdxl-faceid")])
def test_methods_of_other_families_are_refused_with_the_reason(catalog: Catalog, method: str, way_out: str) -> None:
    with pytest.raises(UnsupportedCombination, match="cross-attention") as caught:
        normalise(None, {"prompt": "x", "identities": [{"method": method, "images": [uri()]}]}, catalog, "flux1-mini")
    assert all(name in caught.value.remedy for name in ("pulid", "xlabs-ip-adapter-v2", way_out))
    assert caught.value.details["param"] == "identities[0].method"


def test_unknown_methods_and_versions_are_refused(catalog: Catalog) -> None:
    with pytest.raises(UnknownModel, match="'pullid'.*pulid"):
        normalise(None, {"prompt": "x", "identity": {**PERSON, "method": "pullid"}}, catalog, "flux1-mini")
    with pytest.raises(UnsupportedCombination, match=r"no version 0\.8.*is 0\.9\.1"):
        normalise("flux-pulid", {**BODY, "version": "0.8"}, catalog, "flux1-mini")


@pytest.mark.parametrize(
    ("picture", "said"),
    [
        ("https://example.org/me.png", "addresses are not followed"),
        ("data:image/gif;base64,AAAA", "image/gif"),
        ("§§§", "base64"),
        ("data:image/png,x", "not base64"),
    ],
)
def test_pictures_that_are_none_are_refused_by_their_place(catalog: Catalog, picture: str, said: str) -> None:
    with pytest.raises(InvalidImage, match=said) as caught:
        normalise(None, {"prompt": "x", "identities": [PERSON, {**PERSON, "images": [uri(), picture]}]}, catalog, "flux1-mini")
    assert caught.value.details["param"] == "identities[1].images[1]"


def test_a_workflow_is_for_its_family(tmp_path: Path, catalog: Catalog) -> None:
    preset = Preset(name="other", description="Another family.", family="sdxl")
    with pytest.raises(UnsupportedCombination, match="family sdxl; flux1-mini is of flux1"):
        normalise("other", {"prompt": "x"}, catalog, "flux1-mini", {"other": preset})


def test_the_commercial_policy_refuses_before_anything_runs(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LICENSE_POLICY", "commercial")
    asked(catalog, "flux-pulid", BODY)
    with pytest.raises(LicenseRefused, match="flux1-dev"):
        normalise("flux-pulid", BODY, catalog, "flux1-dev")


def test_a_rejected_picture_is_not_repeated_in_the_error(catalog: Catalog) -> None:
    with pytest.raises(InvalidRequest) as caught:
        normalise("flux-pulid", {**BODY, "size": uri()}, catalog, "flux1-mini")
    assert len(str(caught.value)) < 400 and len(problem_of(caught.value).model_dump_json()) < 2000


def test_an_error_stays_small_whatever_was_sent(catalog: Catalog) -> None:
    wrong = {**BODY, "k" * 100_000: 1, **{f"field{k}": 1 for k in range(5_000)}}
    with pytest.raises(InvalidRequest, match=r"5000 more: .*\.\.\.") as caught:
        normalise("flux-pulid", wrong, catalog, "flux1-mini")
    assert len(problem_of(caught.value).model_dump_json()) < 10_000


def test_the_limits_of_pictures_are_those_of_the_server(catalog: Catalog) -> None:
    small, large = Limits(bytes=1000), Limits(bytes=2 * DEFAULT_LIMITS.bytes)
    huge = "A" * (DEFAULT_LIMITS.bytes * 3 // 2)
    with pytest.raises(InvalidImage, match="allowed"):
        normalise("flux-pulid", BODY, catalog, "flux1-mini", limits=small)
    _, people, *_ = normalise("flux-pulid", {**BODY, "reference_image": huge}, catalog, "flux1-mini", limits=large)
    assert len(people[0].pictures[0]) > DEFAULT_LIMITS.bytes


def test_a_new_workflow_is_a_file(tmp_path: Path, catalog: Catalog) -> None:
    content = {
        "description": "Half as strong.", "family": "flux1", "method": "pulid", "fields": ["weight"],
        "defaults": {"weight": 0.5}, "bases": {"flux1-mini": {"num_inference_steps": 8}},
    }  # fmt: skip
    (tmp_path / "gentle.yaml").write_text(yaml.safe_dump(content))
    presets = load_presets(tmp_path)
    specs, *_ = normalise("gentle", BODY, catalog, "flux1-mini", presets)
    assert specs[0].steps == 8 and specs[0].identities[0].weight == 0.5
    assert presets["gentle"].endpoint == "/gentle"
    with pytest.raises(InvalidRequest, match="`start_step`: there is no such field"):
        normalise("gentle", {**BODY, "start_step": 2}, catalog, "flux1-mini", presets)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"colour": 1}, "colour"),
        ({"fields": ["wait"]}, "'wait' is no field"),
        ({"defaults": {"waight": 1}}, "'waight' is no field"),
        ({"defaults": {"num_inference_steps": 0}}, "num_inference_steps"),
        ({"help": {"start": "Not shown."}}, "'start' is no field"),
        ({"styles": {"oil": {"start_step": -1}}}, "start_step"),
        ({"family": None}, "family"),
    ],
)
def test_a_wrong_workflow_file_is_named(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    content = {"description": "x", "family": "flux1", "method": "pulid", "fields": ["weight"], **change}
    (tmp_path / "wrong.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidCatalog, match=rf"(?s)wrong\.yaml.*{said}"):
        load_presets(tmp_path)


def test_every_shipped_workflow_runs_on_every_base_of_its_family(catalog: Catalog, presets: dict[str, Preset]) -> None:
    assert set(presets) == {path.stem for path in WORKFLOWS_PATH.glob("*.yaml")} >= {"flux-pulid", "flux-ipadapter-faceid"}
    for preset in presets.values():
        for entry in catalog.models.values():
            if entry.role == "base" and entry.family == preset.family:
                asked(catalog, preset.name, BODY, entry.id)


def test_a_problem_is_its_error_again() -> None:
    error = MultipleFaces("Two faces.", details={"boxes": [[0, 1, 2, 3]], "param": "reference_image"})
    problem = problem_of(error)
    assert (problem.status, problem.code, problem.param) == (422, "multiple_faces", "reference_image")
    assert problem.type.endswith("multiple_faces") and problem.title.startswith("A picture shows several faces")
    copy = error_of(problem)
    assert type(copy) is MultipleFaces and (copy.message, copy.remedy, copy.details) == (error.message, error.remedy, error.details)


def test_a_problem_of_a_newer_server_is_still_an_error() -> None:
    copy = error_of(problem_of(MultipleFaces("Two.")).model_copy(update={"code": "of_tomorrow", "status": 451}))
    assert type(copy) is LikenessError and copy.details == {"code": "of_tomorrow", "status": 451}


def test_requests_can_be_understood_without_any_model_library() -> None:
    heavy = {"torch", "ray", "diffusers", "transformers", "onnxruntime", "insightface", "fastapi", "huggingface_hub"}
    source = f"import serve.normalise, serve.answers, sys; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
