"""What is to be known of a set before it is trained on: too few, all alike, or altered."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Final

from training.dataset.dataset import Dataset
from training.dataset.settings import FEW, CurationSettings
from training.dataset.values import FaceFacts, Notice

_ONE_ANGLE_DEGREES: Final = 15.0
_LOW_QUALITY: Final = 0.15
"""As for characters (deployments/curation.py)."""
_MOST_OF_ONE: Final = 0.8
_MASKED_SHARE: Final = 0.3


def notices(dataset: Dataset, faces: Mapping[str, FaceFacts], settings: CurationSettings) -> tuple[Notice, ...]:
    """faces: of each picture of the dataset, by its source's name."""
    pictures = dataset.pictures
    found: list[Notice | None] = [
        _few(dataset),
        _one_composition(dataset),
        _one_angle(faces),
        _named("low_quality", "Pictures whose faces are small, unsharp, turned away or compressed", (
            name for name, face in faces.items() if face.quality < _LOW_QUALITY), "Better ones give a better likeness."),
        _named("upscaled", "Enlarged pictures", (picture.source for picture in pictures if picture.upscaled),
            "What enlarging invents is learned first; leave small ones as they are where you can."),
    ]  # fmt: skip
    masked = [picture.source for picture in pictures if picture.mask is not None]
    if len(masked) > _MASKED_SHARE * len(pictures):
        found.append(_named("masked", "Pictures into which other heads reach", masked, "They are little weighed; too many may still show."))
    if settings.blur_others:
        message = "Other people's heads are blurred where they reach in: a LoRA may learn the blur. Masks are the better way."
        found.append(Notice(code="blurred_others", message=message))
    return tuple(notice for notice in found if notice is not None)


def _few(dataset: Dataset) -> Notice | None:
    count = len(dataset.pictures)
    if count >= FEW:
        return None
    said = "1 picture is" if count == 1 else f"{count} pictures are"
    return Notice(code="few_pictures", message=f"Only {said} accepted. With fewer than {FEW} a LoRA learns the pictures, not the person.")


def _one_composition(dataset: Dataset) -> Notice | None:
    (name, count), *_ = Counter(picture.composition for picture in dataset.pictures).most_common(1)
    if len(dataset.pictures) < FEW or count <= _MOST_OF_ONE * len(dataset.pictures):
        return None
    message = (
        f"{count} of {len(dataset.pictures)} pictures are {name}. Add others: 12 close, 6 to the waist, 6 whole, 1 from behind is usual."
    )
    return Notice(code="one_composition", message=message)


def _one_angle(faces: Mapping[str, FaceFacts]) -> Notice | None:
    yaws = [face.yaw for face in faces.values()]
    if len(yaws) < FEW or max(yaws) - min(yaws) >= _ONE_ANGLE_DEGREES:
        return None
    return Notice(code="one_angle", message=f"All faces are within {max(yaws) - min(yaws):.0f} degrees. Add some from the sides.")


def _named(code: str, what: str, names: Iterable[str], advice: str) -> Notice | None:
    pictures = tuple(names)
    return Notice(code=code, message=f"{what}: {len(pictures)}. {advice}", pictures=pictures) if pictures else None
