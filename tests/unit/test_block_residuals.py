"""Residuals inside the blocks of a transformer: when they are refused, how several live together, and that they go without a trace."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from torch import Tensor

from deployments.identity.block_residuals import BlockResiduals, Residual
from tests.named_weights import fill, named_tensor


def _transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=12, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    fill(model)
    return model.eval()


@torch.no_grad()
def _run(transformer: FluxTransformer2DModel, **items: object) -> Tensor:
    (velocity,) = transformer(
        hidden_states=named_tensor("picture", 1, 6, 8), encoder_hidden_states=named_tensor("text", 1, 4, 20),
        pooled_projections=named_tensor("pooled", 1, 12), timestep=torch.tensor([0.5]), img_ids=torch.zeros(6, 3),
        txt_ids=torch.zeros(4, 3), joint_attention_kwargs=items, return_dict=False,
    )  # fmt: skip
    assert isinstance(velocity, Tensor)
    return velocity


def _constant(image: Tensor, item: Any) -> Tensor:
    return torch.full_like(image, float(item)) * torch.linspace(-1, 1, image.shape[-1])


THREE: Sequence[Residual | None] = (_constant, None, _constant)


def test_a_residual_acts_only_when_its_own_item_comes() -> None:
    transformer = _transformer()
    base = _run(transformer)
    BlockResiduals(transformer, "mood", THREE)
    assert not torch.allclose(_run(transformer, mood=1.0), base, atol=1e-2)
    for items in ({}, {"mood": None}, {"mood": 0.0}, {"scale": 1.0}):
        assert torch.equal(_run(transformer, **items), base)


def test_a_residual_is_added_to_what_its_block_returns() -> None:
    transformer = _transformer()
    blocks: Any = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    seen: list[Tensor] = []

    def remember(image: Tensor, item: Any) -> Tensor:
        seen.append(image)
        return _constant(image, item)

    BlockResiduals(transformer, "mood", (None, None, remember))
    returned: list[tuple[Tensor, Tensor]] = []
    blocks[2].register_forward_hook(lambda module, args, output: returned.append(output))
    _run(transformer, mood=1.0)
    ((text, image),) = returned
    assert text.shape == (1, 4, 32)
    assert torch.equal(image, seen[0] + _constant(seen[0], 1.0))


def test_two_methods_live_together_and_go_in_reverse_order() -> None:
    transformer = _transformer()
    base = _run(transformer)
    mood, taste = BlockResiduals(transformer, "mood", THREE), BlockResiduals(transformer, "taste", THREE)
    one, both = _run(transformer, mood=0.5), _run(transformer, mood=0.5, taste=0.25)
    torch.testing.assert_close(_run(transformer, taste=0.5), one)
    torch.testing.assert_close(both, _run(transformer, mood=0.75))
    with pytest.raises(ValueError, match="taste"):
        mood.eject()
    taste.eject()
    assert torch.equal(_run(transformer, mood=0.5), one)
    mood.eject()
    assert torch.equal(_run(transformer), base)


def test_what_was_injected_after_a_cache_or_twice_is_refused() -> None:
    transformer = _transformer()
    transformer.enable_cache(FirstBlockCacheConfig())
    with pytest.raises(ValueError, match="before caches and offloads"):
        BlockResiduals(transformer, "mood", THREE)
    transformer.disable_cache()
    BlockResiduals(transformer, "mood", THREE)
    with pytest.raises(ValueError, match="already injected"):
        BlockResiduals(transformer, "mood", THREE)


def test_one_residual_a_block_is_asked_for() -> None:
    transformer = _transformer()
    with pytest.raises(ValueError, match="2 residuals for 3 blocks"):
        BlockResiduals(transformer, "mood", THREE[:2])
    assert not any("_diffusers_hook" in vars(module) for module in transformer.modules())


def test_ejecting_twice_is_refused() -> None:
    residuals = BlockResiduals(_transformer(), "mood", THREE)
    residuals.eject()
    with pytest.raises(ValueError, match="ejected already"):
        residuals.eject()


def test_ejecting_keeps_what_else_was_put_in_place_of_a_forward() -> None:
    transformer = _transformer()
    block: Any = transformer.transformer_blocks[0]
    original = block.forward

    def patched(*args: Any, **kwargs: Any) -> Any:
        text, image = original(*args, **kwargs)
        return text, image * 2

    block.forward = patched
    base = _run(transformer)
    BlockResiduals(transformer, "mood", THREE).eject()
    assert block.forward is patched
    assert torch.equal(_run(transformer), base)
