"""Stacks of LoRAs on the embedded transformer: exact, isolated, gone without a trace; and the cache they are kept in."""

from __future__ import annotations

import gc
import threading
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any, cast

import numpy as np
import psutil
import pytest
import torch
from torch import Tensor

from deployments.contracts import RGB
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.denoisers.lora.cache import LoraCache
from deployments.denoisers.lora.formats import open_lora, read_lora
from deployments.denoisers.lora.stack import applied
from deployments.denoisers.lora.weights import LoraWeights
from deployments.errors import InvalidRequest, LoraIncompatible
from tests.mini_drawing import PACK, PROMPT, PULID, SIZE, STEPS, XLABS, denoiser, pipeline, pulid_person, request, spec, texts, xlabs_person

ADA = PACK / "loras" / "ada.safetensors"
TARGETS = ("attn.to_q", "attn.to_v", "attn.add_k_proj", "ff.net.2", "norm1.linear")


@cache
def flux() -> Flux1Denoiser:
    return denoiser()


@cache
def ada() -> LoraWeights:
    return open_lora(ADA, flux().transformer).to("cpu", torch.float32)


def lora(seed: int, rank: int = 4) -> LoraWeights:
    """A random one, on modules that others leave alone and on modules that they share."""
    generator = torch.Generator().manual_seed(seed)
    model: Any = flux().transformer
    state = {}
    names = [f"transformer_blocks.{seed % 2}.{name}" for name in TARGETS] + ["single_transformer_blocks.0.proj_out", "x_embedder"]
    for name in names:
        module = model.get_submodule(name)
        state[f"{name}.lora_A.weight"] = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
        state[f"{name}.lora_B.weight"] = torch.randn(module.out_features, rank, generator=generator) / 4
    return read_lora(state, flux().transformer)


def draw(**changes: Any) -> RGB:
    return flux().draw(spec(**changes), texts()).picture


def look(model: Any) -> Tensor:
    """One forward on random inputs, fp32."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"hidden_states": (1, 16, 64), "encoder_hidden_states": (1, 6, 128), "pooled_projections": (1, 128)}
    given = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    still = {"timestep": torch.tensor([0.6]), "guidance": torch.tensor([2.5]), "img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(6, 3)}
    with torch.inference_mode():
        (velocity,) = model(**given, **still, return_dict=False)
    return cast(Tensor, velocity.clone())


@contextmanager
def merged(model: Any, *stack: tuple[LoraWeights, float]) -> Iterator[None]:
    kept: dict[str, Tensor] = {}
    for weights, scale in stack:
        for name, change in weights.modules.items():
            weight = model.get_submodule(name).weight
            kept.setdefault(name, weight.clone())
            weight += scale * change.delta()
    yield
    for name, weight in kept.items():
        model.get_submodule(name).weight.copy_(weight)


def traces(model: Any) -> list[str]:
    """Modules on which something stands for their class's forward."""
    return [name for name, module in model.named_modules() if "forward" in module.__dict__]


def distance(left: Tensor, right: Tensor) -> float:
    return float((left - right).norm() / right.norm())


def test_a_stack_is_the_sum_of_its_changes_and_leaves_nothing_behind() -> None:
    model = flux().transformer
    base, before = look(model), {name: weight.clone() for name, weight in model.state_dict().items()}
    stack = [(lora(1), 0.8), (lora(2, rank=6), -0.5), (ada(), 1.3), (lora(1), 0.25)]
    with merged(model, *stack):
        expected = look(model)
    with applied(model, stack):
        found = look(model)
    assert distance(found, expected) < 1e-5 and distance(found, base) > 0.05
    assert torch.equal(look(model), base) and not traces(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_scale_zero_and_no_lora_are_exactly_the_base() -> None:
    base = look(flux().transformer)
    for stack in ([], [(ada(), 0.0)]):
        with applied(flux().transformer, stack):
            assert not traces(flux().transformer)
            assert torch.equal(look(flux().transformer), base)


def test_an_error_while_drawing_leaves_nothing_behind() -> None:
    base = look(flux().transformer)
    with pytest.raises(KeyboardInterrupt), applied(flux().transformer, [(ada(), 1.0)]):
        raise KeyboardInterrupt
    assert torch.equal(look(flux().transformer), base) and not traces(flux().transformer)


def test_a_second_stack_waits_for_the_first_to_go() -> None:
    with applied(flux().transformer, [(ada(), 1.0)]):
        alone = look(flux().transformer)
        with pytest.raises(RuntimeError, match="one at a time"), applied(flux().transformer, [(ada(), 1.0)]):
            raise AssertionError
        assert torch.equal(look(flux().transformer), alone)


@pytest.mark.parametrize("scale", [4.5, -100.0, float("nan"), float("inf")])
def test_a_scale_out_of_range_is_refused(scale: float) -> None:
    with pytest.raises(InvalidRequest, match="-4.0 to 4.0"), applied(flux().transformer, [(ada(), scale)]):
        raise AssertionError
    assert not traces(flux().transformer)


def test_where_it_would_not_be_heard_it_is_refused() -> None:
    model: Any = denoiser().transformer
    with applied(model, [(ada(), 1.0)]):
        heard = look(model)
    model.fuse_qkv_projections()
    with pytest.raises(LoraIncompatible, match=r"attn\.\w+ are fused"), applied(model, [(ada(), 1.0)]):
        raise AssertionError
    model.unfuse_qkv_projections()
    with applied(model, [(ada(), 1.0)]):
        assert torch.equal(look(model), heard)
    model.single_transformer_blocks = model.single_transformer_blocks[:2]
    with pytest.raises(LoraIncompatible, match=r"no module single_transformer_blocks\.\d"), applied(model, [(ada(), 1.0)]):
        raise AssertionError


def test_ada_is_to_us_what_she_is_to_stock_diffusers() -> None:
    pipe, embeds = pipeline(), texts()
    generator, base = torch.Generator().manual_seed(7), look(pipe.transformer)
    pipe.load_lora_weights(ADA.parent, weight_name=ADA.name, adapter_name="ada")
    pipe.set_adapters("ada", 0.7)
    try:
        expected = pipe(
            prompt_embeds=embeds.states[:1], pooled_prompt_embeds=embeds.pooled[:1], width=SIZE, height=SIZE, num_inference_steps=STEPS,
            guidance_scale=2.5, max_sequence_length=48, generator=generator, output_type="np",
        ).images[0]  # fmt: skip
    finally:
        pipe.unload_lora_weights()
    generator.manual_seed(7)
    with applied(pipe.transformer, [(open_lora(ADA, pipe.transformer).to("cpu", torch.float32), 0.7)]):
        found = pipe(
            prompt_embeds=embeds.states[:1], pooled_prompt_embeds=embeds.pooled[:1], width=SIZE, height=SIZE, num_inference_steps=STEPS,
            guidance_scale=2.5, max_sequence_length=48, generator=generator, output_type="np",
        ).images[0]  # fmt: skip
    assert np.abs(found - expected).max() < 1e-4
    assert torch.equal(look(pipe.transformer), base)
    with applied(flux().transformer, [(ada(), 0.7)]):
        ours = draw()
    assert np.abs(ours / 255 - expected).max() < 1 / 255
    assert np.abs(ours / 255 - draw() / 255).mean() > 0.01, f"{PROMPT!r} shows no trace of her"


def test_beside_identities_it_is_what_merged_weights_would_be() -> None:
    both = denoiser(PULID, XLABS)
    people = [pulid_person("her"), xlabs_person("her")]
    asked = spec(request(PULID, weight=1.0), request(XLABS, weight=0.7, start=0.25), true_cfg_scale=2.0)
    base = both.draw(asked, texts(), people).picture
    with merged(both.transformer, (ada(), 0.8), (lora(1), 0.3)):
        expected = both.draw(asked, texts(), people).picture
    with applied(both.transformer, [(ada(), 0.8), (lora(1), 0.3)]):
        found = both.draw(asked, texts(), people).picture
    assert np.abs(found.astype(int) - expected).max() <= 1 < np.abs(found.astype(int) - base).max()
    assert np.array_equal(both.draw(asked, texts(), people).picture, base)
    both.eject()
    assert torch.equal(look(both.transformer), look(flux().transformer))


def test_beside_weights_stored_in_eight_bits_it_is_what_merged_weights_would_be() -> None:
    small: Any = denoiser().transformer
    small.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert small.single_transformer_blocks[0].attn.to_q.weight.dtype == torch.float8_e4m3fn
    plain: Any = denoiser().transformer
    plain.load_state_dict({name: weight.float() for name, weight in small.state_dict().items()})
    base = look(small)
    with merged(plain, (ada(), 1.0), (lora(1), 0.5)):
        expected = look(plain)
    with applied(small, [(ada(), 1.0), (lora(1), 0.5)]):
        assert distance(look(small), expected) < 1e-5 < distance(base, expected)
    assert torch.equal(look(small), base)


def test_compiled_blocks_hear_it() -> None:
    """torch.compile guards on what stands on an instance; were that to change, a compiled base would go on without its LoRA."""
    model: Any = denoiser().transformer
    with applied(model, [(lora(1), 1.0)]):
        expected = look(model)
    base = look(model)
    model.transformer_blocks[1].compile(backend="eager")
    assert torch.equal(look(model), base)
    with applied(model, [(lora(1), 1.0)]):
        assert distance(look(model), expected) < 1e-6
    assert torch.equal(look(model), base)
    torch._dynamo.reset()


def test_two_hundred_swaps_take_no_memory_and_change_no_picture() -> None:
    model, cached = flux().transformer, LoraCache(1 << 24)
    loras = {str(seed): lora(seed) for seed in range(4)}
    expected: dict[str, Tensor] = {}

    def swap(times: int) -> None:
        for turn in range(times):
            name = str(turn % 4)
            with cached.held(name, partial(loras.__getitem__, name)) as weights, applied(model, [(weights, 0.5)]):
                found = look(model)
            assert torch.equal(found, expected.setdefault(name, found))

    swap(20)
    gc.collect()
    tracemalloc.start()
    resident, traced = psutil.Process().memory_info().rss, tracemalloc.get_traced_memory()[0]
    swap(200)
    gc.collect()
    grown, kept = psutil.Process().memory_info().rss - resident, tracemalloc.get_traced_memory()[0] - traced
    tracemalloc.stop()
    assert kept < 100_000 and grown < 32 << 20
    assert cached.counts.misses == 4 and cached.counts.hits == 216 and not traces(model)


def test_a_warm_swap_is_quick() -> None:
    """Microseconds for each module; the bound is for machines that do other things too."""
    cached, took = LoraCache(1 << 24), []
    for _ in range(50):
        start = time.perf_counter()
        with cached.held("ada", ada) as weights, applied(flux().transformer, [(weights, 1.0)]):
            pass
        took.append(time.perf_counter() - start)
    assert sorted(took)[25] < 0.005


def test_the_cache_lets_go_of_the_longest_unused_and_never_of_what_is_held() -> None:
    size = lora(0).nbytes
    cached, loads = LoraCache(2 * size), []

    def load(name: str) -> LoraWeights:
        loads.append(name)
        return lora(0)

    def use(name: str) -> None:
        with cached.held(name, lambda: load(name)):
            pass

    with cached.held("a", lambda: load("a")) as held:
        for name in "bcdb":
            use(name)
        assert cached.counts.nbytes <= 2 * size and loads == ["a", "b", "c", "d", "b"]
        with cached.held("a", lambda: load("a")) as again, cached.held("e", lambda: load("e")), cached.held("f", lambda: load("f")):
            assert again is held and cached.counts.nbytes == 3 * size and not cached.drop("a")
    counts = cached.counts
    assert counts.nbytes <= 2 * size and counts.hits == 1 and counts.misses == 7 and counts.evictions == counts.misses - counts.entries
    use("e")
    assert cached.counts.hits == 2 and cached.drop("e") and not cached.drop("e")


def test_a_cache_of_nothing_serves_and_keeps_nothing() -> None:
    cached = LoraCache(0)
    with cached.held("ada", ada) as weights, applied(flux().transformer, [(weights, 1.0)]):
        assert cached.counts.entries == 1
    assert cached.counts.entries == 0 and cached.counts.nbytes == 0
    with pytest.raises(ValueError, match="-1 bytes"):
        LoraCache(-1)


def test_a_load_that_fails_is_forgotten() -> None:
    cached = LoraCache(1 << 24)

    def broken() -> LoraWeights:
        raise LoraIncompatible("It does not fit.")

    with pytest.raises(LoraIncompatible), cached.held("ada", broken):
        raise AssertionError
    assert cached.counts.entries == 0
    with cached.held("ada", ada):
        assert cached.counts.entries == 1 and cached.counts.misses == 1


def test_threads_that_want_the_same_lora_load_it_once() -> None:
    cached, loads, seen = LoraCache(0), [], []
    together, loaded = threading.Barrier(4), threading.Barrier(4)

    def load() -> LoraWeights:
        loads.append(1)
        time.sleep(0.05)
        return ada()

    def use() -> None:
        together.wait(10)
        with cached.held("ada", load) as weights:
            seen.append(weights)
            loaded.wait(10)

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(loads) == 1 and len(seen) == 4 and len({id(weights) for weights in seen}) == 1
    assert cached.counts.entries == 0


def test_the_cache_brings_a_lora_to_its_type() -> None:
    with LoraCache(1 << 24, dtype=torch.bfloat16).held("ada", ada) as weights:
        kinds = {tensor.dtype for change in weights.modules.values() for tensor in (change.down, change.up)}
    assert kinds == {torch.bfloat16} and weights.facts is ada().facts


def test_modules_fused_in_the_file_share_their_factor_on_the_device_too() -> None:
    state = {"img_in.lora_A.weight": torch.randn(4, 64), "img_in.lora_B.weight": torch.randn(256, 4)}
    fused = {"single_blocks.0.linear1.lora_A.weight": torch.randn(4, 256), "single_blocks.0.linear1.lora_B.weight": torch.randn(1792, 4)}
    weights = read_lora(state | fused, flux().transformer).to("cpu", torch.bfloat16)
    assert weights.nbytes == 2 * sum(tensor.numel() for tensor in (state | fused).values())
