"""Our whole denoise loop against the published one, from noise to latents: start step, true CFG, delayed true CFG (goldens/README.md)."""

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
from deployments.identity.pulid import PuLID, metadata_of
from deployments.identity.pulid_adapter import PuLIDAdapter
from tests.named_weights import fill
from tests.parity import cases
from tests.parity.agreement import TOLERANCE, golden, relative_error


@pytest.fixture(scope="module")
def adapter_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pulid = PuLID(cases.PULID)
    fill(pulid)
    path = tmp_path_factory.mktemp("pulid") / "pulid.safetensors"
    save_file(pulid.state_dict(), path, metadata=metadata_of(cases.PULID))
    return path


def _ended(transformer: FluxTransformer2DModel, adapter: PuLIDAdapter, case: cases.Denoising) -> Tensor:
    """The case in our words: percents in place of step numbers."""
    given = cases.denoise_input()
    influences = []
    if case.weight is not None:
        request = IdentityRequest(method="pulid", weight=case.weight, start=case.start_step / cases.STEPS)
        own, nobody = (adapter.condition(given[name], request) for name in ("own", "nobody"))
        influences.append(Influence(adapter.key, own, nobody, request.start, request.end))
    call = Call(
        given["noise"], given["positions"], Text(given["states"], given["pooled"]), cases.GUIDANCE,
        negative=Text(given["negative_states"], given["negative_pooled"]) if case.true_cfg != 1 else None,
        true_cfg_scale=case.true_cfg, true_cfg_start=case.timestep_to_start_cfg / cases.STEPS, influences=influences,
    )  # fmt: skip
    scheduler = sampler(cases.SCHEDULE, cases.STEPS, given["noise"].shape[1])
    with torch.inference_mode():
        return denoise(transformer, scheduler, call, before_forward=lambda: None, after_step=lambda step: None)


@pytest.mark.parametrize("case", cases.DENOISINGS, ids=lambda case: case.name)
def test_the_loop_ends_where_the_references_ends(case: cases.Denoising, adapter_file: Path) -> None:
    transformer = cases.transformer()
    ended = _ended(transformer, PuLIDAdapter(transformer, adapter_file), case)
    theirs = golden("denoise")
    assert relative_error(ended, theirs[case.name]) <= TOLERANCE
    # The cases would prove nothing if what they vary hardly mattered.
    others = [relative_error(theirs[case.name], other) for name, other in theirs.items() if name != case.name]
    assert min(others) > 0.03
