"""Which pictures of a set show one person well enough to be used, which is the best of them, and what is to be known of the set.

`measured` looks at one picture, once; `judged` compares what was measured, without any model and as often as the set changes. Who is one
person is decided by the recogniser that conditions pictures, since that is what they will be used by; every cosine that is shown is the
judge's. Knows neither owners nor files. Importing this imports numpy, scipy and Pillow, no torch and no onnxruntime.

Stands above the faces and the identity methods because it needs both: their measures of a face (deployments/identity/blending.py) are
those by which references are weighed when they are used.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from io import BytesIO
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.cluster.hierarchy import fcluster, linkage

from deployments.contracts import RGB, Face, Floats, PictureFaces
from deployments.identity.blending import SAME_PERSON_FROM, frontality, quality, sharpness, yaw
from deployments.store.character_values import Judgement, Notice, PictureFacts, PictureFormat, Reason, Verdict

BLURRED: Final = 25.0
"""Sharpness below which a picture is set aside: a quarter of what counts as half sharp (blending.py). Mini's references have 155 to 850;
halved and enlarged again about 70, after a Gaussian blur of 2 pixels 5."""
_LOW_QUALITY: Final = 0.15
"""Of a picture that is kept, with a warning: a face of half the recogniser's size, half sharp, somewhat turned and compressed."""
_FEW: Final = 3
"""Below, nobody can be outvoted: of two pictures that differ, either may be the stranger."""
_ONE_ANGLE_DEGREES: Final = 15.0
_BLOCK_PX: Final = 8
# Steps at the borders of blocks, over those elsewhere, less 1. Mini's references have up to 0.55 as PNG files; saved as JPEG of quality
# 30 and then as PNG 0.75 to 1.8, of quality 10 2.3 and more.
_BLOCKS_FROM, _BLOCKS_RANGE = 0.6, 4.0
_WORST: Final = 0.9
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601
# ISO/IEC 10918-1, table K.1: what every encoder that has a "quality" scales, in any order, since only sums are compared.
_LUMINANCE: Final = np.array(
    [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62,
     18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
     72, 92, 95, 98, 112, 100, 103, 99]
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Curated:
    """facts: of the pictures that were new. judgement: of the whole set, those that were known first."""

    facts: tuple[PictureFacts, ...]
    judgement: Judgement


def measured(data: bytes, picture: RGB, found: PictureFaces) -> PictureFacts:
    """What is to be known of one picture. data: its file, which `picture` was decoded from; found: with the needs embedding, judge and
    aligned, and attributes where there is a model for them. Of several faces the largest is
    measured, and nobody's embedding is handed on."""
    with Image.open(BytesIO(data)) as image:
        format, tables = image.format, getattr(image, "quantization", None)
    facts = PictureFacts(
        sha256=sha256(data).hexdigest(),
        format=cast(PictureFormat, {"PNG": "png", "WEBP": "webp"}.get(str(format), "jpeg")),
        width=found.size[0],
        height=found.size[1],
        faces=len(found.faces),
        compression=compression(picture, tables),
    )
    if not found.faces:
        return facts
    facts = of_face(facts, found.faces[0])
    # A picture of several people is not used: nothing of theirs is kept beside it.
    return facts if len(found.faces) == 1 else replace(facts, embedding=None, judge_embedding=None)


def judged(
    pictures: Sequence[PictureFacts], smallest_px: float, best: int | None = None, recogniser: str | None = None, judge: str | None = None
) -> Judgement:
    """What is to be known of a set. smallest_px: of the shorter side of a face's box. best: the place of the picture that was chosen by
    hand; then whoever it shows is the person, otherwise who is in most of the pictures (of as many, who is shown best). recogniser, judge:
    whose embeddings these are, by their ids."""
    reasons = _unusable(pictures, smallest_px)
    usable = [place for place, reason in enumerate(reasons) if reason is None]
    groups = _people(pictures, usable, best)
    for place in (place for group in groups[1:] for place in group):
        reasons[place] = "other_person"
    kept = groups[0] if groups else []
    if not kept:
        return Judgement(verdicts=tuple(Verdict(reason=reason) for reason in reasons), recogniser=recogniser, judge=judge)
    centroid = _unit(_stacked([pictures[place].judge_embedding for place in kept]).mean(0))
    cosines = [_cosine(facts.judge_embedding, centroid) for facts in pictures]
    own = [cast(float, cosines[place]) for place in kept]
    order = _order(pictures, kept, best)
    ranks = {place: rank for rank, place in enumerate(order)}
    return Judgement(
        verdicts=tuple(Verdict(reason=reasons[place], rank=ranks.get(place), cosine=cosines[place]) for place in range(len(pictures))),
        best=order[0],
        embedding=_packed(_stacked([pictures[place].embedding for place in kept]).mean(0)),
        centroid=_packed(centroid),
        spread=(float(np.mean(own)), min(own)),
        notices=tuple(_notices(pictures, kept, groups)),
        recogniser=recogniser,
        judge=judge,
    )


def vector(packed: bytes) -> Floats:
    """[512] of an embedding as it is stored."""
    return np.frombuffer(packed, "<f4").astype(np.float32)


def grouped(embeddings: Floats, same_person: float = SAME_PERSON_FROM) -> list[list[int]]:
    """[n, 512] of the conditioning recogniser, raw or not -> the rows by whom they show: those that are alike on average (average linkage),
    at `same_person` or more. No single pair decides: a dark profile is like the others together, and two people are not one because one
    picture of each looks alike."""
    if len(embeddings) < 2:
        return [[row] for row in range(len(embeddings))]
    units = _unit(embeddings)
    apart = np.maximum(1 - units @ units.T, 0)[np.triu_indices(len(units), 1)]
    labels = fcluster(linkage(apart, "average"), 1 - same_person, "distance")
    return [[row for row, label in enumerate(labels) if label == wanted] for wanted in sorted(set(labels))]


def jpeg_quality(table: Sequence[int]) -> int:
    """1..100: the quality at which libjpeg's table of luminance is as coarse as this one. It scales table K.1 by 5000 / q % below 50, by
    200 - 2 q % from there on (libjpeg, jcparam.c, jpeg_quality_scaling). An encoder's own tables are placed among those by their sum."""
    total = int(np.sum(table))
    return min(range(1, 101), key=lambda quality: abs(int(_scaled(quality).sum()) - total))


def blockiness(picture: RGB) -> float:
    """How much the steps from pixel to pixel are larger every eighth one than elsewhere, 0 where they are not: what a JPEG leaves behind in
    a PNG that was made of it, cropped or not, but not enlarged. After Wang, Sheikh and Bovik, No-reference perceptual quality assessment
    of JPEG compressed images (2002), their measure B, here relative to the picture's own steps and for any place of the grid."""
    grey = picture.astype(np.float32) @ _LUMA
    return max(0.0, min(_blocks_along(grey), _blocks_along(grey.T)))


def compression(picture: RGB, tables: Any) -> float:
    """0..1: 1 - quality / 100 of a JPEG, or what the blocks in the pixels tell, whichever is more."""
    blocks = min(max((blockiness(picture) - _BLOCKS_FROM) / _BLOCKS_RANGE, 0.0), _WORST)
    coarse = 1 - jpeg_quality(tables[0]) / 100 if isinstance(tables, dict) and 0 in tables else 0.0
    return float(max(blocks, coarse))


def _scaled(quality: int) -> NDArray[np.int64]:
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    return np.asarray(np.clip((_LUMINANCE * percent + 50) // 100, 1, 255), np.int64)


def _blocks_along(grey: Floats) -> float:
    steps = np.abs(np.diff(grey, axis=1))
    if steps.shape[1] < 3 * _BLOCK_PX or not steps.size:
        return 0.0
    above = np.maximum(steps[:, 1:-1] - (steps[:, :-2] + steps[:, 2:]) / 2, 0)
    means = np.array([above[:, start::_BLOCK_PX].mean() for start in range(_BLOCK_PX)])
    # Half a grey level: in a picture that is all but flat any step would stand out.
    return float(means.max() / max(float(np.median(means)), 0.5) - 1)


def of_face(facts: PictureFacts, face: Face) -> PictureFacts:
    """The picture's facts with those of one of its faces, which needs embedding, judge and aligned."""
    if face.embedding is None or face.judge_embedding is None or face.aligned is None:
        raise ValueError("A face is measured by its embeddings and its crop: analyse it with the needs embedding, judge and aligned.")
    return replace(
        facts,
        box=cast(tuple[float, float, float, float], tuple(round(float(side), 1) for side in face.box)),
        score=round(float(face.score), 3),
        landmarks=tuple((round(float(x), 1), round(float(y), 1)) for x, y in face.landmarks),
        age=face.age,
        sex=face.sex,
        size=round(float((face.box[2:] - face.box[:2]).min()), 1),
        sharpness=round(sharpness(face.aligned), 1),
        frontality=round(frontality(face.landmarks), 3),
        yaw=round(yaw(face.landmarks), 1),
        quality=round(quality(face) * (1 - facts.compression), 4),
        embedding=_packed(face.embedding),
        judge_embedding=_packed(face.judge_embedding),
    )


def _unusable(pictures: Sequence[PictureFacts], smallest_px: float) -> list[Reason | None]:
    seen: set[str] = set()
    reasons: list[Reason | None] = []
    for facts in pictures:
        reasons.append("duplicate" if facts.sha256 in seen else _fault(facts, smallest_px))
        seen.add(facts.sha256)
    return reasons


def _fault(facts: PictureFacts, smallest_px: float) -> Reason | None:
    if facts.faces == 0 or facts.size is None or facts.sharpness is None:
        return "no_face"
    if facts.faces > 1:
        return "several_faces"
    if facts.size < smallest_px:
        return "too_small"
    return "blurred" if facts.sharpness < BLURRED else None


def _people(pictures: Sequence[PictureFacts], places: Sequence[int], best: int | None) -> list[list[int]]:
    """The places by whom they show, the person meant first."""
    if not places:
        return []
    groups = [[places[row] for row in group] for group in grouped(_stacked([pictures[place].embedding for place in places]))]

    def worth(group: list[int]) -> tuple[bool, int, float]:
        return best in group, len(group), max(pictures[place].quality for place in group)

    return sorted(groups, key=worth, reverse=True)


def _order(pictures: Sequence[PictureFacts], kept: Sequence[int], best: int | None) -> list[int]:
    """The best first, then whichever is of most use beside those before: quality times distance (1 - cosine) to the nearest of them."""
    first = best if best is not None and best in kept else max(kept, key=lambda place: pictures[place].quality)
    order, left = [first], [place for place in kept if place != first]
    units = {place: vector(cast(bytes, pictures[place].judge_embedding)) for place in kept}
    while left:
        chosen = _stacked([pictures[place].judge_embedding for place in order])
        gain = {place: pictures[place].quality * (1 - float((chosen @ units[place]).max())) for place in left}
        order.append(max(left, key=lambda place: gain[place]))
        left.remove(order[-1])
    return order


def _notices(pictures: Sequence[PictureFacts], kept: Sequence[int], groups: Sequence[Sequence[int]]) -> list[Notice]:
    found = []
    if len(groups) > 1:
        sure = len(groups[0]) > len(groups[1])
        who = "who is in most of them is kept" if sure else "nobody is in most of them; who is shown best is kept"
        message = f"The pictures show {len(groups)} people: {who}. Choose `best` by hand where somebody else is meant."
        found.append(Notice(code="two_people", message=message, groups=tuple(map(tuple, groups))))
    low = tuple(place for place in kept if pictures[place].quality < _LOW_QUALITY)
    if low:
        message = "Some pictures are small, unsharp, turned away or compressed. Better ones give a better likeness."
        found.append(Notice(code="low_quality", message=message, groups=(low,)))
    yaws = [pictures[place].yaw or 0.0 for place in kept]
    if len(kept) >= _FEW and max(yaws) - min(yaws) < _ONE_ANGLE_DEGREES:
        message = f"All pictures are seen from one angle, within {max(yaws) - min(yaws):.0f} degrees. Add some from the sides."
        found.append(Notice(code="one_angle", message=message, groups=(tuple(kept),)))
    if len(kept) < _FEW:
        message = (
            f"{len(kept)} of the pictures {'is' if len(kept) == 1 else 'are'} used. With {_FEW} or more, strangers among them are found."
        )
        found.append(Notice(code="too_few", message=message, groups=(tuple(kept),)))
    return found


def _cosine(embedding: bytes | None, centroid: Floats) -> float | None:
    return None if embedding is None else float(np.clip(vector(embedding) @ centroid, -1, 1))


def _stacked(embeddings: Sequence[bytes | None]) -> Floats:
    return np.stack([vector(packed) for packed in embeddings if packed is not None])


def _unit(vectors: Floats) -> Floats:
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6), np.float32)


def _packed(values: Floats) -> bytes:
    return np.asarray(values, "<f4").tobytes()
