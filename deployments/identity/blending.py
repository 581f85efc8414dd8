"""Several reference pictures of one person become one set of tokens, and pictures of somebody else are left out of it.

Works on whatever an encoder makes of each reference, tokens [n references, q, width], and knows none of the encoders; what it knows of
the references are their faces. Importing this imports numpy and nothing heavier.

Where the modes were read: sipie800/ComfyUI-PuLID-Flux-Enhanced at fa3c12a, pulidflux.py (`fusion`: mean, concat, norm_id, max_token).
Not taken over: `max`, which makes a token that no reference has, number by number; `auto_weight`, whose weights do not sum up to 1;
`train_weight`, which trains for minutes. `quality` is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

import numpy as np

from deployments.contracts import RGB, Face, Floats, Person
from deployments.errors import InvalidRequest

if TYPE_CHECKING:
    from torch import Tensor

SAME_PERSON_FROM: Final = 0.3
"""Cosine of the conditioning recogniser from which two references count as one person's; serving's verdict on a picture is as strict.

Mini's recogniser, 60 people in four scenes each: no pair of one person lies below it (the lowest 0.66; 0.60 with blurred and halved
pictures), of the pairs of different people 1 % lie above (the highest 0.51). Who uses PuLID on photographs advises 0.4 at the least
against the whole set, and single pairs of one person lie below what their set's centroid gives.
"""
# The recogniser's crop is 112 px wide: of a smaller face some of it is invented.
_WHOLE_FACE_PX: Final = 112.0
# At which size sharpness is looked for: at that of the crop itself every small face, being enlarged, would count as blurred.
_SHARPNESS_PX: Final = 128
# Variance of the Laplacian, in grey levels squared, that counts as half sharp: a usual border (A. Rosebrock, Blur detection with OpenCV,
# 2015) of a usual measure (Pech-Pacheco et al., 2000). Mini's references: about 300 as they are, 70 at half the size, 5 after a blur.
_HALF_SHARP: Final = 100.0
# No factor is less: a reference is weighed, not dropped. One that is bad in every way has 1 / 160,000 of the weight of a perfect one.
_LEAST: Final = 0.05
# The nose stands beneath an eye, where frontality is 0, at a turn of some 55 degrees: its height over the line of the eyes, in halves of
# their distance, follows from that.
_NOSE_HEIGHT: Final = float(1 / np.tan(np.radians(55.0)))
_LUMA: Final = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


def blended(tokens: Tensor, faces: Sequence[Face], mode: str) -> Tensor:
    """What all references say together. tokens: [n, q, width], of any type, which is kept; faces: n, in the same order.

    -> [1, q, width], or in the mode `concat` [1, n * q, width]; a single reference as it is, bit for bit.
    Raises InvalidRequest for a mode that there is not.
    """
    if mode not in BLENDS:
        raise InvalidRequest(f"There is no way {mode!r} to blend references.", f"Use one of {', '.join(BLENDS)}.")
    if len(tokens) != len(faces):
        raise ValueError(f"{len(tokens)} sets of tokens came for {len(faces)} faces; give one for each.")
    return BLENDS[mode](tokens, faces) if len(tokens) > 1 else tokens


def blended_through(seen: Tensor, faces: Sequence[Face], mode: str, projected: Callable[[Tensor], Tensor]) -> Tensor:
    """For encoders that see one vector in each reference, [n, 1, width], and project it into tokens: modes that average do so before it,
    as in the adapter's training, the others choose among tokens. projected: [n, width] -> [n, q, width of a token]."""
    if mode in AVERAGES:
        return projected(blended(seen, faces, mode)[0])
    return blended(projected(seen[:, 0]), faces, mode)


def _mean(tokens: Tensor, faces: Sequence[Face]) -> Tensor:
    return tokens.float().mean(0, keepdim=True).to(tokens.dtype)


def _by_quality(tokens: Tensor, faces: Sequence[Face]) -> Tensor:
    return _weighted(tokens, tokens.new_tensor([quality(face) for face in faces]).float())


def _by_norm(tokens: Tensor, faces: Sequence[Face]) -> Tensor:
    """Each reference by the length of all its tokens: an encoder is seldom loud about a face that it hardly sees."""
    return _weighted(tokens, tokens.float().norm(dim=(1, 2)))


def _weighted(tokens: Tensor, weights: Tensor) -> Tensor:
    """weights: [n], above 0."""
    shares = (weights / weights.sum()).view(-1, 1, 1)
    return (shares * tokens.float()).sum(0, keepdim=True).to(tokens.dtype)


def _in_a_row(tokens: Tensor, faces: Sequence[Face]) -> Tensor:
    """The cross attention chooses among all references, each time anew."""
    return tokens.flatten(0, 1)[None]


def _loudest(tokens: Tensor, faces: Sequence[Face]) -> Tensor:
    """Each token from the reference in which it is longest."""
    chosen = tokens.float().norm(dim=2).argmax(0)
    return tokens.gather(0, chosen.view(1, -1, 1).expand(1, *tokens.shape[1:]))


BLENDS: Final[Mapping[str, Callable[[Tensor, Sequence[Face]], Tensor]]] = {
    "mean": _mean,
    "quality": _by_quality,
    "concat": _in_a_row,
    "norm": _by_norm,
    "max_token": _loudest,
}
"""How references become one, by the name that a request gives (`IdentityRequest.blend`)."""
AVERAGES: Final = frozenset({"mean", "quality", "norm"})
"""The modes that only weigh: an encoder of two stages applies them between the two, as to embeddings [n, 1, width]."""


def quality(face: Face) -> float:
    """How much a reference is worth, above 0, at most 1: score of the detector x size x frontality x sharpness.

    size: shorter side of the box against the recogniser's crop. frontality: 1 where the nose stands midway between the eyes, 0 where it
    stands under one of them (at a turn of some 55 degrees). sharpness: of the aligned crop; without one it counts as sharp.
    """
    sharp = 1.0 if face.aligned is None else sharpness(face.aligned) / (sharpness(face.aligned) + _HALF_SHARP)
    size = float((face.box[2:] - face.box[:2]).min()) / _WHOLE_FACE_PX
    factors = (float(face.score), size, frontality(face.landmarks), sharp)
    return float(np.prod([min(max(factor, _LEAST), 1.0) for factor in factors]))


def frontality(landmarks: Floats) -> float:
    """landmarks [5, 2] of a Face -> at most 1; below 0 where the nose stands beyond an eye. A head tilted to its shoulder is as frontal
    as an upright one: what counts is the place along the line between the eyes."""
    first, second, nose = landmarks[:3].astype(np.float64)
    across = second - first
    along = float((nose - first) @ across / max(float(across @ across), 1e-6))
    return 1 - abs(2 * along - 1)


def yaw(landmarks: Floats) -> float:
    """landmarks [5, 2] of a Face -> degrees, estimated; above 0 where the nose points to the picture's right."""
    first, second, nose = landmarks[:3].astype(np.float64)
    turned = float(np.degrees(np.arctan((1 - frontality(landmarks)) / _NOSE_HEIGHT)))
    return turned if (nose - (first + second) / 2) @ (second - first) >= 0 else -turned


def sharpness(crop: RGB) -> float:
    """Variance of the Laplacian of a square crop, RGB [side, side, 3], brought to at most _SHARPNESS_PX; grey levels squared."""
    grey = crop.astype(np.float32) @ _LUMA
    block = max(1, len(grey) // _SHARPNESS_PX)
    side = len(grey) // block
    grey = grey[: side * block, : side * block].reshape(side, block, side, block).mean((1, 3))
    centre = grey[1:-1, 1:-1]
    return float((grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:] - 4 * centre).var())


def of_one_person(person: Person) -> tuple[Person, tuple[int, ...]]:
    """The person without the references that show somebody else, and the places of those. Raises as `strangers`."""
    left_out = strangers(person.faces)
    if not left_out:
        return person, ()
    kept = [place for place in range(len(person.faces)) if place not in left_out]
    return Person(tuple(person.faces[place] for place in kept), tuple(person.pictures[place] for place in kept)), left_out


def strangers(faces: Sequence[Face], threshold: float = SAME_PERSON_FROM) -> tuple[int, ...]:
    """The places of the references that show somebody else than most do. threshold: cosine of the conditioning recogniser, -1..1.

    Those that look like at least half of the others are the person; no two people can both be that. The rest is compared with their
    centroid, which sees more than any single picture does: a dark profile may be nearer to it than to each of them.
    Faces without embeddings are not compared: nothing can be said about them.
    Raises InvalidRequest where nobody is in the majority, as with two references of two people: who is meant?
    """
    embeddings = [face.embedding for face in faces if face.embedding is not None]
    if len(faces) < 2 or len(embeddings) != len(faces):
        return ()
    units = _units(np.stack(embeddings))
    alike = units @ units.T >= threshold
    members = alike.sum(1) - alike.diagonal() >= (len(faces) - 1) / 2
    if not members.any():
        raise _nobody_in_particular(units @ units.T, threshold)
    centroid = _units(units[members].mean(0))
    return tuple(int(place) for place in np.flatnonzero(~members & (units @ centroid < threshold)))


def _units(vectors: Floats) -> Floats:
    """[..., width], each of length 1; a vector of zeros, which looks like nobody, as it is."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-6), np.float32)


def _nobody_in_particular(cosines: Floats, threshold: float) -> InvalidRequest:
    pairs = [(a, b) for a in range(len(cosines)) for b in range(a) if cosines[a, b] < threshold]
    places = sorted({place for pair in pairs for place in pair})
    named = f"{', '.join(map(str, places[:-1]))} and {places[-1]}"
    return InvalidRequest(
        f"The reference pictures {named} show different people, none of them in most of the pictures.",
        "Send pictures of one person; where they show others too, say with `face_index` who is meant.",
        {"pictures": places, "cosines": [[round(float(value), 3) for value in row] for row in cosines], "threshold": threshold},
    )
