"""The whole recipe at toy size: every stage runs, the pack that comes of it opens, and a second run has nothing left to do."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline
from insightface.app import FaceAnalysis
from torch import Tensor

from deployments.identity.eva_clip import load_eva
from deployments.identity.instantx_ip_adapter import config_of as instantx_config
from deployments.identity.instantx_ip_adapter import load_projection as load_instantx
from deployments.identity.pulid import load_pulid
from deployments.identity.redux import load_projection as load_redux
from deployments.identity.siglip import Siglip
from deployments.weights import safetensors_header
from training.mini import train
from training.mini.flux_folder import SIGLIP_DIM
from training.mini.generator.sizes import INSTANTX, PULID, REDUX
from training.mini.stages import STAGES
from training.mini.storage import fake_quantise
from training.mini.workspace import Workspace


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("recipe")
    assert train.main(["--smoke", "--device", "cpu", "--out", str(folder / "pack"), "--workspace", str(folder / "work")]) == 0
    return folder / "pack"


def test_every_stage_leaves_its_results_and_is_not_run_twice(pack: Path, capsys: pytest.CaptureFixture[str]) -> None:
    work = pack.parent / "work"
    assert [name for stage in STAGES for name in stage.makes if not (work / name).is_file()] == []
    assert train.main(["--smoke", "--device", "cpu", "--workspace", str(work)]) == 0
    assert capsys.readouterr().out.count("already done") == len(STAGES)


def test_stock_libraries_open_the_pack(pack: Path) -> None:
    pipe = FluxPipeline.from_pretrained(pack / "flux1", dtype=torch.float32)
    assert {p.dtype for p in pipe.transformer.parameters()} == {torch.float32}
    faces = FaceAnalysis(name=str(pack / "insightface"), root=str(pack), providers=["CPUExecutionProvider"])
    assert set(faces.models) == {"detection", "recognition", "genderage"}


def test_our_own_modules_open_the_pack_strictly(pack: Path) -> None:
    assert load_pulid(pack / "pulid" / "pulid_flux_mini.safetensors").config == PULID
    assert len(load_eva(pack / "eva-clip" / "eva_clip_mini.safetensors").config.taps) == 5
    adapter = pack / "instantx-ip-adapter" / "ip-adapter.safetensors"
    assert instantx_config(safetensors_header(adapter).shapes, "it") == load_instantx(adapter).config == INSTANTX
    assert load_redux(pack / "redux" / "redux.safetensors").config == REDUX
    assert Siglip(pack / "siglip-vision").width == SIGLIP_DIM


def test_the_encoder_that_two_adapters_share_stands_still_while_they_learn(pack: Path) -> None:
    work = Workspace(pack.parent / "work")
    before, after = work.load("siglip-vision"), work.load("siglip-adapters")
    encoder = [name for name in before if name.startswith("siglip.")]
    moved = [name for name in encoder if not torch.equal(_as_packed(before[name]), after[name].float())]
    assert len(encoder) > 60 and moved == []
    assert any(not torch.equal(before[name], after[name]) for name in before if name.startswith("redux."))


def _as_packed(parameter: Tensor) -> Tensor:
    return fake_quantise(parameter.float()) if parameter.ndim == 2 else parameter.float()
