"""Redux against diffusers' ReduxImageEncoder, and the words of a picture against those of black-forest-labs/flux's prepare_redux."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
from safetensors.torch import save_file
from torch import Tensor

from deployments.contracts import IdentityRequest
from deployments.denoisers.flux1_loop import Call, Influence, Text, denoise
from deployments.denoisers.schedule import sampler
from deployments.identity.redux import ReduxAdapter, averaged, load_projection
from tests.named_weights import fill, named_tensor
from tests.parity import cases
from tests.parity.agreement import TOLERANCE, relative_error

_WIDTH, _SIDE = 24, 9


def _reference() -> ReduxImageEncoder:
    encoder = ReduxImageEncoder(redux_dim=_WIDTH, txt_in_features=cases.FLUX["joint_attention_dim"])
    fill(encoder)
    return encoder.eval()


def _file(folder: Path) -> Path:
    save_file(_reference().state_dict(), folder / "redux.safetensors")
    return folder / "redux.safetensors"


def _patches() -> Tensor:
    return named_tensor("patches", 2, _SIDE * _SIDE, _WIDTH)


def test_the_words_are_those_of_diffusers(tmp_path: Path) -> None:
    with torch.no_grad():
        expected = _reference()(_patches()).image_embeds
        assert relative_error(load_projection(_file(tmp_path)).tokens(_patches()), expected) <= TOLERANCE


def _ended(transformer: FluxTransformer2DModel, states: Tensor, influences: list[Influence]) -> Tensor:
    given = cases.denoise_input()
    call = Call(given["noise"], given["positions"], Text(states, given["pooled"]), cases.GUIDANCE, influences=influences)
    scheduler = sampler(cases.SCHEDULE, cases.STEPS, given["noise"].shape[1])
    with torch.inference_mode():
        return denoise(transformer, scheduler, call, before_forward=lambda: None, after_step=lambda step: None)


def test_the_whole_loop_ends_where_the_published_concatenation_ends(tmp_path: Path) -> None:
    """prepare_redux: cat([T5's states, the picture's words]), at the position zero, and the text's own pooled vector."""
    transformer: Any = cases.transformer()
    states, words = cases.denoise_input()["states"], _reference()(_patches()[:1]).image_embeds.detach()
    adapter = ReduxAdapter(transformer, _file(tmp_path))
    own = adapter.condition(words, IdentityRequest(method="redux"))
    ours = _ended(transformer, states, [Influence(adapter.key, own, (), 0.0, 1.0)])
    assert relative_error(ours, _ended(transformer, torch.cat([states, words], dim=1), [])) <= TOLERANCE
    assert relative_error(ours, _ended(transformer, states, [])) > 0.01


def test_the_grid_goes_down_as_in_the_comfyui_node() -> None:
    """interpolate(mode="area") to side // factor, on a grid that the node turns round and back."""
    words = named_tensor("words", 2, _SIDE * _SIDE, 8)
    for factor in (2, 3, 4, 5):
        turned = words.view(2, _SIDE, _SIDE, 8).transpose(1, -1)
        small = F.interpolate(turned, size=(_SIDE // factor, _SIDE // factor), mode="area").transpose(1, -1).reshape(2, -1, 8)
        assert relative_error(averaged(words, factor), small) <= TOLERANCE
