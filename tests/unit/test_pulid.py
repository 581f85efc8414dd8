"""PuLID: the published layout, strict loading, what the encoder sees, and what an injected transformer does and leaves alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from safetensors.torch import save_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from deployments.errors import CheckpointMismatch, DamagedWeights
from deployments.identity.pulid import (
    WHITENED_CLASSES,
    PuLID,
    PuLIDConfig,
    config_of,
    eva_pixels,
    face_to_grey,
    identity_condition,
    inject,
    load_pulid,
    metadata_of,
)
from tests.named_weights import fill, named_tensor

TINY = PuLIDConfig(
    dim=32, depth=5, heads=2, head_dim=16, ff_mult=2, id_tokens=2, queries=4, output_dim=24, mapping_width=16, face_dim=8, vision_dim=6,
    vision_width=20, vision_tokens=5, ca_dim=32, ca_heads=2, ca_head_dim=12, double_interval=1, single_interval=2, num_double=2,
    num_single=3,
)  # fmt: skip
ANNA, BORIS = named_tensor("anna", 1, 4, 24), named_tensor("boris", 1, 4, 24)


def _pulid(config: PuLIDConfig = TINY) -> PuLID:
    model = PuLID(config)
    fill(model)
    return model.eval()


def _transformer(num_double: int = 2, num_single: int = 3) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=num_double, num_single_layers=num_single, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=20, pooled_projection_dim=12, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    fill(model)
    return model.eval()


def _inputs(n: int = 1) -> dict[str, Any]:
    return {
        "hidden_states": named_tensor("picture", 1, 6, 8).expand(n, -1, -1),
        "encoder_hidden_states": named_tensor("text", 1, 4, 20).expand(n, -1, -1),
        "pooled_projections": named_tensor("pooled", 1, 12).expand(n, -1),
        "timestep": torch.full((n,), 0.5),
        "guidance": torch.full((n,), 3.5),
        "img_ids": torch.tensor([[0.0, float(y), float(x)] for y in range(3) for x in range(2)]),
        "txt_ids": torch.zeros(4, 3),
        "return_dict": False,
    }


def _run(transformer: FluxTransformer2DModel, condition: object = None, n: int = 1, **more: object) -> Tensor:
    kwargs = None if condition is None else {"pulid": condition}
    (velocity,) = transformer(**_inputs(n), joint_attention_kwargs=kwargs, **more)
    assert isinstance(velocity, Tensor)
    return velocity


def _published_layout() -> dict[str, tuple[int, ...]]:
    """Names and shapes of pulid_flux_v0.9.0.safetensors and pulid_flux_v0.9.1.safetensors."""
    layout: dict[str, tuple[int, ...]] = {"pulid_encoder.latents": (1, 32, 1024), "pulid_encoder.proj_out": (1024, 2048)}
    for index in range(10):
        layer = f"pulid_encoder.layers.{index}."
        layout |= {f"{layer}{norm}.{kind}": (1024,) for norm in ("0.norm1", "0.norm2", "1.0") for kind in ("weight", "bias")}
        layout |= {f"{layer}0.to_q.weight": (1024, 1024), f"{layer}0.to_kv.weight": (2048, 1024), f"{layer}0.to_out.weight": (1024, 1024)}
        layout |= {f"{layer}1.1.weight": (4096, 1024), f"{layer}1.3.weight": (1024, 4096)}
    for name, source, target in [(f"mapping_{index}", 1024, 1024) for index in range(5)] + [("id_embedding_mapping", 1280, 5120)]:
        layout |= {f"pulid_encoder.{name}.{i}.{kind}": (1024,) for i in (1, 4) for kind in ("weight", "bias")}
        for i, shape in ((0, (1024, source)), (3, (1024, 1024)), (6, (target, 1024))):
            layout |= {f"pulid_encoder.{name}.{i}.weight": shape, f"pulid_encoder.{name}.{i}.bias": shape[:1]}
    for index in range(20):
        ca = f"pulid_ca.{index}."
        layout |= {f"{ca}norm1.{kind}": (2048,) for kind in ("weight", "bias")} | {
            f"{ca}norm2.{kind}": (3072,) for kind in ("weight", "bias")
        }
        layout |= {f"{ca}to_q.weight": (2048, 3072), f"{ca}to_kv.weight": (4096, 2048), f"{ca}to_out.weight": (3072, 2048)}
    return layout


def test_defaults_are_the_published_files() -> None:
    with torch.device("meta"):
        model = PuLID(PuLIDConfig())
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == _published_layout()
    assert len(model.state_dict()) == 312
    assert sum(parameter.numel() for parameter in model.parameters()) == 571_033_600


def test_published_blocks_are_followed_by_an_attention() -> None:
    """flux/model.py: after double blocks 0, 2, ... 18 and single blocks 0, 4, ... 36."""
    config = PuLIDConfig()
    after = {block: config.attention_after(block) for block in range(config.blocks)}
    assert [block for block, index in after.items() if index is not None] == [*range(0, 19, 2), *range(19, 57, 4)]
    assert [index for index in after.values() if index is not None] == list(range(20))


@torch.no_grad()
def test_a_file_gives_the_same_tokens(tmp_path: Path) -> None:
    model, path = _pulid(), tmp_path / "pulid.safetensors"
    save_file(model.state_dict(), path, metadata_of(TINY))
    loaded = load_pulid(path)
    assert loaded.config == TINY
    assert not loaded.training
    assert torch.equal(loaded.unconditional(), model.unconditional())
    # What no file holds is there nevertheless.
    assert [int(loaded.attention(index).position) for index in range(TINY.attentions)] == list(range(TINY.attentions))
    assert load_pulid(path, dtype=torch.bfloat16).unconditional().dtype == torch.bfloat16


def test_a_damaged_file_is_named_key_by_key(tmp_path: Path) -> None:
    state, path = _pulid().state_dict(), tmp_path / "pulid.safetensors"
    del state["pulid_ca.1.to_q.weight"]
    state["pulid_ca.9.to_q.weight"] = torch.zeros(24, 32)
    state["pulid_encoder.latents"] = torch.zeros(1, 5, 32)
    save_file(state, path, metadata_of(TINY))
    with pytest.raises(CheckpointMismatch, match=r"pulid_ca\.1\.to_q\.weight.*pulid_ca\.9\.to_q\.weight.*pulid_encoder\.latents") as caught:
        load_pulid(path)
    assert caught.value.details == {
        "missing": ["pulid_ca.1.to_q.weight"],
        "left_over": ["pulid_ca.9.to_q.weight"],
        "wrong_shape": ["pulid_encoder.latents [1, 5, 32] instead of [1, 4, 32]"],
    }


def test_a_file_without_metadata_must_have_the_published_sizes(tmp_path: Path) -> None:
    save_file(_pulid().state_dict(), tmp_path / "pulid.safetensors")
    with pytest.raises(CheckpointMismatch, match=r"pulid_encoder\.latents \[1, 4, 32\] instead of \[1, 32, 1024\]|wrong shape"):
        load_pulid(tmp_path / "pulid.safetensors")


def test_configuration_travels_in_the_metadata() -> None:
    assert config_of(metadata_of(TINY)) == TINY
    assert config_of({}) == PuLIDConfig()
    for text in ('{"colour": 3}', "{", '{"depth": 7}', '{"dim": "wide"}', "[]"):
        with pytest.raises(DamagedWeights, match="metadata"):
            config_of({"config": text})


def test_only_the_face_and_the_hair_reach_the_vision_tower() -> None:
    rgb = torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1).expand(1, 3, 1, 19)
    grey = face_to_grey(rgb, torch.arange(19).view(1, 1, 19))
    assert grey.shape == (1, 3, 1, 19)
    white = [index for index in range(19) if torch.equal(grey[0, :, 0, index], torch.ones(3))]
    # background, both ears, earring, neck, necklace, cloth, hat
    assert white == [0, 7, 8, 9, 14, 15, 16, 18] == list(WHITENED_CLASSES)
    torch.testing.assert_close(grey[0, :, 0, 17], torch.full((3,), 0.299 + 0.587 * 0.5 + 0.114 * 0.25))


def test_whitened_classes_can_be_chosen() -> None:
    labels = torch.tensor([[[0, 6, 17]]])
    grey = face_to_grey(torch.zeros(1, 3, 1, 3), labels, (*WHITENED_CLASSES, 6))
    assert grey[0, 0, 0].tolist() == [1.0, 1.0, 0.0]


def test_pixels_are_resized_without_aliasing_and_normalised() -> None:
    constant = eva_pixels(torch.full((1, 3, 64, 64), 0.5), 16)
    assert constant.shape == (1, 3, 16, 16)
    expected = (0.5 - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor([0.26862954, 0.26130258, 0.27577711])
    torch.testing.assert_close(constant.mean((0, 2, 3)), expected)
    noise = named_tensor("noise", 1, 3, 64, 64)
    # An average over about 4 x 4 pixels, whereas bicubic samples alone would keep most of the deviation.
    assert float((eva_pixels(noise, 16) - eva_pixels(noise * 0, 16)).std() * 0.27) < 0.35


def test_condition_keeps_the_length_of_the_face_embedding_only() -> None:
    face, vision = named_tensor("face", 2, 8) * 20, named_tensor("vision", 2, 6) * 7
    condition = identity_condition(face, vision)
    assert torch.equal(condition[:, :8], face)
    torch.testing.assert_close(condition[:, 8:], vision / vision.norm(dim=-1, keepdim=True))


@torch.no_grad()
def test_encoder_reads_the_embedding_and_every_state() -> None:
    model, condition = _pulid(), named_tensor("condition", 1, 14)
    states = [named_tensor(f"state_{index}", 1, 5, 20) for index in range(5)]
    tokens = model(condition, states)
    assert tokens.shape == (1, 4, 24)
    assert not torch.allclose(model(-condition, states), tokens, atol=1e-2)
    for index in range(5):
        changed = [state if i != index else -state for i, state in enumerate(states)]
        assert not torch.allclose(model(condition, changed), tokens, atol=1e-2)
    with pytest.raises(ValueError, match="5 states"):
        model(condition, states[:4])


@torch.no_grad()
def test_nobody_is_not_a_row_of_zeros() -> None:
    nobody = _pulid().unconditional(2)
    assert nobody.shape == (2, 4, 24)
    assert float(nobody.abs().mean()) > 0.01


@pytest.mark.parametrize("change", [{"depth": 6}, {"queries": 0}, {"ca_heads": 1.5}])
def test_impossible_sizes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="|".join(change)):
        PuLIDConfig(**change)


@torch.no_grad()
def test_inject_then_eject_leaves_no_trace() -> None:
    transformer = _transformer()
    base, before = _run(transformer), [dict(vars(module)) for module in transformer.modules()]
    injection = inject(transformer, _pulid())
    assert not torch.allclose(_run(transformer, injection.condition(ANNA)), base, atol=1e-2)
    injection.eject()
    assert torch.equal(_run(transformer), base)
    assert [dict(vars(module)) for module in transformer.modules()] == before


@torch.no_grad()
def test_without_a_condition_an_injected_transformer_is_the_base_bit_for_bit() -> None:
    transformer = _transformer()
    base, names = _run(transformer), list(transformer.state_dict())
    injection = inject(transformer, _pulid())
    assert list(transformer.state_dict()) == names
    assert torch.equal(_run(transformer), base)
    assert torch.equal(transformer(**_inputs(), joint_attention_kwargs={"pulid": None})[0], base)
    assert torch.equal(_run(transformer, injection.condition(ANNA, 0.0)), base)


@torch.no_grad()
def test_every_picture_of_a_batch_has_its_own_identity_and_weight() -> None:
    transformer = _transformer()
    injection = inject(transformer, _pulid())
    apart = [_run(transformer), _run(transformer, injection.condition(ANNA, 0.5)), _run(transformer, injection.condition(BORIS, 1.5))]
    together = _run(transformer, injection.condition(torch.cat([ANNA, ANNA, BORIS]), torch.tensor([0.0, 0.5, 1.5])), n=3)
    torch.testing.assert_close(together, torch.cat(apart))
    # One identity serves a whole batch.
    torch.testing.assert_close(_run(transformer, injection.condition(ANNA, 0.5), n=3), apart[1].expand(3, -1, -1))


@torch.no_grad()
def test_interleaved_conditions_never_mix() -> None:
    transformer = _transformer()
    injection = inject(transformer, _pulid())
    people = {"anna": injection.condition(ANNA), "boris": injection.condition(BORIS), "nobody": None}
    alone = {name: _run(transformer, condition) for name, condition in people.items()}
    assert not torch.allclose(alone["anna"], alone["boris"], atol=1e-2)
    for name in ("anna", "boris", "nobody", "boris", "anna", "nobody", "anna"):
        assert torch.equal(_run(transformer, people[name]), alone[name])


@torch.no_grad()
def test_two_people_add_up_in_any_order() -> None:
    transformer = _transformer()
    injection = inject(transformer, _pulid())
    anna, boris = injection.condition(ANNA, 0.7), injection.condition(BORIS, 0.4)
    torch.testing.assert_close(_run(transformer, anna + boris), _run(transformer, boris + anna))
    torch.testing.assert_close(_run(transformer, anna + anna), _run(transformer, injection.condition(ANNA, 1.4)))


@torch.no_grad()
def test_the_callers_arguments_are_not_changed() -> None:
    transformer = _transformer()
    injection = inject(transformer, _pulid())
    kwargs = {"pulid": injection.condition(ANNA)}
    transformer(**_inputs(), joint_attention_kwargs=kwargs)
    assert list(kwargs) == ["pulid"]


def test_the_plain_function_path_equals_the_hooks() -> None:
    """A loop that runs the blocks itself, as training does, adds `residual` after the blocks that `attention_after` names."""
    transformer, pulid = _transformer(), _pulid()
    model: Any = transformer
    call = _inputs()
    keys, values = pulid.keys_values(ANNA)
    hidden, text = model.x_embedder(call["hidden_states"]), model.context_embedder(call["encoder_hidden_states"])
    temb = model.time_text_embed(call["timestep"] * 1000, call["guidance"] * 1000, call["pooled_projections"])
    rotary = model.pos_embed(torch.cat([call["txt_ids"], call["img_ids"]]))
    for block, module in enumerate([*model.transformer_blocks, *model.single_transformer_blocks]):
        text, hidden = module(hidden, text, temb, rotary)
        index = TINY.attention_after(block)
        if index is not None:
            hidden = hidden + 0.6 * pulid.residual(index, hidden, keys[index], values[index])
    velocity = model.proj_out(model.norm_out(hidden, temb))
    torch.testing.assert_close(_run(transformer, inject(transformer, pulid).condition(ANNA, 0.6)), velocity)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_reach_every_parameter_and_the_tokens(checkpointing: bool) -> None:
    transformer, pulid = _transformer().requires_grad_(False).train(), _pulid()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    injection = inject(transformer, pulid)
    tokens = pulid(named_tensor("condition", 2, 14), [named_tensor(f"state_{index}", 2, 5, 20) for index in range(5)])
    tokens.retain_grad()
    _run(transformer, injection.condition(tokens, torch.tensor([0.5, 1.0])), n=2).square().mean().backward()
    assert tokens.grad is not None
    assert all(float(tokens.grad[index].abs().max()) > 0 for index in range(2))
    without = [name for name, parameter in pulid.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert without == []


@torch.no_grad()
def test_stock_pipeline_takes_the_condition(caplog: pytest.LogCaptureFixture) -> None:
    transformer = _transformer()
    pipeline = FluxPipeline(FlowMatchEulerDiscreteScheduler(), None, None, None, None, None, transformer)
    pipeline.set_progress_bar_config(disable=True)
    injection = inject(transformer, _pulid())

    def latents(condition: object) -> Tensor:
        output = pipeline(
            prompt_embeds=named_tensor("text", 1, 4, 20), pooled_prompt_embeds=named_tensor("pooled", 1, 12), height=32, width=32,
            num_inference_steps=2, num_images_per_prompt=2, generator=torch.Generator().manual_seed(0), output_type="latent",
            joint_attention_kwargs={"pulid": condition, "scale": 1.0},
        )  # fmt: skip
        assert isinstance(output.images, Tensor)
        return output.images

    base, anna = latents(None), latents(injection.condition(ANNA))
    assert not torch.allclose(anna, base, atol=1e-2)
    assert torch.equal(latents(injection.condition(ANNA, 0.0)), base)
    assert "not expected" not in caplog.text


@torch.no_grad()
def test_a_cache_enabled_later_sees_the_identity_once() -> None:
    transformer = _transformer()
    injection = inject(transformer, _pulid())
    condition = injection.condition(ANNA)
    exact = _run(transformer, condition)
    transformer.enable_cache(FirstBlockCacheConfig(threshold=1e9))
    for _ in range(2):  # the second call takes the residual of the first from the cache
        with transformer.cache_context("cond"):
            torch.testing.assert_close(_run(transformer, condition), exact)
    with pytest.raises(ValueError, match="disable_cache"):
        injection.eject()
    transformer.disable_cache()
    assert torch.equal(_run(transformer, condition), exact)
    injection.eject()


def test_a_transformer_of_other_sizes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 32\), the transformer has \(3, 3, 32\)"):
        inject(_transformer(num_double=3), _pulid())


def test_tokens_of_another_width_are_refused() -> None:
    injection = inject(_transformer(), _pulid())
    with pytest.raises(ValueError, match=r"\[n, tokens, 24\], not \[1, 4, 25\]"):
        injection.condition(torch.zeros(1, 4, 25))


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@torch.no_grad()
@pytest.mark.usefixtures("_fresh_compiler")
def test_compiled_blocks_share_their_graphs_over_attentions_weights_and_people() -> None:
    config = replace(TINY, double_interval=1, single_interval=1, num_double=4, num_single=6)
    transformer, pulid = _transformer(num_double=4, num_single=6), _pulid(config)
    injection = inject(transformer, pulid)
    calls = [injection.condition(who, weight) for who in (ANNA, BORIS) for weight in (0.0, 0.5, 1.0)]
    eager = [_run(transformer, call) for call in calls]
    counter = CompileCounter()
    transformer.compile_repeated_blocks(fullgraph=True, backend=counter)
    compiled = [_run(transformer, call) for call in calls]
    # For ten attentions: the double blocks, the first single block (its text is contiguous), the other single blocks.
    assert counter.frame_count == 3
    for a, b in zip(compiled, eager, strict=True):
        torch.testing.assert_close(a, b)
