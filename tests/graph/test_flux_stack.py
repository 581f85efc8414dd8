"""LoRAs, controls, several people, a picture to begin from: the whole stack in one process, and what of it is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from deployments.contracts import RGB
from deployments.errors import InvalidImage, InvalidLora, InvalidRequest, LikenessError, LoraNotFound, UnsupportedCombination
from deployments.images import decode
from serve.client import Client

ROOT = Path(__file__).parents[2]
SAMPLES = ROOT / "samples"
ADA, BRUNO = SAMPLES / "characters" / "ada-1.png", SAMPLES / "characters" / "bruno-1.png"
LORA = ROOT / "models" / "mini" / "loras" / "ada.safetensors"
BODY = "a full body photo of a smiling person wearing a red t-shirt on a beach at sunset"
PORTRAIT = "a portrait of a smiling person wearing a blue suit in a cafe"
QUICK: dict[str, Any] = {"steps": 2, "width": 64, "height": 64, "scores": False, "seed": 3}

EIGHT = {**QUICK, "steps": 8}
"""Windows hold some of eight steps, and none of two."""


def uri(picture: NDArray[np.uint8]) -> str:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def drawn(client: Client, **fields: Any) -> RGB:
    return decode(client.generate(**{**QUICK, **fields}).data[0].content)


@pytest.fixture(scope="module")
def lora(client: Client) -> Iterator[str]:
    item = client.loras.add(LORA, name="ada")
    assert item.format == "diffusers" and item.keys == 68
    yield item.id
    client.loras.delete(item.id)


def test_an_avatar_is_lora_pulid_and_pose_in_one_request(client: Client, lora: str) -> None:
    answer = client.generate(workflow="flux-avatar", prompt=BODY, reference_image=ADA, loras=[{"id": lora}], **EIGHT)
    made = answer.request
    (identity,), (control,), (own,) = made["identities"], made["controls"], made["loras"]
    assert (identity["method"], identity["weight"], identity["start"], identity["end"]) == ("pulid", 0.4, 0.15, 0.9)
    assert (control["pose"], control["scale"], control["start"], control["end"]) == ("full-standing", 0.85, 0.0, 0.8)
    assert own["id"] == lora and len(own["sha256"]) == 64 and not answer.warnings
    assert "flux1-mini-controlnet-union" in answer.models and "pulid-mini" in answer.models


def test_the_pose_is_chosen_per_picture(client: Client) -> None:
    fields: dict[str, Any] = {"workflow": "flux-avatar", "reference_image": ADA, **EIGHT}
    assert client.generate(prompt=PORTRAIT, **fields).request["controls"] == []
    assert client.generate(prompt=BODY, pose="none", **fields).request["controls"] == []
    (named,) = client.generate(prompt=BODY, pose="full-arms-raised", **fields).request["controls"]
    assert named["pose"] == "full-arms-raised"
    (asked,) = client.generate(prompt=PORTRAIT, pose="auto", **fields).request["controls"]
    assert asked["pose"] == "half-front"
    without = client.generate(prompt=PORTRAIT, **fields)
    assert any("`loras` was not given" in warning for warning in without.warnings)


def test_each_part_changes_the_picture_and_nothing_stays(client: Client, lora: str) -> None:
    plain = drawn(client, prompt=BODY)
    parts: list[dict[str, Any]] = [
        {"loras": [{"id": lora}]},
        {"loras": [{"id": lora, "scale": 0.5}]},
        {"pose": "full-arms-raised"},
        {"controls": [{"type": "pose", "pose": "full-standing", "edits": [{"arm": "left", "angle": 160}, {"head_room": 0.18}]}]},
        {"image": ADA, "strength": 0.5},
        {"identity": {"method": "pulid", "images": [ADA], "region": "left"}},
        {"identity": {"method": "pulid", "images": [ADA], "region": [0, 0, 1, 0.4]}},
    ]
    pictures = [drawn(client, prompt=BODY, **part) for part in parts]
    for place, picture in enumerate(pictures):
        assert not np.array_equal(picture, plain), parts[place]
        assert not any(np.array_equal(picture, other) for other in pictures[:place]), parts[place]
    assert np.array_equal(drawn(client, prompt=BODY), plain)
    nothing = {"loras": [{"id": lora, "scale": 0}], "controls": [{"type": "pose", "pose": "full-standing", "scale": 0}]}
    assert np.array_equal(drawn(client, prompt=BODY, **nothing), plain)
    assert np.array_equal(drawn(client, prompt=BODY, image=ADA, strength=1), plain)


def test_less_strength_keeps_more_of_the_picture(client: Client) -> None:
    own = decode(ADA.read_bytes())
    fields = {"prompt": PORTRAIT, "image": ADA, "steps": 8, "width": 192, "height": 192}
    distance = [float(np.abs(drawn(client, strength=share, **fields).astype(float) - own).mean()) for share in (0.2, 0.6, 0.875)]
    assert distance[0] < distance[1] < distance[2] and distance[0] < 20


@pytest.mark.slow  # sixteen pictures
def test_the_later_an_identity_begins_and_the_weaker_it_is_the_less_it_shows(client: Client) -> None:
    def likeness(**fields: float) -> float:
        cosines = []
        for name in ("ada", "bruno", "esi", "greta"):
            reference = SAMPLES / "characters" / f"{name}-1.png"
            answer = client.generate(workflow="flux-pulid", prompt=PORTRAIT, reference_image=reference, seed=5, steps=8, **fields)
            cosines.append(answer.data[0].scores[0].cosine or 0.0)
        return float(np.mean(cosines))

    whole = likeness(start=0)
    assert whole > likeness(start=0.5) + 0.05 > likeness(start=0.875) + 0.1
    assert whole > likeness(start=0, weight=0.5) + 0.05


def test_a_drawn_pose_picture_is_a_photographed_one(client: Client) -> None:
    """A skeleton that the pose command drew, sent as it is, is that pose."""
    skeleton = SAMPLES / "poses"
    picture = sorted(skeleton.glob("*.png"))[0]
    as_it_is = drawn(client, prompt=BODY, width=192, height=192, controls=[{"type": "pose", "image": picture, "prepared": True}])
    assert np.array_equal(as_it_is, drawn(client, prompt=BODY, width=192, height=192, pose_image=picture))


REFUSED: list[tuple[dict[str, Any], type[LikenessError], str]] = [
    ({"loras": [{"id": "lora_of_nobody"}]}, LoraNotFound, "lora_of_nobody"),
    ({"loras": [{"id": "a", "scale": 9}]}, InvalidRequest, "scale"),
    ({"loras": [{"id": "a"}, {"id": "a"}]}, InvalidRequest, "twice"),
    ({"controls": [{"type": "canny", "image": ADA}]}, UnsupportedCombination, "There are: pose"),
    ({"controls": [{"type": "pose"}]}, InvalidRequest, "either `image` or"),
    ({"pose": "full-armless"}, InvalidRequest, "There is no pose"),
    ({"pose": "auto", "prompt": "something"}, InvalidRequest, "the prompt names none"),
    ({"pose_image": uri(np.full((64, 64, 3), 200, np.uint8))}, InvalidImage, "shows no person"),
    ({"controls": [{"type": "pose", "pose": "full-standing", "edits": [{"leg": 1}]}]}, InvalidRequest, "no edit of a pose"),
    ({"controls": [{"type": "pose", "pose": "full-standing", "start": 0.4, "end": 0.6}]}, InvalidRequest, "none of the picture's 2 steps"),
    ({"strength": 0.5}, InvalidRequest, "there is none"),
    (
        {"identities": [{"method": "pulid", "images": [ADA], "region": "left"}, {"method": "pulid", "images": [BRUNO], "region": "top"}]},
        InvalidRequest,
        "overlap",
    ),
    ({"identity": {"method": "pulid", "images": [ADA], "mask": uri(np.full((64, 32, 3), 255, np.uint8))}}, InvalidRequest, "same shape"),
    (
        {"identity": {"method": "pulid", "images": [ADA], "region": "left", "mask": uri(np.zeros((8, 8, 3), np.uint8))}},
        InvalidRequest,
        "region",
    ),
    (
        {"identities": [{"method": "redux", "images": [ADA]}, {"method": "redux", "images": [BRUNO]}]},
        UnsupportedCombination,
        "redux and people",
    ),
    ({"identity": {"method": "redux", "images": [ADA], "region": "left"}}, UnsupportedCombination, "redux and masks"),
    ({"identity": {"method": "pulid", "images": [ADA, BRUNO]}}, InvalidRequest, "(?i)same person|disagree|different"),
]


@pytest.mark.parametrize(("fields", "kind", "said"), REFUSED)
def test_what_cannot_be_is_refused_and_the_next_request_is_unharmed(
    client: Client, fields: dict[str, Any], kind: type[LikenessError], said: str
) -> None:
    before = drawn(client, prompt=BODY)
    with pytest.raises(kind, match=said) as caught:
        client.generate(**{**QUICK, "prompt": BODY, **fields})
    assert caught.value.remedy
    assert np.array_equal(drawn(client, prompt=BODY), before)


def test_files_that_are_no_lora_are_refused(client: Client, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(LORA.read_bytes()[:1000])
    pickle = tmp_path / "renamed.safetensors"
    pickle.write_bytes(b"\x80\x02}q\x00.")
    for file in (cut, pickle):
        with pytest.raises(InvalidLora):
            client.loras.add(file)
    assert file.stem not in [item.name for item in client.loras.list().data]


def test_a_stranger_among_the_references_is_left_out_and_said(client: Client) -> None:
    pictures = [SAMPLES / "characters" / f"ada-{k}.png" for k in (1, 2, 3)]
    answer = client.generate(workflow="flux-pulid", prompt=PORTRAIT, reference_images=[pictures[0], BRUNO, *pictures[1:]], **QUICK)
    assert answer.warnings == ["Reference 1 of person 0 shows somebody else than the other pictures do; it was left out."]


def test_the_table_of_combinations_is_shown(client: Client) -> None:
    shown = client.workflows()
    assert shown.controls == ["pose"] and {"redux"} < {rule.first for rule in shown.combinations}
    assert all(rule.works != bool(rule.instead) for rule in shown.combinations)


def test_nothing_that_was_asked_for_is_left_out_where_little_is_drawn_anew(client: Client) -> None:
    """A picture to begin from takes the first steps away: what was to act in them, or the picture itself, would be gone without a word."""
    begun = {**EIGHT, "prompt": BODY, "image": ADA}
    early: list[dict[str, Any]] = [
        {"identity": {"method": "pulid", "images": [ADA], "end": 0.5}},
        {"controls": [{"type": "pose", "pose": "full-standing", "end": 0.5}]},
    ]
    for fields in early:
        with pytest.raises(InvalidRequest, match="`strength` leaves only steps 6 to 7"):
            client.generate(**{**begun, **fields, "strength": 0.2})
    with pytest.raises(InvalidRequest, match="leaves nothing of `image`"):
        client.generate(**{**begun, "strength": 0.95})


def test_a_thin_picture_takes_no_memory_and_a_transparent_mask_is_not_here(client: Client) -> None:
    thin = uri(np.full((1, 20_000, 3), 128, np.uint8))
    assert drawn(client, prompt=BODY, image=thin, strength=0.5).shape == (64, 64, 3)
    clear = np.zeros((64, 64, 4), np.uint8)
    clear[:, :32] = 255
    placed = {"prompt": BODY, "identity": {"method": "pulid", "images": [ADA], "mask": uri(clear)}}
    left = {"prompt": BODY, "identity": {"method": "pulid", "images": [ADA], "region": "left"}}
    assert np.array_equal(drawn(client, **placed), drawn(client, **left))


def test_every_model_with_a_part_in_the_pixels_is_named(client: Client) -> None:
    person = SAMPLES / "characters" / "ada-1.png"
    answer = client.generate(prompt=BODY, pose_image=person, **QUICK)
    assert "body-keypoints-mini" in answer.models
    assert answer.request["server"] == {"dtype": "float32", "weights": "as published", "cache_threshold": 0.0}
