"""Room for LoRAs on a compiled transformer: exact, gone without a trace, and one graph for whatever is applied."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn
from torch._dynamo.utils import counters

from deployments.denoisers.lora.formats import open_lora, read_lora
from deployments.denoisers.lora.slots import LoraSlots
from deployments.denoisers.lora.stack import applied
from deployments.denoisers.lora.weights import LoraWeights
from deployments.errors import InvalidRequest, LoraIncompatible
from tests.mini_drawing import FLUX, PACK

ROOM = 24


@pytest.fixture
def model() -> Any:
    return FluxTransformer2DModel.from_pretrained(FLUX / "transformer").requires_grad_(False).eval()


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def look(model: Any) -> Tensor:
    """One forward on random inputs, fp32."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden_states": (1, 16, 64), "encoder_hidden_states": (1, 6, 128), "pooled_projections": (1, 128)}
    given = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    still = {"timestep": torch.tensor([0.6]), "guidance": torch.tensor([2.5]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}
    with torch.inference_mode():
        (velocity,) = model(**given, **still, return_dict=False)
    drawn: Tensor = velocity.clone()
    return drawn


def lora(model: Any, seed: int, rank: int, *names: str) -> LoraWeights:
    generator, state = torch.Generator().manual_seed(seed), {}
    for name in names:
        module = model.get_submodule(name)
        state[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) / 16
        state[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) / 8
        state[f"{name}.alpha"] = torch.tensor(3.0)
    return read_lora(state, model)


def stacks(model: Any) -> list[list[tuple[LoraWeights, float]]]:
    """Of other modules, ranks and scales each."""
    ada = open_lora(PACK / "loras" / "ada.safetensors", model).to("cpu", torch.float32)
    ends = lora(model, 1, 3, "x_embedder", "proj_out", "norm_out.linear")
    middle = lora(model, 2, 11, "transformer_blocks.0.attn.to_q", "single_transformer_blocks.3.proj_mlp")
    return [[(ada, 1.0)], [(middle, -0.4), (ada, 0.3), (ends, 2.0)], [(ends, 0.7)], [], [(ada, 0.25), (ada, 0.5)]]


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


def test_room_filled_is_the_stack_and_room_emptied_is_the_base(model: Any) -> None:
    base, names = look(model), set(model.state_dict())
    expected = []
    for stack in stacks(model):
        with applied(model, stack):
            expected.append(look(model))
    slots = LoraSlots(model, ROOM)
    for stack, whole in zip(stacks(model), expected, strict=True):
        with slots.applied(stack):
            assert distance(look(model), whole) < 1e-5
        assert torch.equal(look(model), base)
    assert set(model.state_dict()) == names
    slots.eject()
    assert torch.equal(look(model), base) and not list(_roomy(model))


def _roomy(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (type(module) is not nn.Linear or dict(module.named_buffers())):
            yield name


def test_compiled_blocks_are_compiled_once_whatever_is_applied(model: Any, dynamo: None) -> None:
    slots = LoraSlots(model, ROOM)
    base = look(model)
    with slots.applied(stacks(model)[1]):
        expected = look(model)
    for block in (*model.transformer_blocks, *model.single_transformer_blocks):
        block.compile(backend="eager", fullgraph=True)
    assert torch.equal(look(model), base)
    graphs = counters["stats"]["unique_graphs"]
    for stack in stacks(model) * 3:
        with slots.applied(stack):
            found = look(model)
        if len(stack) == 3:
            assert torch.equal(found, expected)
    assert counters["stats"]["unique_graphs"] == graphs <= 3
    assert torch.equal(look(model), base)


def test_what_does_not_fit_the_room_is_refused_and_leaves_it_empty(model: Any) -> None:
    slots, base = LoraSlots(model, 10), look(model)
    (ada,) = stacks(model)[0]
    with pytest.raises(LoraIncompatible, match="rank 16 together.* room for 10"), slots.applied([ada, ada]):
        raise AssertionError
    with pytest.raises(InvalidRequest, match="scale nan"), slots.applied([(ada[0], float("nan"))]):
        raise AssertionError
    with slots.applied([ada]), pytest.raises(RuntimeError, match="one at a time"), slots.applied([ada]):
        raise AssertionError
    with pytest.raises(KeyboardInterrupt), slots.applied([ada]):
        raise KeyboardInterrupt
    assert torch.equal(look(model), base)


def test_room_is_made_on_plain_modules_only(model: Any) -> None:
    with pytest.raises(ValueError, match="rank 0"):
        LoraSlots(model, 0)
    LoraSlots(model, 1)
    with pytest.raises(ValueError, match="no plain linear module"):
        LoraSlots(model, 1)
