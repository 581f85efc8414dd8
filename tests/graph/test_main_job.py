"""The main job, end to end in one process: a photo and a prompt in, the same face out. (On a real Ray: tests/cluster.)"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from deployments.errors import InvalidRequest, MultipleFaces, UnsupportedCombination
from deployments.images import decode, parameters_of
from serve.client import Client

SAMPLES = Path(__file__).parents[2] / "samples"
ADA, BRUNO = SAMPLES / "characters" / "ada-1.png", SAMPLES / "characters" / "bruno-1.png"
GROUP = sorted((SAMPLES / "groups").glob("*.png"))[0]
PORTRAIT = "a portrait of a smiling person wearing a green hoodie in a library with soft daylight, arms down"
QUICK: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "scores": False}
"""For what does not look at the picture's face."""


def data_uri(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def mean_cosine(client: Client, workflow: str, **fields: Any) -> float:
    """Over four people, one portrait each, 8 steps."""
    cosines = []
    for name in ("ada", "bruno", "esi", "greta"):
        reference = SAMPLES / "characters" / f"{name}-1.png"
        answer = client.generate(workflow=workflow, prompt=PORTRAIT, reference_image=reference, seed=5, steps=8, **fields)
        cosines.append(answer.data[0].scores[0].cosine or 0.0)
    return float(np.mean(cosines))


def test_both_methods_bring_the_face_and_nobody_brings_none(client: Client) -> None:
    base = mean_cosine(client, "flux-pulid", weight=0)
    assert abs(base) < 0.15
    assert mean_cosine(client, "flux-pulid", style="stylized") > base + 0.1
    assert mean_cosine(client, "flux-ipadapter-faceid", weight=1) > base + 0.1


def test_weight_zero_is_the_base_bit_for_bit_and_weight_one_is_not(client: Client) -> None:
    plain = client.generate(prompt=PORTRAIT, seed=3, **QUICK).data[0].content
    for workflow in ("flux-pulid", "flux-ipadapter-faceid"):
        pictures = [
            decode(
                client.generate(workflow=workflow, prompt=PORTRAIT, reference_image=ADA, seed=3, weight=weight, start=0, **QUICK)
                .data[0]
                .content
            )
            for weight in (0, 1)
        ]
        assert np.array_equal(pictures[0], decode(plain))
        assert not np.array_equal(pictures[1], decode(plain))


def test_the_same_request_gives_the_same_file_and_picture_k_is_that_of_seed_plus_k(client: Client) -> None:
    fields = {"workflow": "flux-pulid", "prompt": PORTRAIT, "reference_image": ADA, **QUICK}
    two = client.generate(seed=11, n=2, **fields)
    assert [item.seed for item in two.data] == [11, 12]
    assert two.data[1].content == client.generate(seed=12, **fields).data[0].content
    assert two.data[0].content != two.data[1].content


def test_the_file_says_how_to_make_it_again_and_names_no_picture_by_its_content(client: Client) -> None:
    answer = client.generate(workflow="flux-pulid", prompt=PORTRAIT, reference_image=ADA, style="stylized", **QUICK)
    said: Any = parameters_of(answer.data[0].content)
    assert said is not None and said == json.loads(json.dumps(answer.request))
    assert said["seed"] == answer.data[0].seed and said["prompt"] == PORTRAIT
    assert said["identities"][0]["method"] == "pulid" and len(said["identities"][0]["pictures"][0]) == 64
    again = client.generate(
        workflow="flux-pulid", prompt=PORTRAIT, reference_image=ADA, style="stylized", **(QUICK | {"seed": said["seed"]})
    )
    assert again.data[0].content == answer.data[0].content


def test_a_handle_gives_the_pixels_that_http_gives(client: Client, handle: Any) -> None:
    body = {"prompt": PORTRAIT, "reference_image": data_uri(ADA), "seed": 9, **QUICK}
    through_handle = handle.generate.remote("flux-pulid", body).result()
    assert through_handle.data[0].content == client.generate(workflow="flux-pulid", **body).data[0].content


def test_a_prompt_is_encoded_once_for_every_workflow(client: Client, handle: Any) -> None:
    prompt = "a close-up portrait of a laughing person wearing a white suit in a desert with warm light"
    before = handle.prompt_stats.remote().result()
    for workflow in ("flux-pulid", "flux-ipadapter-faceid", "flux-pulid"):
        client.generate(workflow=workflow, prompt=prompt, reference_image=ADA, seed=1, **QUICK)
    after = handle.prompt_stats.remote().result()
    assert after["encodes"] == before["encodes"] + 1
    assert after["hits"] == before["hits"] + 2


def test_two_people_and_two_methods_act_together(client: Client) -> None:
    def one(*identities: dict[str, Any]) -> bytes:
        return client.generate(prompt=PORTRAIT, identities=list(identities), seed=4, **QUICK).data[0].content

    ada, bruno = {"method": "pulid", "images": [ADA]}, {"method": "pulid", "images": [BRUNO]}
    pictures = {one(ada), one(bruno), one(ada, bruno), one(ada, {"method": "xlabs-ip-adapter-v2", "images": [ADA]})}
    assert len(pictures) == 4
    turned = decode(one(ada, bruno)).astype(int) - decode(one(bruno, ada))
    assert np.abs(turned).max() <= 1  # sums in another order


def test_one_person_by_two_methods_has_one_face(client: Client) -> None:
    people = [{"method": method, "images": [ADA]} for method in ("pulid", "xlabs-ip-adapter-v2")]
    (picture,) = client.generate(prompt=PORTRAIT, identities=people, seed=5, steps=8).data
    first, second = picture.scores
    assert first.cosine is not None and first.cosine == second.cosine


def test_a_recipe_that_the_file_cannot_hold_is_refused_before_anything_is_drawn(client: Client, handle: Any) -> None:
    before = handle.prompt_stats.remote().result()
    with pytest.raises(InvalidRequest, match="png"):
        client.generate(
            prompt="\N{CJK UNIFIED IDEOGRAPH-6F22}" * 10_000,
            negative_prompt="\N{CJK UNIFIED IDEOGRAPH-6F22}" * 2_000,
            output_format="jpeg",
            **QUICK,
        )
    assert handle.prompt_stats.remote().result() == before


def test_a_group_needs_a_face_index_and_the_boxes_say_which(client: Client) -> None:
    with pytest.raises(MultipleFaces) as caught:
        client.generate(workflow="flux-pulid", prompt=PORTRAIT, reference_image=GROUP, **QUICK)
    boxes = caught.value.details["boxes"]
    assert isinstance(boxes, list) and len(boxes) == len(client.analyze(GROUP).faces) > 1
    pictures = {
        client.generate(workflow="flux-pulid", prompt=PORTRAIT, reference_image=GROUP, face_index=k, seed=1, **QUICK).data[0].b64_json
        for k in (0, 1)
    }
    assert len(pictures) == 2


def test_compare_tells_people_apart(client: Client) -> None:
    same = client.compare(ADA, SAMPLES / "characters" / "ada-2.png")
    other = client.compare(ADA, BRUNO)
    assert (same.verdict, other.verdict) == ("same", "different")
    assert same.cosine > 0.6 > other.cosine + 0.3


def test_compare_asks_for_its_own_field_where_there_are_several_faces(client: Client) -> None:
    with pytest.raises(MultipleFaces, match="second_face_index") as caught:
        client.compare(ADA, GROUP)
    assert caught.value.details["param"] == "second_face_index" and caught.value.details["boxes"]
    assert client.compare(ADA, GROUP, second_face_index=0).verdict in ("same", "different")


def test_a_negative_prompt_that_is_not_heard_is_told_and_one_that_is_changes_the_picture(client: Client) -> None:
    fields = {"prompt": PORTRAIT, "seed": 2, **QUICK}
    plain, unheard = client.generate(**fields), client.generate(negative_prompt="a forest", **fields)
    assert np.array_equal(decode(plain.data[0].content), decode(unheard.data[0].content))
    assert not plain.warnings and "negative_prompt" in unheard.warnings[0]
    heard = client.generate(negative_prompt="a forest", true_cfg_scale=3, **fields)
    assert not heard.warnings and not np.array_equal(decode(heard.data[0].content), decode(plain.data[0].content))


def test_a_form_with_an_upload_is_the_same_request(http: httpx.Client, client: Client) -> None:
    fields = {name: json.dumps(value) for name, value in {"seed": 6, **QUICK}.items()}
    form = http.post(
        "/flux-pulid", data={"prompt": PORTRAIT, **fields}, files={"reference_image": ("ada.png", ADA.read_bytes(), "image/png")}
    )
    assert form.status_code == 200, form.text
    asked = client.generate(workflow="flux-pulid", prompt=PORTRAIT, reference_image=ADA, seed=6, **QUICK)
    assert base64.b64decode(form.json()["data"][0]["b64_json"]) == asked.data[0].content


PERSON = {"prompt": "x", "reference_image": data_uri(ADA)}


def by(method: str) -> dict[str, Any]:
    return {"prompt": "x", "identities": [{"method": method, "images": [data_uri(ADA)]}]}


@pytest.mark.parametrize(
    ("path", "body", "code", "says"),
    [
        ("/flux-pulid", {"prompt": "x"}, "invalid_request", "reference_image"),
        ("/flux-pulid", PERSON | {"prompt": " "}, "invalid_request", "prompt"),
        ("/flux-pulid", PERSON | {"colour": 1}, "invalid_request", "colour"),
        ("/flux-pulid", PERSON | {"width": 100, "height": 100}, "invalid_request", "multiple of 16"),
        ("/flux-pulid", PERSON | {"weight": 4}, "invalid_request", "0 to 3"),
        ("/flux-ipadapter-faceid", PERSON | {"weight": 2}, "invalid_request", "0 to 1"),
        ("/flux-pulid", PERSON | {"reference_image": "data:text/plain;base64,QUJD"}, "invalid_image", "text/plain"),
        ("/flux-pulid", PERSON | {"reference_image": "data:image/png;base64,QUJD"}, "invalid_image", ""),
        ("/flux-pulid", PERSON | {"reference_image": "https://example.org/me.png"}, "url_not_allowed", "address"),
        ("/v1/generate", {"workflow": "flux-nothing", "prompt": "x"}, "invalid_request", "flux-nothing"),
        ("/v1/generate", by("instantid"), "unsupported_combination", "/sdxl-instantid"),
        ("/v1/generate", by("faceid"), "unsupported_combination", "pulid"),
    ],
)
def test_bad_input_is_a_problem_with_a_stable_code_and_nothing_is_drawn(
    http: httpx.Client, handle: Any, path: str, body: dict[str, Any], code: str, says: str
) -> None:
    before = handle.prompt_stats.remote().result()
    answer = http.post(path, json=body)
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert (answer.status_code, problem["code"]) == (422, code)
    assert says in problem["detail"] + problem["remedy"] + str(problem["param"])
    if code != "invalid_image":
        assert handle.prompt_stats.remote().result() == before


def test_a_picture_without_a_face_is_named(http: httpx.Client) -> None:
    blank = SAMPLES / "poses"
    answer = http.post("/flux-pulid", json={"prompt": "x", "reference_image": data_uri(sorted(blank.glob("*.png"))[0])})
    assert (answer.status_code, answer.json()["code"]) == (422, "no_face_detected")


def test_a_body_that_is_no_json_or_too_large_or_elsewhere(http: httpx.Client, settings: Any) -> None:
    assert http.post("/v1/generate", content=b"{").json()["code"] == "invalid_request"
    assert http.post("/v1/generate", content=b"[1]").json()["code"] == "invalid_request"
    assert "larger" in http.post("/v1/generate", content=b" " * (settings.max_body_bytes + 1)).json()["detail"]
    assert http.get("/nowhere").json()["code"] == "not_found"
    assert http.post("/v1/generate", json={"prompt": "x"}, headers={"x-request-timeout-seconds": "0"}).status_code == 422


def test_the_documentation_knows_every_workflow_and_field(http: httpx.Client) -> None:
    openapi = http.get("/openapi.json").json()
    fields = openapi["paths"]["/flux-pulid"]["post"]["requestBody"]["content"]["application/json"]["schema"]["properties"]
    assert {"prompt", "reference_image", "start_step", "style"} <= set(fields)
    workflows = http.get("/v1/workflows").json()["workflows"]
    assert {workflow["endpoint"] for workflow in workflows} <= set(openapi["paths"])
    serving = {model["id"] for model in http.get("/v1/models").json()["data"] if model["serving"]}
    assert {"flux1-mini", "pulid-mini", "xlabs-ip-adapter-mini", "faces-mini"} <= serving


def test_health(http: httpx.Client) -> None:
    assert http.get("/healthz").status_code == 200
    assert http.get("/readyz").json()["ready"]


def test_errors_of_the_sdk_are_the_servers(client: Client) -> None:
    with pytest.raises(UnsupportedCombination, match="SDXL"):
        client.generate(prompt="x", identities=[{"method": "instantid", "images": [ADA]}])
    with pytest.raises(InvalidRequest) as caught:
        client.generate(prompt="x", stepz=4)
    assert caught.value.details["param"] == "stepz"
