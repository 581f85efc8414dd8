"""Memory modes on the embedded pack: where weights lie changes no pixel, whatever is attached; how they are stored changes a little."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, get_args

import pytest
import torch
from diffusers import AutoencoderKL, FirstBlockCacheConfig, FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor, nn

from deployments.denoisers.flux1_loop import Call, Influence, Text, denoise
from deployments.denoisers.folders import open_part
from deployments.denoisers.latents import Grid, noise, positions, unpack
from deployments.denoisers.lora.places import places
from deployments.denoisers.lora.stack import applied
from deployments.denoisers.lora.weights import LoraFacts, LoraWeights, LowRank
from deployments.denoisers.memory import CHANGES_PIXELS, Arrangement, arrange
from deployments.denoisers.packed import Fp8Linear, Nf4Linear, pack
from deployments.denoisers.schedule import sampler
from deployments.hardware import MemoryMode
from tests.mini_drawing import ATTACH, FLUX, PERSON, PULID, XLABS, request, texts
from tests.named_weights import named_tensor

CPU = torch.device("cpu")
MODES: Sequence[MemoryMode] = get_args(MemoryMode)
MOVING = [mode for mode in MODES if not CHANGES_PIXELS[mode]]
GRID = Grid(8, 8, 16)


class _Studio:
    """A fresh pair of models, with both adapters, in a mode."""

    def __init__(self, mode: MemoryMode, adapters_first: bool = False) -> None:
        self.transformer: Any = open_part(FluxTransformer2DModel, FLUX, "transformer", torch.float32)
        _dither(self.transformer)
        self.vae: Any = open_part(AutoencoderKL, FLUX, "vae", torch.float32)
        if not adapters_first:
            self.arrangement: Arrangement = arrange(self.transformer, self.vae, mode, CPU)
        self.adapters = {model: ATTACH[model](self.transformer) for model in (PULID, XLABS)}
        if adapters_first:
            self.arrangement = arrange(self.transformer, self.vae, mode, CPU)

    @torch.inference_mode()
    def draw(self, *people: str, loras: Sequence[LoraWeights] = ()) -> Tensor:
        """[3, 64, 64], the decoder's floats. people: methods, each with a person."""
        embeds = texts()
        influences = []
        for model in people:
            adapter = self.adapters[model]
            influences.append(Influence(adapter.key, adapter.condition(PERSON[model]("somebody").tokens, request(model)), (), 0.0, 1.0))
        call = Call(
            latents=noise(GRID, torch.Generator().manual_seed(3)),
            positions=positions(GRID),
            prompt=Text(embeds.states[:1], embeds.pooled[:1]),
            guidance=2.5,
            influences=influences,
        )
        schedule = sampler({"use_dynamic_shifting": True}, 3, GRID.tokens)
        with self.arrangement.denoising(), applied(self.transformer, [(lora, 1.0) for lora in loras]):
            latents = denoise(self.transformer, schedule, call, before_forward=lambda: None, after_step=lambda step: None)
        with self.arrangement.decoding():
            picture: Tensor = self.vae.decode(unpack(latents, GRID), return_dict=False)[0][0]
        return picture


def _dither(model: nn.Module) -> None:
    """The embedded pack is stored in fp8, which packing would find unchanged; every weight is moved by a few percent of itself."""
    generator = torch.Generator().manual_seed(5)
    for parameter in model.parameters():
        parameter.data *= 1 + 0.02 * torch.randn(parameter.shape, generator=generator)


def _lora() -> LoraWeights:
    """On every linear module that a LoRA can name."""
    with torch.device("meta"):
        model: Any = FluxTransformer2DModel.from_config(FluxTransformer2DModel.load_config(FLUX / "transformer"))
    modules = {}
    for name in {piece.module for place in places(model).values() for piece in place.pieces}:
        linear = model.get_submodule(name)
        down, up = named_tensor(f"{name} down", 4, linear.in_features), named_tensor(f"{name} up", linear.out_features, 4)
        modules[name] = LowRank(down, up, 0.02)
    return LoraWeights(modules, LoraFacts("made", 2 * len(modules), (4, 4)))


@pytest.fixture(scope="module")
def lora() -> LoraWeights:
    return _lora()


@pytest.fixture(scope="module")
def expected(lora: LoraWeights) -> dict[str, Tensor]:
    """What `full` draws."""
    studio = _Studio("full")
    return {"base": studio.draw(), "people": studio.draw(PULID, XLABS), "all": studio.draw(PULID, XLABS, loras=[lora])}


def test_every_mode_says_whether_it_changes_pixels(expected: dict[str, Tensor]) -> None:
    assert set(CHANGES_PIXELS) == set(MODES)
    assert len({picture.sum().item() for picture in expected.values()}) == 3
    with pytest.raises(ValueError, match="no memory mode"):
        arrange(nn.Linear(1, 1), nn.Linear(1, 1), "small", CPU)  # type: ignore[arg-type]


@pytest.mark.parametrize("adapters_first", [True, False])
@pytest.mark.parametrize("mode", [mode for mode in MOVING if mode != "full"])
def test_where_weights_lie_changes_no_pixel(mode: MemoryMode, adapters_first: bool, expected: dict[str, Tensor], lora: LoraWeights) -> None:
    studio = _Studio(mode, adapters_first)
    for _ in range(2):
        assert torch.equal(studio.draw(PULID, XLABS, loras=[lora]), expected["all"])
        assert torch.equal(studio.draw(PULID, XLABS), expected["people"])
        assert torch.equal(studio.draw(), expected["base"])


@pytest.mark.parametrize("mode", [*MOVING, "fp8-sequential", "nf4-offload"])
def test_adapters_leave_in_every_mode(mode: MemoryMode, expected: dict[str, Tensor]) -> None:
    studio = _Studio(mode)
    with_adapters = studio.draw()
    for model in (XLABS, PULID):
        studio.adapters[model].eject()
    assert torch.equal(studio.draw(), with_adapters)
    assert torch.equal(with_adapters, expected["base"]) is not CHANGES_PIXELS[mode]


@pytest.mark.parametrize(("mode", "error"), [("fp8", 0.06), ("nf4", 0.25)])
def test_packed_weights_draw_nearly_the_same(mode: MemoryMode, error: float, expected: dict[str, Tensor], lora: LoraWeights) -> None:
    studio = _Studio(mode)
    drawn = {"base": studio.draw(), "people": studio.draw(PULID, XLABS), "all": studio.draw(PULID, XLABS, loras=[lora])}
    for name in ("base", "people"):
        off = (drawn[name] - expected[name]).norm() / expected[name].norm()
        assert 0 < off < error, name
    # A LoRA and a person do to packed weights what they do to others.
    change, meant = ((pictures["all"] - pictures["base"]).flatten() for pictures in (drawn, expected))
    assert torch.cosine_similarity(change, meant, dim=0) > 0.9


def test_a_packed_mode_draws_the_same_wherever_its_weights_lie() -> None:
    assert torch.equal(_Studio("fp8").draw(PULID, XLABS), _Studio("fp8-sequential", adapters_first=True).draw(PULID, XLABS))
    assert torch.equal(_Studio("nf4").draw(PULID, XLABS), _Studio("nf4-offload", adapters_first=True).draw(PULID, XLABS))


@contextmanager
def _at_home(model: nn.Module) -> Iterator[list[int]]:
    """Grows, at every call of a linear module, by how many weights of the model do not lie where they rest. Afterwards they do."""
    rest = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    away: list[int] = []
    handles = [
        module.register_forward_pre_hook(
            lambda *_: away.append(sum(p.numel() for n, p in model.named_parameters() if p.data_ptr() != rest[n]))
        )
        for module in model.modules()
        if isinstance(module, nn.Linear)
    ]
    yield away
    for handle in handles:
        handle.remove()
    assert {name: parameter.data_ptr() for name, parameter in model.named_parameters()} == rest


def _numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_only_what_works_is_brought() -> None:
    """By how many weights lie elsewhere than at rest while a linear module works: none, all blocks, two of them, two modules."""
    parameters: dict[str, int] = {}
    for mode in ("full", "offload", "group", "sequential"):
        studio = _Studio(mode)
        with _at_home(studio.transformer) as away:
            studio.draw()
        parameters[mode] = max(away)
    blocks = [*studio.transformer.transformer_blocks, *studio.transformer.single_transformer_blocks]
    sizes = sorted(_numbers(block) for block in blocks)
    largest = max(_numbers(leaf) for block in blocks for leaf in block.modules() if isinstance(leaf, nn.Linear))
    assert largest <= parameters.pop("sequential") <= 2 * largest
    assert parameters == {"full": 0, "offload": sum(sizes), "group": sum(sizes[-2:])}


def _fail(*_: object) -> None:
    raise RuntimeError("amid a block")


def test_a_failed_forward_leaves_everything_at_rest(expected: dict[str, Tensor]) -> None:
    for mode in ("offload", "group", "sequential"):
        studio = _Studio(mode)
        blocks = studio.transformer.single_transformer_blocks
        with _at_home(studio.transformer), pytest.raises(RuntimeError, match="amid a block"):
            handle = blocks[3].attn.register_forward_pre_hook(_fail)
            studio.draw()
        handle.remove()
        assert torch.equal(studio.draw(), expected["base"])


def test_weights_that_are_away_are_missed() -> None:
    for mode in ("group", "sequential"):
        studio = _Studio(mode)
        with pytest.raises(RuntimeError, match="are away"):
            studio.transformer.transformer_blocks[0].norm1.linear(torch.zeros(1, 256))
            studio.transformer.transformer_blocks[0](torch.zeros(1, 4, 256), torch.zeros(1, 4, 256), torch.zeros(1, 256), None)


def test_release_leaves_a_plain_transformer(expected: dict[str, Tensor]) -> None:
    for mode in MOVING:
        studio = _Studio(mode)
        studio.arrangement.release()
        studio.arrangement = arrange(studio.transformer, studio.vae, "full", CPU)
        assert torch.equal(studio.draw(PULID, XLABS), expected["people"])


def test_blocks_that_a_cache_leaves_out_are_not_waited_for() -> None:
    """diffusers' first-block cache runs some blocks in one step and only the first in another."""
    pictures = []
    for mode in ("full", "group", "sequential"):
        studio = _Studio(mode)
        studio.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
        with studio.transformer.cache_context("cond"):
            pictures.append(studio.draw(PULID))
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])


def test_nets_beside_the_transformer_lie_as_it_does() -> None:
    net: Any = open_part(FluxControlNetModel, FLUX.parent, "flux1-controlnet-union", torch.float32)
    _dither(net)
    inputs = {
        "hidden_states": named_tensor("latents", 1, 16, 64), "controlnet_cond": named_tensor("pose", 1, 16, 64),
        "controlnet_mode": torch.tensor([[4]]), "encoder_hidden_states": texts().states[:1], "pooled_projections": texts().pooled[:1],
        "timestep": torch.tensor([0.5]), "guidance": torch.tensor([2.5]), "txt_ids": torch.zeros(texts().states.shape[1], 3),
        "img_ids": positions(Grid(4, 4, 16)), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        plain = net(**inputs)[0][0]
        for mode in ("offload", "group", "sequential", "fp8-sequential"):
            studio = _Studio("full")
            arrangement = arrange(studio.transformer, studio.vae, mode, CPU, nets=[net])
            with _at_home(net) as away, arrangement.denoising([net, net]):
                led = net(**inputs)[0][0]
            assert max(away) > 0
            assert torch.equal(led, plain) is not CHANGES_PIXELS[mode]
            assert torch.allclose(led, plain, atol=0.1 * plain.abs().max().item())
            arrangement.release()


def test_fp8_keeps_what_was_published_in_fp8() -> None:
    """Every weight that plain e4m3 can hold survives; others are off by at most a 16th of themselves."""
    for storage_exact in (True, False):
        linear = nn.Linear(64, 32, bias=False)
        weight = named_tensor("weight", 32, 64) * 0.01
        weight = weight.to(torch.float8_e4m3fn).float() if storage_exact else weight
        linear.weight.data.copy_(weight)
        pack([linear], "fp8", CPU, CPU)
        assert isinstance(linear, Fp8Linear)
        off = (linear.unpacked(torch.float32) - weight).abs()
        assert bool((off == 0).all()) if storage_exact else bool((off <= weight.abs() / 16 + weight.abs().amax() / 2**15).all())


def test_fp8_is_closer_than_a_plain_cast() -> None:
    weight = named_tensor("weight", 256, 256) * 0.01
    linear = nn.Linear(256, 256)
    linear.weight.data.copy_(weight)
    pack([linear], "fp8", CPU, CPU)
    assert isinstance(linear, Fp8Linear)
    ours, cast_ = ((found - weight).norm() for found in (linear.unpacked(torch.float32), weight.to(torch.float8_e4m3fn).float()))
    assert ours < 0.6 * cast_


def test_nf4_takes_the_nearest_level_of_its_block() -> None:
    """By trying all sixteen levels of QLoRA's table (arXiv:2305.14314, appendix E) on every weight; 40 x 50 leaves the last block short."""
    weight = named_tensor("weight", 40, 50)
    linear = nn.Linear(50, 40, bias=False)
    linear.weight.data.copy_(weight)
    pack([linear], "nf4", CPU, CPU)
    assert isinstance(linear, Nf4Linear)
    levels = torch.tensor([-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0, 0.07958, 0.16093, 0.24611, 0.33792, 0.44071,
                           0.56262, 0.72296, 1])  # fmt: skip
    flat = torch.cat([weight.flatten(), torch.zeros(48)]).view(-1, 64)
    scale = flat.abs().amax(1, keepdim=True)
    nearest = levels[(flat[..., None] / scale[..., None] - levels).abs().argmin(-1)] * scale
    assert torch.allclose(linear.unpacked(torch.float32).flatten(), nearest.flatten()[:2000], atol=1e-4)
    assert linear.packed.nbytes == 1024


def test_what_was_packed_is_not_packed_again() -> None:
    studio = _Studio("fp8")
    with pytest.raises(ValueError, match="Fp8Linear"):
        arrange(studio.transformer, studio.vae, "nf4", CPU)


def test_leaves_that_are_no_leaves_are_refused() -> None:
    studio = _Studio("full")
    studio.transformer.transformer_blocks[0].attn.own = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match="of its own"):
        arrange(studio.transformer, studio.vae, "sequential", CPU)
