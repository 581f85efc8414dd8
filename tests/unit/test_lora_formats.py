"""LoRA files in every published spelling are the same change of the embedded transformer as merging by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers
from torch import Tensor, nn

from deployments.denoisers.lora.factors import Approximation
from deployments.denoisers.lora.formats import read_lora
from deployments.denoisers.lora.places import places
from deployments.denoisers.lora.stack import applied
from deployments.denoisers.lora.weights import LoraWeights
from deployments.errors import LoraIncompatible
from tests.lora_files import FORMATS, LINEARS, QKV, RANK, TRANSFORMER, State, changes, export, kohya, random
from tests.mini_drawing import FLUX


def look() -> Tensor:
    """One forward on random inputs."""
    inputs = {
        "hidden_states": random(1, 16, 64, seed=1) * 8,
        "encoder_hidden_states": random(1, 6, 128, seed=2) * 8,
        "pooled_projections": random(1, 128, seed=3) * 8,
        "timestep": torch.tensor([0.6]),
        "guidance": torch.tensor([2.5]),
        "img_ids": torch.arange(48.0).reshape(16, 3) % 4,
        "txt_ids": torch.zeros(6, 3),
    }
    with torch.inference_mode():
        (velocity,) = TRANSFORMER(**inputs, return_dict=False)
    return cast(Tensor, velocity.clone())


@contextmanager
def merged(deltas: Mapping[str, Tensor]) -> Iterator[None]:
    """The transformer with these changes added to its weights by hand."""
    kept = {name: LINEARS[name].weight.clone() for name in deltas}
    for name, delta in deltas.items():
        LINEARS[name].weight += delta
    yield
    for name, weight in kept.items():
        LINEARS[name].weight.copy_(weight)


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


def check_equal(weights: LoraWeights, deltas: Mapping[str, Tensor]) -> None:
    assert weights.modules.keys() == deltas.keys()
    for name, delta in deltas.items():
        assert distance(weights.modules[name].delta(), delta) < 1e-5, name
    with merged(deltas):
        expected = look()
    with applied(TRANSFORMER, [(weights, 1.0)]):
        found = look()
    assert distance(found, expected) < 1e-5
    assert distance(look(), expected) > 1e-2


@pytest.mark.parametrize("spelling", FORMATS)
def test_every_spelling_is_the_same_change_as_merging_by_hand(spelling: str) -> None:
    names, _, _, _, alpha = FORMATS[spelling]
    state = export(*FORMATS[spelling])
    weights = read_lora(state, TRANSFORMER)
    assert weights.facts.format == ("bfl" if spelling == "bfl" else spelling.split(",")[0].split(" of ")[0])
    assert weights.facts.keys == len(state) and weights.facts.ranks == (RANK, RANK) and weights.facts.error == 0
    check_equal(weights, {name: delta for change in changes(names) for name, delta in change.delta((alpha or RANK) / RANK).items()})


def test_alphas_in_the_metadata_count_as_peft_counts_them() -> None:
    config = {
        "transformer.r": RANK,
        "transformer.lora_alpha": 2,
        "transformer.alpha_pattern": {"attn.to_q": 8},
        "text_encoder.lora_alpha": 5,
    }
    state = export(*FORMATS["diffusers"])
    weights = read_lora(state, TRANSFORMER, metadata={"lora_adapter_metadata": json.dumps(config)})
    assert weights.modules["transformer_blocks.0.attn.to_q"].scale == 2 and weights.modules["x_embedder"].scale == 0.5
    rooted = json.dumps(config | {"transformer.use_rslora": True})
    assert read_lora(state, TRANSFORMER, metadata={"lora_adapter_metadata": rooted}).modules["x_embedder"].scale == 1.0


def test_three_loras_that_were_saved_as_one_sparse_one_come_apart() -> None:
    name, parts = "lora_unet_double_blocks_0_img_attn_qkv", [(random(2, 256, seed=i), random(256, 2, seed=9 + i)) for i in range(3)]
    sparse = {
        f"{name}.lora_down.weight": torch.cat([down for down, _ in parts]),
        f"{name}.lora_up.weight": torch.block_diag(*(up for _, up in parts)),
        f"{name}.alpha": torch.tensor(3.0),
    }
    weights = read_lora(sparse, TRANSFORMER)
    assert weights.facts.ranks == (2, 2)
    check_equal(weights, {f"transformer_blocks.0.{q}": 0.5 * up @ down for q, (down, up) in zip(QKV, parts, strict=True)})


def test_at_true_size_every_row_goes_where_diffusers_converter_sends_it() -> None:
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(guidance_embeds=True)
    known = places(transformer)
    # A checkpoint in the original names whose rows are numbered.
    original = {f"{name}.scale": torch.zeros(1) for name in _norms()}
    for index, name in enumerate(_original_names()):
        rows = torch.arange(known[name.replace(".", "_")].shape[0], dtype=torch.float64) + 1e6 * index
        original |= {f"{name}.weight": rows[:, None], f"{name}.bias": rows}
    converted = convert_flux_transformer_checkpoint_to_diffusers(dict(original))
    reached = set()
    for name in _original_names():
        for piece in known[name.replace(".", "_")].pieces:
            ours = torch.cat([original[f"{name}.bias"][start:stop] for start, stop in piece.rows])
            assert torch.equal(ours, converted[f"{piece.module}.bias"]), piece.module
            reached.add(piece.module)
    assert reached == {name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}


def _original_names() -> list[str]:
    double = [f"{part}_{name}" for part in ("img", "txt") for name in ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")]
    blocks = [f"double_blocks.{i}.{name}" for i in range(19) for name in double]
    blocks += [f"single_blocks.{i}.{name}" for i in range(38) for name in ("linear1", "linear2", "modulation.lin")]
    ends = [f"{name}_in.{layer}" for name in ("time", "vector", "guidance") for layer in ("in_layer", "out_layer")]
    return [*blocks, *ends, "img_in", "txt_in", "final_layer.linear", "final_layer.adaLN_modulation.1"]


def _norms() -> list[str]:
    double = [f"double_blocks.{i}.{part}_attn.norm.{kind}_norm" for i in range(19) for part in ("img", "txt") for kind in ("query", "key")]
    return double + [f"single_blocks.{i}.norm.{kind}_norm" for i in range(38) for kind in ("query", "key")]


def test_lokr_and_loha_come_as_what_they_are() -> None:
    w1, w2a, w2b = random(8, 8, seed=1), random(32, 3, seed=2), random(3, 32, seed=3)
    a1, b1, a2, b2 = random(256, 3, seed=4), random(3, 64, seed=5), random(256, 3, seed=6), random(3, 64, seed=7)
    state = {
        "transformer.single_transformer_blocks.0.attn.to_q.lokr_w1": w1,
        "transformer.single_transformer_blocks.0.attn.to_q.lokr_w2_a": w2a,
        "transformer.single_transformer_blocks.0.attn.to_q.lokr_w2_b": w2b,
        "transformer.single_transformer_blocks.0.attn.to_q.alpha": torch.tensor(6.0),
        "lycoris_single_transformer_blocks_0_attn_to_k.lokr_w1": w1,
        "lycoris_single_transformer_blocks_0_attn_to_k.lokr_w2": w2a @ w2b,
        "lycoris_single_transformer_blocks_0_attn_to_k.alpha": torch.tensor(1e10),
        "lycoris_x_embedder.hada_w1_a": a1,
        "lycoris_x_embedder.hada_w1_b": b1,
        "lycoris_x_embedder.hada_w2_a": a2,
        "lycoris_x_embedder.hada_w2_b": b2,
        "lycoris_x_embedder.alpha": torch.tensor(1.5),
    }
    weights = read_lora(state, TRANSFORMER)
    assert weights.facts.error < 1e-6 and weights.facts.ranks == (9, 24) and weights.facts.format == "diffusers+lycoris"
    deltas = {
        "single_transformer_blocks.0.attn.to_q": 2 * torch.kron(w1, w2a @ w2b),
        "single_transformer_blocks.0.attn.to_k": torch.kron(w1, w2a @ w2b),
        "x_embedder": 0.5 * (a1 @ b1) * (a2 @ b2),
    }
    check_equal(weights, deltas)


@pytest.mark.parametrize(
    "state",
    [
        {"lokr_w1": random(8, 8, seed=1), "lokr_w2": random(32, 32, seed=2)},
        {f"hada_w{n}_{s}": random(*((256, 12) if s == "a" else (12, 256)), seed=n) for n in (1, 2) for s in "ab"},
        {f"hada_w{n}_{s}": random(*((256, 20) if s == "a" else (20, 256)), seed=n) for n in (1, 2) for s in "ab"},
    ],
    ids=["lokr", "loha", "loha of full rank"],
)
def test_the_stated_error_is_the_true_one_and_too_large_a_one_is_refused(state: State) -> None:
    module = "single_transformer_blocks.0.attn.to_q"
    spelled = {f"transformer.{module}.{kind}": tensor for kind, tensor in state.items()}
    whole = torch.kron(*state.values()) if "lokr_w1" in state else _loha(state)
    weights = read_lora(spelled, TRANSFORMER, limit=Approximation(rank=60, error=1.0))
    assert weights.facts.ranks == (60, 60)
    stated, true = weights.facts.errors[f"transformer.{module}"], distance(weights.modules[module].delta(), whole)
    best = float(torch.linalg.svdvals(whole)[60:].norm() / whole.norm())
    assert 0.05 < stated < 0.95 and abs(stated - true) < 1e-4 and abs(stated - best) < 1e-4
    with pytest.raises(LoraIncompatible, match=rf"brought to rank 60: transformer\.{module} \({stated:.1%}\)"):
        read_lora(spelled, TRANSFORMER, limit=Approximation(rank=60, error=0.02))


def _loha(state: State) -> Tensor:
    return (state["hada_w1_a"] @ state["hada_w1_b"]) * (state["hada_w2_a"] @ state["hada_w2_b"])


def test_factors_of_eight_bits_are_read_as_their_values() -> None:
    state = {key: tensor if key.endswith("alpha") else tensor.to(torch.float8_e4m3fn) for key, tensor in kohya().items()}
    weights = read_lora(state, TRANSFORMER)
    key = "lora_unet_img_in.lora_down.weight"
    assert torch.equal(weights.modules["x_embedder"].down.float(), state[key].float())


def test_the_meta_device_suffices() -> None:
    with torch.device("meta"):
        model = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(FLUX / "transformer"))
    assert read_lora(kohya(), model).modules.keys() == read_lora(kohya(), TRANSFORMER).modules.keys()
