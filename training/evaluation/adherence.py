"""Whether a picture shows what its prompt asked for. Several measures, each a few named numbers a picture; what is configured is asked.

None of them is shown who the person is, but CLIP-I, which compares with the references on purpose: high, the background came along with
the face. Importing this imports no model library; opening a measure does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Protocol, cast

import numpy as np

from deployments.catalog import license_policy, load_catalog, refuse_licence
from deployments.contracts import RGB, Floats
from deployments.errors import InvalidRequest
from deployments.images import decode
from training.evaluation.cases import Subject, plain_text
from training.evaluation.plan import Plan, Prompt

CLIP_TEXT: Final = "clip_t"
CLIP_IMAGE: Final = "clip_i"


class Adherence(Protocol):
    """A measure. names: of its numbers, which are columns; models: the catalogue's ids of what it runs."""

    @property
    def names(self) -> tuple[str, ...]: ...
    @property
    def models(self) -> tuple[str, ...]: ...

    def scores(self, picture: RGB, prompt: Prompt, subject: Subject) -> Mapping[str, float]:
        """Some of `names` -> a number; what a prompt says nothing of is left out."""
        ...


class LabelAdherence:
    """A classifier with labels: of each of its outputs 1 where its first label is the one that the prompt expects, else 0."""

    def __init__(self, model: str, prompts: Sequence[Prompt]) -> None:
        """model: the catalogue's id, of an entry whose `options.labels` says what each output means. Raises InvalidRequest for prompts
        that expect what it cannot tell, MissingWeights, LicenseRefused."""
        from deployments.safety.classifier import OnnxClassifier

        entry = load_catalog().entry(model)
        refuse_licence(entry, license_policy())
        options = cast(Mapping[str, Any], entry.options)
        self._outputs: dict[str, list[str]] = {name: list(labels) for name, labels in dict(options.get("labels") or {}).items()}
        for prompt in prompts:
            for output, label in prompt.expects.items():
                if label not in self._outputs.get(output, ()):
                    known = ", ".join(self._outputs.get(output, self._outputs))
                    message = f"The prompt {prompt.name} expects {output}: {label}, which {model} cannot tell."
                    raise InvalidRequest(message, f"It tells {known or 'nothing'}; correct the plan.")
        expected = {output for prompt in prompts for output in prompt.expects}
        self.names = tuple(output for output in self._outputs if output in expected)
        self.models = (model,)
        self._classifier = OnnxClassifier({name: entry.located(name) for name in entry.weights}, options)

    def scores(self, picture: RGB, prompt: Prompt, subject: Subject) -> dict[str, float]:
        (found,) = self._classifier.scores([picture])
        return {
            output: float(max(self._outputs[output], key=lambda label: found[label]) == wanted) for output, wanted in prompt.expects.items()
        }


class ClipAdherence:
    """CLIP-T: cosine of the picture and its prompt, without the word that calls up a LoRA. CLIP-I: mean cosine of the picture and the
    references. (Hessel et al., CLIPScore, 2021, without its factor of 2.5 and its cut at 0; Ruiz et al., DreamBooth, 2023.)"""

    names = (CLIP_TEXT, CLIP_IMAGE)
    models: tuple[str, ...] = ()

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        """folder: a whole CLIP as transformers keeps it, its tokenizer too. Raises MissingWeights, CheckpointMismatch."""
        import torch
        from transformers import AutoTokenizer, CLIPModel

        from deployments.pretrained import load_pretrained

        self._clip = load_pretrained(
            CLIPModel, folder, device, torch.float32, ("text_model.embeddings.position", "vision_model.embeddings.position")
        )
        self._tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self._device = device
        self._texts: dict[str, Floats] = {}
        self._references: dict[str, Floats] = {}

    def scores(self, picture: RGB, prompt: Prompt, subject: Subject) -> dict[str, float]:
        seen, asked = self._seen(picture), self._read(plain_text(prompt, subject))
        if subject.name not in self._references:
            self._references[subject.name] = np.stack([self._seen(decode(data)) for data in subject.references])
        return {CLIP_TEXT: float(seen @ asked), CLIP_IMAGE: float((self._references[subject.name] @ seen).mean())}

    def _seen(self, picture: RGB) -> Floats:
        """[width], of length 1."""
        import torch

        from deployments.identity.xlabs_encoder import clip_pixels

        height, width = picture.shape[:2]
        middle = np.array([width, height, width, height], np.float32) * np.float32(
            0.5
        )  # of no face: the middle square is read, as CLIP's own does
        pixels = clip_pixels(picture, middle, int(self._clip.config.vision_config.image_size)).to(self._device)
        with torch.no_grad():
            states = self._clip.vision_model(pixel_values=pixels).pooler_output
            return _normal(self._clip.visual_projection(states))

    def _read(self, text: str) -> Floats:
        """[width], of length 1. What is longer than CLIP reads is cut off."""
        import torch

        if text not in self._texts:
            most = int(self._clip.config.text_config.max_position_embeddings)
            ids = self._tokenizer(text, truncation=True, max_length=most, return_tensors="pt").to(self._device)
            with torch.no_grad():
                states = self._clip.text_model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).pooler_output
                self._texts[text] = _normal(self._clip.text_projection(states))
        return self._texts[text]


def measures(plan: Plan) -> list[Adherence]:
    """What the plan configures, opened."""
    found: list[Adherence] = []
    if plan.labels is not None:
        found.append(LabelAdherence(plan.labels, plan.prompts))
    if plan.clip is not None:
        found.append(ClipAdherence(plan.clip))
    return found


def _normal(rows: Any) -> Floats:
    vector = rows[0].float().cpu().numpy()
    return np.asarray(vector / np.linalg.norm(vector), np.float32)
