"""SigLIP and the two encoders that read it: the published preprocessing, whole or tower alone, several references, nobody."""

from __future__ import annotations

import json
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import SiglipConfig, SiglipModel, SiglipVisionModel

try:  # by this name where torchvision is not installed, and it is not
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil as SiglipImageProcessor
except ImportError:
    from transformers import SiglipImageProcessor

from deployments.contracts import RGB, Face, IdentityRequest, Person
from deployments.errors import CheckpointMismatch, InvalidRequest
from deployments.identity.base import IdentityEncoder
from deployments.identity.instantx_encoder import InstantXEncoder
from deployments.identity.instantx_ip_adapter import InstantX, InstantXConfig, load_projection
from deployments.identity.redux import ReduxConfig, ReduxProjection
from deployments.identity.redux_encoder import ReduxEncoder
from deployments.identity.siglip import Siglip, siglip_pixels
from deployments.weights import models_root
from tests.named_weights import fill, named_tensor
from training.mini.flux_folder import SIGLIP_DIM, siglip_processor_config, siglip_vision_config
from training.mini.folders import save_siglip
from training.mini.generator.sizes import INSTANTX, REDUX

SAMPLES = models_root().parent / "samples" / "characters"
INSTANTX_ASKED, REDUX_ASKED = IdentityRequest(method="instantx-ip-adapter"), IdentityRequest(method="redux")


def _tower() -> SiglipVisionModel:
    torch.manual_seed(3)
    return SiglipVisionModel(siglip_vision_config()).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tower and both adapters of drawn weights, as the pack lays them out."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("siglip")
    save_siglip(folder / "siglip-vision", _tower())
    for name, module in (("instantx", InstantX(INSTANTX)), ("redux", ReduxProjection(REDUX))):
        fill(module)
        save_file(module.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def instantx(folder: Path) -> InstantXEncoder:
    return InstantXEncoder(folder / "instantx.safetensors", folder / "siglip-vision", model="instantx-ip-adapter-mini", torch_threads=1)


@pytest.fixture(scope="module")
def redux(folder: Path) -> ReduxEncoder:
    return ReduxEncoder(folder / "redux.safetensors", folder / "siglip-vision", model="redux-mini", torch_threads=1)


def _picture(name: str) -> RGB:
    return np.asarray(Image.open(SAMPLES / f"{name}.png").convert("RGB"))


def _face(likeness: str) -> Face:
    """A face whose embedding says who it is."""
    landmarks = np.array([[40, 40], [70, 40], [55, 60], [42, 75], [68, 75]], np.float32)
    embedding = named_tensor(f"{likeness}'s face", 512).numpy()
    return Face(box=np.array([20, 20, 90, 90], np.float32), score=0.9, landmarks=landmarks, embedding=embedding)


def _person(*names: str) -> Person:
    return Person(tuple(_face(name.split("-")[0]) for name in names), tuple(_picture(name) for name in names))


@pytest.mark.parametrize("size", [(192, 192), (301, 177)])
def test_pixels_are_those_of_the_published_processor(size: tuple[int, int]) -> None:
    picture = np.asarray(Image.fromarray(_picture("ada-1")).resize(size))
    config = {key: value for key, value in siglip_processor_config().items() if key != "image_processor_type"}
    expected = SiglipImageProcessor(**config)(images=[Image.fromarray(picture)], return_tensors="pt").pixel_values
    ours = siglip_pixels(picture, 112)
    assert ours.shape == expected.shape and (ours - expected).abs().max() < 1e-5


def test_a_tower_gives_what_the_model_gives(folder: Path) -> None:
    siglip = Siglip(folder / "siglip-vision")
    stored, pixels = SiglipVisionModel.from_pretrained(folder / "siglip-vision").eval(), siglip_pixels(_picture("ada-1"), 112)
    with torch.no_grad():
        expected = stored(pixels)
    assert siglip.width == SIGLIP_DIM
    torch.testing.assert_close(siglip.pooled(_picture("ada-1")), expected.pooler_output)
    torch.testing.assert_close(siglip.patches(_picture("ada-1")), expected.last_hidden_state)
    assert siglip.patches(_picture("ada-1")).shape == (1, 64, SIGLIP_DIM)


@pytest.mark.parametrize("prefix", ["vision_model.", ""])
def test_the_tower_of_a_whole_siglip_is_read_and_the_rest_passed_over(tmp_path: Path, prefix: str) -> None:
    """google/siglip-so400m-patch14-384 is whole, with the tower's names under `vision_model.`."""
    vision = siglip_vision_config().to_dict()
    torch.manual_seed(3)
    whole = SiglipModel(
        SiglipConfig(vision_config=vision, text_config={"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1})
    ).eval()
    tower = whole.vision_model.state_dict()
    spare = {"text_model.head.weight": torch.zeros(1), "logit_scale": torch.zeros(1), "logit_bias": torch.zeros(1)}
    save_file({f"{prefix}{key}": value.clone() for key, value in tower.items()} | spare, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(whole.config.to_dict(), default=str))
    with torch.no_grad():
        expected = whole.vision_model(siglip_pixels(_picture("ada-1"), 112)).pooler_output
    torch.testing.assert_close(Siglip(tmp_path).pooled(_picture("ada-1")), expected, rtol=1e-4, atol=1e-5)


def test_a_tower_that_lacks_a_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder / "siglip-vision" / "config.json").read_bytes())
    state = load_file(folder / "siglip-vision" / "model.safetensors")
    save_file({key: value for key, value in state.items() if not key.endswith("probe")}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointMismatch, match=r"1 missing: .*probe"):
        Siglip(tmp_path)


def test_one_reference_is_the_projection_of_its_pooled_output(folder: Path, instantx: InstantXEncoder) -> None:
    encoded = instantx.encode(_person("ada-1"), INSTANTX_ASKED)
    with torch.no_grad():
        expected = load_projection(folder / "instantx.safetensors").tokens(Siglip(folder / "siglip-vision").pooled(_picture("ada-1")))
    torch.testing.assert_close(encoded.tokens, expected)
    assert encoded.model == "instantx-ip-adapter-mini" and encoded.tokens.shape == (1, INSTANTX.tokens, INSTANTX.token_dim)
    assert encoded.unconditional.shape == (1, 0, INSTANTX.token_dim) and encoded.left_out == ()


def test_several_references_are_averaged_before_the_projection_or_stand_in_a_row(folder: Path, instantx: InstantXEncoder) -> None:
    both, siglip = _person("ada-1", "ada-2"), Siglip(folder / "siglip-vision")
    with torch.no_grad():
        mean = (siglip.pooled(both.pictures[0]) + siglip.pooled(both.pictures[1])) / 2
        expected = load_projection(folder / "instantx.safetensors").tokens(mean)
    torch.testing.assert_close(instantx.encode(both, INSTANTX_ASKED).tokens, expected)
    row = instantx.encode(both, IdentityRequest(method="instantx-ip-adapter", blend="concat")).tokens
    single = [instantx.encode(_person(name), INSTANTX_ASKED).tokens for name in ("ada-1", "ada-2")]
    torch.testing.assert_close(row, torch.cat(single, dim=1))


def test_reduxs_words_follow_one_another(redux: ReduxEncoder) -> None:
    single = [redux.encode(_person(name), REDUX_ASKED).tokens for name in ("ada-1", "ada-2")]
    both = redux.encode(_person("ada-1", "ada-2"), REDUX_ASKED)
    assert both.tokens.shape == (2, 64, REDUX.text_dim) and both.unconditional.shape == (1, 0, REDUX.text_dim)
    torch.testing.assert_close(both.tokens, torch.cat(single))
    assert not torch.allclose(single[0], single[1], atol=1e-2)
    with pytest.raises(InvalidRequest, match="no blend 'quality'"):
        redux.encode(_person("ada-1"), IdentityRequest(method="redux", blend="quality"))


def test_a_strangers_picture_is_left_out(instantx: InstantXEncoder, redux: ReduxEncoder) -> None:
    mixed, alone = _person("ada-1", "ada-2", "bruno-1"), _person("ada-1", "ada-2")
    for encoder, asked in ((instantx, INSTANTX_ASKED), (redux, REDUX_ASKED)):
        encoded = encoder.encode(mixed, asked)
        assert encoded.left_out == (2,)
        assert torch.equal(encoded.tokens, encoder.encode(alone, asked).tokens)


@pytest.mark.parametrize(("method", "asked"), [("instantx", INSTANTX_ASKED), ("redux", REDUX_ASKED)])
def test_a_picture_is_encoded_once(method: str, asked: IdentityRequest, request: pytest.FixtureRequest) -> None:
    encoder = cast(IdentityEncoder, request.getfixturevalue(method))
    looked: list[torch.nn.Module] = []
    hook = torch.nn.modules.module.register_module_forward_hook(lambda module, args, output: looked.append(module))
    for name, times in (("chiyo-1", 1), ("chiyo-1", 1), ("chiyo-2", 2)):
        encoder.encode(_person(name), asked)
        assert sum(isinstance(module, SiglipVisionModel) for module in looked) == times
    hook.remove()


def test_adapters_that_read_another_siglip_are_refused(folder: Path, tmp_path: Path) -> None:
    narrow = InstantX(InstantXConfig(image_dim=8, tokens=2, token_dim=4, dim=8, blocks=1))
    save_file(narrow.state_dict(), tmp_path / "instantx.safetensors")
    with pytest.raises(CheckpointMismatch, match="reads embeddings of 8 numbers, the SigLIP in .* gives 96"):
        InstantXEncoder(tmp_path / "instantx.safetensors", folder / "siglip-vision", model="it")
    save_file(ReduxProjection(ReduxConfig(image_dim=8, text_dim=4)).state_dict(), tmp_path / "redux.safetensors")
    with pytest.raises(CheckpointMismatch, match="reads patches of 8 numbers, the SigLIP in .* gives 96"):
        ReduxEncoder(tmp_path / "redux.safetensors", folder / "siglip-vision", model="it")
