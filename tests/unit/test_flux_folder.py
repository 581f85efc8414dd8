"""The mini FLUX folder, its ControlNet and its XLabs adapter, untrained, opened and run by stock diffusers."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    FluxControlNetModel,
    FluxControlNetPipeline,
    FluxMultiControlNetModel,
    FluxPipeline,
    FluxTransformer2DModel,
)
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPTextModel, CLIPVisionModelWithProjection, T5EncoderModel

from training.mini.flux_folder import clip_text_config, clip_vision_config, controlnet_from, flux_config, scheduler, t5_config, vae_config
from training.mini.folders import save_controlnet, save_flux_folder, save_picture_encoder
from training.mini.generator.flow import position_ids
from training.mini.generator.forward import Prompt, TrainableFlux
from training.mini.storage import fake_quantise, save_weights, stored
from training.mini.tokenisers import PROMPT_TOKENS, build_tokenisers
from training.mini.xlabs_adapter import XLabsAdapter, export_xlabs

SHIFT = 2.0
POSE, OTHER_MODE = 4, 2
Pixels = np.ndarray[Any, np.dtype[np.int16]]


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "transformer": FluxTransformer2DModel(**flux_config()),
        "vae": AutoencoderKL(**vae_config(scaling_factor=0.5, shift_factor=0.1)),
        "t5": T5EncoderModel(t5_config()),
        "clip": CLIPTextModel(clip_text_config()),
        "tokenisers": build_tokenisers(),
        "scheduler": scheduler(SHIFT),
    }


@pytest.fixture(scope="module")
def folder(models: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("flux")
    save_flux_folder(out, **models)
    return out


@pytest.fixture
def pipe(folder: Path) -> Any:
    pipeline = FluxPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def adapter_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An XLabs adapter that does something, and its encoder."""
    torch.manual_seed(1)
    out = tmp_path_factory.mktemp("xlabs")
    save_weights(out / "ip_adapter.safetensors", stored(export_xlabs(_loud_adapter())))
    save_picture_encoder(out / "image_encoder", CLIPVisionModelWithProjection(clip_vision_config()))
    return out


def _loud_adapter() -> XLabsAdapter:
    adapter = XLabsAdapter()
    for parameter in adapter.values.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return adapter


def _run(pipeline: Any, prompt: str = "a smiling person", **options: Any) -> Pixels:
    """64 x 64, two steps, the same noise every time."""
    sizes = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": 3.0, "max_sequence_length": PROMPT_TOKENS}
    picture = pipeline(prompt, generator=torch.Generator().manual_seed(3), **(sizes | options)).images[0]
    return np.asarray(picture).astype(np.int16)


def _picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def _load_adapter(pipeline: Any, folder: Path) -> None:
    pipeline.load_ip_adapter(
        folder, weight_name="ip_adapter.safetensors", image_encoder_pretrained_model_name_or_path=folder / "image_encoder",
        image_encoder_dtype=torch.float32,
    )  # fmt: skip


@pytest.mark.filterwarnings("ignore:`torch_dtype` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"dtype": torch.float32}, {"torch_dtype": torch.float32}, {"low_cpu_mem_usage": False}])
def test_stock_pipeline_computes_in_fp32_with_the_stored_weights(folder: Path, models: dict[str, Any], options: dict[str, Any]) -> None:
    pipeline = FluxPipeline.from_pretrained(folder, **options)

    def halved(weight: Tensor) -> Tensor:
        return weight.half().float()

    def matrices_rounded(weight: Tensor) -> Tensor:
        return fake_quantise(weight) if weight.ndim == 2 else halved(weight)

    expected = {"transformer": matrices_rounded, "vae": halved, "t5": matrices_rounded, "clip": matrices_rounded}
    parts = {"transformer": pipeline.transformer, "vae": pipeline.vae, "t5": pipeline.text_encoder_2, "clip": pipeline.text_encoder}
    for name, part in parts.items():
        assert {p.dtype for p in part.parameters()} == {torch.float32}, name
        loaded = part.state_dict()
        assert [key for key, w in models[name].state_dict().items() if not torch.equal(loaded[key], expected[name](w))] == []


def test_matrices_of_the_transformer_are_fp8_on_disk(folder: Path) -> None:
    weights = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    assert {w.dtype for w in weights.values() if w.ndim == 2} == {torch.float8_e4m3fn}
    assert {w.dtype for w in weights.values() if w.ndim != 2} == {torch.float16}


def test_the_prompt_changes_the_picture_and_its_case_does_not(pipe: Any) -> None:
    base = _run(pipe)
    assert base.shape == (64, 64, 3)
    assert np.array_equal(_run(pipe, "A Smiling PERSON"), base)
    assert np.abs(_run(pipe, "a sad person in a forest") - base).max() > 1
    assert np.abs(_run(pipe, guidance_scale=1.0) - base).max() > 1


def test_both_text_encoders_reach_the_picture(pipe: Any) -> None:
    base = _run(pipe, "a person", prompt_2="a person")
    assert not np.array_equal(_run(pipe, "a sad dog", prompt_2="a person"), base)
    assert not np.array_equal(_run(pipe, "a person", prompt_2="a sad dog"), base)


def test_sigmas_are_shifted_statically_at_any_size(pipe: Any) -> None:
    for size in (64, 96):
        _run(pipe, num_inference_steps=4, height=size, width=size, output_type="np")
        plain = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
        torch.testing.assert_close(pipe.scheduler.sigmas, SHIFT * plain / (1 + (SHIFT - 1) * plain))


def test_192_px_are_576_tokens(pipe: Any) -> None:
    latents, ids = pipe.prepare_latents(1, 16, 192, 192, torch.float32, "cpu", torch.Generator())
    assert latents.shape == (1, 576, flux_config()["in_channels"]) and ids.shape == (576, 3)


def test_the_same_models_give_the_same_bytes_and_no_machine_is_named(models: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    reopened = {
        "transformer": FluxTransformer2DModel.from_pretrained(folder / "transformer"),
        "vae": AutoencoderKL.from_pretrained(folder / "vae"),
        "t5": T5EncoderModel.from_pretrained(folder / "text_encoder_2"),
        "clip": CLIPTextModel.from_pretrained(folder / "text_encoder"),
    }
    save_flux_folder(tmp_path, **(models | reopened))
    names = sorted(p.relative_to(folder) for p in folder.rglob("*") if p.is_file())
    assert names == sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*") if p.is_file())
    assert [name for name in names if (folder / name).read_bytes() != (tmp_path / name).read_bytes()] == []
    assert [name for name in names if name.suffix == ".json" and str(folder) in (tmp_path / name).read_text()] == []


def test_the_adapter_obeys_its_scale_and_its_picture(pipe: Any, adapter_folder: Path) -> None:
    base = _run(pipe)
    _load_adapter(pipe, adapter_folder)
    first, second = _run(pipe, ip_adapter_image=_picture(1)), _run(pipe, ip_adapter_image=_picture(2))
    assert np.abs(first - base).mean() > 1
    assert np.abs(first - second).mean() > 1
    pipe.set_ip_adapter_scale(0.0)
    assert np.array_equal(_run(pipe, ip_adapter_image=_picture(1)), base)
    pipe.unload_ip_adapter()
    assert np.array_equal(_run(pipe), base)


def test_stock_loading_prepares_pictures_as_the_file_says(pipe: Any, adapter_folder: Path) -> None:
    _load_adapter(pipe, adapter_folder)
    written = CLIPImageProcessor.from_pretrained(adapter_folder / "image_encoder")
    picture = _picture(1).resize((200, 150))
    pixels = [processor(picture, return_tensors="pt").pixel_values for processor in (pipe.feature_extractor, written)]
    assert pixels[0].shape == (1, 3, 112, 112)
    assert torch.equal(pixels[0], pixels[1])


def test_the_adapters_file_has_the_published_names() -> None:
    state = export_xlabs(XLabsAdapter())
    projections = [
        f"double_blocks.{i}.processor.ip_adapter_double_stream_{p}_proj.{w}" for i in range(2) for p in "kv" for w in ("weight", "bias")
    ]
    model = [f"ip_adapter_proj_model.{layer}.{w}" for layer in ("proj", "norm") for w in ("weight", "bias")]
    assert sorted(state) == sorted(projections + model)
    assert state["ip_adapter_proj_model.proj.weight"].shape == (4 * 128, 128)
    assert state["double_blocks.1.processor.ip_adapter_double_stream_v_proj.weight"].shape == (256, 128)


class _Step:
    """One call of the transformer, in stock form and in training form."""

    def __init__(self, n: int = 3, side: int = 12, words: int = 8) -> None:
        torch.manual_seed(2)
        self.transformer: Any = FluxTransformer2DModel(**flux_config()).requires_grad_(False)
        self.training = TrainableFlux(copy.deepcopy(self.transformer), side, words, compiled=False)
        self.noisy, self.times, self.guidance = torch.randn(n, side * side // 4, 64), torch.rand(n), torch.full((n,), 2.0)
        self.prompt, self.seen = Prompt(torch.randn(n, words, 128), torch.randn(n, 128)), torch.randn(n, 128)
        self.ids = position_ids(side, side, words, "cpu").split([words, side * side // 4])

    def stock(self, **attention: Any) -> Tensor:
        velocity: Tensor = self.transformer(
            hidden_states=self.noisy, encoder_hidden_states=self.prompt.states, pooled_projections=self.prompt.pooled, timestep=self.times,
            guidance=self.guidance, txt_ids=self.ids[0], img_ids=self.ids[1], joint_attention_kwargs=attention or None, return_dict=False,
        )[0]  # fmt: skip
        return velocity

    def trained(self, image: list[tuple[Tensor, Tensor]] | None = None) -> Tensor:
        return self.training.velocity(self.noisy, self.prompt, self.times, self.guidance, image=image)


def test_training_adds_what_the_stock_processor_adds(pipe: Any, tmp_path: Path) -> None:
    step, adapter = _Step(), _loud_adapter()
    save_weights(tmp_path / "ip.safetensors", export_xlabs(adapter))
    with torch.no_grad():
        base, trained = step.trained(), step.trained(adapter(step.seen))
        assert (trained - base).abs().mean() > 0.01
        torch.testing.assert_close(base, step.stock(), atol=1e-5, rtol=1e-5)
        pipe.transformer = step.transformer
        pipe.load_ip_adapter(tmp_path, weight_name="ip.safetensors", image_encoder_pretrained_model_name_or_path=None)
        torch.testing.assert_close(trained, step.stock(ip_adapter_image_embeds=[step.seen[:, None]]), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(trained, step.stock(ip_hidden_states=[adapter.tokens(step.seen)]), atol=1e-5, rtol=1e-5)


def test_an_untrained_adapter_changes_nothing_and_learns_in_all_its_parts() -> None:
    step = _Step()
    with torch.no_grad():
        assert torch.equal(step.trained(XLabsAdapter()(step.seen)), step.trained())
    adapter = _loud_adapter()
    step.trained(adapter(step.seen)).square().mean().backward()
    assert [name for name, p in adapter.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


@pytest.fixture
def controlnet(models: dict[str, Any], tmp_path: Path) -> Any:
    save_controlnet(tmp_path / "controlnet", controlnet_from(models["transformer"]))
    return FluxControlNetModel.from_pretrained(tmp_path / "controlnet")


diffusers_own_deprecation = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")


@diffusers_own_deprecation
def test_the_controlnet_begins_as_the_transformer_and_changes_nothing(pipe: Any, controlnet: Any, models: dict[str, Any]) -> None:
    theirs, ours = models["transformer"].state_dict(), controlnet.state_dict()
    shared = [key for key in ours if key in theirs]
    assert {key.split(".")[0] for key in shared} == {"time_text_embed", "context_embedder", "x_embedder", "transformer_blocks"}
    assert [key for key in shared if ours[key].ndim == 2 and not torch.equal(ours[key], fake_quantise(theirs[key]))] == []
    assert controlnet.union and controlnet.config.num_mode == 10
    control = _control_pipeline(pipe, controlnet)
    assert np.array_equal(_controlled(control, _picture(1), POSE, 1.0), _controlled(control, _picture(1), POSE, 0.0))


@diffusers_own_deprecation
def test_a_trained_controlnet_sees_its_picture_and_its_mode(pipe: Any, controlnet: Any) -> None:
    torch.manual_seed(4)
    for layer in (controlnet.controlnet_blocks[0], controlnet.controlnet_x_embedder):
        torch.nn.init.normal_(layer.weight, std=0.3)
    control = _control_pipeline(pipe, controlnet)
    pose = _controlled(control, _picture(1), POSE, 1.0)
    assert np.abs(pose - _controlled(control, _picture(1), POSE, 0.0)).mean() > 1
    assert np.abs(pose - _controlled(control, _picture(2), POSE, 1.0)).mean() > 1
    assert not np.array_equal(pose, _controlled(control, _picture(1), OTHER_MODE, 1.0))


def _control_pipeline(pipe: Any, controlnet: Any) -> Any:
    pipeline = FluxControlNetPipeline.from_pipe(pipe, controlnet=FluxMultiControlNetModel([controlnet]))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _controlled(pipeline: Any, picture: Image.Image, mode: int, scale: float) -> Pixels:
    return _run(
        pipeline, control_image=[picture], control_mode=[mode], controlnet_conditioning_scale=[scale],
        control_guidance_start=[0.0], control_guidance_end=[1.0],
    )  # fmt: skip


def test_the_index_names_the_published_classes(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "FluxPipeline"
    assert index["tokenizer_2"] == ["transformers", "T5TokenizerFast"]
    assert index["text_encoder"] == ["transformers", "CLIPTextModel"]
