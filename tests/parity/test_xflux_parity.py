"""The XLabs adapter against XLabs' own code: its projection, its blocks, its denoise loop, its ComfyUI node's ramps (goldens/README.md)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor

from deployments.contracts import IdentityRequest
from deployments.denoisers.flux1_loop import Call, Influence, Text, denoise
from deployments.denoisers.schedule import sampler
from deployments.identity.image_attention import ImageCondition
from deployments.identity.xlabs_ip_adapter import RAMPS, XLabs, XLabsAdapter, load_projection, ramp
from tests.named_weights import fill
from tests.parity import cases
from tests.parity.agreement import TOLERANCE, golden, relative_error


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    whole = XLabs(cases.XLABS)
    fill(whole)
    path = tmp_path_factory.mktemp("xlabs") / "ip_adapter.safetensors"
    save_file(whole.state_dict(), path)
    return path


@torch.no_grad()
def _tokens(adapter_file: Path) -> dict[str, Tensor]:
    projection = load_projection(adapter_file)
    return {which: projection.tokens(embeds) for which, embeds in cases.image_embeds().items()}


def _condition(adapter: XLabsAdapter, tokens: Tensor, weight: float, form: str = "constant") -> ImageCondition:
    return adapter.condition(tokens, IdentityRequest(method="xlabs-ip-adapter-v2", weight=weight, options={"weight_type": form}))


def _influences(adapter: XLabsAdapter, tokens: dict[str, Tensor], case: cases.Steering) -> list[Influence]:
    """As Flux1Denoiser does: a weight of 0 is left out."""
    if not case.ip_scale:
        return []
    own, other = (_condition(adapter, tokens[which], weight) for which, weight in (("own", case.ip_scale), ("negative", case.neg_ip_scale)))
    return [Influence(adapter.key, own, other, start=0.0, end=1.0)]


def _ended(transformer: FluxTransformer2DModel, influences: list[Influence], case: cases.Steering) -> Tensor:
    """The case in our words: percents in place of step numbers, and no second pass where true CFG is off."""
    given = cases.denoise_input()
    call = Call(
        given["noise"], given["positions"], Text(given["states"], given["pooled"]), cases.GUIDANCE,
        negative=Text(given["negative_states"], given["negative_pooled"]) if case.true_gs != 1 else None,
        true_cfg_scale=case.true_gs, true_cfg_start=case.timestep_to_start_cfg / cases.STEPS, influences=influences,
    )  # fmt: skip
    scheduler = sampler(cases.SCHEDULE, cases.STEPS, given["noise"].shape[1])
    with torch.inference_mode():
        return denoise(transformer, scheduler, call, before_forward=lambda: None, after_step=lambda step: None)


def test_the_projection_equals_xfluxs(adapter_file: Path) -> None:
    ours = torch.cat(list(_tokens(adapter_file).values()))
    assert relative_error(ours, golden("xflux")["tokens"]) <= TOLERANCE


@pytest.mark.parametrize("scale", cases.IP_SCALES)
def test_the_transformer_equals_xfluxs_with_its_block_processor(adapter_file: Path, scale: float) -> None:
    """Two pictures with two references in one call."""
    transformer, theirs = cases.transformer(), golden("xflux")
    adapter = XLabsAdapter(transformer, adapter_file)
    call = cases.flux_input() | {"return_dict": False}
    with torch.inference_mode():
        item = _condition(adapter, torch.cat(list(_tokens(adapter_file).values())), scale)
        (base,) = transformer(**call)
        (steered,) = transformer(**call, joint_attention_kwargs={adapter.key: item})
    assert relative_error(base, theirs["velocity_base"]) <= TOLERANCE
    assert relative_error(steered, theirs[f"velocity_{scale}"]) <= TOLERANCE
    # The case would prove nothing if the picture hardly mattered in it.
    assert relative_error(base, theirs[f"velocity_{scale}"]) > 0.05


@pytest.mark.parametrize("case", cases.STEERINGS, ids=lambda case: case.name)
def test_the_loop_ends_where_xfluxs_ends(case: cases.Steering, adapter_file: Path) -> None:
    transformer, theirs = cases.transformer(), golden("xflux_denoise")
    with torch.inference_mode():
        influences = _influences(XLabsAdapter(transformer, adapter_file), _tokens(adapter_file), case)
    assert relative_error(_ended(transformer, influences, case), theirs[case.name]) <= TOLERANCE
    # The cases would prove nothing if what they vary hardly mattered.
    others = [relative_error(theirs[case.name], other) for name, other in theirs.items() if name != case.name]
    assert min(others) > 0.03


@pytest.mark.parametrize("blocks", cases.RAMP_BLOCKS)
@pytest.mark.parametrize("form", cases.RAMPS)
def test_every_ramp_is_the_nodes_at_the_strengths_we_name(form: str, blocks: int) -> None:
    assert ramp({"weight_type": form}, blocks) == pytest.approx(golden("xflux_comfyui")[f"{form}_{blocks}"].tolist(), rel=1e-12)


def test_no_ramp_is_left_without_its_original() -> None:
    assert RAMPS.keys() - cases.RAMPS.keys() == {"constant"}


@pytest.mark.parametrize("form", cases.SMALL_RAMPS)
def test_a_ramped_forward_equals_that_of_the_nodes_processors(adapter_file: Path, form: str) -> None:
    transformer = cases.transformer()
    adapter = XLabsAdapter(transformer, adapter_file)
    shared = ("img_ids", "txt_ids")
    call = {name: given if name in shared else given[:1] for name, given in cases.flux_input().items()}
    with torch.inference_mode():
        item = _condition(adapter, _tokens(adapter_file)["own"], 1.0, form)
        (ramped,) = transformer(**call, return_dict=False, joint_attention_kwargs={adapter.key: item})
    theirs = golden("xflux_comfyui")
    assert relative_error(ramped, theirs[f"velocity_{form}"]) <= TOLERANCE
    assert relative_error(theirs["velocity_linear"], theirs["velocity_sigmoid"]) > 0.05
