"""fp8 storage: what is rounded in training is what comes back from the file, and the same weights give the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from training.mini.storage import MATRIX_DTYPE, fake_quantise, save_weights, stored

SMALLEST = 2.0**-9
"""e4m3's smallest number; its numbers below 2**-6 are this far apart."""


def _matrix() -> Tensor:
    """Every magnitude that weights have, and the corners: halves between neighbours, signed zeros, what is too large."""
    drawn = torch.randn(64, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-5, 1, 64)
    corners = [0.0, -0.0, -1e-7, SMALLEST / 2, -SMALLEST / 2, 1.5 * SMALLEST, 1.0625, 1.1875, 448.0, 463.0, 5e3, -5e3]
    drawn[0, : len(corners)] = torch.tensor(corners)
    return drawn


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


def test_a_stored_matrix_is_the_fake_quantised_one_bit_for_bit(tmp_path: Path) -> None:
    weight = _matrix()
    save_weights(tmp_path / "w.safetensors", stored({"w": weight}, MATRIX_DTYPE))
    loaded = load_file(tmp_path / "w.safetensors")["w"]
    assert loaded.dtype == torch.float8_e4m3fn
    assert _same_bits(loaded.float(), fake_quantise(weight))


def test_rounding_is_to_nearest_even_and_saturates() -> None:
    given = torch.tensor([1.0625, 1.1875, SMALLEST / 2, 1.5 * SMALLEST, 5e3, -5e3])
    assert fake_quantise(given).tolist() == [1.0, 1.25, 0.0, 2 * SMALLEST, 448.0, -448.0]


def test_the_error_is_half_a_step_at_most() -> None:
    weight = _matrix().clamp(-448, 448)
    step = torch.maximum(weight.abs() * 2.0**-3, torch.tensor(SMALLEST))
    assert ((fake_quantise(weight) - weight).abs() <= step / 2).all()


def test_the_gradient_passes_straight_through() -> None:
    weight = _matrix().requires_grad_()
    outgoing = torch.randn(64, 64)
    fake_quantise(weight).backward(outgoing)
    assert weight.grad is not None and torch.equal(weight.grad, outgoing)


def test_only_matrices_are_fp8_and_ties_are_written_once() -> None:
    table = torch.randn(5, 4)
    state = {"table": table, "tied": table, "bias": torch.randn(4), "kernel": torch.randn(2, 2, 3, 3), "steps": torch.tensor([7])}
    written = stored(state, MATRIX_DTYPE)
    assert {name: value.dtype for name, value in written.items()} == {
        "table": torch.float8_e4m3fn, "bias": torch.float16, "kernel": torch.float16, "steps": torch.int64,
    }  # fmt: skip
    assert stored(state)["table"].dtype == torch.float16


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 70_000.0])
def test_broken_weights_are_refused_by_name(broken: float) -> None:
    with pytest.raises(ValueError, match=r"'norm\.weight'"):
        stored({"linear.weight": torch.zeros(2, 2), "norm.weight": torch.tensor([0.0, broken])}, MATRIX_DTYPE)


def test_the_same_weights_give_the_same_bytes(tmp_path: Path) -> None:
    state, facts = {"b": torch.ones(3), "a": torch.zeros(2, 2)}, {f"fact {i}": "é" * i for i in range(8)}
    contents = set()
    for i in range(8):  # the library alone would order eight facts in eight ways
        save_weights(tmp_path / str(i) / "w.safetensors", stored(state), facts)
        contents.add((tmp_path / str(i) / "w.safetensors").read_bytes())
    assert len(contents) == 1
    with safe_open(tmp_path / "0" / "w.safetensors", "pt") as file:
        assert file.metadata() == facts | {"format": "pt"}
        assert torch.equal(file.get_tensor("b"), torch.ones(3).half())


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "w.safetensors"
    save_weights(path, {"w": torch.ones(2), "old": torch.ones(1)})
    with safe_open(path, "pt") as reader:
        save_weights(path, {"w": torch.zeros(2)})
        assert torch.equal(reader.get_tensor("w"), torch.ones(2)), "who had the old file open still reads it"
    assert load_file(path).keys() == {"w"}
    assert [p.name for p in path.parent.iterdir()] == ["w.safetensors"], "no draft is left"
