"""Whether prompts are followed: by the world's classifier on pictures that do and do not, and CLIP's arithmetic on a tiny random one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPModel

from deployments.errors import InvalidRequest, MissingWeights
from deployments.images import decode
from deployments.weights import models_root
from tests.evaluation_subjects import rendered, sample, samples
from training.evaluation.adherence import ClipAdherence, LabelAdherence, measures
from training.evaluation.cases import Subject
from training.evaluation.plan import Prompt, load_plan

ADA = Subject(name="ada", references=samples("ada", (1, 2)), lora="lora_1", trigger="ohwx woman", noun="woman")
_SIDE = 32


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole CLIP of random weights, and the pack's tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    tokenizer = AutoTokenizer.from_pretrained(models_root() / "mini" / "flux1" / "tokenizer", local_files_only=True)
    common = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(4)
    text = {**common, "vocab_size": len(tokenizer), "max_position_embeddings": 20, "eos_token_id": tokenizer.eos_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = {**common, "image_size": _SIDE, "patch_size": 8}
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _theirs(folder: Path, text: str, data: bytes) -> float:
    """The cosine that transformers' own CLIP gives, of a square picture."""
    model = CLIPModel.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=20)
    small = Image.fromarray(decode(data)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    mean, deviation = np.array([0.48145466, 0.4578275, 0.40821073]), np.array([0.26862954, 0.26130258, 0.27577711])
    pixels = torch.tensor(((np.asarray(small) / 255 - mean) / deviation).transpose(2, 0, 1)[None], dtype=torch.float32)
    with torch.no_grad():
        found = model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"], pixel_values=pixels)
        return float(found.logits_per_image[0, 0] / model.logit_scale.exp())


def test_the_classifier_finds_what_was_drawn_and_not_what_was_not() -> None:
    plan = load_plan("mini")
    measure = LabelAdherence(plan.labels or "", plan.prompts)
    assert measure.names == ("scene", "clothes") and measure.models == ("content-gate-mini",)
    pictures = [rendered(prompt.text, 3, "Ada") for prompt in plan.prompts]
    right = [measure.scores(picture, prompt, ADA) for picture, prompt in zip(pictures, plan.prompts, strict=True)]
    assert np.mean([score["scene"] for score in right]) == 1 and np.mean([score["clothes"] for score in right]) >= 8 / 9
    wrong = [measure.scores(picture, prompt, ADA)["scene"] for picture, prompt in zip(pictures[1:], plan.prompts[:-1], strict=True)]
    assert np.mean(wrong) == 0


def test_a_label_that_nobody_can_tell_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="expects scene: on the moon, which content-gate-mini cannot tell"):
        LabelAdherence("content-gate-mini", [Prompt(name="moon", framing="full", text="x", expects={"scene": "on the moon"})])


def test_clip_is_compared_with_the_prompt_without_the_trigger_and_with_the_references(clip: Path) -> None:
    measure = ClipAdherence(clip)
    data = sample("bruno", 1)
    scores = measure.scores(decode(data), Prompt(name="p", framing="portrait", text="a portrait of {who} in a park"), ADA)
    assert scores["clip_t"] == pytest.approx(_theirs(clip, "a portrait of woman in a park", data), abs=1e-5)
    assert -1 <= scores["clip_i"] < 0.9999
    own = measure.scores(
        decode(sample("ada", 1)), Prompt(name="p", framing="portrait", text="x"), Subject(name="one", references=[sample("ada", 1)])
    )
    assert own["clip_i"] == pytest.approx(1, abs=1e-5)  # itself


def test_clip_reads_what_fits_of_a_long_prompt(clip: Path) -> None:
    prompt = Prompt(name="long", framing="portrait", text="a portrait in a park with trees " * 20)
    found = ClipAdherence(clip).scores(decode(sample("ada", 1)), prompt, ADA)
    assert found["clip_t"] == pytest.approx(_theirs(clip, prompt.text, sample("ada", 1)), abs=1e-5)


def test_a_plan_opens_what_it_configures(clip: Path, tmp_path: Path) -> None:
    plan = load_plan("mini")
    assert [measure.names for measure in measures(plan.but(clip=clip))] == [("scene", "clothes"), ("clip_t", "clip_i")]
    assert measures(plan.but(labels=None)) == []
    with pytest.raises(MissingWeights, match="config.json"):
        measures(plan.but(clip=tmp_path))
