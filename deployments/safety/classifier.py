"""Any ONNX picture classifier as the content gate's: one softmax for each of its outputs.

What it was trained for stands in the catalogue's entry, or in the files that its publisher put beside it. Knows no label.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deployments.contracts import RGB, Floats
from deployments.errors import DamagedWeights, InvalidCatalog
from deployments.sessions import open_session


class OnnxClassifier:
    """Input [n, 3, height, width] RGB, each output [n, its labels] of logits.

    files: `model`, the ONNX file; for one of transformers' also `config` (id2label) and `preprocessor` (size, image_mean, image_std).
    options, before those files: labels (output -> its labels, in their order), size ([width, height] pixels), mean and deviation (of one
    channel each, of pixels in 0..1; 0 and 1 where nobody says). A picture is squeezed to the size, as transformers' ViT processor does.
    """

    def __init__(
        self, files: Mapping[str, Path], options: Mapping[str, Any], provider: Literal["cpu", "cuda"] = "cpu", threads: int = 1
    ) -> None:
        """Raises InvalidCatalog where labels or size are nowhere said, DamagedWeights where the model has others, and as open_session."""
        self._session = open_session(files["model"], provider, threads)
        self._input = self._session.get_inputs()[0]
        config, processor = _published(files.get("config")), _published(files.get("preprocessor"))
        self._labels = _labels(options, config, [output.name for output in self._session.get_outputs()], files["model"])
        self.labels = tuple(label for labels in self._labels.values() for label in labels)
        self._size = _size(options, processor, self._input.shape, files["model"])
        # One number a channel, or one for all three.
        self._mean = np.asarray(options.get("mean", processor.get("image_mean", 0)), np.float32)
        self._deviation = np.asarray(options.get("deviation", processor.get("image_std", 1)), np.float32)
        # A model that does not answer as its labels say is found out now, not at the first picture.
        self.scores([np.zeros((8, 8, 3), np.uint8)])

    def scores(self, pictures: Sequence[RGB]) -> list[dict[str, float]]:
        """label -> 0..1, for each picture; the labels of one output sum to 1. Pictures are judged one by one: how many come is not ours."""
        return [self._scores(picture) for picture in pictures]

    def _scores(self, picture: RGB) -> dict[str, float]:
        squeezed = Image.fromarray(picture).resize(self._size, Image.Resampling.BILINEAR)
        planes = ((np.asarray(squeezed, np.float32) / 255 - self._mean) / self._deviation).transpose(2, 0, 1)[None]
        found = self._session.run(list(self._labels), {self._input.name: np.ascontiguousarray(planes)})
        scores: dict[str, float] = {}
        for (name, labels), logits in zip(self._labels.items(), found, strict=True):
            if logits.shape != (1, len(labels)):
                raise DamagedWeights(f"The gate's output {name} is {list(logits.shape)}, and {len(labels)} labels are said of it.")
            scores.update(zip(labels, map(float, _softmax(logits[0])), strict=True))
        return scores


def _labels(options: Mapping[str, Any], config: Mapping[str, Any], outputs: Sequence[str], model: Path) -> dict[str, tuple[str, ...]]:
    """Output -> labels. Raises InvalidCatalog for an output that the model has not, and for a label that two outputs have."""
    known = config.get("id2label", {})
    named: Mapping[str, Any] = options.get("labels") or ({outputs[0]: [known[key] for key in sorted(known, key=int)]} if known else {})
    labels = {name: tuple(map(str, texts)) for name, texts in named.items()}
    every = [label for texts in labels.values() for label in texts]
    if not every or set(labels) - set(outputs) or len(set(every)) < len(every):
        message = f"What the outputs of {model} mean is not said, or said of outputs that it has not, or twice."
        raise InvalidCatalog(message, f"Say it in the entry's `options.labels`; the outputs are {', '.join(outputs)}.")
    return labels


def _size(options: Mapping[str, Any], processor: Mapping[str, Any], shape: Sequence[Any], model: Path) -> tuple[int, int]:
    """(width, height): of the model's input, where it is fixed there, else as it is said."""
    if isinstance(shape[2], int) and isinstance(shape[3], int):
        return shape[3], shape[2]
    said = processor.get("size", {})
    found = options.get("size") or (said.get("width"), said.get("height"))
    if not all(isinstance(side, int) and side > 0 for side in found):
        raise InvalidCatalog(f"The size of {model}'s pictures is not said.", "Say it in the entry's `options.size`: [width, height].")
    return int(found[0]), int(found[1])


def _published(path: Path | None) -> Mapping[str, Any]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedWeights(f"{path} cannot be read as JSON: {error}.") from error
    return content if isinstance(content, dict) else {}


def _softmax(logits: Floats) -> NDArray[np.float64]:
    grown = np.exp(logits.astype(np.float64) - logits.max())
    return np.asarray(grown / grown.sum(), np.float64)
