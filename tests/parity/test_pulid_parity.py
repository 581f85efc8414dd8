"""Ours against the published PuLID code, on the same weights: relative error at most 1e-5 in fp32 (goldens/README.md)."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from deployments.identity.eva_clip import EvaVisionTransformer
from deployments.identity.pulid import PuLID, inject
from tests.named_weights import fill, named_tensor
from tests.parity import cases
from tests.parity.agreement import TOLERANCE, golden, relative_error


@cache
def _pulid() -> PuLID:
    model = PuLID(cases.PULID)
    fill(model)
    return model.eval()


@torch.no_grad()
def test_eva_tower_equals_the_reference_at_its_end_and_at_every_tap() -> None:
    model = EvaVisionTransformer(cases.EVA)
    fill(model)
    embedding, states = model.eval()(cases.eva_input())
    theirs = golden("eva_clip")
    assert relative_error(embedding, theirs["embedding"]) <= TOLERANCE
    assert [key for key in theirs if key.startswith("state_")] == [f"state_{index}" for index in range(len(states))]
    for index, state in enumerate(states):
        assert relative_error(state, theirs[f"state_{index}"]) <= TOLERANCE


@torch.no_grad()
def test_encoder_equals_the_reference() -> None:
    assert relative_error(_pulid()(*cases.encoder_input()), golden("pulid")["tokens"]) <= TOLERANCE


@torch.no_grad()
def test_unconditional_tokens_equal_the_references_zeros_through_the_encoder() -> None:
    assert relative_error(_pulid().unconditional(), golden("pulid")["unconditional"]) <= TOLERANCE


@torch.no_grad()
@pytest.mark.parametrize("weight", cases.WEIGHTS)
def test_injected_transformer_equals_the_references_flux(weight: float) -> None:
    transformer, pulid = cases.transformer(), _pulid()
    injection = inject(transformer, pulid)
    identity = named_tensor("identity", 2, cases.PULID.queries, cases.PULID.output_dim)
    call = cases.flux_input() | {"return_dict": False}
    (base,) = transformer(**call)
    (steered,) = transformer(**call, joint_attention_kwargs={"pulid": injection.condition(identity, weight)})
    theirs = golden("pulid")
    assert relative_error(base, theirs["velocity_base"]) <= TOLERANCE
    assert relative_error(steered, theirs[f"velocity_{weight}"]) <= TOLERANCE
    # The case would prove nothing if identity hardly mattered in it.
    assert relative_error(base, theirs[f"velocity_{weight}"]) > 0.05
