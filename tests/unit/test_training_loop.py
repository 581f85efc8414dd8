"""The trainer on a FLUX of random weights: it learns, resumes to the bit, agrees with itself in two processes, stops when told to."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from safetensors import safe_open
from torch.multiprocessing.spawn import start_processes

from deployments.errors import InvalidRequest, ProviderUnavailable, TrainingDiverged, UnsupportedCombination
from tests.lora_training import CARD, Plan, run, settings, trainer, training_set, transformer, work_in_group
from training.adapters import Average, add_lora, target_names
from training.checkpoints import LORA, STATE, checkpoints, newest_state
from training.loop import Trainer
from training.lora_header import scored
from training.objective import HELD_OUT_SIGMAS, Draw, FluxObjective, QwenObjective, held_out_batch, losses, objective_of, shifted, sigma_of
from training.settings import TARGETS

CPU = torch.device("cpu")


def _equal(left: Any, right: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_a_lora_learns_what_it_has_not_seen_and_only_the_lora_moves(tmp_path: Path) -> None:
    model = transformer()
    before = {name: p.clone() for name, p in model.named_parameters()}
    made = trainer(tmp_path, settings(steps=30, batch=4, checkpoint_every=30), model)
    untrained = made.held_out_loss()
    outcome, seen = run(made, tmp_path)
    assert outcome.step == 30 and not outcome.stopped and len(seen) == 30
    assert untrained is not None and outcome.held_out is not None and outcome.held_out < 0.97 * untrained
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if ".lora_" not in name}
    assert frozen.keys() == before.keys() and all(torch.equal(p, before[name]) for name, p in frozen.items())


@pytest.mark.parametrize("changes", [{}, {"schedule": "cosine", "grad_accum": 2, "caption_dropout": 0.3, "prior_weight": 0.5}])
def test_a_training_that_was_broken_off_ends_as_if_it_had_not_been(tmp_path: Path, changes: dict[str, Any]) -> None:
    told = settings(**changes)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    straight = trainer(whole, told)
    _, expected = run(straight, whole)
    cut, before = run(trainer(broken, told), broken, until=3)
    assert cut.stopped and cut.step == 3
    resumed = trainer(broken, told)
    _, after = run(resumed, broken)
    assert [p.loss for p in before + after] == [p.loss for p in expected] and [p.step for p in after] == [4, 5, 6]
    assert _equal(straight.parameters, resumed.parameters) and _equal(straight.average.values, resumed.average.values)
    assert checkpoints(whole)[6].read_bytes() == checkpoints(broken)[6].read_bytes()


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    run(trainer(tmp_path, settings()), tmp_path)
    with pytest.raises(InvalidRequest, match="other settings or other pictures"):
        run(trainer(tmp_path, settings(learning_rate=1e-3)), tmp_path)
    with pytest.raises(InvalidRequest, match="other settings or other pictures"):
        run(trainer(tmp_path, settings(), data=replace(training_set(), hash="1" * 64)), tmp_path)
    longer, _ = run(trainer(tmp_path, settings(steps=7, checkpoint_every=50)), tmp_path)
    assert longer.step == 7


@pytest.fixture(scope="module")
def in_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of two trainings that two processes shared: one to its end, one that the second process cancelled in its step 2."""
    folder = tmp_path_factory.mktemp("group")
    plans: list[Plan] = [(str(folder / "whole"), _SHARED, None), (str(folder / "stopped"), settings(steps=50), 1)]
    for place, _, _ in plans:
        Path(place).mkdir()
    start_processes(work_in_group, (2, str(folder / "meeting"), plans), nprocs=2, start_method="spawn")
    return folder / "whole", folder / "stopped"


_SHARED = settings(batch=2, steps=8, grad_accum=2)


def _of_ranks(folder: Path, name: str) -> list[Any]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=True)[name] for rank in range(2)]


def test_two_processes_train_what_one_does(in_two: tuple[Path, Path], tmp_path: Path) -> None:
    single = trainer(tmp_path, _SHARED.model_copy(update={"batch": 4}))
    start = [p.detach().clone() for p in single.parameters]
    run(single, tmp_path)
    first, second = _of_ranks(in_two[0], "parameters")
    moved = max(float((p - q).detach().abs().max()) for p, q in zip(single.parameters, start, strict=True))
    apart = max(float((p - q).detach().abs().max()) for p, q in zip(single.parameters, first, strict=True))
    assert _equal(first, second) and moved > 1e-2 and apart <= 1e-5
    assert list(checkpoints(in_two[0])) == [3, 6, 8]


def test_one_process_that_is_cancelled_stops_all_on_the_same_step(in_two: tuple[Path, Path]) -> None:
    assert _of_ranks(in_two[1], "step") == [2, 2]
    assert list(checkpoints(in_two[1])) == [2]


def test_a_loss_that_is_no_number_ends_the_training(tmp_path: Path) -> None:
    data = training_set()
    broken = replace(data, trained=tuple(replace(item, mean=item.mean * float("nan")) for item in data.trained))
    with pytest.raises(TrainingDiverged, match="step 1 is nan"):
        run(trainer(tmp_path, settings(), data=broken), tmp_path)
    assert checkpoints(tmp_path) == {}


def test_old_states_go_loras_stay_and_a_damaged_state_is_passed_over(tmp_path: Path) -> None:
    run(trainer(tmp_path, settings(steps=4, checkpoint_every=1, keep_states=2)), tmp_path)
    assert list(checkpoints(tmp_path)) == [1, 2, 3, 4]
    assert [path.parent.name for path in sorted(tmp_path.rglob(STATE))] == ["step-000003", "step-000004"]
    newest = tmp_path / "step-000004" / STATE
    newest.write_bytes(newest.read_bytes()[:100])
    state = newest_state(tmp_path)
    assert state is not None and state["step"] == 3
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_the_file_says_what_it_is_and_takes_scores(tmp_path: Path) -> None:
    run(trainer(tmp_path, settings()), tmp_path)
    path = tmp_path / "step-000006" / LORA
    (tmp_path / "best.safetensors").write_bytes(scored(path.read_bytes(), {"identity": 0.61}))
    with safe_open(tmp_path / "best.safetensors", "pt") as file, safe_open(path, "pt") as first:
        header = file.metadata()
        assert all(torch.equal(file.get_tensor(name), first.get_tensor(name)) for name in first.keys())
    said = {"trigger_word": "ohwx", "base": "flux1-mini", "rank": "4", "alpha": "8", "step": "6", "dataset_sha256": "0" * 64}
    assert said.items() <= header.items() and json.loads(header["scores"])["identity"] == 0.61
    assert json.loads(header["lora_adapter_metadata"])["transformer.lora_alpha"] == 8


def test_factors_are_fp32_in_a_bf16_base_and_all_of_them_move(tmp_path: Path) -> None:
    told = settings(dtype="bfloat16", learning_rate=1e-4, steps=2, checkpoint_every=2)
    made = trainer(tmp_path, told, transformer(torch.bfloat16))
    before = [p.detach().clone() for p in made.parameters]
    assert {p.dtype for p in made.parameters} == {v.dtype for v in made.average.values} == {torch.float32}
    run(made, tmp_path)
    moved = sum(int((p != q).sum()) for p, q in zip(made.parameters, before, strict=True))
    assert moved > 0.95 * sum(p.numel() for p in made.parameters)


def test_blocks_that_are_computed_twice_change_nothing(tmp_path: Path) -> None:
    kept, twice = transformer(), transformer()
    twice.enable_gradient_checkpointing()
    made = [trainer(tmp_path / name, settings(steps=2), model) for name, model in (("kept", kept), ("twice", twice))]
    for each in made:
        run(each, tmp_path / "nothing there")
    assert _equal(made[0].parameters, made[1].parameters)


def test_a_seed_is_a_training_and_another_is_another(tmp_path: Path) -> None:
    ends = []
    for number, seed in enumerate((5, 5, 6)):
        torch.manual_seed(number)  # no generator but the trainer's own may matter
        made = trainer(tmp_path / str(number), settings(seed=seed, steps=2))
        run(made, tmp_path / str(number))
        ends.append(made.parameters)
    assert _equal(ends[0], ends[1]) and not _equal(ends[0], ends[2])


def test_a_picture_draws_the_same_numbers_in_whatever_company() -> None:
    data, draw = training_set(masked=True), Draw(3, "sigmoid")
    whole = draw.batch(data, [0, 1, 2, 0], 7, 0)
    half = draw.batch(data, [2, 0], 7, 2)
    for name in ("clean", "noise", "sigmas"):
        assert torch.equal(getattr(whole, name)[2:], getattr(half, name))
    assert not torch.equal(whole.noise[0], whole.noise[3]), "a picture twice in a batch must not bring the same noise twice"
    assert not torch.equal(whole.noise, draw.batch(data, [0, 1, 2, 0], 8, 0).noise)


def test_masked_places_count_less_and_a_masked_picture_as_much_as_another() -> None:
    data = training_set(masked=True)
    batch = Draw(3, "sigmoid").batch(data, [0, 1], 0, 0)
    assert batch.weights is not None and torch.allclose(batch.weights.mean(1), torch.ones(2))
    assert float(batch.weights[0, 0] / batch.weights[0, 1]) == pytest.approx(0.1) and bool((batch.weights[1] == 1).all())
    plain = losses(FluxObjective(), transformer(), replace(batch, weights=None))
    masked = losses(FluxObjective(), transformer(), batch)
    assert torch.allclose(plain[1], masked[1]) and not torch.allclose(plain[0], masked[0])


def test_captions_are_dropped_and_class_pictures_weighed() -> None:
    data = training_set()
    dropped = [Draw(1, "sigmoid", caption_dropout=0.5).batch(data, [0], step, 0).states[0] for step in range(60)]
    assert 15 < sum(torch.equal(states, data.prompts.states[data.empty_caption]) for states in dropped) < 45
    assert Draw(1, "sigmoid", prior_weight=0.25).batch(data, [5], 0, 0).importance.tolist() == [0.25]


def test_noise_levels_are_those_of_the_published_recipes() -> None:
    """Medians counted for FLUX.1-dev: 0.50 unshifted, 0.76 at 1024 px and 0.70 at 768 px; Qwen-Image's factor at 1328 px is 2.30."""
    half = torch.tensor([0.5])
    assert float(shifted(half, "sigmoid", 4096)) == 0.5
    assert float(shifted(half, "flux_shift", 4096)) == pytest.approx(0.76, abs=0.003)
    assert float(shifted(half, "flux_shift", 2304)) == pytest.approx(0.70, abs=0.003)
    qwen = float(shifted(half, "qwen_shift", 83 * 83))
    assert qwen / (1 - qwen) == pytest.approx(2.30, abs=0.01)
    drawn = torch.cat([sigma_of("sigmoid", 64, torch.Generator().manual_seed(k)) for k in range(500)])
    assert abs(float(drawn.median()) - 0.5) < 0.05 and 0 < float(drawn.min()) and float(drawn.max()) < 1


def test_the_held_out_loss_is_always_asked_the_same() -> None:
    data = training_set()
    first, again = held_out_batch(data, 1), held_out_batch(data, 1)
    assert torch.equal(first.noise, again.noise) and torch.allclose(first.sigmas, torch.tensor(HELD_OUT_SIGMAS))
    assert bool((first.noise[0] == first.noise[4]).all())


def test_the_average_warms_up() -> None:
    weight = torch.nn.Parameter(torch.zeros(1))
    average = Average([weight], 0.99)
    expected = 0.0
    for n in range(1, 40):
        with torch.no_grad():
            weight.add_(1)
        average.update()
        decay = min(0.99, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.item()
    assert float(average.values[0]) == pytest.approx(expected, rel=1e-5)
    with average.applied():
        assert weight.item() == average.values[0].item()
    assert weight.item() == 39


def test_targets_that_match_nothing_and_optimisers_that_are_not_there_are_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="matches none of the .* linear modules"):
        trainer(tmp_path, settings(targets="no_such_module"))
    with pytest.raises(UnsupportedCombination, match="sdxl"):
        objective_of("sdxl", 1.0)
    with pytest.raises(ProviderUnavailable, match="needs the package prodigyopt"):
        trainer(tmp_path, settings(optimiser="prodigy", learning_rate=1.0))


def _qwen() -> Any:
    torch.manual_seed(0)
    return QwenImageTransformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=32, axes_dims_rope=(4, 6, 6), in_channels=64
    )


def test_qwen_trains_every_module_that_can_learn_and_no_other() -> None:
    model, data = _qwen(), training_set()
    names = target_names(model, TARGETS["qwen-image"])
    ends = ("attn.to_add_out", "attn.add_q_proj", "txt_mlp.net.0.proj", "txt_mlp.net.2")
    dead = {f"transformer_blocks.1.{end}" for end in ends}
    assert dead.isdisjoint(names) and {name.replace("blocks.1", "blocks.0") for name in dead} <= set(names)
    parameters = add_lora(model, TARGETS["qwen-image"], 4, 4, seed=1)
    with torch.no_grad():
        for p in parameters:  # B begins at zero, and lets nothing through to A
            p.add_(0.01)
    losses(QwenObjective(), model, Draw(1, "qwen_shift").batch(data, [0, 1], 0, 0)).sum().backward()
    still = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
    assert still == [] and len(parameters) == 2 * len(names)


def test_qwen_learns(tmp_path: Path) -> None:
    told = settings(steps=20, batch=4, checkpoint_every=20, sigma_sampling="qwen_shift")
    made = Trainer(told, _qwen(), training_set(), tmp_path, replace(CARD, family="qwen-image"))
    untrained = made.held_out_loss()
    outcome, _ = run(made, tmp_path)
    assert untrained is not None and outcome.held_out is not None and outcome.held_out < 0.99 * untrained


def test_the_benchmark_of_a_step_runs_and_both_loops_learn_the_same_thing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks.training_step import main

    assert main(["--tiny", "--eager", "--steps", "2", "--write", str(tmp_path / "table.md")]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["way"] for one in found] == [
        f"{whose}, blocks {blocks}" for whose in ("stock diffusers", "ours") for blocks in ("computed twice", "kept")
    ]
    assert all(one["step_seconds"] > 0 and 0.5 < one["loss"] / found[0]["loss"] < 2 for one in found)
    assert (tmp_path / "table.md").read_text().count("\n|") == 6
