"""The InstantX adapter against InstantX's own code: its projection, and its processor on double and single blocks (goldens/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from deployments.contracts import IdentityRequest
from deployments.identity.image_attention import IMAGE_KEY, GatedTerm
from deployments.identity.instantx_ip_adapter import InstantX, InstantXAdapter, load_projection
from tests.named_weights import fill
from tests.parity import cases
from tests.parity.agreement import TOLERANCE, golden, relative_error


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = InstantX(cases.INSTANTX)
    fill(whole)
    path = tmp_path_factory.mktemp("instantx") / "ip-adapter.safetensors"
    save_file(whole.state_dict(), path)
    return path


@torch.no_grad()
def _tokens(adapter_file: Path) -> Tensor:
    return load_projection(adapter_file).tokens(torch.cat(list(cases.image_embeds().values())))


def test_the_tokens_are_those_of_the_published_projection(adapter_file: Path) -> None:
    assert relative_error(_tokens(adapter_file), golden("instantx")["tokens"]) <= TOLERANCE


@pytest.mark.parametrize("scale", cases.IP_SCALES)
def test_all_blocks_together_are_those_of_the_published_processor(adapter_file: Path, scale: float) -> None:
    transformer, expected = cases.transformer(), golden("instantx")
    adapter = InstantXAdapter(transformer, adapter_file)
    with torch.inference_mode():
        # Two pictures at once, each with its own reference.
        condition = adapter.condition(_tokens(adapter_file), IdentityRequest(method="instantx-ip-adapter", weight=scale))
        (velocity,) = transformer(**cases.flux_input(), joint_attention_kwargs={IMAGE_KEY: condition}, return_dict=False)
    assert relative_error(velocity, expected[f"velocity_{scale}"]) <= TOLERANCE
    # The case would prove nothing if the adapter hardly mattered in it.
    assert relative_error(expected["velocity_base"], expected[f"velocity_{scale}"]) > 0.05


@pytest.mark.parametrize("kind", ["double", "single"])
def test_each_kind_of_block_matters_to_what_was_compared(adapter_file: Path, kind: str) -> None:
    """With one kind silenced the velocity is not the published one: a processor that forgot it would be found out."""
    transformer, doubles = cases.transformer(), cases.FLUX["num_layers"]
    adapter = InstantXAdapter(transformer, adapter_file)
    with torch.inference_mode():
        (term,) = adapter.condition(_tokens(adapter_file), IdentityRequest(method="instantx-ip-adapter"))
        assert isinstance(term, GatedTerm)
        at_work = (torch.arange(cases.INSTANTX.blocks) >= doubles) == (kind == "double")
        deaf = term._replace(scales=term.scales * at_work)
        (velocity,) = transformer(**cases.flux_input(), joint_attention_kwargs={IMAGE_KEY: (deaf,)}, return_dict=False)
    assert relative_error(velocity, golden("instantx")["velocity_1.0"]) > 0.02


def test_without_a_condition_and_after_ejection_the_base_is_bit_equal(adapter_file: Path) -> None:
    transformer = cases.transformer()
    with torch.inference_mode():
        (base,) = transformer(**cases.flux_input(), return_dict=False)
        adapter = InstantXAdapter(transformer, adapter_file)
        assert torch.equal(transformer(**cases.flux_input(), joint_attention_kwargs={IMAGE_KEY: ()}, return_dict=False)[0], base)
        adapter.eject()
        assert torch.equal(transformer(**cases.flux_input(), return_dict=False)[0], base)
