"""Image attention and the XLabs adapter: stock without a picture, additive with one, sized by its file, and gone without a trace."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor

from deployments.errors import CheckpointMismatch, InvalidRequest
from deployments.identity.image_attention import IMAGE_KEY, ImageAttention, ImageCondition, ImageTerm
from deployments.identity.xlabs_ip_adapter import RAMPS, XLabs, XLabsAdapter, XLabsConfig, config_of, load_projection, ramp
from tests.mini_drawing import XLABS, XLABS_FILE, request
from tests.named_weights import fill, named_tensor

DOUBLE, HEADS, HEAD_DIM, PICTURE = 3, 2, 16, 6


def _transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=DOUBLE, num_single_layers=2, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    fill(model)
    return model.eval()


@torch.inference_mode()
def _run(transformer: FluxTransformer2DModel, **items: object) -> Tensor:
    (velocity,) = transformer(
        hidden_states=named_tensor("picture", 1, PICTURE, 8), encoder_hidden_states=named_tensor("text", 1, 4, 20),
        pooled_projections=named_tensor("pooled", 1, 12), timestep=torch.tensor([0.5]), img_ids=torch.zeros(PICTURE, 3),
        txt_ids=torch.zeros(4, 3), joint_attention_kwargs=items, return_dict=False,
    )  # fmt: skip
    assert isinstance(velocity, Tensor)
    return velocity


def _term(name: str, scale: float = 1.0, tokens: int = 4, mask: Tensor | None = None) -> ImageTerm:
    keys, values = (named_tensor(f"{name}'s {kind}", DOUBLE, 1, tokens, HEADS, HEAD_DIM) for kind in ("keys", "values"))
    return ImageTerm(keys, values, torch.full((DOUBLE,), scale), mask)


def _error(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


# --- the processor ------------------------------------------------------------------------------------------------------------------


def test_without_a_picture_the_transformer_is_stock_bit_for_bit() -> None:
    transformer = _transformer()
    base = _run(transformer)
    ImageAttention(transformer)
    for items in ({}, {IMAGE_KEY: ()}, {IMAGE_KEY: None}):
        assert torch.equal(_run(transformer, **items), base)


def test_our_own_joint_attention_is_stocks_bit_for_bit_where_nothing_is_added() -> None:
    transformer = _transformer()
    base = _run(transformer)
    ImageAttention(transformer)
    assert torch.equal(_run(transformer, **{IMAGE_KEY: (_term("Ada", scale=0.0),)}), base)
    assert _error(_run(transformer, **{IMAGE_KEY: (_term("Ada"),)}), base) > 0.05


def test_fused_projections_read_the_same() -> None:
    transformer = _transformer()
    ImageAttention(transformer)
    apart = _run(transformer, **{IMAGE_KEY: (_term("Ada"),)})
    transformer.fuse_qkv_projections()
    assert _error(_run(transformer, **{IMAGE_KEY: (_term("Ada"),)}), apart) < 1e-5


def test_a_block_adds_what_its_queries_find_by_the_scale_of_that_block() -> None:
    """The third output of one attention, computed once more by softmax."""
    transformer: Any = _transformer()
    ImageAttention(transformer)
    attn, block = transformer.transformer_blocks[1].attn, 1
    picture, text = named_tensor("tokens", 1, PICTURE, 32), named_tensor("words", 1, 4, 32)
    term = _term("Ada")._replace(scales=torch.tensor([0.0, 0.7, 0.0]))
    with torch.inference_mode():
        *_, added = attn(picture, text, **{IMAGE_KEY: (term,)})
        query = attn.norm_q(attn.to_q(picture).unflatten(-1, (HEADS, HEAD_DIM)))[0].transpose(0, 1)
        keys, values = (x[block, 0].transpose(0, 1) for x in (term.keys, term.values))
        found = torch.softmax(query @ keys.transpose(1, 2) / HEAD_DIM**0.5, dim=-1) @ values
    assert _error(added[0], 0.7 * found.transpose(0, 1).flatten(1)) < 1e-5


def test_references_add_up_and_a_mask_confines_one() -> None:
    transformer: Any = _transformer()
    ImageAttention(transformer)
    attn = transformer.transformer_blocks[0].attn
    picture, text = named_tensor("tokens", 2, PICTURE, 32), named_tensor("words", 2, 4, 32)
    left = (torch.arange(PICTURE) < PICTURE // 2).float().view(1, PICTURE, 1)

    @torch.inference_mode()
    def added(*condition: ImageTerm) -> Tensor:
        return attn(picture, text, **{IMAGE_KEY: condition})[2]  # type: ignore[no-any-return]

    ada, bruno = added(_term("Ada")), added(_term("Bruno", tokens=7))
    torch.testing.assert_close(added(_term("Ada"), _term("Bruno", tokens=7)), ada + bruno)
    masked = added(_term("Ada", mask=left), _term("Bruno", tokens=7, mask=1 - left))
    torch.testing.assert_close(masked, torch.cat([ada[:, : PICTURE // 2], bruno[:, PICTURE // 2 :]], dim=1))
    assert ada.shape == (2, PICTURE, 32)


def test_single_blocks_take_the_item_in_silence(caplog: pytest.LogCaptureFixture) -> None:
    transformer = _transformer()
    ImageAttention(transformer)
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        _run(transformer, **{IMAGE_KEY: (_term("Ada"),)})
        assert not caplog.records
        _run(transformer, unknown=1)
        assert "unknown" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_adapters_share_the_processors_and_the_last_one_takes_them_along() -> None:
    transformer = _transformer()
    names, before = set(transformer.state_dict()), [type(processor) for processor in transformer.attn_processors.values()]
    one, other = ImageAttention(transformer), ImageAttention(transformer)
    steered = _run(transformer, **{IMAGE_KEY: (_term("Ada"),)})
    one.eject()
    assert torch.equal(_run(transformer, **{IMAGE_KEY: (_term("Ada"),)}), steered)
    assert set(transformer.state_dict()) == names
    other.eject()
    assert [type(processor) for processor in transformer.attn_processors.values()] == before == [FluxAttnProcessor] * len(before)
    with pytest.raises(ValueError, match="ejected already"):
        other.eject()


def test_a_strangers_processor_is_refused_and_left_in_its_place() -> None:
    transformer: Any = _transformer()
    stranger = FluxIPAdapterAttnProcessor(32, 20)
    transformer.transformer_blocks[2].attn.set_processor(stranger)
    with pytest.raises(ValueError, match="FluxIPAdapterAttnProcessor"):
        ImageAttention(transformer)
    assert transformer.transformer_blocks[2].attn.processor is stranger
    assert type(transformer.transformer_blocks[0].attn.processor) is FluxAttnProcessor


def test_the_chosen_attention_backend_stays_chosen() -> None:
    transformer: Any = _transformer()
    transformer.set_attention_backend("_native_math")
    ImageAttention(transformer)
    assert {str(processor._attention_backend.value) for processor in transformer.attn_processors.values()} == {"_native_math"}
    assert _error(_run(transformer), _run(_transformer())) < 1e-5


# --- the adapter's file -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tokens", "millions"), [(16, 528.67), (4, 491)])
def test_the_published_sizes_follow_from_the_shapes(tokens: int, millions: float) -> None:
    """v2: 528.67 million numbers (1.06 GB in half precision); v1: 982 MB."""
    with torch.device("meta"):
        whole = XLabs(XLabsConfig(tokens=tokens))
    shapes = {name: tuple(tensor.shape) for name, tensor in whole.state_dict().items()}
    assert config_of(shapes, "it") == XLabsConfig(tokens=tokens)
    assert len(shapes) == 19 * 4 + 4
    assert shapes["ip_adapter_proj_model.proj.weight"] == (tokens * 4096, 768)
    assert shapes["ip_adapter_proj_model.proj.bias"] == (tokens * 4096,)
    assert shapes["ip_adapter_proj_model.norm.weight"] == shapes["ip_adapter_proj_model.norm.bias"] == (4096,)
    for block in range(19):
        for letter in "kv":
            layer = f"double_blocks.{block}.processor.ip_adapter_double_stream_{letter}_proj"
            assert shapes[f"{layer}.weight"] == (3072, 4096) and shapes[f"{layer}.bias"] == (3072,)
    assert sum(tensor.numel() for tensor in whole.state_dict().values()) / 1e6 == pytest.approx(millions, abs=0.5 if tokens == 4 else 0.005)


def _broken(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    key = "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"
    changes: dict[str, dict[str, Tensor]] = {
        "stranger": {**state, "double_blocks.0.processor.gate": torch.zeros(1)},
        "shape": {**state, key: state[key][:, :-1].contiguous()},
        "tokens": {**state, "ip_adapter_proj_model.proj.weight": state["ip_adapter_proj_model.proj.weight"][:-1].contiguous()},
        "block": {**state, "double_blocks.first.gate": torch.zeros(1)},
    }
    return changes[name] if name in changes else {key: tensor for key, tensor in state.items() if key != name}


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("stranger", "1 left over: double_blocks.0.processor.gate"),
        ("shape", "1 wrong shape: double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"),
        ("tokens", "does not divide into tokens"),
        ("block", "makes no sense"),
        ("ip_adapter_proj_model.norm.weight", "no XLabs IP-Adapter"),
        ("ip_adapter_proj_model.norm.bias", "1 missing: ip_adapter_proj_model.norm.bias"),
        ("double_blocks.1.processor.ip_adapter_double_stream_v_proj.bias", "1 missing: double_blocks.1"),
    ],
)
def test_a_file_that_is_not_wholly_the_adapter_is_refused_by_both_halves(tmp_path: Path, broken: str, said: str) -> None:
    file = tmp_path / "ip_adapter.safetensors"
    save_file(_broken(load_file(XLABS_FILE), broken), file)
    with pytest.raises(CheckpointMismatch, match=said):
        load_projection(file)
    with pytest.raises(CheckpointMismatch, match=said):
        XLabsAdapter(_transformer(), file)


def test_an_adapter_for_a_transformer_of_another_size_is_refused_and_nothing_attached() -> None:
    transformer = _transformer()
    with pytest.raises(CheckpointMismatch, match=r"\(2, 256\), the transformer has \(3, 32\)"):
        XLabsAdapter(transformer, XLABS_FILE)
    assert {type(processor) for processor in transformer.attn_processors.values()} == {FluxAttnProcessor}


# --- ramps --------------------------------------------------------------------------------------------------------------------------


def test_the_default_ramp_is_the_one_of_diffusers_docstring() -> None:
    strengths = ramp({}, 19)
    assert strengths == ramp({"weight_type": "linear"}, 19)
    assert strengths == pytest.approx([0.3 + (0.92 - 0.3) * index / 18 for index in range(19)])
    assert ramp({}, 2) == pytest.approx([0.3, 0.92])


@pytest.mark.parametrize("form", RAMPS)
@pytest.mark.parametrize("blocks", [2, 3, 19])
def test_every_ramp_has_a_strength_for_each_block_and_is_never_nothing(form: str, blocks: int) -> None:
    strengths = ramp({"weight_type": form}, blocks)
    assert len(strengths) == blocks
    assert min(strengths) >= 0 and 0.4 < max(strengths) <= 1


def test_the_forms_do_what_their_names_say() -> None:
    forms = {form: ramp({"weight_type": form}, 19) for form in RAMPS}
    assert set(forms["constant"]) == {1.0}
    assert forms["first_half"][:9] == pytest.approx([index / 8 for index in range(9)]) and set(forms["first_half"][9:]) == {1.0}
    assert set(forms["second_half"][:10]) == {0.0} and forms["second_half"][10:] == pytest.approx([index / 8 for index in range(9)])
    assert forms["sigmoid"] == sorted(forms["sigmoid"]) and 0 < forms["sigmoid"][0] < 0.05 and 0.95 < forms["sigmoid"][-1] < 1


@pytest.mark.parametrize("options", [{"weight_type": "steep"}, {"weight_type": 1.0}, {"strength": 1.0}])
def test_options_that_there_are_not_are_refused(options: dict[str, str | float]) -> None:
    with pytest.raises(InvalidRequest):
        ramp(options, 19)


def test_the_weight_multiplies_the_ramp_and_tokens_of_another_width_are_refused(tmp_path: Path) -> None:
    config = XLabsConfig(image_dim=8, tokens=4, token_dim=20, dim=32, blocks=DOUBLE)
    whole = XLabs(config)
    fill(whole)
    save_file(whole.state_dict(), tmp_path / "ip_adapter.safetensors")
    adapter = XLabsAdapter(_transformer(), tmp_path / "ip_adapter.safetensors")
    condition: ImageCondition = adapter.condition(named_tensor("Ada", 1, 4, 20), request(XLABS, weight=0.5))
    assert condition[0].scales.tolist() == pytest.approx([0.5 * strength for strength in (0.3, 0.61, 0.92)])
    assert condition[0].keys.shape == condition[0].values.shape == (DOUBLE, 1, 4, HEADS, HEAD_DIM)
    with pytest.raises(ValueError, match=r"\[n, tokens, 20\]"):
        adapter.condition(named_tensor("Ada", 1, 4, 24), request(XLABS))
