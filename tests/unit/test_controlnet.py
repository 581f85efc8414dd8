"""Union ControlNets around their forward: the published layouts, what is refused, what is never computed, and how controls add up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from deployments.catalog import Catalog, Entry, load_catalog
from deployments.contracts import RGB, ControlRequest, Guides
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.denoisers.flux1_controlnet import UnionControl, together
from deployments.denoisers.flux1_loop import Forward, Text
from deployments.denoisers.windows import active_steps
from deployments.errors import CheckpointMismatch, InvalidCatalog, InvalidRequest, MissingWeights, UnsupportedCombination
from deployments.weights import WeightFolder
from tests.mini_drawing import FLUX, PACK, SIZE, STEPS, forwards, spec, texts
from tests.named_weights import fill, named_tensor
from tests.parity import cases

MINI = PACK / "flux1-controlnet-union"
POSE: dict[str, int | None] = {"pose": 4}
# Of the catalogue's entries: what their config.json says, beyond what FLUX.1-dev's transformer says of itself, and their parameters.
PUBLISHED: dict[str, tuple[dict[str, Any], int]] = {
    "flux1-controlnet-union-pro": ({"num_layers": 5, "num_single_layers": 10, "num_mode": 10}, 3_301_956_608),
    "flux1-controlnet-union-pro-2": ({"num_layers": 6, "num_single_layers": 0, "num_mode": None}, 2_140_876_800),
}
FLUX_DEV = {
    "patch_size": 1, "in_channels": 64, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096,
    "pooled_projection_dim": 768, "guidance_embeds": True, "axes_dims_rope": [16, 56, 56],
}  # fmt: skip
# A base of 5 double and 5 single blocks: 4 residuals are spread over it by twos, hence the fourth is nobody's.
BASE: dict[str, Any] = cases.FLUX | {"num_layers": 5}
NET: dict[str, Any] = BASE | {"num_layers": 4, "num_single_layers": 0, "num_mode": None}


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return load_catalog()


@pytest.fixture(scope="module")
def transformer() -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(**BASE)
    fill(model)
    return model.eval()


@pytest.fixture(scope="module")
def unions() -> list[UnionControl]:
    """What the denoiser has opened."""
    return []


@pytest.fixture(scope="module")
def flux(unions: list[UnionControl]) -> Flux1Denoiser:
    """With the pack's ControlNet beside it."""

    def opened(base: FluxTransformer2DModel, **where: Any) -> UnionControl:
        unions.append(UnionControl(base, MINI, POSE, **where))
        return unions[-1]

    return Flux1Denoiser(FLUX, controls={"union": opened})


def _saved(folder: Path, **changes: Any) -> Path:
    net = FluxControlNetModel(**(NET | changes))
    fill(net)
    net.save_pretrained(folder)
    return folder


# --- layouts ------------------------------------------------------------------------------------------------------------------------


def _bytes_of_file(net: Any) -> int:
    """Of a safetensors file with these tensors in bf16: prefix, header padded to eights, data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, tensor in sorted(net.state_dict().items()):
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [at, at + 2 * tensor.numel()]}
        at += 2 * tensor.numel()
    text = len(json.dumps(header, separators=(",", ":")))
    return 8 + text + -text % 8 + at


@pytest.mark.parametrize("model", PUBLISHED)
def test_a_published_net_has_the_size_of_its_file_to_the_byte(catalog: Catalog, model: str) -> None:
    config, parameters = PUBLISHED[model]
    with torch.device("meta"):
        net: Any = FluxControlNetModel(**FLUX_DEV, **config)
    assert sum(tensor.numel() for tensor in net.parameters()) == parameters
    weight = catalog.entry(model).weights["controlnet"]
    assert isinstance(weight, WeightFolder)
    pinned = {file.file: file.bytes for file in weight.files}
    assert _bytes_of_file(net) == pinned["diffusion_pytorch_model.safetensors"]


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_catalogues_modes_are_those_of_the_net(catalog: Catalog, model: str) -> None:
    entry, tokens = catalog.entry(model), PUBLISHED[model][0]["num_mode"]
    modes, advice = _options(entry, "modes"), _options(entry, "per_mode")
    numbers = [number for number in modes.values() if number is not None]
    assert modes.keys() == advice.keys() and numbers == (list(range(7)) if tokens else [])
    for said in advice.values():
        assert 0 < said["scale"] <= 1 and 0 < said.get("end", 1.0) <= 1
    assert {"canny", "depth", "pose", "gray"} <= modes.keys() and ("tile" in modes) == bool(tokens) == ("soft_edge" not in modes)


def _options(entry: Entry, name: str) -> dict[str, Any]:
    found = entry.options[name]
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda weights: weights.pop("controlnet_x_embedder.bias"), "controlnet_x_embedder.bias"),
        (lambda weights: weights.update({"stranger.weight": torch.zeros(2)}), "stranger.weight"),
        (lambda weights: weights.update({"controlnet_x_embedder.bias": torch.zeros(2)}), "controlnet_x_embedder.bias"),
    ],
    ids=["missing", "left over", "misshapen"],
)
def test_a_file_that_does_not_fit_is_refused_and_the_key_named(
    transformer: FluxTransformer2DModel, tmp_path: Path, change: Any, said: str
) -> None:
    file = _saved(tmp_path) / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    change(weights)
    save_file(weights, file)
    with pytest.raises(CheckpointMismatch, match=said):
        UnionControl(transformer, tmp_path, {"pose": None})


def test_a_file_that_is_cut_short_or_not_there_is_refused(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    file = _saved(tmp_path) / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(MissingWeights, match=tmp_path.name):
        UnionControl(transformer, tmp_path, {"pose": None})
    file.unlink()
    with pytest.raises(MissingWeights, match=tmp_path.name):
        UnionControl(transformer, tmp_path, {"pose": None})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 4}, "num_attention_heads 4 instead of 2"),
        ({"in_channels": 16}, "in_channels 16 instead of 8"),
        ({"conditioning_embedding_channels": 16}, "reads pixels"),
    ],
)
def test_a_net_of_another_base_is_refused(transformer: FluxTransformer2DModel, tmp_path: Path, change: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointMismatch, match=said):
        UnionControl(transformer, _saved(tmp_path, **change), {"pose": None})


@pytest.mark.parametrize(
    ("tokens", "modes", "wrong"),
    [(None, {"pose": 4}, "pose"), (3, {"canny": 0, "pose": 3}, "pose"), (3, {"canny": None}, "canny"), (3, {"tile": -1}, "tile")],
)
def test_numbers_of_modes_that_the_net_does_not_have_are_refused(
    transformer: FluxTransformer2DModel, tmp_path: Path, tokens: int | None, modes: dict[str, int | None], wrong: str
) -> None:
    with pytest.raises(InvalidCatalog, match=f"wrong for {wrong}:"):
        UnionControl(transformer, _saved(tmp_path, num_mode=tokens), modes)


def test_a_mode_that_the_net_does_not_know_is_refused_by_name(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    net = UnionControl(transformer, _saved(tmp_path), {"pose": None, "canny": None})
    with pytest.raises(InvalidRequest, match="no mode 'tile'") as caught:
        net.prepare(torch.zeros(1, 6, 8), "tile", 1.0, 0.0, 1.0)
    assert "pose, canny" in caught.value.remedy


# --- residuals ----------------------------------------------------------------------------------------------------------------------


def _forward() -> Forward:
    given = cases.denoise_input()
    text = Text(given["states"], given["pooled"])
    return Forward(given["noise"], torch.tensor([0.6]), torch.tensor([3.5]), text, given["positions"])


def _picture(name: str = "a condition") -> Tensor:
    return named_tensor(name, 1, 6, BASE["in_channels"])


@torch.no_grad()
def test_each_block_gets_stocks_residual_and_what_no_block_gets_is_gone(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    union = UnionControl(transformer, _saved(tmp_path), {"pose": None})
    stock: Any = FluxControlNetModel.from_pretrained(tmp_path)
    assert len(stock.transformer_blocks) == 4 and len(union.net.transformer_blocks) == len(union.net.controlnet_blocks) == 3
    given = _forward()
    theirs, _ = stock(
        hidden_states=given.latents, controlnet_cond=_picture(), conditioning_scale=0.7, encoder_hidden_states=given.text.states,
        pooled_projections=given.text.pooled, timestep=given.time, guidance=given.guidance, img_ids=given.positions,
        txt_ids=given.text_positions, return_dict=False,
    )  # fmt: skip
    double, single = union.prepare(_picture(), "pose", 0.7, 0.0, 1.0).residuals(given)
    assert len(double) == 5 and not single
    for ours, place in zip(double, (0, 0, 1, 1, 2), strict=True):
        assert torch.equal(ours, theirs[place])


@torch.no_grad()
def test_blocks_before_single_blocks_are_all_computed(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    union = UnionControl(transformer, _saved(tmp_path, num_single_layers=4), {"pose": None})
    assert len(union.net.transformer_blocks) == 4 and len(union.net.controlnet_blocks) == 3
    assert len(union.net.single_transformer_blocks) == len(union.net.controlnet_single_blocks) == 3
    double, single = union.prepare(_picture(), "pose", 1.0, 0.0, 1.0).residuals(_forward())
    assert len(double) == len(single) == 5


@torch.no_grad()
def test_controls_add_up_and_neighbours_share_their_sums(transformer: FluxTransformer2DModel, tmp_path: Path) -> None:
    nets = [UnionControl(transformer, _saved(tmp_path / str(singles), num_single_layers=singles), {"pose": None}) for singles in (0, 3)]
    fields = [net.prepare(_picture(f"picture {k}"), "pose", 0.5 + k, 0.0, 1.0).residuals(_forward()) for k, net in enumerate(nets)]
    double, single = together(fields)
    for index, ours in enumerate(double):
        assert torch.equal(ours, fields[0][0][index] + fields[1][0][index])
    assert single == fields[1][1] and len({id(tensor) for tensor in double}) == 3
    assert together([]) == ((), ()) and together(fields[:1])[0] is fields[0][0]


@torch.no_grad()
def test_the_mode_the_picture_and_the_scale_are_heard() -> None:
    base: Any = FluxTransformer2DModel.from_pretrained(FLUX, subfolder="transformer", dtype=torch.float32)
    union, given = UnionControl(base, MINI, {"pose": 4, "other": 2}), texts()
    forward = Forward(
        named_tensor("latents", 1, 6, 64), torch.tensor([0.6]), torch.tensor([2.5]), Text(given.states[:1], given.pooled[:1]),
        cases.flux_input()["img_ids"],
    )  # fmt: skip

    def says(mode: str = "pose", picture: str = "one", scale: float = 1.0) -> Tensor:
        return union.prepare(named_tensor(picture, 1, 6, 64), mode, scale, 0.0, 1.0).residuals(forward)[0][0]

    usual = says()
    assert float(usual.abs().max()) > 0.1
    torch.testing.assert_close(says(scale=0.5), 0.5 * usual)
    for other in (says(mode="other"), says(picture="two")):
        assert float((other - usual).abs().max() / usual.abs().max()) > 0.01


@pytest.mark.parametrize("steps", [3, 7, 20, 28, 50])
def test_whole_steps_are_stocks_and_a_window_in_six_digits_is_what_was_meant(steps: int) -> None:
    """Stock acts in step i unless i / N < start or (i + 1) / N > end, to the last bit of a double; ours forgives 1e-4 of a step."""

    def stocks(start: float, end: float) -> list[int]:
        return [i for i in range(steps) if not (i / steps < start or (i + 1) / steps > end)]

    for first in range(steps + 1):
        for last in range(first, steps + 1):
            assert list(active_steps(steps, first / steps, last / steps)) == stocks(first / steps, last / steps)
            assert list(active_steps(steps, round(first / steps, 6), round(last / steps, 6))) == list(range(first, last))
    for start, end in ((0.0, 0.65), (0.15, 0.9), (0.0, 0.8)):
        assert list(active_steps(steps, start, end)) == stocks(start, end)


# --- in the denoiser ----------------------------------------------------------------------------------------------------------------


@contextmanager
def _asked(unions: list[UnionControl]) -> Iterator[list[int]]:
    """Grows by one whenever the ControlNet runs."""
    (union,) = unions
    net: Any = union.net
    asked: list[int] = []
    handle = net.register_forward_pre_hook(lambda module, args: asked.append(1))
    try:
        yield asked
    finally:
        handle.remove()


def _condition(level: int = 0) -> RGB:
    """A diagonal line on grey."""
    picture = np.full((SIZE, SIZE, 3), level, np.uint8)
    picture[np.arange(SIZE), np.arange(SIZE)] = 255
    return picture


def _drawn(flux: Flux1Denoiser, *controls: ControlRequest, pictures: tuple[RGB, ...] = (), **changes: Any) -> RGB:
    guides = Guides(pictures or (_condition(),) * len(controls))
    return flux.draw(spec(controls=controls, **changes), texts(), guides=guides).picture


def _control(**changes: Any) -> ControlRequest:
    usual: dict[str, Any] = {"model": "union", "mode": "pose", "scale": 1.0}
    return ControlRequest(**(usual | changes))


@pytest.mark.parametrize(("start", "end"), [(0.0, 1.0), (0.25, 0.75), (0.5, 1.0), (0.0, 0.25)])
@pytest.mark.parametrize("true_cfg", [1.0, 2.5])
def test_the_net_runs_in_its_window_only_and_once_for_both_passes(
    flux: Flux1Denoiser, unions: list[UnionControl], start: float, end: float, true_cfg: float
) -> None:
    with _asked(unions) as asked, forwards(flux) as started:
        _drawn(flux, _control(start=start, end=end), true_cfg_scale=true_cfg)
    assert len(asked) == len(active_steps(STEPS, start, end)) == (end - start) * STEPS
    assert len(started) == STEPS * (1 if true_cfg == 1 else 2)


def test_scale_nought_is_no_control_and_costs_nothing(flux: Flux1Denoiser, unions: list[UnionControl]) -> None:
    base = _drawn(flux)
    with _asked(unions) as asked:
        assert np.array_equal(_drawn(flux, _control(scale=0.0)), base)
    assert not asked
    assert not np.array_equal(_drawn(flux, _control()), base)
    assert np.array_equal(_drawn(flux), base)


def test_the_same_request_draws_the_same_pixels_and_each_of_two_controls_counts(flux: Flux1Denoiser) -> None:
    pictures = _condition(), _condition(90)
    both = _drawn(flux, _control(), _control(scale=0.5), pictures=pictures)
    assert np.array_equal(_drawn(flux, _control(), _control(scale=0.5), pictures=pictures), both)
    assert not np.array_equal(_drawn(flux, _control(), pictures=pictures[:1]), both)
    assert not np.array_equal(_drawn(flux, _control(), _control(scale=0.5), pictures=pictures[::-1]), both)


def test_the_noise_is_the_same_with_and_without_a_control(flux: Flux1Denoiser) -> None:
    """Stock draws the condition's latents first, from the same generator: the same seed then means other noise."""
    seen: list[Tensor] = []
    transformer: Any = flux.transformer
    handle = transformer.register_forward_pre_hook(lambda module, args, named: seen.append(named["hidden_states"]), with_kwargs=True)
    try:
        _drawn(flux)
        _drawn(flux, _control())
    finally:
        handle.remove()
    assert torch.equal(seen[0], seen[STEPS]) and not torch.equal(seen[1], seen[STEPS + 1])


def test_a_control_that_is_not_deployed_is_refused(flux: Flux1Denoiser) -> None:
    with pytest.raises(UnsupportedCombination, match="other is not deployed") as caught:
        _drawn(flux, _control(model="other"))
    assert "union" in caught.value.remedy
