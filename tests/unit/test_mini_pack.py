"""The embedded pack does what it is for, asserted as effects on people that no model was trained on. The full bars: models/mini/CARD.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from deployments.catalog import CATALOG_PATH
from training.mini import measures
from training.mini.faces.verification import Pictures, attribute_accuracy, face_analysis
from training.mini.heldout import SAMPLE_CHARACTERS
from training.mini.sitting import Sitting, cosines
from training.mini.studio import Studio
from training.mini.world.captions import caption
from training.mini.world.scene import PORTRAIT, sample_scenes

ROOT = CATALOG_PATH.parents[1]
PACK, SAMPLES = ROOT / "models" / "mini", ROOT / "samples"
STEPS = 10
PEOPLE = 6


def _pictures(*paths: Path) -> Pictures:
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths])


@pytest.fixture(scope="module")
def sitting() -> Sitting:
    return Sitting(PACK)


@pytest.fixture(scope="module")
def studio() -> Studio:
    torch.set_num_threads(2)
    return Studio(PACK, torch.device("cpu"))


@pytest.fixture(scope="module")
def references() -> Pictures:
    return _pictures(*(SAMPLES / "characters" / f"{name.lower()}-1.png" for name in SAMPLE_CHARACTERS[:PEOPLE]))


@pytest.mark.parametrize("name", SAMPLE_CHARACTERS)
def test_every_picture_of_a_character_is_the_same_person_to_the_judge(sitting: Sitting, name: str) -> None:
    same = sitting.judged(_pictures(*sorted((SAMPLES / "characters").glob(f"{name.lower()}-*.png"))))
    other = SAMPLE_CHARACTERS[(SAMPLE_CHARACTERS.index(name) + 1) % len(SAMPLE_CHARACTERS)].lower()
    stranger = sitting.judged(_pictures(SAMPLES / "characters" / f"{other}-1.png"))[0]
    assert (same[1:] @ same[0]).min() > 0.5 > (same @ stranger).max()


def test_stock_insightface_finds_everyone_in_the_group_pictures() -> None:
    analysis = face_analysis(PACK, None)
    for path in sorted((SAMPLES / "groups").glob("*.png")):
        found = analysis.get(np.ascontiguousarray(_pictures(path)[0][..., ::-1]))
        assert len(found) == len(path.stem.split("-"))


def test_prompts_are_followed(studio: Studio) -> None:
    scene = sample_scenes(8, 3)
    right = attribute_accuracy(PACK, 0, studio.draw(caption(scene), list(range(8)), steps=STEPS), scene)
    assert min(right[name] for name in ("scene", "colour", "framing")) >= 0.85


def test_pulid_brings_the_face_and_weight_zero_is_the_base(studio: Studio, sitting: Sitting, references: Pictures) -> None:
    judged = sitting.judged(references)
    texts, seeds = caption(sample_scenes(PEOPLE, 4, framing=PORTRAIT)), list(range(PEOPLE))
    base = studio.draw(texts, seeds, steps=STEPS)
    tokens = sitting.tokens(references, studio.attach_pulid())
    off, on = (studio.draw_identity(texts, seeds, tokens, weight, steps=STEPS) for weight in (0.0, 1.0))
    studio.detach_pulid()
    assert np.array_equal(off, base)
    assert np.mean(cosines(sitting.judged(on), judged)[0]) > np.mean(cosines(sitting.judged(base), judged)[0]) + 0.1


def test_an_ip_adapter_of_scale_zero_is_the_base_and_of_scale_one_is_not(studio: Studio, references: Pictures) -> None:
    texts, seeds = caption(sample_scenes(2, 5)), [0, 1]
    base = studio.draw(texts, seeds, steps=4)
    studio.attach_ip_adapter()
    off, on = (studio.draw_like(texts, seeds, references[:2], weight, steps=4) for weight in (0.0, 1.0))
    studio.detach_ip_adapter()
    assert np.abs(off.astype(int) - base.astype(int)).max() <= 1
    assert np.abs(on.astype(int) - base.astype(int)).mean() > 1


@pytest.mark.slow
def test_skeletons_are_obeyed(studio: Studio) -> None:
    figures = measures.pose(studio, 6)
    assert figures["obeyed"] > figures["without_control"] + 0.3


@pytest.mark.slow
def test_the_sample_lora_brings_its_character(studio: Studio, sitting: Sitting) -> None:
    texts = [f"ada, {text}" for text in caption(sample_scenes(4, 6, framing=PORTRAIT))]
    ada = np.repeat(sitting.judged(_pictures(SAMPLES / "characters" / "ada-1.png")), 4, axis=0)
    before = np.mean(cosines(sitting.judged(studio.draw(texts, [0, 1, 2, 3], steps=STEPS)), ada)[0])
    studio.pipe.load_lora_weights(PACK / "loras", weight_name="ada.safetensors")
    after = np.mean(cosines(sitting.judged(studio.draw(texts, [0, 1, 2, 3], steps=STEPS)), ada)[0])
    studio.pipe.unload_lora_weights()
    assert after > before + 0.2
