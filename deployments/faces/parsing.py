"""The face parser: which of CelebAMask's 19 classes every pixel of an FFHQ crop belongs to. Any ONNX file with BiSeNet's outside."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from deployments.contracts import RGB
from deployments.errors import DamagedWeights
from deployments.sessions import Provider, open_session

CLASSES: Final = 19
# facexlib feeds its BiSeNet as torchvision's models are fed: ImageNet's mean and deviation, RGB.
_MEAN: Final = np.array([0.485, 0.456, 0.406], np.float32)
_DEVIATION: Final = np.array([0.229, 0.224, 0.225], np.float32)


class FaceParser:
    """One ONNX file: input [n, 3, 512, 512], first output [n, 19, 512, 512], one logit a class."""

    def __init__(self, path: Path, provider: Provider = "cpu", threads: int = 1) -> None:
        """Raises MissingWeights, DamagedWeights (also for another number of classes), ProviderUnavailable."""
        self._session = open_session(path, provider, threads)
        self._input = self._session.get_inputs()[0].name
        output = self._session.get_outputs()[0]
        self._output = output.name
        if output.shape[1] != CLASSES:
            raise DamagedWeights(f"{path} tells {output.shape[1]} classes apart, a face parser {CLASSES}.", "Use a CelebAMask parser.")

    def labels(self, crop: RGB) -> NDArray[np.uint8]:
        """RGB [512, 512, 3] -> [512, 512] uint8, the likeliest class of each pixel."""
        planes = ((crop.astype(np.float32) / 255 - _MEAN) / _DEVIATION).transpose(2, 0, 1)[None]
        (logits,) = self._session.run([self._output], {self._input: np.ascontiguousarray(planes)})
        return np.asarray(logits[0].argmax(0), np.uint8)
