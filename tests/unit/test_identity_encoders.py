"""The encoder halves on the samples: equal to the chain that measures, strict, and nothing encoded twice."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPImageProcessor

from deployments.catalog import CATALOG_PATH
from deployments.contracts import RGB, Face, IdentityRequest, IdentityTokens, Person, PersonPictures
from deployments.errors import CheckpointMismatch, InvalidRequest, MissingWeights
from deployments.faces.analysis import FaceAnalyser
from deployments.identity.base import IdentityEncoder
from deployments.identity.blending import BLENDS
from deployments.identity.pulid import load_pulid
from deployments.identity.pulid_encoder import PuLIDEncoder, load_id_former
from deployments.identity.token_cache import TokenCache, content_key
from deployments.identity.xlabs_encoder import XLabsEncoder, clip_pixels
from training.mini.faces.verification import DETECTOR_SIZE
from training.mini.sitting import Sitting
from training.mini.studio import Studio

ROOT = CATALOG_PATH.parents[1]
PACK, SAMPLES = ROOT / "models" / "mini", ROOT / "samples" / "characters"
PULID, EVA = PACK / "pulid" / "pulid_flux_mini.safetensors", PACK / "eva-clip" / "eva_clip_mini.safetensors"
XLABS, CLIP = PACK / "xlabs-ip-adapter" / "ip_adapter.safetensors", PACK / "clip-vision"
NAMES = ("ada", "bruno", "chiyo")
REQUEST = IdentityRequest(method="any")
"""Of which an encoder reads how references are blended."""


def _pictures(name: str, *numbers: int) -> PersonPictures:
    return PersonPictures(tuple((SAMPLES / f"{name}-{number}.png").read_bytes() for number in numbers))


@pytest.fixture(scope="module")
def people() -> dict[str, Person]:
    """Each person of NAMES by their first picture, and `name+` by their first two."""
    torch.set_num_threads(1)
    judge, parser = PACK / "judge" / "arcface_judge.onnx", PACK / "parser" / "face_parser.onnx"
    analyser = FaceAnalyser(PACK / "insightface", judge, parser, det_size=DETECTOR_SIZE, smallest_px=16)
    asked = {f"{name}{'+' * (count - 1)}": _pictures(name, *range(1, count + 1)) for name in NAMES for count in (1, 2)}
    return dict(zip(asked, analyser.people(list(asked.values()), ("embedding", "aligned")), strict=True))


@pytest.fixture(scope="module")
def pulid() -> PuLIDEncoder:
    return PuLIDEncoder(PULID, EVA, model="pulid-mini", torch_threads=1)


@pytest.fixture(scope="module")
def xlabs() -> XLabsEncoder:
    return XLabsEncoder(XLABS, CLIP, model="xlabs-ip-adapter-mini", nobody="zero_embedding", torch_threads=1)


def _one(person: Person, index: int) -> Person:
    return Person(person.faces[index : index + 1], person.pictures[index : index + 1])


def test_pulids_tokens_are_those_of_the_measuring_chain(people: dict[str, Person], pulid: PuLIDEncoder) -> None:
    whole = load_pulid(PULID)
    references = np.concatenate([people[name].pictures[0][None] for name in NAMES])
    expected = Sitting(PACK).tokens(references, whole)
    for row, name in enumerate(NAMES):
        tokens = pulid.encode(people[name], REQUEST)
        assert tokens.model == "pulid-mini" and tokens.tokens.shape == expected[:1].shape
        assert torch.allclose(tokens.tokens[0], expected[row], atol=1e-4)
    with torch.no_grad():
        assert torch.allclose(pulid.encode(people["ada"], REQUEST).unconditional, whole.unconditional(), atol=1e-6)


def test_xlabs_tokens_are_those_of_the_stock_pipeline(people: dict[str, Person], xlabs: XLabsEncoder) -> None:
    studio = Studio(PACK, torch.device("cpu"))
    studio.attach_ip_adapter()
    for name in NAMES[:2]:
        embeds = studio._image_embeds(people[name].pictures[0][None])
        for given, ours in (
            (embeds, xlabs.encode(people[name], REQUEST).tokens),
            (0 * embeds, xlabs.encode(people[name], REQUEST).unconditional),
        ):
            with torch.no_grad():
                (expected,) = studio.pipe.transformer.encoder_hid_proj([given])
            assert torch.allclose(ours, expected.view_as(ours), atol=1e-4)


def test_nobody_is_a_black_picture_for_the_published_files(people: dict[str, Person]) -> None:
    black = Person(people["ada"].faces[:1], (np.zeros_like(people["ada"].pictures[0]),))
    encoder = XLabsEncoder(XLABS, CLIP, model="xlabs-ip-adapter-v2", torch_threads=1)
    encoded = encoder.encode(black, REQUEST)
    assert torch.allclose(encoded.unconditional, encoded.tokens, atol=1e-6)
    assert not torch.allclose(encoded.unconditional, encoder.encode(people["ada"], REQUEST).tokens, atol=1e-2)


@pytest.mark.parametrize("method", ["pulid", "xlabs"])
def test_tokens_tell_one_person_from_another(people: dict[str, Person], method: str, request: pytest.FixtureRequest) -> None:
    encoder = cast(IdentityEncoder, request.getfixturevalue(method))
    nobody = encoder.encode(people["ada"], REQUEST).unconditional
    rows = {(name, k): encoder.encode(_one(people[f"{name}+"], k), REQUEST).tokens - nobody for name in NAMES for k in (0, 1)}
    same = [_cosine(rows[name, 0], rows[name, 1]) for name in NAMES]
    others = [_cosine(rows[a, 0], rows[b, 1]) for a in NAMES for b in NAMES if a != b]
    assert np.mean(same) > np.mean(others)


def _cosine(a: Tensor, b: Tensor) -> float:
    return float(F.cosine_similarity(a.flatten(), b.flatten(), dim=0))


def test_several_references_are_averaged_unless_something_else_is_asked(
    people: dict[str, Person], pulid: PuLIDEncoder, xlabs: XLabsEncoder
) -> None:
    both = people["ada+"]
    single = [pulid.encode(_one(both, index), REQUEST).tokens for index in (0, 1)]
    assert torch.allclose(pulid.encode(both, REQUEST).tokens, (single[0] + single[1]) / 2, atol=1e-6)
    twice = Person(both.faces[:1] * 2, both.pictures[:1] * 2)
    for encoder in (pulid, xlabs):
        assert torch.allclose(encoder.encode(twice, REQUEST).tokens, encoder.encode(_one(both, 0), REQUEST).tokens, atol=1e-6)
    # Of XLabs the embeddings are averaged, before the projection and its norm.
    first, second = (xlabs._embedding(both.pictures[index], both.faces[index].box) for index in (0, 1))
    assert torch.allclose(xlabs.encode(both, REQUEST).tokens, xlabs._projected((first + second) / 2), atol=1e-6)
    assert not torch.allclose(xlabs.encode(both, REQUEST).tokens, xlabs.encode(_one(both, 0), REQUEST).tokens, atol=1e-3)


@pytest.mark.parametrize("method", ["pulid", "xlabs"])
@pytest.mark.parametrize("blend", list(BLENDS))
def test_every_blend_gives_tokens_and_nobodys_beside_them(
    people: dict[str, Person], method: str, blend: str, request: pytest.FixtureRequest
) -> None:
    encoder, wanted = cast(IdentityEncoder, request.getfixturevalue(method)), replace(REQUEST, blend=blend)
    both, alone = encoder.encode(people["ada+"], wanted), encoder.encode(_one(people["ada+"], 0), REQUEST)
    width = alone.tokens.shape[1]
    assert both.tokens.shape[1] == both.unconditional.shape[1] == (2 * width if blend == "concat" else width)
    assert torch.equal(both.unconditional[:, -width:], alone.unconditional)
    single = encoder.encode(_one(people["ada+"], 0), wanted)
    assert torch.equal(single.tokens, alone.tokens), "a single reference is what it is"
    if blend == "concat":
        assert torch.allclose(both.tokens[:, :width], alone.tokens, atol=1e-5)
    else:
        assert not torch.allclose(both.tokens, alone.tokens, atol=1e-3)


@pytest.mark.parametrize("method", ["pulid", "xlabs"])
def test_somebody_elses_picture_is_left_out_and_reported(people: dict[str, Person], method: str, request: pytest.FixtureRequest) -> None:
    encoder = cast(IdentityEncoder, request.getfixturevalue(method))
    ada, bruno = people["ada+"], people["bruno"]
    mixed = Person((ada.faces[0], *bruno.faces, ada.faces[1]), (ada.pictures[0], *bruno.pictures, ada.pictures[1]))
    for blend in BLENDS:
        got, alone = (encoder.encode(person, replace(REQUEST, blend=blend)) for person in (mixed, ada))
        assert got.left_out == (1,) and alone.left_out == ()
        assert torch.equal(got.tokens, alone.tokens)
    unknown = Person(tuple(replace(face, embedding=None) for face in mixed.faces), mixed.pictures)
    if method == "xlabs":
        assert encoder.encode(unknown, REQUEST).left_out == (), "nothing is known of these faces"


def test_a_blend_that_there_is_not_is_refused(people: dict[str, Person], pulid: PuLIDEncoder, xlabs: XLabsEncoder) -> None:
    for encoder in (pulid, xlabs):
        for person in (people["ada"], people["ada+"]):
            with pytest.raises(InvalidRequest, match=r"'median'.*max_token"):
                encoder.encode(person, replace(REQUEST, blend="median"))


def test_a_face_is_encoded_once(people: dict[str, Person]) -> None:
    encoder = PuLIDEncoder(PULID, EVA, model="pulid-mini")
    runs: list[int] = []
    encoder._eva.register_forward_hook(lambda *_: runs.append(1))
    first = encoder.encode(people["ada"], REQUEST)
    assert torch.equal(encoder.encode(people["ada"], REQUEST).tokens, first.tokens) and len(runs) == 1
    encoder.encode(people["ada+"], REQUEST)
    assert len(runs) == 2, "the first of the two references is known"
    (face,) = people["ada"].faces
    assert face.embedding is not None
    other = encoder.encode(Person((replace(face, embedding=-face.embedding),), people["ada"].pictures), REQUEST)
    assert len(runs) == 3 and not torch.equal(other.tokens, first.tokens)


def test_a_picture_is_encoded_once(people: dict[str, Person]) -> None:
    encoder = XLabsEncoder(XLABS, CLIP, model="xlabs-ip-adapter-mini")
    runs: list[int] = []
    encoder._clip.register_forward_hook(lambda *_: runs.append(1))
    answers = [encoder.encode(people[name], REQUEST) for name in ("ada", "bruno", "ada")]
    assert len(runs) == 2 and torch.equal(answers[0].tokens, answers[2].tokens)


def test_the_cache_forgets_the_least_recently_used() -> None:
    cache, made = TokenCache(2), list[str]()

    def make(key: str) -> Tensor:
        made.append(key)
        return torch.zeros(1)

    for key in "abacab":
        cache.get(key, lambda key=key: make(key))  # type: ignore[misc]
    assert made == ["a", "b", "c", "b"]


def test_content_has_types_and_shapes() -> None:
    flat, square = np.zeros(4, np.uint8), np.zeros((2, 2), np.uint8)
    keys = {content_key("m", flat), content_key("m", square), content_key("n", flat), content_key("m", flat[:2], flat[2:])}
    assert len(keys) == 4 and content_key("m", flat.copy()) in keys
    assert content_key("m", square.view(np.int8)) not in keys


def test_half_precision_is_near_and_stays_half(people: dict[str, Person], pulid: PuLIDEncoder, xlabs: XLabsEncoder) -> None:
    encoders: list[tuple[IdentityEncoder, IdentityEncoder]] = [
        (pulid, PuLIDEncoder(PULID, EVA, dtype=torch.bfloat16, model="pulid-mini")),
        (xlabs, XLabsEncoder(XLABS, CLIP, dtype=torch.bfloat16, model="xlabs-ip-adapter-mini", nobody="zero_embedding")),
    ]
    for full, half in encoders:
        expected, got = full.encode(people["ada+"], REQUEST), half.encode(people["ada+"], REQUEST)
        for name in ("tokens", "unconditional"):
            a, b = getattr(expected, name), getattr(got, name)
            assert b.dtype == torch.bfloat16 and _cosine(a, b.float()) > 0.99


def test_a_face_without_what_pulid_reads_is_named(people: dict[str, Person], pulid: PuLIDEncoder) -> None:
    bare = Person((replace(people["ada"].faces[0], aligned=None),), people["ada"].pictures)
    with pytest.raises(ValueError, match="aligned"):
        pulid.encode(bare, REQUEST)


def test_only_the_encoder_half_is_read_and_the_whole_file_is_checked(tmp_path: Path) -> None:
    former = load_id_former(PULID)
    whole = load_pulid(PULID)
    assert {name for name, _ in former.named_parameters()} == {name for name, _ in whole.pulid_encoder.named_parameters()}
    assert all(torch.equal(a, b) for a, b in zip(former.parameters(), whole.pulid_encoder.parameters(), strict=True))
    tensors, metadata = load_file(PULID), _metadata(PULID)
    denoisers = next(name for name in tensors if name.startswith("pulid_ca."))
    file = tmp_path / "changed.safetensors"
    for changed, word in (
        ({name: tensor for name, tensor in tensors.items() if name != denoisers}, "missing"),
        ({**tensors, "stranger": torch.zeros(1)}, "left over: stranger"),
        ({**tensors, denoisers: torch.zeros(1)}, "wrong shape"),
    ):
        save_file(changed, file, metadata)
        with pytest.raises(CheckpointMismatch, match=word):
            load_id_former(file)


def _metadata(path: Path) -> dict[str, str]:
    from deployments.weights import safetensors_header

    return dict(safetensors_header(path).metadata)


def test_clips_vision_tower_loads_strictly(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    shutil.copytree(CLIP, folder)
    tensors = load_file(folder / "model.safetensors")
    # A whole CLIP may be given: its text tower is not ours to miss.
    save_file({**tensors, "text_model.a": torch.zeros(1), "logit_scale": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    XLabsEncoder(XLABS, folder, model="x")
    save_file({**tensors, "stranger": torch.zeros(1)}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match="stranger"):
        XLabsEncoder(XLABS, folder, model="x")
    with pytest.raises(MissingWeights, match="nowhere"):
        XLabsEncoder(XLABS, tmp_path / "nowhere", model="x")


def _random_picture(width: int, height: int) -> RGB:
    return np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize(("width", "height"), [(192, 192), (300, 192), (111, 200), (640, 427), (60, 40)])
def test_pictures_are_prepared_as_clips_own_processor_does(width: int, height: int) -> None:
    picture = _random_picture(width, height)
    middle = np.array([width / 2 - 5, height / 2 - 5, width / 2 + 5, height / 2 + 5], np.float32)
    stock = CLIPImageProcessor.from_pretrained(CLIP)(images=Image.fromarray(picture), return_tensors="pt").pixel_values
    assert torch.allclose(clip_pixels(picture, middle, stock.shape[-1]), stock, atol=1e-5)


@pytest.mark.parametrize("tall", [True, False])
def test_the_square_follows_a_face_that_the_middle_would_cut(tall: bool) -> None:
    picture = np.zeros((400, 100, 3), np.uint8)
    picture[10:50] = 255  # the face, at the very top
    box = np.array([20, 10, 80, 50], np.float32)
    if not tall:
        picture, box = picture.transpose(1, 0, 2).copy(), box[[1, 0, 3, 2]]
    white = clip_pixels(picture, box, 100)[0, 0] > 0
    assert white.sum() == 40 * 100
    assert (clip_pixels(picture, np.array([50, 50, 50, 50], np.float32) + 150, 100) < 0).all()


def test_encoders_are_what_the_house_calls_identity_encoders(pulid: PuLIDEncoder, xlabs: XLabsEncoder, people: dict[str, Person]) -> None:
    encoders: tuple[IdentityEncoder, ...] = (pulid, xlabs)
    for encoder in encoders:
        tokens = encoder.encode(people["bruno"], REQUEST)
        assert isinstance(tokens, IdentityTokens) and tokens.tokens.shape == tokens.unconditional.shape
        assert tokens.tokens.device.type == "cpu" and not tokens.tokens.requires_grad
        assert not torch.allclose(tokens.tokens, tokens.unconditional, atol=1e-2)


def test_faces_of_the_samples_have_all_that_pulid_reads(people: dict[str, Person]) -> None:
    faces: list[Face] = [face for person in people.values() for face in person.faces]
    assert all(face.embedding is not None and face.aligned is not None and face.labels is not None for face in faces)
