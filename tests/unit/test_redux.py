"""Redux: words behind the prompt's, fewer by a factor, quieter by a weight, and of nobody none."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file

from deployments.contracts import IdentityRequest, IdentityTokens
from deployments.denoisers import flux1_loop
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.errors import CheckpointMismatch, InvalidRequest
from deployments.identity.redux import TEXT_KEY, ReduxAdapter, ReduxConfig, ReduxProjection, averaged, config_of, load_projection
from tests.mini_drawing import FLUX, forwards, spec, texts
from tests.named_weights import fill, named_tensor
from training.mini.generator.sizes import REDUX

SIDE = 8


def _file(folder: Path) -> Path:
    projection = ReduxProjection(REDUX)
    fill(projection)
    save_file(projection.state_dict(), folder / "redux.safetensors")
    return folder / "redux.safetensors"


def _transformer(text_dim: int = REDUX.text_dim) -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=1,
        joint_attention_dim=text_dim, pooled_projection_dim=8, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def _request(weight: float = 1.0, **options: str | float) -> IdentityRequest:
    return IdentityRequest(method="redux", weight=weight, options=options)


def _words(pictures: int = 1) -> torch.Tensor:
    return named_tensor("words", pictures, SIDE * SIDE, REDUX.text_dim)


def test_the_published_sizes() -> None:
    with torch.device("meta"):
        projection = ReduxProjection(ReduxConfig())
    shapes = {name: tuple(tensor.shape) for name, tensor in projection.state_dict().items()}
    assert shapes == {
        "redux_up.weight": (12288, 1152), "redux_up.bias": (12288,), "redux_down.weight": (4096, 12288), "redux_down.bias": (4096,),
    }  # fmt: skip
    assert config_of(shapes, "it") == ReduxConfig()
    assert sum(tensor.numel() for tensor in projection.state_dict().values()) / 1e6 == pytest.approx(64.5, abs=0.05)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"redux_up.weight": None}, "no Redux: it has no redux_up.weight"),
        ({"redux_up.bias": None}, "1 missing: redux_up.bias"),
        ({"norm.weight": torch.ones(1)}, "1 left over: norm.weight"),
        ({"redux_up.bias": torch.ones(3)}, "1 wrong shape: redux_up.bias"),
        ({"redux_down.weight": torch.ones(3)}, "makes no sense"),
    ],
)
def test_a_file_that_is_not_wholly_redux_is_refused(tmp_path: Path, change: dict[str, torch.Tensor | None], said: str) -> None:
    file = _file(tmp_path)
    save_file({name: tensor for name, tensor in (load_file(file) | change).items() if tensor is not None}, file)
    with pytest.raises(CheckpointMismatch, match=said):
        load_projection(file)


def test_a_file_for_another_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMismatch, match="words of 128 numbers, the transformer reads words of 20"):
        ReduxAdapter(_transformer(20), _file(tmp_path))


@pytest.mark.parametrize(("factor", "side"), [(1, 8), (2, 4), (3, 2), (4, 2), (5, 1)])
def test_words_of_neighbours_become_their_mean(factor: int, side: int) -> None:
    small = averaged(_words(), factor)
    assert small.shape == (1, side * side, REDUX.text_dim)
    if factor == 2:
        torch.testing.assert_close(small[0, 1], _words()[0, [2, 3, SIDE + 2, SIDE + 3]].mean(0))
    if factor == 5:
        torch.testing.assert_close(small[0, 0], _words()[0].mean(0))


def test_words_that_are_no_picture_are_a_mistake() -> None:
    with pytest.raises(ValueError, match="10 words are no square grid"):
        averaged(named_tensor("words", 1, 10, 4), 2)


def test_every_picture_speaks_in_its_turn_by_the_weight(tmp_path: Path) -> None:
    adapter = ReduxAdapter(_transformer(), _file(tmp_path))
    assert adapter.key == TEXT_KEY == flux1_loop.TEXT_KEY
    first, second = adapter.condition(_words(2), _request(0.4, downsampling=2))
    assert first.shape == second.shape == (1, 16, REDUX.text_dim)
    torch.testing.assert_close(second, 0.4 * averaged(_words(2)[1:], 2))
    assert adapter.condition(_words()[:, :0], _request()) == ()


@pytest.mark.parametrize("factor", [0, 6, 1.5, "3", True])
def test_factors_that_there_are_not_are_refused(tmp_path: Path, factor: Any) -> None:
    adapter = ReduxAdapter(_transformer(), _file(tmp_path))
    with pytest.raises(InvalidRequest, match="There is no downsampling"):
        adapter.condition(_words(), _request(downsampling=factor))


def test_what_redux_does_not_know_is_refused(tmp_path: Path) -> None:
    adapter = ReduxAdapter(_transformer(), _file(tmp_path))
    with pytest.raises(InvalidRequest, match="no option weight_type"):
        adapter.condition(_words(), _request(weight_type="linear"))
    with pytest.raises(InvalidRequest, match="takes no mask"):
        adapter.condition(_words(), _request(), torch.ones(1, 4, 1))
    with pytest.raises(ValueError, match=r"\[pictures, words, 128\]"):
        adapter.condition(_words()[..., :64], _request())


@pytest.fixture(scope="module")
def mini(tmp_path_factory: pytest.TempPathFactory) -> Flux1Denoiser:
    """With a Redux of drawn weights."""
    return Flux1Denoiser(FLUX, {"redux-mini": partial(ReduxAdapter, path=_file(tmp_path_factory.mktemp("redux")))}, torch_threads=1)


def _person() -> IdentityTokens:
    return IdentityTokens("redux-mini", _words(), _words()[:, :0])


def test_pictures_with_words_without_and_with_fewer(mini: Flux1Denoiser) -> None:
    base = mini.draw(spec(), texts()).picture
    all_, fewer = (mini.draw(spec(_request(downsampling=factor)), texts(), [_person()]).picture for factor in (1, 3))
    assert (mini.draw(spec(_request(0.0)), texts(), [_person()]).picture == base).all()
    assert (all_ != base).mean() > 0.2 and (fewer != all_).mean() > 0.2
    mini.eject()
    assert (mini.draw(spec(), texts()).picture == base).all()


def test_only_the_prompts_pass_reads_them_and_only_in_the_window(tmp_path: Path) -> None:
    mini = Flux1Denoiser(FLUX, {"redux-mini": partial(ReduxAdapter, path=_file(tmp_path))}, torch_threads=1)
    lengths: list[int] = []

    def note(module: torch.nn.Module, args: object, given: dict[str, Any]) -> None:
        lengths.append(given["encoder_hidden_states"].shape[1])

    transformer: Any = mini.transformer
    handle = transformer.register_forward_pre_hook(note, with_kwargs=True)
    request = IdentityRequest(method="redux", end=0.5)
    with forwards(mini) as started:
        mini.draw(spec(request, true_cfg_scale=2.0), texts(), [_person()])
    handle.remove()
    words = texts().states.shape[1]
    assert len(started) == 8 and lengths == [words + SIDE * SIDE, words] * 2 + [words] * 4
