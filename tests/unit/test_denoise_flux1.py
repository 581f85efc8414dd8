"""The FLUX denoiser on the embedded pack: equal to stock where stock can do the same, to a plain restatement where it cannot."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor

from deployments.contracts import RGB, GenerationSpec, IdentityRequest, IdentityTokens
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.denoisers.flux1_loop import Call, Text, denoise
from deployments.denoisers.latents import Grid, noise, positions, to_picture, unpack
from deployments.denoisers.schedule import sampler
from deployments.errors import CheckpointMismatch, InvalidRequest, UnsupportedCombination
from deployments.identity.base import IdentityAdapter
from deployments.identity.pulid_adapter import PuLIDAdapter
from deployments.weights import safetensors_header
from tests.mini_drawing import (
    ATTACH,
    FLUX,
    PERSON,
    PULID,
    PULID_FILE,
    SIZE,
    STEPS,
    XLABS,
    adapter_layers,
    denoiser,
    forwards,
    pipeline,
    pulid_person,
    request,
    spec,
    texts,
    xlabs_person,
)

GRID = Grid(SIZE // 8, SIZE // 8, 16)


@pytest.fixture(scope="module")
def flux() -> Flux1Denoiser:
    """With both methods attached."""
    return denoiser(PULID, XLABS)


@pytest.fixture(scope="module")
def base(flux: Flux1Denoiser) -> RGB:
    return flux.draw(spec(), texts()).picture


def _differ(one: RGB, other: RGB) -> float:
    """Mean difference in grey levels."""
    return float(np.abs(one.astype(np.float32) - other).mean())


# --- stock ------------------------------------------------------------------------------------------------------------------------


def _stock(wanted: GenerationSpec, output: str, **extra: Any) -> Any:
    given = texts()
    return pipeline()(
        prompt_embeds=given.states[:1], pooled_prompt_embeds=given.pooled[:1], width=wanted.width, height=wanted.height,
        num_inference_steps=wanted.steps, guidance_scale=wanted.guidance_scale, generator=torch.Generator().manual_seed(wanted.seed),
        output_type=output, **extra,
    ).images  # fmt: skip


@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
def test_without_identity_the_latents_are_those_of_stock_fluxpipeline(flux: Flux1Denoiser, true_cfg: float) -> None:
    given, cfg = texts(), true_cfg != 1
    negative = {"negative_prompt_embeds": given.states[1:], "negative_pooled_prompt_embeds": given.pooled[1:], "true_cfg_scale": true_cfg}
    stock = _stock(spec(), "latent", **(negative if cfg else {}))
    call = Call(
        noise(GRID, torch.Generator().manual_seed(spec().seed)), positions(GRID), Text(given.states[:1], given.pooled[:1]), 2.5,
        negative=Text(given.states[1:], given.pooled[1:]) if cfg else None, true_cfg_scale=true_cfg,
    )  # fmt: skip
    scheduler = sampler(pipeline().scheduler.config, STEPS, GRID.tokens)
    with torch.inference_mode():
        ours = denoise(flux.transformer, scheduler, call, before_forward=lambda: None, after_step=lambda step: None)
    assert float((ours - stock).abs().max() / stock.abs().max()) <= 1e-5


@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
def test_without_identity_the_picture_is_stocks(flux: Flux1Denoiser, size: tuple[int, int]) -> None:
    wanted = spec(width=size[0], height=size[1])
    picture = flux.draw(wanted, texts()).picture
    stock = (_stock(wanted, "np")[0] * 255).round()
    assert picture.shape == (size[1], size[0], 3) and picture.dtype == np.uint8
    # An error of 1e-5 may carry a pixel over the edge between two levels, no further.
    assert np.abs(picture - stock).max() <= 1


# --- a plain restatement ------------------------------------------------------------------------------------------------------------


class _Plain:
    """The loop once more, with nothing that makes it fast, safe or general: a transformer of its own, Euler by hand."""

    def __init__(self) -> None:
        self.transformer = FluxTransformer2DModel.from_pretrained(FLUX, subfolder="transformer", dtype=torch.float32).eval()
        self.adapters: dict[str, IdentityAdapter] = {model: attach(self.transformer) for model, attach in ATTACH.items()}

    @torch.no_grad()
    def draw(self, people: Sequence[tuple[IdentityTokens, IdentityRequest, Iterable[int]]], scale: float, negative: Iterable[int]) -> RGB:
        """people: each with the steps in which it acts; negative: the steps with a second pass, at true CFG `scale`."""
        levels = torch.linspace(1, 1 / STEPS, STEPS)
        levels = torch.cat([2 * levels / (1 + levels), torch.zeros(1)])  # mini's static shift of 2
        latents = noise(GRID, torch.Generator().manual_seed(spec().seed))
        for step in range(STEPS):
            acting = [(tokens, wanted) for tokens, wanted, steps in people if step in steps]
            velocity = self._velocity(0, latents, levels[step], [(x.model, x.tokens, wanted) for x, wanted in acting])
            if step in negative:
                away = self._velocity(1, latents, levels[step], [(x.model, x.unconditional, wanted) for x, wanted in acting])
                velocity = scale * velocity + (1 - scale) * away
            latents = latents + (levels[step + 1] - levels[step]) * velocity
        vae = pipeline().vae
        return to_picture(vae.decode(unpack(latents, GRID) / vae.config.scaling_factor + vae.config.shift_factor).sample)

    def _velocity(self, row: int, latents: Tensor, level: Tensor, acting: Sequence[tuple[str, Tensor, IdentityRequest]]) -> Tensor:
        items: dict[str, Any] = {}
        for model, tokens, wanted in acting:
            adapter = self.adapters[model]
            items[adapter.key] = items.get(adapter.key, ()) + adapter.condition(tokens, wanted)
        (velocity,) = self.transformer(
            latents, texts().states[row : row + 1], texts().pooled[row : row + 1], level.view(1), positions(GRID),
            torch.zeros(texts().states.shape[1], 3), torch.tensor([2.5]), joint_attention_kwargs=items, return_dict=False,
        )  # fmt: skip
        assert isinstance(velocity, Tensor)
        return velocity


@pytest.fixture(scope="module")
def plain() -> _Plain:
    return _Plain()


ALL, LATE, EARLY = range(STEPS), range(2, STEPS), range(2)


@pytest.mark.parametrize("model", [PULID, XLABS])
@pytest.mark.parametrize(("window", "steps"), [((0.0, 1.0), ALL), ((0.5, 1.0), LATE), ((0.0, 0.5), EARLY), ((0.25, 0.75), range(1, 3))])
def test_a_window_is_the_identity_switched_on_and_off_by_hand(
    flux: Flux1Denoiser, plain: _Plain, base: RGB, model: str, window: tuple[float, float], steps: range
) -> None:
    wanted, ada = request(model, start=window[0], end=window[1]), PERSON[model]("Ada")
    picture = flux.draw(spec(wanted), texts(), [ada]).picture
    assert np.abs(picture.astype(int) - plain.draw([(ada, wanted, steps)], 1, ())).max() <= 1
    assert _differ(picture, base) > 1


@pytest.mark.parametrize(("start", "steps"), [(0.0, ALL), (0.5, LATE)])
def test_true_cfg_makes_a_second_pass_with_nobody_in_it_at_the_same_weight(
    flux: Flux1Denoiser, plain: _Plain, start: float, steps: range
) -> None:
    ada, bruno = pulid_person("Ada"), xlabs_person("Bruno")
    requests = (request(PULID, weight=0.7, start=0.25), request(XLABS, weight=0.6, end=0.75))
    wanted = spec(*requests, true_cfg_scale=2.0, true_cfg_start=start)
    restated = plain.draw([(ada, requests[0], range(1, 4)), (bruno, requests[1], range(3))], 2.0, steps)
    assert np.abs(flux.draw(wanted, texts(), [ada, bruno]).picture.astype(int) - restated).max() <= 1
    elsewhere = plain.draw([(ada, requests[0], range(1, 4)), (bruno, requests[1], range(3))], 2.0, EARLY)
    assert _differ(restated, elsewhere) > 1


def test_negative_passes_are_made_only_where_true_cfg_acts(flux: Flux1Denoiser) -> None:
    def passes(**changes: Any) -> int:
        with forwards(flux) as count:
            flux.draw(spec(**changes), texts())
        return len(count)

    assert passes() == passes(true_cfg_scale=1.005) == passes(true_cfg_scale=3.0, true_cfg_start=1.0) == STEPS
    assert passes(true_cfg_scale=3.0) == 2 * STEPS
    assert passes(true_cfg_scale=3.0, true_cfg_start=0.5) == STEPS + len(LATE)


# --- weight, people, methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [PULID, XLABS])
@pytest.mark.parametrize("true_cfg", [1.0, 2.0])
def test_weight_nought_is_the_base_bit_for_bit_and_costs_nothing(flux: Flux1Denoiser, model: str, true_cfg: float) -> None:
    plain, ada = flux.draw(spec(true_cfg_scale=true_cfg), texts()).picture, PERSON[model]("Ada")
    with adapter_layers(flux) as calls:
        drawn = flux.draw(spec(request(model, weight=0.0), true_cfg_scale=true_cfg), texts(), [ada])
    assert np.array_equal(drawn.picture, plain)
    assert not calls


def test_people_add_up_in_any_order_and_methods_combine(flux: Flux1Denoiser) -> None:
    def draw(*models_and_names: tuple[str, str]) -> RGB:
        people = [PERSON[model](name) for model, name in models_and_names]
        return flux.draw(spec(*(request(model, weight=0.5) for model, _ in models_and_names)), texts(), people).picture

    for model in (PULID, XLABS):
        ada, bruno, both = draw((model, "Ada")), draw((model, "Bruno")), draw((model, "Ada"), (model, "Bruno"))
        assert min(_differ(both, ada), _differ(both, bruno), _differ(ada, bruno)) > 0.2
        assert np.abs(both.astype(int) - draw((model, "Bruno"), (model, "Ada"))).max() <= 1
    mixed = draw((PULID, "Ada"), (XLABS, "Bruno"))
    assert min(_differ(mixed, draw((PULID, "Ada"))), _differ(mixed, draw((XLABS, "Bruno")))) > 0.2


def test_the_same_person_twice_at_half_weight_is_that_person_once(flux: Flux1Denoiser) -> None:
    for model in (PULID, XLABS):
        ada = PERSON[model]("Ada")
        twice = flux.draw(spec(request(model, weight=0.4), request(model, weight=0.4)), texts(), [ada, ada]).picture
        once = flux.draw(spec(request(model, weight=0.8)), texts(), [ada]).picture
        assert np.abs(twice.astype(int) - once).max() <= 1


def test_a_picture_does_not_depend_on_what_was_drawn_before(flux: Flux1Denoiser, base: RGB) -> None:
    ada, bruno = pulid_person("Ada"), xlabs_person("Bruno")
    wanted = [(spec(request(PULID), seed=3), [ada]), (spec(request(XLABS), seed=4), [bruno]), (spec(), [])]
    alone = [denoiser(PULID, XLABS).draw(one, texts(), people).picture for one, people in wanted]
    after = [flux.draw(one, texts(), people).picture for one, people in (*wanted, *reversed(wanted))]
    for index, picture in enumerate(alone):
        assert np.array_equal(after[index], picture) and np.array_equal(after[-1 - index], picture)
    assert np.array_equal(alone[2], base)
    assert not np.array_equal(flux.draw(spec(seed=8), texts()).picture, base)


def test_keys_and_values_are_made_once_a_request_and_not_once_a_step(flux: Flux1Denoiser) -> None:
    people = [pulid_person("Ada"), xlabs_person("Ada")]

    def calls(steps: int) -> dict[int, int]:
        with adapter_layers(flux) as seen:
            flux.draw(spec(request(PULID), request(XLABS), steps=steps), texts(), people)
        return {module: seen.count(module) for module in seen}

    few, many = calls(2), calls(4)
    once = [module for module in few if few[module] == many[module] == 1]
    every_step = [module for module in few if (few[module], many[module]) == (2, 4)]
    readers = len(pipeline().transformer.transformer_blocks) * 2
    assert len(few) == len(once) + len(every_step)
    # PuLID's to_kv once, to_q and to_out every step; all of XLabs' layers once.
    assert len(every_step) == 2 * (len(once) - readers) > 0


# --- attaching, ejecting ------------------------------------------------------------------------------------------------------------


def test_attached_and_ejected_adapters_leave_the_base_bit_for_bit(base: RGB) -> None:
    flux = denoiser()
    names = set(flux.transformer.state_dict())
    assert np.array_equal(flux.draw(spec(), texts()).picture, base)
    both = denoiser(PULID, XLABS)
    assert set(both.transformer.state_dict()) == names
    both.draw(spec(request(PULID), request(XLABS)), texts(), [pulid_person("Ada"), xlabs_person("Ada")])
    both.eject()
    assert np.array_equal(both.draw(spec(), texts()).picture, base)
    assert not any("_diffusers_hook" in vars(module) for module in both.transformer.modules())
    assert {type(processor) for processor in both.transformer.attn_processors.values()} == {FluxAttnProcessor}
    with pytest.raises(UnsupportedCombination, match="pulid-mini is not attached"):
        both.draw(spec(request(PULID)), texts(), [pulid_person("Ada")])


def test_the_tokens_a_caller_hands_in_stay_as_they_are(flux: Flux1Denoiser) -> None:
    ada = pulid_person("Ada")
    before = ada.tokens.clone(), ada.unconditional.clone(), texts().states.clone()
    flux.draw(spec(request(PULID), true_cfg_scale=2.0), texts(), [ada])
    assert all(torch.equal(*pair) for pair in zip(before, (ada.tokens, ada.unconditional, texts().states), strict=True))


def test_every_step_is_reported_and_decoding_is_the_last(flux: Flux1Denoiser) -> None:
    seen: list[tuple[int, int]] = []
    drawn = flux.draw(spec(), texts(), on_step=lambda progress: seen.append((progress.step, progress.total)))
    assert seen == [(step, STEPS + 1) for step in range(1, STEPS + 2)]
    assert list(drawn.seconds) == ["wait", "condition", "denoise", "decode"]
    assert drawn.seconds["denoise"] > drawn.seconds["condition"] >= 0


def test_bf16_draws_nearly_the_same_picture(base: RGB) -> None:
    half = denoiser(PULID, XLABS, dtype=torch.bfloat16)
    picture = half.draw(spec(), texts()).picture
    assert 0 < _differ(picture, base) < 8
    people = [pulid_person("Ada"), xlabs_person("Bruno")]
    steered = half.draw(spec(request(PULID), request(XLABS), true_cfg_scale=2.0), texts(), people).picture
    assert _differ(steered, picture) > 1


# --- refusals -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{"width": 60}, {"height": 0}, {"width": -8}, {"steps": 0}])
def test_sizes_and_steps_that_cannot_be_drawn_are_refused(flux: Flux1Denoiser, changes: dict[str, int]) -> None:
    with forwards(flux) as count, pytest.raises(InvalidRequest):
        flux.draw(spec(**changes), texts())
    assert not count


def test_what_does_not_belong_together_is_refused_before_any_forward(flux: Flux1Denoiser) -> None:
    one = type(texts())(texts().states[:1], texts().pooled[:1])
    stranger = IdentityTokens("pulid-dev", pulid_person("Ada").tokens, pulid_person("Ada").unconditional)
    cases: list[tuple[type[Exception], str, Callable[[], object]]] = [
        (ValueError, "embeddings of 2 texts", lambda: flux.draw(spec(true_cfg_scale=2.0), one)),
        (ValueError, "0 identities came for 1", lambda: flux.draw(spec(request(PULID)), texts())),
        (ValueError, "1 identities came for 0", lambda: flux.draw(spec(), texts(), [pulid_person("Ada")])),
        (UnsupportedCombination, "pulid-dev is not attached.*pulid-mini", lambda: flux.draw(spec(request(PULID)), texts(), [stranger])),
        (
            InvalidRequest,
            "no weight_type 'steep'.*linear",
            lambda: flux.draw(spec(request(XLABS, options={"weight_type": "steep"})), texts(), [xlabs_person("Ada")]),
        ),
        (
            InvalidRequest,
            "no option weight_type",
            lambda: flux.draw(spec(request(PULID, options={"weight_type": "linear"})), texts(), [pulid_person("Ada")]),
        ),
    ]
    for kind, said, draw in cases:
        with forwards(flux) as count, pytest.raises(kind, match=said):
            draw()
        assert not count


def test_a_folder_that_lacks_a_tensor_is_refused_where_stock_would_invent_one(tmp_path: Path) -> None:
    shutil.copytree(FLUX, tmp_path / "flux1")
    file = tmp_path / "flux1" / "transformer" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    save_file({name: tensor for name, tensor in state.items() if name != "proj_out.bias"}, file)
    with pytest.raises(CheckpointMismatch, match="1 missing keys: proj_out.bias"):
        Flux1Denoiser(tmp_path / "flux1")


def test_an_adapter_file_that_lacks_a_tensor_of_either_half_is_refused(tmp_path: Path) -> None:
    state, metadata = load_file(PULID_FILE), dict(safetensors_header(PULID_FILE).metadata)
    for lost in ("pulid_ca.0.to_out.weight", "pulid_encoder.latents"):
        save_file({name: tensor for name, tensor in state.items() if name != lost}, tmp_path / "pulid.safetensors", metadata=metadata)
        with pytest.raises(CheckpointMismatch, match=f"1 missing: {lost}"):
            PuLIDAdapter(pipeline().transformer, tmp_path / "pulid.safetensors")
