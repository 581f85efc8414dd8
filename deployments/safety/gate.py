"""The content gate: which pictures an operator lets in and out, by what a classifier sees in them. Its verdict is a refusal with a name,
never a black picture.

What a label means is the classifier's business and what is refused is the operator's: nothing here knows either. Opens no file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from deployments.contracts import RGB
from deployments.errors import InvalidCatalog, InvalidRequest

Threshold = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True)
class Finding:
    """What a picture is refused for: the classifier's label, and its score, 0..1."""

    label: str
    score: float


class Gate(Protocol):
    """Judges pictures."""

    def check(self, pictures: Sequence[RGB]) -> Sequence[Finding | None]:
        """One a picture, in their order; None is let through."""
        ...


class Classifier(Protocol):
    """What an entry of role `gate` names as its `implementation`: called with the entry's files by their names, its options, and the
    provider and threads of onnxruntime.

    labels: all that it can say. scores: for each picture, uint8 RGB [H, W, 3] of any size, label -> 0..1.
    """

    labels: tuple[str, ...]

    def __init__(self, files: Mapping[str, Path], options: Mapping[str, Any], provider: Literal["cpu", "cuda"], threads: int) -> None: ...
    def scores(self, pictures: Sequence[RGB]) -> Sequence[Mapping[str, float]]: ...


class GateSettings(BaseModel):
    """model: id of the catalogue, of role `gate`; None: there is no gate. refuse: label -> the score from which a picture is refused.
    input, output: whether pictures that come in (references, masks, poses), and those that were drawn, are judged. forced: also where a
    request says `enable_safety_checker: false`. provider: of onnxruntime. threads: of one run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    refuse: Mapping[str, Threshold] = {}
    input: bool = True
    output: bool = True
    forced: bool = False
    provider: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _means_something(self) -> Self:
        if (self.model is None) != (not self.refuse):
            raise ValueError("`model` and `refuse` belong together: a gate needs a classifier, and labels that it refuses")
        if self.model is None and self.forced:
            raise ValueError("`forced` is set, and there is no `model` to judge by")
        if self.model is not None and not (self.input or self.output):
            raise ValueError("neither `input` nor `output` is judged; leave `model` out if that is meant")
        return self

    def applies(self, asked: bool | None) -> bool:
        """Whether a request's pictures are judged. asked: its `enable_safety_checker`; None leaves it to the server: wherever it can.

        Raises InvalidRequest where it is asked for and there is no gate.
        """
        if self.model is None:
            if asked:
                remedy = "Leave `enable_safety_checker` out, or ask the operator to set a model for the gate."
                raise InvalidRequest("This server has no content gate.", remedy, {"param": "enable_safety_checker"})
            return False
        return self.forced or asked is not False


class ThresholdGate:
    """A Gate: a classifier and the scores from which its labels are refused."""

    def __init__(self, classifier: Classifier, refuse: Mapping[str, float]) -> None:
        """Raises InvalidCatalog for a label that the classifier never says: it would be refused never, unnoticed."""
        unknown = sorted(set(refuse) - set(classifier.labels))
        if unknown:
            message = f"The content gate is to refuse {', '.join(map(repr, unknown))}, which its classifier never says."
            raise InvalidCatalog(message, f"It says: {', '.join(classifier.labels)}.")
        self._classifier, self._refuse = classifier, dict(refuse)

    def check(self, pictures: Sequence[RGB]) -> tuple[Finding | None, ...]:
        return tuple(self._judged(scores) for scores in self._classifier.scores(pictures))

    def _judged(self, scores: Mapping[str, float]) -> Finding | None:
        """The likeliest of what is refused. A score that is no number lets nothing through."""
        found = [Finding(label, scores[label]) for label, least in self._refuse.items() if not scores[label] < least]
        return max(found, key=lambda finding: finding.score, default=None)
