"""Which size each picture is trained in, and which pictures meet in a step: pure functions of sizes, a seed and the number of the step.

Knows no tensor. The same step gives the same pictures on every run, however many processes share them, hence nothing has to be saved of
it to resume.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from deployments.errors import InvalidImage

_RATIOS = (1 / 2, 4 / 7, 2 / 3, 3 / 4, 5 / 6, 1.0, 6 / 5, 4 / 3, 3 / 2, 7 / 4, 2.0)
"""Width to height: what the ladder of diffusers 0.42 (training_utils.py: generate_aspect_ratio_buckets) spans, in eleven steps: few shapes
keep a compiled transformer from being compiled again and again."""


@dataclass(frozen=True, order=True)
class Bucket:
    """Pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


@dataclass(frozen=True)
class Place:
    """Where a picture's part for a bucket comes from: scaled to width x height, and from there the bucket cut out at left, top."""

    bucket: Bucket
    width: int
    height: int
    left: int
    top: int


def ladder(resolution: int, divisor: int) -> tuple[Bucket, ...]:
    """Sizes of about resolution^2 pixels whose sides the divisor (VAE's factor x patch) divides."""
    sides = [(resolution * math.sqrt(ratio), resolution / math.sqrt(ratio)) for ratio in _RATIOS]
    found = (Bucket(*(max(divisor, round(side / divisor) * divisor) for side in pair)) for pair in sides)
    return tuple(dict.fromkeys(found))


def places_of(width: int, height: int, resolutions: Sequence[int], divisor: int) -> tuple[Place, ...]:
    """One for every resolution that the picture fills without being enlarged; where it fills none, the largest smaller one that it fills.

    (Enlarged pictures teach the model their blur.) Raises InvalidImage for one with a side shorter than two divisors.
    """
    found = [place for side in resolutions if (place := _placed(width, height, side, divisor)) is not None]
    if found:
        return tuple(dict.fromkeys(found))
    for side in range(min(resolutions) // divisor * divisor, divisor, -divisor):
        place = _placed(width, height, side, divisor)
        if place is not None:
            return (place,)
    raise InvalidImage(f"A picture of {width} x {height} pixels is too small to be trained on.", f"Send one of {min(resolutions)} or more.")


def _placed(width: int, height: int, resolution: int, divisor: int) -> Place | None:
    """In the bucket of the nearest shape; None where the picture would have to grow."""
    shape = math.log(width / height)
    bucket = min(ladder(resolution, divisor), key=lambda b: abs(math.log(b.width / b.height) - shape))
    scale = max(bucket.width / width, bucket.height / height)
    if scale > 1:
        return None
    scaled = max(bucket.width, round(width * scale)), max(bucket.height, round(height * scale))
    return Place(bucket, *scaled, (scaled[0] - bucket.width) // 2, (scaled[1] - bucket.height) // 2)


class Batches:
    """Groups of items of one bucket, without end. In the long run every item comes equally often, whatever the size of its bucket, and
    with other companions each time (ostris/ai-toolkit, toolkit/dataloader_mixins.py, pads short batches with copies and pairs once)."""

    def __init__(self, members: Mapping[Bucket, Iterable[int]], group: int, seed: int) -> None:
        """members: items by bucket. group: items of a step's forward over all processes."""
        self._members = {bucket: sorted(items) for bucket, items in sorted(members.items()) if items}
        if not self._members:
            raise ValueError("There is nothing to train on.")
        self._group, self._seed = group, seed
        self._total = sum(map(len, self._members.values()))
        self._visits: list[tuple[Bucket, int]] = []
        self._counts = dict.fromkeys(self._members, 0)

    def at(self, number: int) -> tuple[int, ...]:
        """The items of group `number` (0, 1, ...)."""
        while len(self._visits) <= number:
            self._visit()
        key, before = self._visits[number]
        return tuple(self._item(key, before * self._group + k) for k in range(self._group))

    def _visit(self) -> None:
        """The bucket that is furthest behind its share."""
        done = len(self._visits) + 1
        key = max(self._counts, key=lambda k: len(self._members[k]) * done / self._total - self._counts[k])
        self._visits.append((key, self._counts[key]))
        self._counts[key] += 1

    def _item(self, key: Bucket, position: int) -> int:
        """Of the endless row of shuffled rounds through a bucket."""
        items = self._members[key]
        round_, place = divmod(position, len(items))
        order = random.Random(f"{self._seed} {key} {round_}").sample(items, len(items))
        return order[place]
