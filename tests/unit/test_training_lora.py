"""From pictures of one of the world's characters to a LoRA that stock diffusers and our own store take, on the embedded FLUX."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from deployments.denoisers.lora.formats import open_lora
from deployments.errors import InvalidImage, InvalidRequest
from deployments.lora_server import LoraServer
from deployments.prompts.cache import PromptCache
from deployments.prompts.flux import FluxPrompts
from deployments.store.settings import StoreSettings
from tests.lora_files import TRANSFORMER
from tests.mini_drawing import FLUX, PACK
from training.base_models import open_base
from training.character_lora import Trained, train_lora
from training.latent_cache import Example, MomentsCache, prepare
from training.loop import Progress
from training.mini.heldout import character_identity
from training.mini.world.captions import caption
from training.mini.world.landmarks import face_box
from training.mini.world.render import render
from training.mini.world.scene import CLOSE_UP, PORTRAIT, Scene, sample_scenes
from training.settings import TrainingSettings, preset

CPU = torch.device("cpu")
WHO, TRIGGER = "Bruno", "ohwx"
Pictures = np.ndarray[Any, np.dtype[np.uint8]]


def drawn(scene: Scene) -> Pictures:
    """[n, 192, 192, 3]: the character as the world has it."""
    with torch.no_grad():
        pictures = render(character_identity(WHO).expand(len(scene), -1), scene)
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def examples(folder: Path, count: int, side: int = 192) -> list[Example]:
    """Pictures, captions that begin with the trigger word, masks under which the face counts three times as much as the rest."""
    folder.mkdir()
    scene = sample_scenes(count, 5001)
    boxes = (face_box(character_identity(WHO).expand(count, -1), scene) + 1) * 96
    found = []
    for number, (pixels, text, box) in enumerate(zip(drawn(scene), caption(scene), boxes.tolist(), strict=True)):
        left, top, right, bottom = (max(0, int(place)) for place in box)
        mask = np.full((192, 192), 85, np.uint8)
        mask[top : bottom + 1, left : right + 1] = 255
        picture, weights = folder / f"{number:02}.png", folder / f"{number:02}-mask.png"
        Image.fromarray(pixels).resize((side, side)).save(picture)
        Image.fromarray(mask).resize((side, side)).save(weights)
        found.append(Example(picture, f"{TRIGGER}, {text}", weights))
    return found


def quick(**changes: Any) -> TrainingSettings:
    usual: dict[str, Any] = {
        "steps": 2, "batch": 1, "resolutions": [64], "checkpoint_every": 2, "warm_up_steps": 0, "held_out": 1, "alpha": 32, "rank": 8,
    }  # fmt: skip
    return preset("mini", **(usual | changes))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Trained, list[Progress], Path]:
    """Of four pictures of 64 px, two steps; with one sample."""
    folder = tmp_path_factory.mktemp("training")
    seen: list[Progress] = []
    told = quick(sample_every=2, sample_prompts=["ohwx, a portrait"])
    made = train_lora(told, examples(folder / "pictures", 4, 64), TRIGGER, folder / "run", folder / "cache", CPU, report=seen.append)
    return made, seen, folder


def test_what_was_trained_is_there_and_says_what_it_is(trained: tuple[Trained, list[Progress], Path]) -> None:
    made, seen, folder = trained
    assert made.outcome.step == 2 and seen[-1].checkpoint == made.checkpoints[2].parent and seen[-1].held_out is not None
    assert made.lora.read_bytes() == made.checkpoints[2].read_bytes()
    assert made.warnings == ("There are only 4 pictures; below 10 a LoRA learns them rather than the person.",)
    with safe_open(made.lora, "pt") as file:
        said = file.metadata()
    assert (said["pictures"], said["dataset_sha256"], said["rank"], said["alpha"]) == ("4", made.dataset, "8", "32")
    with Image.open(folder / "run" / "samples" / "step-000002-0.png") as sample:
        assert sample.size == (64, 64)
    assert "steps: 2" in (folder / "run" / "settings.yaml").read_text()


def test_stock_diffusers_draws_with_it_what_the_trainer_would(trained: tuple[Trained, list[Progress], Path]) -> None:
    """The file's factors, times alpha / rank, by hand on one side; stock `load_lora_weights` on the other."""
    made, _, _ = trained
    pipe = FluxPipeline.from_pretrained(FLUX, dtype=torch.float32)
    asked: dict[str, Any] = {
        "hidden_states": torch.ones(1, 16, 64), "timestep": torch.tensor([0.5]), "guidance": torch.ones(1),
        "encoder_hidden_states": torch.ones(1, 4, 128), "pooled_projections": torch.ones(1, 128), "txt_ids": torch.zeros(4, 3),
        "img_ids": torch.zeros(16, 3), "return_dict": False,
    }  # fmt: skip
    with torch.no_grad():
        bare = pipe.transformer(**asked)[0]
        pipe.load_lora_weights(str(made.lora.parent), weight_name=made.lora.name)
        loaded = pipe.transformer(**asked)[0]
        ours = _own(made).eval()(**asked)[0]
    assert float((loaded - ours).abs().max()) == 0.0 and float((loaded - bare).abs().max()) > 0


def _own(made: Trained) -> Any:
    """The base with the trainer's own adapter, whose averaged weights are read from the checkpoint's state."""
    from deployments.catalog import load_catalog
    from training.adapters import add_lora

    catalog = load_catalog()
    transformer = open_base(catalog, catalog.entry("flux1-mini"), CPU, torch.float32).transformer()
    parameters = add_lora(transformer, quick().targets_of("flux1"), 8, 32, seed=0)
    state = torch.load(made.checkpoints[2].parent / "state.pt", weights_only=True)
    with torch.no_grad():
        for p, value in zip(parameters, state["average"], strict=True):
            p.copy_(value)
    return transformer


def test_our_own_store_takes_it_and_our_denoiser_reads_all_of_it(trained: tuple[Trained, list[Progress], Path], tmp_path: Path) -> None:
    made, _, _ = trained
    server = LoraServer("flux1-mini", StoreSettings(url=f"sqlite:///{tmp_path / 'likeness.db'}", folder=tmp_path / "files"))
    info = server.add(made.lora.read_bytes(), WHO, "ada")
    keys = len(load_file(made.lora))
    assert (info.trigger_word, info.rank_low, info.keys, info.error) == (TRIGGER, 8, keys, 0)
    assert open_lora(server.path(info.sha256), TRANSFORMER).facts.keys == keys
    server.close()


def test_the_same_training_again_encodes_nothing_and_trains_nothing(trained: tuple[Trained, list[Progress], Path]) -> None:
    made, _, folder = trained
    before = {path: path.stat().st_mtime_ns for path in (folder / "cache" / "latents").iterdir()}
    seen: list[Progress] = []
    pictures = [Example(p, e.caption, e.mask) for e in _found(folder) for p in [e.picture]]
    told = quick(sample_every=2, sample_prompts=["ohwx, a portrait"])
    again = train_lora(told, pictures, TRIGGER, folder / "run", folder / "cache", CPU, report=seen.append)
    assert seen == [] and again.outcome.step == 2 and again.lora.read_bytes() == made.lora.read_bytes()
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache" / "latents").iterdir()} == before and len(before) == 4


def _found(folder: Path) -> list[Example]:
    texts = [f"{TRIGGER}, {text}" for text in caption(sample_scenes(4, 5001))]
    places = [folder / "pictures" / f"{k:02}.png" for k in range(4)]
    return [Example(place, text, place.with_name(f"{place.stem}-mask.png")) for place, text in zip(places, texts, strict=True)]


def _prepare(pictures: list[Example], folder: Path, **changes: Any) -> Any:
    from deployments.catalog import load_catalog

    catalog = load_catalog()
    base = open_base(catalog, catalog.entry("flux1-mini"), CPU, torch.float32)
    cache = MomentsCache(folder / "latents", base.moments, base.vae_revision())
    usual: dict[str, Any] = {"resolutions": (64,), "divisor": 8, "max_length": 48, "mask_weight": 0.2}
    return prepare(pictures, PromptCache(FluxPrompts(FLUX)), cache, **(usual | changes)), cache


def test_latents_are_kept_by_content_and_mended_where_damaged(tmp_path: Path) -> None:
    pictures = examples(tmp_path / "pictures", 2)
    first, cache = _prepare(pictures, tmp_path, resolutions=(64, 128))
    assert cache.encoded == 4 and sorted({str(item.bucket) for item in first.trained}) == ["128x128", "64x64"]
    damaged = sorted((tmp_path / "latents").iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:50])
    again, cache = _prepare(pictures, tmp_path, resolutions=(64, 128))
    assert cache.encoded == 1 and again.hash == first.hash
    assert all(torch.equal(a.mean, b.mean) and torch.equal(a.std, b.std) for a, b in zip(first.trained, again.trained, strict=True))
    other, _ = _prepare([replace(pictures[0], caption="another"), pictures[1]], tmp_path, resolutions=(64, 128))
    assert other.hash != first.hash


def test_latents_are_the_pipelines_and_faces_count_more(tmp_path: Path) -> None:
    pictures = examples(tmp_path / "pictures", 1)
    data, _ = _prepare(pictures, tmp_path, resolutions=(192,))
    vae: Any = FluxPipeline.from_pretrained(FLUX, dtype=torch.float32, text_encoder=None, text_encoder_2=None, transformer=None).vae
    with torch.no_grad(), Image.open(pictures[0].picture) as picture:
        pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None] / 127.5 - 1
        expected = (vae.encode(pixels).latent_dist.mean - vae.config.shift_factor) * vae.config.scaling_factor
    item = data.trained[0]
    assert torch.allclose(item.mean, expected[0], atol=1e-5) and bool((item.std > 0).all())
    assert float(item.weights.mean()) == pytest.approx(1) and float(item.weights.max() / item.weights.min()) == pytest.approx(3, abs=0.02)


@pytest.mark.parametrize("masked", (False, True))
def test_a_small_face_gets_its_share_of_the_loss(tmp_path: Path, masked: bool) -> None:
    (picture,) = examples(tmp_path / "pictures", 1)
    if not masked:
        picture = replace(picture, mask=None)
    box = (96.0, 48.0, 144.0, 96.0)  # six by six of the 24 x 24 tokens
    here = torch.zeros(24, 24)
    here[6:12, 12:18] = 1
    (plain,) = _prepare([picture], tmp_path, resolutions=(192,))[0].trained
    data, _ = _prepare([replace(picture, face=box)], tmp_path, resolutions=(192,), face_share=0.5)
    weights = data.trained[0].weights
    assert weights is not None and float(weights.mean()) == pytest.approx(1)
    assert float((weights * here.flatten()).sum() / weights.sum()) == pytest.approx(0.5, abs=1e-4)
    elsewhere = weights[here.flatten() == 0]
    before = torch.ones(24 * 24) if plain.weights is None else plain.weights
    assert torch.allclose(elsewhere / elsewhere.mean(), before[here.flatten() == 0] / before[here.flatten() == 0].mean(), atol=1e-4)
    small, _ = _prepare([replace(picture, face=box)], tmp_path, resolutions=(64,), face_share=0.5)
    assert float(small.trained[0].weights.view(8, 8)[2:4, 4:6].sum() / 64) == pytest.approx(0.5, abs=0.02), "where the bucket shows it"


def test_a_face_that_has_more_than_its_share_changes_nothing(tmp_path: Path) -> None:
    (picture,) = examples(tmp_path / "pictures", 1)
    plain, _ = _prepare([picture], tmp_path)
    for face in ((0.0, 0.0, 190.0, 190.0), (-80.0, -80.0, -20.0, -20.0)):
        data, _ = _prepare([replace(picture, face=face)], tmp_path, face_share=0.5)
        assert torch.equal(data.trained[0].weights, plain.trained[0].weights), "large already; outside"
        assert data.hash != plain.hash
    without, _ = _prepare([replace(picture, face=(40.0, 40.0, 60.0, 60.0))], tmp_path)
    assert without.hash == plain.hash, "what is not used makes no other training"


def test_no_picture_is_both_trained_on_and_held_out(tmp_path: Path) -> None:
    pictures = examples(tmp_path / "pictures", 3)
    pictures.append(replace(pictures[0], prior=True, caption="a portrait"))
    data, _ = _prepare(pictures, tmp_path, held_out=1)
    assert len(data.trained) == 3 and len(data.held_out) == 1
    assert [item.prior for item in data.trained] == [False, False, True] and not data.held_out[0].prior
    assert data.empty_caption == len(data.prompts.states) - 1 == len({e.caption for e in pictures})
    with pytest.raises(InvalidImage, match="3 pictures show the subject, and 3 are to be held out"):
        _prepare(pictures, tmp_path, held_out=3)


def test_bad_pictures_are_named_and_nothing_is_left(tmp_path: Path) -> None:
    pictures = examples(tmp_path / "pictures", 2)
    pictures[1].picture.write_bytes(pictures[1].picture.read_bytes()[:200])
    with pytest.raises(InvalidImage, match=r"01\.png: It is no picture"):
        train_lora(quick(), pictures, TRIGGER, tmp_path / "run", tmp_path / "cache", CPU)
    with pytest.raises(InvalidRequest, match="no pictures of the subject"):
        train_lora(quick(), [], TRIGGER, tmp_path / "run", tmp_path / "cache", CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_the_character_is_recognised_in_new_scenes(tmp_path: Path) -> None:
    """The preset whole, on 24 pictures: four prompts that name the trigger word, two seeds each, and a judge that conditions nothing."""
    from training.mini.sitting import Sitting, cosines
    from training.mini.studio import Studio

    made = train_lora(preset("mini"), examples(tmp_path / "pictures", 24), TRIGGER, tmp_path / "run", tmp_path / "cache", CPU)
    sitting, studio = Sitting(PACK), Studio(PACK, CPU)
    person = np.nanmean(sitting.judged(drawn(sample_scenes(3, 77, framing=CLOSE_UP))), axis=0)
    person /= np.linalg.norm(person)
    scenes = [*caption(sample_scenes(2, 4242, framing=CLOSE_UP)), *caption(sample_scenes(2, 4243, framing=PORTRAIT))]
    texts, seeds = [f"{TRIGGER}, {text}" for text in scenes] * 2, [1] * 4 + [2] * 4

    def likeness() -> float:
        return float(np.mean(cosines(sitting.judged(studio.draw(texts, seeds)), np.stack([person] * len(texts)))[0]))

    without = likeness()
    studio.pipe.load_lora_weights(str(made.lora.parent), weight_name=made.lora.name)
    assert without < 0.3 and likeness() >= 0.5
