"""Ours against the published PuLID code, on the same weights: relative error at most 1e-5 in fp32 (goldens/README.md)."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from deployments.identity.eva_clip import EvaVisionTransformer
from deployments.identity.pulid import PuLID, inject
from tests.named_weights import fill, named_tensor
from tests.parity import cases

_TOLERANCE = 1e-5


@cache
def _golden(name: str) -> dict[str, Tensor]:
    with np.load(Path(__file__).parent / "goldens" / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


@cache
def _pulid() -> PuLID:
    model = PuLID(cases.PULID)
    fill(model)
    return model.eval()


def _relative_error(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def test_eva_tower_equals_the_reference_at_its_end_and_at_every_tap() -> None:
    model = EvaVisionTransformer(cases.EVA)
    fill(model)
    embedding, states = model.eval()(cases.eva_input())
    golden = _golden("eva_clip")
    assert _relative_error(embedding, golden["embedding"]) <= _TOLERANCE
    assert [key for key in golden if key.startswith("state_")] == [f"state_{index}" for index in range(len(states))]
    for index, state in enumerate(states):
        assert _relative_error(state, golden[f"state_{index}"]) <= _TOLERANCE


@torch.no_grad()
def test_encoder_equals_the_reference() -> None:
    assert _relative_error(_pulid()(*cases.encoder_input()), _golden("pulid")["tokens"]) <= _TOLERANCE


@torch.no_grad()
def test_unconditional_tokens_equal_the_references_zeros_through_the_encoder() -> None:
    assert _relative_error(_pulid().unconditional(), _golden("pulid")["unconditional"]) <= _TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("weight", cases.WEIGHTS)
def test_injected_transformer_equals_the_references_flux(weight: float) -> None:
    transformer, pulid = cases.transformer(), _pulid()
    injection = inject(transformer, pulid)
    identity = named_tensor("identity", 2, cases.PULID.queries, cases.PULID.output_dim)
    call = cases.flux_input() | {"return_dict": False}
    (base,) = transformer(**call)
    (steered,) = transformer(**call, joint_attention_kwargs={"pulid": injection.condition(identity, weight)})
    golden = _golden("pulid")
    assert _relative_error(base, golden["velocity_base"]) <= _TOLERANCE
    assert _relative_error(steered, golden[f"velocity_{weight}"]) <= _TOLERANCE
    # The case would prove nothing if identity hardly mattered in it.
    assert _relative_error(base, golden[f"velocity_{weight}"]) > 0.05
