"""InstantX and Redux at mini's size: they are trained as they are served."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from PIL import Image
from torch import Tensor

from deployments.contracts import RGB
from deployments.identity.image_attention import IMAGE_KEY, GatedTerm, ImageAttention
from deployments.identity.instantx_ip_adapter import InstantX
from tests.mini_drawing import PACK
from tests.named_weights import fill, named_tensor
from training.mini.flux_folder import flux_config
from training.mini.generator.bank import References
from training.mini.generator.flow import position_ids
from training.mini.generator.forward import Prompt, TrainableFlux
from training.mini.generator.siglip import SiglipAdapters
from training.mini.generator.sizes import INSTANTX
from training.mini.heldout import SAMPLE_CHARACTERS

SAMPLES = PACK.parents[1] / "samples" / "characters"
PEOPLE = [name.lower() for name in SAMPLE_CHARACTERS[:3]]
SIDE, WORDS, HEADS = 8, 5, 4
BOTH, NOBODY_LEFT_OUT = torch.tensor([0, 1]), torch.tensor([False, False])


class _Step:
    """One call of a transformer of mini's size, in serving's form and in training's."""

    def __init__(self) -> None:
        torch.manual_seed(5)
        self.transformer: Any = FluxTransformer2DModel(**flux_config()).requires_grad_(False)
        self.noisy, self.times, self.guidance = torch.randn(2, SIDE * SIDE // 4, 64), torch.rand(2), torch.full((2,), 2.0)
        self.prompt = Prompt(torch.randn(2, WORDS, 128), torch.randn(2, 128))

    @torch.no_grad()
    def served(self, states: Tensor, **attention: Any) -> Tensor:
        ids = position_ids(SIDE, SIDE, states.shape[1], "cpu")
        velocity: Tensor = self.transformer(
            hidden_states=self.noisy, encoder_hidden_states=states, pooled_projections=self.prompt.pooled, timestep=self.times,
            guidance=self.guidance, txt_ids=ids[: states.shape[1]], img_ids=ids[states.shape[1] :], joint_attention_kwargs=attention,
            return_dict=False,
        )[0]  # fmt: skip
        return velocity

    def trained(self, **attached: Any) -> Tensor:
        flux = TrainableFlux(copy.deepcopy(self.transformer), SIDE, WORDS, compiled=False)
        return flux.velocity(self.noisy, self.prompt, self.times, self.guidance, **attached)


def test_training_adds_what_serving_adds_for_instantx() -> None:
    step, adapter = _Step(), InstantX(INSTANTX)
    fill(adapter)
    with torch.no_grad():
        pairs = adapter.keys_values(named_tensor("tokens", 2, INSTANTX.tokens, INSTANTX.token_dim), HEADS)
        keys, values = (torch.stack(parts) for parts in zip(*pairs, strict=True))
    base = step.served(step.prompt.states)
    attention = ImageAttention(step.transformer)
    served = step.served(step.prompt.states, **{IMAGE_KEY: (GatedTerm(keys, values, torch.ones(len(keys))),)})
    attention.eject()
    torch.testing.assert_close(step.trained(gated=pairs), served, atol=1e-5, rtol=1e-5)
    assert (served - base).abs().mean() > 0.01


def test_training_reads_words_as_serving_does() -> None:
    step, words = _Step(), named_tensor("words", 2, 9, 128)
    served = step.served(torch.cat([step.prompt.states, words], dim=1))
    torch.testing.assert_close(step.trained(words=words), served, atol=1e-5, rtol=1e-5)
    assert (served - step.served(step.prompt.states)).abs().mean() > 0.003


def _picture(name: str) -> RGB:
    return np.asarray(Image.open(SAMPLES / f"{name}.png").convert("RGB"))


def _references() -> References:
    """Of two pictures; only the whole picture is looked at."""
    whole = torch.from_numpy(np.stack([_picture(f"{name}-1") for name in PEOPLE[:2]])).permute(0, 3, 1, 2)
    small = torch.nn.functional.interpolate(whole.float(), size=(112, 112), mode="area").to(torch.uint8)
    return References(small, small[:, 0], torch.zeros(2, 512), small)


def _filled() -> SiglipAdapters:
    adapters = SiglipAdapters()
    for reader in adapters.instantx.ip_adapter:
        fill(reader)
    return adapters


@pytest.mark.parametrize("kind", ["gated", "words"])
def test_both_methods_learn_in_all_their_parts(kind: str) -> None:
    step, adapters = _Step(), _filled()
    attached = adapters.gated(_references(), BOTH, NOBODY_LEFT_OUT) if kind == "gated" else adapters.words(_references(), BOTH)
    step.trained(**attached).square().mean().backward()
    part = adapters.instantx if kind == "gated" else adapters.redux
    assert [name for name, p in part.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    # What only pools the patches does nothing for those who read the patches.
    silent = [name for name, p in adapters.siglip.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert all(("head." in name and kind == "words") or name.endswith("k_proj.bias") for name in silent)


@torch.no_grad()
def test_instantx_adds_nothing_for_nobody() -> None:
    step, adapters = _Step(), _filled()
    drawn = step.trained(**adapters.gated(_references(), BOTH, torch.tensor([True, False])))
    torch.testing.assert_close(drawn[0], step.trained()[0], atol=1e-5, rtol=1e-5)
    assert (drawn[1] - step.trained()[1]).abs().mean() > 0.01
