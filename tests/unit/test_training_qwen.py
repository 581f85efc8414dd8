"""From PNG files to a LoRA for Qwen-Image that stock diffusers takes, on a pipeline's folder of random weights in the published layout."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, QwenImageImg2ImgPipeline, QwenImagePipeline, QwenImageTransformer2DModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from deployments.catalog import load_catalog
from deployments.denoisers.latents import Grid, from_picture, pack
from deployments.errors import CheckpointMismatch, InvalidRequest, NotEnoughMemory, UnsupportedCombination
from deployments.prompts.qwen_image import QwenPrompts
from deployments.weights import MODELS_ROOT_VARIABLE, WeightFolder
from serve.app import build_workflows
from serve.cluster import serving
from serve.settings import AppSettings
from tests.named_weights import named_tensor
from tests.qwen_folder import BASE, catalog_of, make
from training.adapters import add_lora, parameter_count, target_names
from training.base_models import Base, open_base
from training.character_lora import Trained, train_lora
from training.latent_cache import Example, MomentsCache, prepare
from training.loop import Progress
from training.memory_plan import plan
from training.objective import Batch, QwenObjective
from training.settings import TARGETS, TrainingSettings, preset
from training.trigger_words import trigger_warnings

CPU = torch.device("cpu")
TRIGGER, TEXT = "ohwx", "ohwx, a portrait in the rain"
GB = 10**9


def pictures(folder: Path, count: int) -> list[Example]:
    """Blotches of 64 x 64, each its own, with captions of different lengths."""
    folder.mkdir()
    found = []
    for number in range(count):
        rough = (named_tensor(f"picture {number}", 4, 4, 3).numpy() * 60 + 128).clip(0, 255).astype(np.uint8)
        Image.fromarray(rough).resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{number}.png")
        found.append(Example(folder / f"{number}.png", f"{TRIGGER}, a portrait" + ", in the rain" * number))
    return found


def quick(**changes: Any) -> TrainingSettings:
    usual: dict[str, Any] = {
        "base": BASE, "steps": 4, "batch": 2, "grad_accum": 1, "resolutions": [64], "checkpoint_every": 2, "warm_up_steps": 0,
        "held_out": 1, "rank": 4, "alpha": 8, "learning_rate": 1e-2, "dtype": "float32", "saved_dtype": "float32",
        "gradient_checkpointing": "off",
    }  # fmt: skip
    return preset("qwen-a100", **(usual | changes))


@dataclass(frozen=True)
class Place:
    """A root of models with the folder in it."""

    root: Path
    folder: Path

    def base(self) -> Base:
        return open_base(catalog_of(self.root), catalog_of(self.root).entry(BASE), CPU, torch.float32)

    def train(self, folder: Path, examples: list[Example], settings: TrainingSettings, **more: Any) -> Trained:
        return train_lora(settings, examples, TRIGGER, folder / "run", folder / "cache", CPU, catalog=catalog_of(self.root), **more)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("models")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv(MODELS_ROOT_VARIABLE, str(root))
        yield Place(root, make(root))


@pytest.fixture(scope="module")
def stock(place: Place) -> Any:
    return QwenImagePipeline.from_pretrained(place.folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def trained(place: Place, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, list[Progress], Path]:
    """Of four pictures, four steps of two, captions of different lengths; with one sample."""
    folder = tmp_path_factory.mktemp("training")
    seen: list[Progress] = []
    told = quick(sample_every=4, sample_prompts=[TEXT])
    return place.train(folder, pictures(folder / "pictures", 4), told, report=seen.append), seen, folder


def test_what_was_trained_is_there_and_says_what_it_is(trained: tuple[Trained, list[Progress], Path]) -> None:
    made, seen, folder = trained
    assert made.outcome.step == 4 and list(made.checkpoints) == [2, 4] and seen[-1].held_out is not None
    with safe_open(made.lora, "pt") as file:
        said = file.metadata()
    assert (said["base"], said["modelspec.architecture"], said["rank"], said["pictures"]) == (BASE, "qwen-image/lora", "4", "4")
    with Image.open(folder / "run" / "samples" / "step-000004-0.png") as sample:
        assert sample.size == (64, 64) and float(np.asarray(sample).std()) > 0


def test_stock_diffusers_draws_with_it_what_the_trainer_would(place: Place, trained: tuple[Trained, list[Progress], Path]) -> None:
    """The trainer's own adapter with the averaged weights of its state on one side; stock `load_lora_weights` on the other."""
    made, _, _ = trained
    pipe: Any = QwenImagePipeline.from_pretrained(place.folder, dtype=torch.float32)
    asked: dict[str, Any] = {
        "hidden_states": named_tensor("latents", 1, 16, 16), "timestep": torch.tensor([0.5]), "img_shapes": [[(1, 4, 4)]],
        "encoder_hidden_states": pipe.encode_prompt(TEXT)[0], "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        bare = pipe.transformer(**asked)[0]
        pipe.load_lora_weights(str(made.lora.parent), weight_name=made.lora.name)
        loaded = pipe.transformer(**asked)[0]
        ours = _own(place, made).eval()(**asked)[0]
    assert float((loaded - ours).abs().max()) == 0.0 and float((loaded - bare).abs().max()) > 1e-3


def _own(place: Place, made: Trained) -> Any:
    transformer = place.base().transformer()
    parameters = add_lora(transformer, TARGETS["qwen-image"], 4, 8, seed=0)
    state = torch.load(made.checkpoints[4].parent / "state.pt", weights_only=True)
    with torch.no_grad():
        for p, value in zip(parameters, state["average"], strict=True):
            p.copy_(value)
    return transformer


def test_a_sample_is_the_picture_that_the_stock_pipeline_draws(place: Place, trained: tuple[Trained, list[Progress], Path]) -> None:
    made, _, folder = trained
    pipe: Any = QwenImagePipeline.from_pretrained(place.folder, dtype=torch.float32)
    pipe.load_lora_weights(str(made.lora.parent), weight_name=made.lora.name)
    (drawn,) = pipe(
        TEXT, negative_prompt="", true_cfg_scale=4.0, width=64, height=64, num_inference_steps=2, generator=torch.Generator().manual_seed(0)
    ).images
    with Image.open(folder / "run" / "samples" / "step-000004-0.png") as sample:
        assert np.array_equal(np.asarray(sample), np.asarray(drawn))


def test_a_training_that_was_broken_off_ends_with_the_same_bytes(
    place: Place, trained: tuple[Trained, list[Progress], Path], tmp_path: Path
) -> None:
    made, _, folder = trained
    whole = place.train(tmp_path / "whole", pictures(tmp_path / "pictures", 4), quick())
    seen: list[Progress] = []
    examples = pictures(tmp_path / "again", 4)
    first = place.train(tmp_path, examples, quick(), report=seen.append, cancelled=lambda: len(seen) >= 1)
    assert first.outcome.stopped and first.outcome.step == 2
    second = place.train(tmp_path, examples, quick(), report=seen.append)
    assert [progress.step for progress in seen] == [1, 2, 3, 4]
    assert second.lora.read_bytes() == whole.lora.read_bytes() == made.lora.read_bytes() != first.checkpoints[2].read_bytes()


def test_as_the_preset_has_it_blocks_are_computed_twice_in_bf16(place: Place, tmp_path: Path) -> None:
    told = quick(dtype="bfloat16", saved_dtype="bfloat16", gradient_checkpointing="on", steps=2, sample_every=2, sample_prompts=[TEXT])
    made = place.train(tmp_path, pictures(tmp_path / "pictures", 3), told)
    factors = load_file(made.lora)
    assert made.memory.checkpointing and {value.dtype for value in factors.values()} == {torch.bfloat16}
    assert all(bool(value.any()) for value in factors.values()) and (tmp_path / "run" / "samples" / "step-000002-0.png").is_file()


def test_it_learns_a_picture(place: Place, tmp_path: Path) -> None:
    """The picture that is held out is the one that is trained on. A rate that moves nothing tells the loss before."""
    (example,) = pictures(tmp_path / "pictures", 1)
    held_out = []
    for steps, rate in ((1, 1e-9), (30, 2e-2)):
        told = quick(steps=steps, checkpoint_every=steps, learning_rate=rate, ema=0.5, rank=16, alpha=16)
        held_out.append(place.train(tmp_path / str(steps), [example, replace(example)], told).outcome.held_out)
    assert held_out[0] is not None and held_out[1] is not None and held_out[1] < 0.7 * held_out[0]


def test_latents_are_the_pipelines(place: Place, tmp_path: Path) -> None:
    """Mean and deviation at once: a sample of the posterior with the pipeline's own noise."""
    (example,) = pictures(tmp_path / "pictures", 1)
    base = place.base()
    cache = MomentsCache(tmp_path / "latents", base.moments, base.vae_revision())
    data = prepare(
        [example], QwenPrompts(place.folder), cache, resolutions=(64,), divisor=base.pixels_of_a_token, max_length=256, mask_weight=0.05
    )
    item = data.trained[0]
    pipe: Any = QwenImageImg2ImgPipeline.from_pretrained(place.folder, dtype=torch.float32)
    with torch.no_grad(), Image.open(example.picture) as picture:
        pixels = pipe.image_processor.preprocess(picture, 64, 64).unsqueeze(2)
        assert torch.allclose(pixels[:, :, 0], from_picture(np.asarray(picture)))
        expected = pipe._encode_vae_image(pixels, torch.Generator().manual_seed(3))
    noise = torch.randn(expected.shape, generator=torch.Generator().manual_seed(3))[0, :, 0]
    assert item.mean.shape == (4, 8, 8) and torch.allclose(item.mean + item.std * noise, expected[0, :, 0], atol=1e-5)
    packed = pipe._pack_latents(expected, 1, 4, 8, 8)
    assert torch.equal(pack(expected[:, :, 0]), packed) and base.pixels_of_a_token == 2 * pipe.vae_scale_factor


def test_texts_are_read_as_the_pipeline_reads_them(place: Place, stock: Any) -> None:
    texts = [TEXT, "", TEXT + ", a long one" * 20]
    found = QwenPrompts(place.folder).encode(texts, 512)
    assert found.states.shape == (3, 512, 32) and found.pooled.shape == (3, 0)
    for row, (text, length) in enumerate(zip(texts, found.lengths, strict=True)):
        expected, mask = stock.encode_prompt(text)
        assert mask is None and length == expected.shape[1]
        assert torch.equal(found.states[row, :length], expected[0]) and not found.states[row, length:].any()
    cut = QwenPrompts(place.folder).encode([TEXT], 100)
    assert cut.lengths == (100,) and torch.equal(cut.states, stock.encode_prompt(TEXT, max_sequence_length=100)[0])
    with pytest.raises(InvalidRequest, match="max_sequence_length is 2000"):
        QwenPrompts(place.folder).encode([TEXT], 2000)


def test_states_are_found_under_both_names_that_the_library_gave_them(place: Place, tmp_path: Path) -> None:
    """transformers wrote `model.layers` and `visual.blocks` before, and knows `model.language_model.layers` and `model.visual.blocks`."""
    expected, folder = QwenPrompts(place.folder).encode([TEXT], 200), tmp_path / "qwen"
    shutil.copytree(place.folder, folder)
    path = folder / "text_encoder" / "model.safetensors"
    old = load_file(path)
    assert "model.norm.weight" in old and "visual.merger.ln_q.weight" in old
    longer = {re.sub("^visual", "model.visual", re.sub("^model", "model.language_model", name)): value for name, value in old.items()}
    save_file(longer, path, {"format": "pt"})
    assert torch.equal(QwenPrompts(folder).encode([TEXT], 200).states, expected.states)


def test_each_picture_of_a_batch_sees_its_own_text_and_no_filling(place: Place) -> None:
    """As where one picture is drawn; whatever lies behind a text, and whoever else is in the batch."""
    transformer, prompts = place.base().transformer(), QwenPrompts(place.folder).encode([TEXT, "ohwx", TEXT + "!"], 200)
    lengths = prompts.lengths
    assert len(set(lengths)) == 3
    latents, order = named_tensor("latents", 4, 16, 16), [0, 1, 2, 1]
    states = torch.stack([prompts.states[row] for row in order])
    for row, place_ in enumerate(order):
        states[row, lengths[place_] :] = 7.0
    sigmas = torch.tensor([0.9, 0.5, 0.3, 0.1])
    batch = Batch(
        clean=latents, noise=latents, sigmas=sigmas, states=states, pooled=torch.zeros(4, 0), weights=None, importance=torch.ones(4),
        grid=Grid(4, 4, 4), lengths=tuple(lengths[k] for k in order),
    )  # fmt: skip
    with torch.no_grad():
        found = QwenObjective().velocity(transformer, batch)
        for row, k in enumerate(order):
            alone = transformer(
                hidden_states=batch.noisy[row : row + 1], timestep=sigmas[row : row + 1], img_shapes=[[(1, 4, 4)]],
                encoder_hidden_states=prompts.states[k : k + 1, : lengths[k]], return_dict=False,
            )[0]  # fmt: skip
            assert torch.allclose(found[row], alone[0], atol=1e-5)


@pytest.mark.parametrize(
    ("part", "opens"), [("transformer", "transformer"), ("vae", "moments"), ("text_encoder", "prompts")], ids=lambda name: str(name)
)
def test_a_checkpoint_that_does_not_fit_is_named(place: Place, tmp_path: Path, part: str, opens: str) -> None:
    (path,) = (place.folder / part).glob("*.safetensors")
    content = path.read_bytes()
    tensors = load_file(path)
    lost = sorted(tensors)[3]
    try:
        save_file({name: value for name, value in tensors.items() if name != lost}, path, {"format": "pt"})
        with pytest.raises(CheckpointMismatch, match=lost.rpartition(".")[2]) as caught:
            getattr(place.base(), opens)()
        assert "missing" in caught.value.message
        save_file({**tensors, "a.stranger": torch.zeros(2)}, path, {"format": "pt"})
        with pytest.raises(CheckpointMismatch, match=r"a\.stranger"):
            getattr(place.base(), opens)()
    finally:
        path.write_bytes(content)


def test_a_trigger_word_is_judged_by_its_tokeniser(place: Place) -> None:
    tokenisers = place.base().tokenisers()
    assert trigger_warnings("ohwx", ["ohwx, a portrait"], tokenisers) == []
    assert "Qwen2.5-VL reads 'zqxjv' in 5 pieces (z q x j v)" in trigger_warnings("zqxjv", ["zqxjv"], tokenisers)[0]


def test_at_its_true_size_the_plan_says_what_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of configurations alone (the classes' own defaults are the published ones), opened as the catalogue's entry is. 20.43
    thousand million numbers and 720 modules are the published ones; four modules of the last block can never learn and are left out."""
    with torch.device("meta"):
        QwenImageTransformer2DModel().save_config(tmp_path / "toy" / "qwen" / "transformer")
        AutoencoderKLQwenImage().save_config(tmp_path / "toy" / "qwen" / "vae")
    monkeypatch.setenv(MODELS_ROOT_VARIABLE, str(tmp_path))
    base, targets, told = Place(tmp_path, tmp_path).base(), TARGETS["qwen-image"], preset("qwen-a100")
    outline = base.outline()
    assert (round(sum(p.numel() for p in outline.parameters()) / 1e9, 2), base.pixels_of_a_token, base.text_tokens) == (20.43, 16, 512)
    linear = {name: module for name, module in outline.named_modules() if isinstance(module, torch.nn.Linear)}
    published = [name for name in linear if re.fullmatch(targets, name)]
    numbers = sum(32 * (linear[name].in_features + linear[name].out_features) for name in published)
    assert (len(published), round(numbers / 1e6, 1)) == (720, 212.3)
    assert (len(target_names(outline, targets)), round(parameter_count(outline, targets, 32) / 1e6, 1)) == (716, 211.0)
    asked = told, outline, targets, base.pixels_of_a_token, base.text_tokens
    assert plan(*asked, 80 * GB).checkpointing
    with pytest.raises(NotEnoughMemory, match="training with qwen-image needs 49.* GB .* 48.0 GB may be taken") as caught:
        plan(*asked, 48 * GB)
    assert caught.value.remedy == "This would fit: gradient_checkpointing = on, optimiser = adamw8bit."


def test_the_catalogue_has_the_published_layout() -> None:
    entry = load_catalog().entry("qwen-image")
    weights = entry.weights["pipeline"]
    assert isinstance(weights, WeightFolder) and entry.licence.commercial and entry.role == "base"
    assert {file.file.partition("/")[0] for file in weights.files if "/" in file.file} == {
        "scheduler", "text_encoder", "tokenizer", "transformer", "vae",
    }  # fmt: skip
    shards = [file.file for file in weights.files if file.file.endswith(".safetensors")]
    assert len(shards) == 9 + 4 + 1 and {file.repo for file in weights.files} == {"Qwen/Qwen-Image"}


def test_a_server_cannot_draw_with_it_and_says_so_before_anything_starts() -> None:
    told = AppSettings(base="qwen-image", methods=(), controlnets=())
    said = "A server cannot draw with qwen-image: there is no denoiser for qwen-image here.*Let `base` be flux1-dev or flux1-mini"
    with pytest.raises(UnsupportedCombination, match=said):
        build_workflows(told)
    with pytest.raises(UnsupportedCombination, match=said), serving(told):
        pass
    with pytest.raises(UnsupportedCombination, match="pulid-mini: it is of role identity"):
        load_catalog().servable("pulid-mini")
