"""The whole recipe at toy size: every stage runs, the pack that comes of it opens, and a second run has nothing left to do."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from insightface.app import FaceAnalysis
from safetensors.torch import load_file
from torch import Tensor, nn

from deployments.identity.eva_clip import load_eva
from deployments.identity.instantx_ip_adapter import config_of as instantx_config
from deployments.identity.instantx_ip_adapter import load_projection as load_instantx
from deployments.identity.pulid import load_pulid
from deployments.identity.redux import load_projection as load_redux
from deployments.identity.siglip import Siglip
from deployments.weights import safetensors_header
from training.mini import train
from training.mini.assemble import assemble
from training.mini.flux_folder import SIGLIP_DIM
from training.mini.generator.bank import References
from training.mini.generator.context import Context
from training.mini.generator.identity_training import train_adapter
from training.mini.generator.sizes import INSTANTX, PULID, REDUX
from training.mini.optimise import Recipe
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
    before, packed = _work(pack).load("siglip-vision"), load_file(pack / "siglip-vision" / "model.safetensors")
    assert len(packed) > 60
    assert [name for name in packed if not torch.equal(_as_packed(before[f"siglip.{name}"]), packed[name].float())] == []
    for name in ("instantx", "redux"):
        after = _work(pack).load(name)
        assert any(not torch.equal(before[f"{name}.{key}"], after[key]) for key in after), name


def test_a_teacher_is_all_that_is_learnt_from(pack: Path) -> None:
    """Whoever says what the teacher says has nothing to learn, whatever the data say; whoever says something else has."""
    context, recipe, teacher = Context(_work(pack), torch.device("cpu"), smoke=True), Recipe(1.0, learning_rate=0.0, smoke=True), _Tint(0.2)
    left = {
        name: train_adapter(name, learner, learner.attach, context, recipe, teacher=teacher.attach)["flow"]
        for name, learner in {"echo": _Tint(0.2), "mute": _Tint(0.0)}.items()
    }
    assert left["echo"] == 0.0 < left["mute"] < 0.1


def test_what_has_not_been_trained_is_left_away(pack: Path, tmp_path: Path) -> None:
    shutil.copytree(pack.parent / "work", tmp_path / "work")
    (tmp_path / "work" / "instantx.safetensors").unlink()
    assemble(Workspace(tmp_path / "work"), tmp_path / "pack")
    assert not (tmp_path / "pack" / "instantx-ip-adapter").exists()
    assert (
        load_redux(tmp_path / "pack" / "redux" / "redux.safetensors").config.image_dim == Siglip(tmp_path / "pack" / "siglip-vision").width
    )
    (tmp_path / "work" / "redux.safetensors").unlink()
    assemble(Workspace(tmp_path / "work"), tmp_path / "pack", overwrite=True)
    assert not (tmp_path / "pack" / "redux").exists() and not (tmp_path / "pack" / "siglip-vision").exists()
    assert (tmp_path / "pack" / "pulid" / "pulid_flux_mini.safetensors").is_file()


class _Tint(nn.Module):
    """Adds the same to every block, whoever is shown."""

    def __init__(self, amount: float) -> None:
        super().__init__()
        self.amount = nn.Parameter(torch.tensor(amount))

    def attach(self, references: References, index: Tensor, drop: Tensor) -> dict[str, Any]:
        return {"identity": lambda block, picture: self.amount * torch.linspace(-1, 1, picture.shape[-1])}


def _work(pack: Path) -> Workspace:
    return Workspace(pack.parent / "work")


def _as_packed(parameter: Tensor) -> Tensor:
    return fake_quantise(parameter.float()) if parameter.ndim == 2 else parameter.float()
