"""The EVA tower: the published layout, strict loading, taps, and positions that follow the grid."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deployments.errors import CheckpointMismatch, DamagedWeights
from deployments.identity.eva_clip import (
    EvaConfig,
    EvaVisionTransformer,
    RotaryTable,
    config_of,
    initialise,
    load_eva,
    metadata_of,
    visual_state,
)
from tests.named_weights import fill, named_tensor

TINY = EvaConfig(image_size=28, patch_size=7, width=32, depth=6, heads=2, mlp_width=48, embed_dim=12, rope_grid=4, taps=(1, 2, 3, 4, 5))


def _tiny() -> EvaVisionTransformer:
    model = EvaVisionTransformer(TINY)
    fill(model)
    return model.eval()


def _checkpoint(model: EvaVisionTransformer) -> dict[str, Tensor]:
    """As the published file has it: with a prefix, with rotary tables in every block, beside a text tower."""
    tables = {
        f"{place}rope.freqs_{kind}": torch.zeros(16, 16) for place in ("", "blocks.0.attn.", "blocks.5.attn.") for kind in ("cos", "sin")
    }
    visual = {f"visual.{name}": tensor for name, tensor in {**model.state_dict(), **tables}.items()}
    return visual | {"logit_scale": torch.zeros(()), "text.ln_final.weight": torch.zeros(4), "token_embedding.weight": torch.zeros(4, 4)}


def _published_layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of EVA02_CLIP_L_336_psz14_s6B.pt under `visual.`, without its rotary tables."""
    width, mlp = 1024, 2730
    layout: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width), "pos_embed": (1, 577, width),
        "patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,), "head.weight": (768, width), "head.bias": (768,),
    }  # fmt: skip
    for index in range(24):
        block = f"blocks.{index}."
        layout |= {f"{block}{norm}.{kind}": (width,) for norm in ("norm1", "norm2", "attn.inner_attn_ln") for kind in ("weight", "bias")}
        layout |= {f"{block}attn.{name}_proj.weight": (width, width) for name in "qkv"}
        layout |= {f"{block}attn.{name}": (width,) for name in ("q_bias", "v_bias", "proj.bias")}
        layout |= {f"{block}attn.proj.weight": (width, width), f"{block}mlp.w3.weight": (width, mlp), f"{block}mlp.w3.bias": (width,)}
        layout |= {f"{block}mlp.{name}.weight": (mlp, width) for name in ("w1", "w2")}
        layout |= {f"{block}mlp.{name}": (mlp,) for name in ("w1.bias", "w2.bias", "ffn_ln.weight", "ffn_ln.bias")}
    return layout


def test_defaults_are_the_published_tower() -> None:
    with torch.device("meta"):
        model = EvaVisionTransformer(EvaConfig())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == _published_layout()
    # With two tables in each of 24 blocks and two at the top, these are the 562 names of the published file.
    assert len(model.state_dict()) + 2 * 24 + 2 == 562
    assert sum(parameter.numel() for parameter in model.parameters()) == 304_432_832


@torch.no_grad()
def test_published_checkpoint_loads_strictly_from_a_file(tmp_path: Path) -> None:
    model, path = _tiny(), tmp_path / "eva.safetensors"
    save_file(_checkpoint(model), path, metadata_of(TINY))
    loaded = load_eva(path)
    pixels = named_tensor("pixels", 2, 3, 28, 28)
    assert loaded.config == TINY
    assert not loaded.training
    assert torch.equal(loaded(pixels)[0], model(pixels)[0])


@torch.no_grad()
def test_file_loads_in_the_type_that_is_asked_for(tmp_path: Path) -> None:
    save_file(_checkpoint(_tiny().half()), tmp_path / "eva.safetensors", metadata_of(TINY))
    loaded = load_eva(tmp_path / "eva.safetensors", dtype=torch.bfloat16)
    embedding, states = loaded(named_tensor("pixels", 1, 3, 28, 28).bfloat16())
    assert embedding.dtype == states[0].dtype == torch.bfloat16


def test_names_of_neither_tower_are_refused() -> None:
    checkpoint = _checkpoint(_tiny()) | {"optimizer.step": torch.zeros(())}
    with pytest.raises(CheckpointMismatch, match="optimizer.step") as caught:
        visual_state(checkpoint)
    assert caught.value.details["left_over"] == ["optimizer.step"]


def test_a_damaged_file_is_named_key_by_key(tmp_path: Path) -> None:
    checkpoint, path = _checkpoint(_tiny()), tmp_path / "eva.safetensors"
    del checkpoint["visual.blocks.3.attn.q_bias"]
    checkpoint["visual.head.weight"] = torch.zeros(13, 32)
    checkpoint["visual.blocks.0.attn.k_bias"] = torch.zeros(32)
    save_file(checkpoint, path, metadata_of(TINY))
    with pytest.raises(CheckpointMismatch, match=str(path)) as caught:
        load_eva(path)
    details = caught.value.details
    assert details["missing"] == ["blocks.3.attn.q_bias"]
    assert details["left_over"] == ["blocks.0.attn.k_bias"]
    assert details["wrong_shape"] == ["head.weight [13, 32] instead of [12, 32]"]


def test_configuration_travels_in_the_metadata() -> None:
    assert config_of(metadata_of(TINY)) == TINY
    assert config_of({}) == EvaConfig()
    with pytest.raises(DamagedWeights, match="colour"):
        config_of({"config": '{"colour": 3, "taps": [1]}'})
    with pytest.raises(DamagedWeights, match="metadata"):
        config_of({"config": "{"})


@pytest.mark.parametrize(
    ("change", "says"),
    [({"width": 34}, "width 34"), ({"image_size": 30}, "multiple of patch_size"), ({"taps": (0, 1)}, "taps"), ({"taps": (2, 6)}, "taps"),
     ({"taps": (3, 2)}, "taps")],
)  # fmt: skip
def test_impossible_sizes_are_refused(change: dict[str, object], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        replace(TINY, **change)  # type: ignore[arg-type]


@torch.no_grad()
def test_taps_are_the_inputs_of_their_blocks() -> None:
    model, entered = _tiny(), {}
    for index, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda _, args, index=index: entered.update({index: args[0]}))
    _, states = model(named_tensor("pixels", 1, 3, 28, 28))
    assert len(states) == len(TINY.taps)
    for tap, state in zip(TINY.taps, states, strict=True):
        assert state.shape == (1, TINY.tokens, TINY.width)
        assert torch.equal(state, entered[tap])


@torch.no_grad()
def test_a_picture_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\[n, 3, 28, 28\]"):
        _tiny()(torch.zeros(1, 3, 56, 56))


def test_rotation_depends_on_the_distance_alone_and_spares_the_class_token() -> None:
    """What rotary embedding promises (Su et al., arXiv:2104.09864, eq. 16), here along rows and along columns."""
    table = RotaryTable(head_dim=16, grid=4, pretrained_grid=4)
    query, key = (table(named_tensor(name, 16).expand(1, 1, 17, 16)) for name in ("query", "key"))
    products = (query[0, 0, 1:] @ key[0, 0, 1:].T).view(4, 4, 4, 4)
    torch.testing.assert_close(products[0, 0, 1, 2], products[2, 1, 3, 3])
    assert abs(float(products[0, 0, 1, 2] - products[0, 0, 2, 1])) > 0.1
    assert torch.equal(query[0, 0, 0], named_tensor("query", 16))


def test_a_finer_grid_is_squeezed_into_the_pretrained_range_of_positions() -> None:
    coarse, fine = RotaryTable(16, grid=4, pretrained_grid=4), RotaryTable(16, grid=8, pretrained_grid=4)
    torch.testing.assert_close(fine.cos.view(8, 8, 16)[::2, ::2], coarse.cos.view(4, 4, 16))
    torch.testing.assert_close(fine.sin.view(8, 8, 16)[::2, ::2], coarse.sin.view(4, 4, 16))


@torch.no_grad()
def test_a_fresh_tower_tells_pictures_apart() -> None:
    torch.manual_seed(0)
    model = EvaVisionTransformer(TINY)
    initialise(model)
    one, other = torch.nn.functional.normalize(model(named_tensor("pixels", 2, 3, 28, 28))[0], dim=-1)
    assert torch.isfinite(one).all()
    assert float(one @ other) < 0.9999
