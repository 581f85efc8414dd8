"""LoRA files that do not fit, or not wholly: each is refused by the name of what is wrong, and what is harmless may stay."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from deployments.denoisers.lora.formats import open_lora, read_lora
from deployments.errors import DamagedWeights, LoraIncompatible, UnsafeWeights
from tests.lora_files import TRANSFORMER, State, kohya

TE = "lora_te1_text_model_encoder_layers_0_mlp_fc1"
QKV_KEY = "lora_unet_double_blocks_1_img_attn_qkv"
TO_Q = "transformer.transformer_blocks.1.attn.to_q"
BAD: dict[str, tuple[State, str]] = {
    "a block that is not there": (
        {"lora_unet_double_blocks_7_img_mlp_0.lora_down.weight": torch.ones(4, 256)},
        "lead nowhere.*blocks_7_img_mlp_0",
    ),
    "an unknown part": ({f"{QKV_KEY}.lora_mid.weight": torch.ones(4, 4)}, "lead nowhere.*lora_mid"),
    "a norm": ({"lora_unet_double_blocks_0_img_attn_norm_key_norm.scale": torch.ones(64)}, "lead nowhere.*key_norm"),
    "a bias": ({f"{QKV_KEY}.lora_up.bias": torch.ones(768)}, r"lead nowhere.*lora_up\.bias"),
    "a full difference": ({f"{QKV_KEY}.diff_b": torch.ones(768)}, "lead nowhere.*diff_b"),
    "half a module": ({"lora_unet_double_blocks_0_txt_mlp_2.lora_down.weight": torch.ones(4, 1024)}, "lacks: .*txt_mlp_2: up"),
    "an alpha alone": ({"lora_unet_double_blocks_0_txt_mlp_2.alpha": torch.tensor(1.0)}, "lacks: .*txt_mlp_2: down, .*txt_mlp_2: up"),
    "a part of a lokr": ({"lora_unet_double_blocks_0_txt_mlp_2.lokr_w2_a": torch.ones(4, 4)}, "lacks: .*lokr_w1.*lokr_w2_b"),
    "lora and lokr": ({f"{QKV_KEY}.lokr_w1": torch.ones(4, 4)}, "one kind of change"),
    "another width": ({f"{QKV_KEY}.lora_down.weight": torch.ones(4, 3072)}, r"img_attn_qkv \(.*\[4, 3072\].*\[768, 256\]"),
    "another rank": ({f"{QKV_KEY}.lora_down.weight": torch.ones(5, 256)}, r"img_attn_qkv \(.*\[5, 256\].*\[768, 256\]"),
    "rank nothing": (
        {f"{QKV_KEY}.lora_down.weight": torch.ones(0, 256), f"{QKV_KEY}.lora_up.weight": torch.ones(768, 0)},
        r"img_attn_qkv \(.*\[0, 256\]",
    ),
    "a vector": ({f"{QKV_KEY}.lora_down.weight": torch.ones(256)}, r"img_attn_qkv \(.*\[256\]"),
    "magnitudes": ({f"{QKV_KEY}.dora_scale": torch.ones(768, 1)}, "is a DoRA.*img_attn_qkv.dora_scale"),
    "magnitudes of peft": ({"base_model.model.x_embedder.lora_magnitude_vector.default.weight": torch.ones(9)}, "is a DoRA.*x_embedder"),
    "clip": ({f"{TE}.lora_down.weight": torch.ones(4, 8), f"{TE}.lora_up.weight": torch.ones(8, 4)}, "text encoders.*lora_te1_text_model"),
    "t5": ({"text_encoders.t5xxl.transformer.encoder.lora_up.weight": torch.ones(8, 4)}, "text encoders.*t5xxl"),
    "half of clip": ({f"{TE}.lora_down.weight": torch.ones(4, 8)}, "text encoders.*lora_te1_text_model"),
    "clip of diffusers": ({"text_encoder.text_model.q_proj.lora_B.weight": torch.ones(8, 4)}, "text encoders.*text_encoder"),
    "not a number": ({f"{QKV_KEY}.lora_up.weight": torch.full((768, 4), torch.nan)}, r"not finite.*img_attn_qkv\.lora_up"),
    "whole numbers": ({f"{QKV_KEY}.lora_up.weight": torch.ones(768, 4, dtype=torch.int8)}, r"not finite.*img_attn_qkv\.lora_up"),
    "two alphas": ({f"{QKV_KEY}.alpha": torch.ones(2)}, "one number.*alpha"),
    "two spellings": ({f"{TO_Q}.lora_A.weight": torch.ones(4, 256), f"{TO_Q}.lora_B.weight": torch.ones(256, 4)}, "two spellings.*to_q"),
    "one module twice": ({f"{QKV_KEY}.lora_A.weight": torch.ones(4, 256)}, "two spellings.*lora_A"),
}


@pytest.mark.parametrize("what", BAD)
def test_whatever_does_not_fit_is_refused_by_name(what: str) -> None:
    extra, message = BAD[what]
    with pytest.raises(LoraIncompatible, match=message) as caught:
        read_lora(kohya() | extra, TRANSFORMER, source="hers.safetensors")
    assert caught.value.message.startswith("hers.safetensors ") and caught.value.details["names"]


def test_no_key_can_be_misspelt_unnoticed() -> None:
    state = kohya()
    for key in state:
        renamed = {(f"{name}_" if name == key else name): tensor for name, tensor in state.items()}
        with pytest.raises(LoraIncompatible) as caught:
            read_lora(renamed, TRANSFORMER)
        assert f"{key}_" in str(caught.value.details["names"])


def test_a_lora_of_another_family_and_an_empty_one_are_refused() -> None:
    sdxl = {"lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": torch.ones(4, 640)}
    for state in (sdxl, {}):
        with pytest.raises(LoraIncompatible, match="changes no module of this transformer"):
            read_lora(state, TRANSFORMER)


def test_metadata_that_say_dora_or_nothing_readable_are_refused() -> None:
    for said, message in (('{"transformer.use_dora": true}', "DoRA"), ("{", "unreadable metadata"), ("[1]", "unreadable metadata")):
        with pytest.raises(LoraIncompatible, match=message):
            read_lora(kohya(), TRANSFORMER, metadata={"lora_adapter_metadata": said})


def test_what_is_zero_may_stay_and_text_encoders_may_be_left_out_on_request() -> None:
    zeros = {f"{QKV_KEY}.diff_b": torch.zeros(768), f"{TE}.lora_down.weight": torch.ones(4, 8), f"{TE}.lora_up.weight": torch.zeros(8, 4)}
    facts = read_lora(kohya() | zeros, TRANSFORMER).facts
    assert set(facts.inert) == set(zeros) and facts.left_out == ()
    trained = {f"{TE}.lora_down.weight": torch.ones(4, 8), f"{TE}.lora_up.weight": torch.ones(8, 4)}
    facts = read_lora(kohya() | trained, TRANSFORMER, text_encoders="leave_out").facts
    assert facts.left_out == tuple(trained) and facts.inert == () and facts.keys == len(kohya()) + 2


def test_damaged_files_and_pickles_are_refused(tmp_path: Path) -> None:
    whole, cut, disguised = (tmp_path / f"{name}.safetensors" for name in ("whole", "cut", "disguised"))
    save_file(kohya(), whole)
    assert open_lora(whole, TRANSFORMER).facts.format == "kohya"
    cut.write_bytes(whole.read_bytes()[:-100])
    disguised.write_bytes(pickle.dumps({"weights": [1, 2]}))
    with pytest.raises(DamagedWeights, match="cut.safetensors"):
        open_lora(cut, TRANSFORMER)
    with pytest.raises(UnsafeWeights, match="disguised.safetensors"):
        open_lora(disguised, TRANSFORMER)
