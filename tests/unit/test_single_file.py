"""Single files of a FLUX pipeline: opened to the same values as the folder, equal to stock converters, and refused by the name of a key."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers, convert_ldm_vae_checkpoint
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from deployments.denoisers.folders import open_part
from deployments.denoisers.single_file import open_transformer, open_vae, transformer_layout, vae_layout
from deployments.errors import CheckpointMismatch, MissingWeights, UnsafeWeights
from deployments.pretrained import load_pretrained
from deployments.prompts.single_file import open_clip, open_t5
from tests.mini_drawing import FLUX
from tests.named_weights import named_tensor

# black-forest-labs/FLUX.1-dev: transformer/config.json and vae/config.json
_TRUE_TRANSFORMER: dict[str, Any] = {"guidance_embeds": True, "axes_dims_rope": (16, 56, 56)}
_TRUE_VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 16, "use_quant_conv": False,
    "use_post_quant_conv": False, "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
}  # fmt: skip
_OPEN: Mapping[str, Callable[[Path], Any]] = {
    "transformer": partial(open_transformer, config=FLUX / "transformer", dtype=torch.float32),
    "vae": partial(open_vae, config=FLUX / "vae", dtype=torch.float32),
    "text_encoder": partial(open_clip, config=FLUX / "text_encoder", device="cpu", dtype=torch.float32),
    "text_encoder_2": partial(open_t5, config=FLUX / "text_encoder_2", device="cpu", dtype=torch.float32),
}
_PREFIX = {
    "transformer": "model.diffusion_model.", "vae": "vae.", "text_encoder": "text_encoders.clip_l.transformer.",
    "text_encoder_2": "text_encoders.t5xxl.transformer.",
}  # fmt: skip


def _folder(part: str) -> dict[str, Tensor]:
    """The weights of the embedded pipeline's part, in fp32."""
    kinds: Mapping[str, Any] = {"transformer": FluxTransformer2DModel, "vae": AutoencoderKL}
    if part in kinds:
        state = open_part(kinds[part], FLUX, part, torch.float32).state_dict()
    else:
        state = load_pretrained(CLIPTextModel if part == "text_encoder" else T5EncoderModel, FLUX / part, "cpu", torch.float32).state_dict()
    return {name: tensor.clone() for name, tensor in state.items()}


def _published(part: str) -> dict[str, Tensor]:
    """The same weights under the names of the published single file."""
    state = _folder(part)
    if part == "text_encoder":
        spare = {"text_projection.weight": torch.ones(2, 2), "text_model.embeddings.position_ids": torch.arange(3)[None]}
        return {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in state.items()} | spare
    if part == "text_encoder_2":
        return {**state, "encoder.embed_tokens.weight": state["shared.weight"].clone()}
    kind, layout = (FluxTransformer2DModel, transformer_layout) if part == "transformer" else (AutoencoderKL, vae_layout)
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(FLUX / part))
    return {name: _fused(target, state) for name, target in layout(model).items()}


def _fused(target: Any, state: Mapping[str, Tensor]) -> Tensor:
    """A published tensor put together from the parameters that it is made of."""
    whole = torch.empty(target.shape)
    for parameter, rows in target.pieces:
        value, start = state[parameter].reshape(-1, *target.shape[1:]), 0
        for first, last in rows:
            whole[first:last] = value[start : start + last - first]
            start += last - first
    return whole


def _saved(folder: Path, state: Mapping[str, Tensor], name: str = "model.safetensors") -> Path:
    save_file({key: tensor.contiguous().clone() for key, tensor in state.items()}, folder / name)
    return folder / name


@pytest.mark.parametrize("part", list(_OPEN))
def test_a_single_file_holds_the_same_values_as_the_folder(tmp_path: Path, part: str) -> None:
    expected, model = _folder(part), _OPEN[part](_saved(tmp_path, _published(part)))
    found = model.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not model.training and not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


@pytest.mark.parametrize("part", list(_OPEN))
def test_a_part_is_found_in_a_checkpoint_that_holds_a_whole_pipeline(tmp_path: Path, part: str) -> None:
    state = {_PREFIX[part] + name: tensor for name, tensor in _published(part).items()}
    found = _OPEN[part](_saved(tmp_path, {**state, "first_stage_model.other": torch.ones(1)})).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in _folder(part).items())


@pytest.mark.parametrize("part", list(_OPEN))
def test_every_key_counts(tmp_path: Path, part: str) -> None:
    state = _published(part)
    # Not a tensor that may be left out, nor one of T5's table, which is there twice.
    name = max(key for key in state if key.endswith(".weight") and key not in ("text_projection.weight", "shared.weight"))
    bare = name.removeprefix("text_model.")
    wrong = {
        "missing": {key: tensor for key, tensor in state.items() if key != name},
        "left_over": {**state, "stranger.weight": torch.ones(1)},
        "wrong_shape": {**state, name: torch.cat([state[name], state[name]])},
    }
    for kind, content in wrong.items():
        with pytest.raises(CheckpointMismatch) as raised:
            _OPEN[part](_saved(tmp_path, content))
        assert ("stranger.weight" if kind == "left_over" else bare) in str(raised.value)
        assert [key for key, names in raised.value.details.items() if names] == [kind]


def test_plain_fp8_is_read_and_scaled_fp8_is_refused(tmp_path: Path) -> None:
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in _published("transformer").items()}
    layout, found = _folder("transformer"), _OPEN["transformer"](_saved(tmp_path, small)).state_dict()
    assert all(torch.equal(found[name], tensor.to(torch.float8_e4m3fn).float()) for name, tensor in layout.items())
    for factor in ("scaled_fp8", "double_blocks.0.img_attn.qkv.scale_weight", "double_blocks.0.img_attn.qkv.weight._scale"):
        with pytest.raises(CheckpointMismatch, match="scaled"):
            _OPEN["transformer"](_saved(tmp_path, {**small, factor: torch.ones(1)}))


def test_two_tables_of_words_are_refused(tmp_path: Path) -> None:
    state = _published("text_encoder_2")
    state["encoder.embed_tokens.weight"] += 1
    with pytest.raises(CheckpointMismatch, match="two different tables"):
        _OPEN["text_encoder_2"](_saved(tmp_path, state))


def test_pickles_and_folders_without_a_configuration_are_refused(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, tmp_path / "flux1-dev.safetensors")
    with pytest.raises(UnsafeWeights):
        _OPEN["transformer"](tmp_path / "flux1-dev.safetensors")
    with pytest.raises(MissingWeights, match="config.json"):
        open_clip(_saved(tmp_path, _published("text_encoder")), tmp_path, "cpu", torch.float32)


def test_the_published_files_are_described_to_the_last_tensor() -> None:
    """Counts and sizes of flux1-dev.safetensors (780 tensors, 23.8 GB in bf16) and ae.safetensors (244 tensors, 335 MB in fp32)."""
    with torch.device("meta"):
        transformer, vae = FluxTransformer2DModel(**_TRUE_TRANSFORMER), AutoencoderKL(**_TRUE_VAE)
    for model, layout, tensors, numbers in (
        (transformer, transformer_layout(transformer), 780, 11_901_408_320),
        (vae, vae_layout(vae), 244, 83_819_683),
    ):
        assert len(layout) == tensors
        assert sum(torch.Size(target.shape).numel() for target in layout.values()) == numbers
        filled = [parameter for target in layout.values() for parameter, _ in target.pieces]
        assert sorted(filled) == sorted(model.state_dict())
    assert transformer_layout(transformer)["single_blocks.37.linear1.weight"].shape == (21504, 3072)
    assert vae_layout(vae)["decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1)


def test_the_transformer_is_read_as_diffusers_reads_it() -> None:
    """At true width (which the stock converter counts on), with every weight two columns thin."""
    thin = {**_TRUE_TRANSFORMER, "num_layers": 2, "num_single_layers": 2}
    with torch.device("meta"):
        layout = transformer_layout(FluxTransformer2DModel(**thin))
    state = {name: named_tensor(name, target.shape[0], *([2] if len(target.shape) == 2 else [])) for name, target in layout.items()}
    stock = convert_flux_transformer_checkpoint_to_diffusers({name: tensor.clone() for name, tensor in state.items()})
    ours = {
        parameter: torch.cat([state[name][start:stop] for start, stop in rows])
        for name, target in layout.items()
        for parameter, rows in target.pieces
    }
    assert ours.keys() == stock.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in stock.items())


def test_the_vae_is_read_as_diffusers_reads_it(tmp_path: Path) -> None:
    config = {**_TRUE_VAE, "block_out_channels": (32, 32, 64, 64)}
    vae: Any = AutoencoderKL(**config)
    state = {name: named_tensor(name, *target.shape) for name, target in vae_layout(vae).items()}
    stock = convert_ldm_vae_checkpoint(dict(state), vae.config)
    vae.save_config(tmp_path)
    ours: Any = open_vae(_saved(tmp_path, state), tmp_path, torch.float32)
    assert ours.state_dict().keys() == stock.keys()
    assert all(torch.equal(ours.state_dict()[name], tensor) for name, tensor in stock.items())
