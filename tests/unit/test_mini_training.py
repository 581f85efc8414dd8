"""The recipe's machinery: optimising, resuming, travelling, refusing. (That every stage runs: test_mini_recipe.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from training.mini import train
from training.mini.exchange import export_files, import_files
from training.mini.optimise import Losses, Recipe, optimise
from training.mini.stages import STAGES, chosen, seconds_of
from training.mini.storage import fake_quantise
from training.mini.workspace import Workspace


def _line(module: nn.Linear) -> Losses:
    return {"loss": ((module.weight - 3.0) ** 2).mean()}


def test_optimising_moves_the_weights_towards_the_minimum(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    before = _line(module)["loss"].item()
    outcome = optimise("line", module, Recipe(0.5, learning_rate=0.05), Workspace(tmp_path), lambda _: _line(module))
    assert _line(module)["loss"].item() < before / 10
    assert outcome["steps"] > 10


def test_a_loss_that_is_not_finite_is_an_error_with_the_stages_name(tmp_path: Path) -> None:
    module = nn.Linear(1, 1)
    with pytest.raises(FloatingPointError, match="stage line"):
        optimise("line", module, Recipe(1), Workspace(tmp_path), lambda _: {"loss": module.weight.sum() * float("nan")})


def test_the_loss_sees_rounded_matrices_and_the_weights_stay_unrounded(tmp_path: Path) -> None:
    module = nn.Linear(8, 8)
    seen = []

    def loss(progress: float) -> Losses:
        seen.append(torch.equal(module.weight, fake_quantise(module.weight)))
        return _line(module)

    optimise("line", module, Recipe(1, smoke=True), Workspace(tmp_path), loss, rounded=module)
    assert seen == [True, True, True]
    assert not torch.equal(module.weight, fake_quantise(module.weight))


def test_a_killed_stage_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.mini.optimise._CHECKPOINT_EVERY_S", 0.0)
    workspace = Workspace(tmp_path)

    def run(module: nn.Linear, steps: int) -> list[torch.Tensor]:
        """The weights that each step began with; killed when it would begin one more."""
        seen: list[torch.Tensor] = []

        def loss(progress: float) -> Losses:
            if len(seen) == steps:
                raise KeyboardInterrupt
            seen.append(module.weight.detach().clone())
            return _line(module)

        with pytest.raises(KeyboardInterrupt):
            optimise("line", module, Recipe(60), workspace, loss)
        return seen

    run(nn.Linear(2, 2), 5)
    reached = workspace.resumable("line", torch.device("cpu"))
    assert reached is not None and reached["schedule"]["steps"] == 5
    assert torch.equal(run(nn.Linear(2, 2), 1)[0], reached["parameters"][0])


def test_results_travel_in_small_pieces_and_arrive_whole(tmp_path: Path) -> None:
    source = tmp_path / "a.bin"
    source.write_bytes(bytes(range(256)) * 400)
    pieces = export_files([source], tmp_path / "parts", piece_bytes=30_000)
    assert len(pieces) > 2 and all(piece.stat().st_size <= 30_000 for piece in pieces)
    import_files(tmp_path / "parts", tmp_path / "there")
    assert (tmp_path / "there" / "a.bin").read_bytes() == source.read_bytes()


def test_a_missing_piece_is_named(tmp_path: Path) -> None:
    source = tmp_path / "a.bin"
    source.write_bytes(bytes(100_000))
    export_files([source], tmp_path / "parts", piece_bytes=30_000)[1].unlink()
    with pytest.raises(FileNotFoundError, match=r"part\.000, part\.001"):
        import_files(tmp_path / "parts", tmp_path / "there")


def test_no_stage_is_longer_than_nine_minutes_and_unknown_ones_are_named() -> None:
    assert all(seconds_of(stage, STAGES, 45) <= 540 for stage in STAGES)
    assert seconds_of(chosen("flux")[0], chosen("flux"), 60) == 540
    with pytest.raises(ValueError, match="unknown stage fluxx; the stages are recogniser"):
        chosen("fluxx")


def test_a_folder_that_holds_a_pack_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pack").mkdir()
    (tmp_path / "pack" / "CARD.md").write_text("a pack")
    assert train.main(["--smoke", "--out", str(tmp_path / "pack")]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (tmp_path / "pack" / "CARD.md").read_text() == "a pack"


def test_a_stage_without_what_it_needs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--smoke", "--stages", "flux", "--workspace", str(tmp_path)]) == 2
    assert "stage flux needs autoencoder.safetensors" in capsys.readouterr().err
