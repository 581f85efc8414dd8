"""A captioner for pictures of the embedded character world: place, clothes, their colour and the expression, as the pack's own classifier
reads them, in the words that the embedded base was trained with."""

from __future__ import annotations

from typing import Any, Final

from deployments.catalog import load_catalog
from deployments.contracts import RGB
from deployments.safety.classifier import OnnxClassifier

# The entry that says what the outputs of attributes.onnx stand for.
_ENTRY: Final = "content-gate-mini"
# Of the probability of an answer: below, nothing is said of it, since a caption that is wrong teaches something wrong.
_SURE: Final = 0.5
_UNSAID: Final = "neutral"


class WorldCaptioner:
    """RGB [H, W, 3] -> such as "wearing a red hoodie in a forest, smiling"."""

    def __init__(self) -> None:
        """Opens the classifier. Raises MissingWeights, DamagedWeights."""
        entry = load_catalog().entry(_ENTRY)
        options: dict[str, Any] = dict(entry.options)
        self._answers: dict[str, list[str]] = options["labels"]
        self._classifier = OnnxClassifier({"model": entry.located("model")}, options)

    def __call__(self, picture: RGB) -> str:
        (scores,) = self._classifier.scores([picture])
        sure = {
            name: max(labels, key=scores.__getitem__)
            for name, labels in self._answers.items()
            if max(scores[label] for label in labels) >= _SURE
        }
        garment = " ".join(sure[name] for name in ("colour", "clothes") if name in sure)
        worn = f"wearing {'an' if garment[0] in 'aeiou' else 'a'} {garment}" if "clothes" in sure else ""
        phrase = " ".join(part for part in (worn, sure.get("scene", "")) if part)
        mood = sure.get("expression", _UNSAID)
        return ", ".join(part for part in (phrase, "" if mood == _UNSAID else mood) if part)
