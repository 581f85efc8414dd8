"""Whether a drawn face is the subject's, by a recogniser that conditioned no picture: against the references, and beside what photographs
of the person themselves reach.

Of several faces the largest counts. Knows no generator and no configuration. Importing this imports numpy and no model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from deployments.contracts import Face, Floats, PictureFaces
from deployments.errors import NoFaceDetected
from deployments.identity.blending import yaw
from training.evaluation.cases import Subject

Look = Callable[[Sequence[bytes]], Sequence[PictureFaces]]
"""Encoded pictures -> their faces, the largest first, with the judge's embeddings, and sex where there is a model for it."""


@dataclass(frozen=True, eq=False)
class Known:
    """A subject as the judge knows it. references: [k, 512], held_out: [m, 512], unit rows, of the pictures that show a face; faceless:
    how many do not."""

    subject: Subject
    references: Floats
    held_out: Floats
    faceless: int
    sex: Literal["F", "M"] | None

    @property
    def centroid(self) -> Floats:
        return unit(self.references.mean(0))

    @property
    def target(self) -> Floats | None:
        """Of the held-out pictures, where there are any."""
        return unit(self.held_out.mean(0)) if len(self.held_out) else None


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One picture. faces: how many; everything else is of the largest, and None without one.

    score: the detector's. face_px: shorter side of its box. yaw: degrees, above 0 where the nose points to the picture's right, an estimate
    from five points. identity: cosine to the centroid of the references; held_out: to that of the pictures never shown; nearest: to the
    nearest reference, whose place is nearest_reference. copy_paste: see there.
    """

    faces: int
    score: float | None = None
    face_px: float | None = None
    yaw: float | None = None
    identity: float | None = None
    held_out: float | None = None
    nearest: float | None = None
    nearest_reference: int | None = None
    copy_paste: float | None = None


def known(subject: Subject, look: Look) -> Known:
    """Raises NoFaceDetected where no reference shows a face."""
    found = look(subject.references)
    shown = [faces.faces[0] for faces in found if faces.faces]
    hidden = [faces.faces[0] for faces in look(subject.held_out) if faces.faces] if subject.held_out else []
    if not shown:
        raise NoFaceDetected(f"None of the {len(found)} references of {subject.name} shows a face.", "Give pictures of the person's face.")
    told = [face.sex for face in shown if face.sex is not None]
    sex: Literal["F", "M"] | None = None
    if told:
        sex = "F" if told.count("F") >= told.count("M") else "M"
    faceless = len(found) + len(subject.held_out) - len(shown) - len(hidden)
    return Known(subject, _judged(shown), _judged(hidden), faceless, subject.sex or sex)


def measured(found: PictureFaces, person: Known) -> Measured:
    """What a picture shows of the person. found: as `Look` gives it."""
    if not found.faces:
        return Measured(faces=0)
    face = found.faces[0]
    vector = _judged([face])[0]
    cosines = person.references @ vector
    target = person.target
    return Measured(
        faces=len(found.faces),
        score=float(face.score),
        face_px=float((face.box[2:] - face.box[:2]).min()),
        yaw=yaw(face.landmarks),
        identity=float(person.centroid @ vector),
        held_out=None if target is None else float(target @ vector),
        nearest=float(cosines.max()),
        nearest_reference=int(cosines.argmax()),
        copy_paste=copy_paste(vector, person.references, target),
    )


def leave_one_out(embeddings: Floats) -> list[float]:
    """[k, 512] unit rows -> of each its cosine to the centroid of the others: what a true picture of the person reaches. Empty below 2.

    The centroid that drawn pictures are compared with is of one picture more. For pictures that have the cosine c with one another, that of
    another one to the centroid of k is c sqrt(k) / sqrt(1 + (k - 1) c): at c = 0.55 it gains 0.011 from 4 to 5, 0.003 from 9 to 10.
    """
    count = len(embeddings)
    if count < 2:
        return []
    others = unit(embeddings.sum(0, keepdims=True) - embeddings)
    return [float(value) for value in (embeddings * others).sum(1)]


def copy_paste(vector: Floats, references: Floats, target: Floats | None) -> float | None:
    """-1..1: above 0, the face is nearer to the one reference that it is like most than to the person in general, as a pasted one is.

    (angle(face, target) - angle(face, reference)) / angle(target, reference), after MultiID-Bench (WithAnyone, metrics/arcface_metric.py,
    `copy_geo`). reference: the nearest; target: the centroid of held-out pictures, or without any that of the other references. None for
    a single reference without a target. Being the nearest favours the reference: compare with `real_copy_paste`.
    """
    nearest = int((references @ vector).argmax())
    goal = target
    if goal is None:
        others = np.delete(references, nearest, axis=0)
        if not len(others):
            return None
        goal = unit(others.mean(0))
    apart = _angle(goal, references[nearest])
    return (_angle(vector, goal) - _angle(vector, references[nearest])) / apart if apart > 1e-6 else None


def real_copy_paste(references: Floats) -> list[float]:
    """The same score of each reference against the others: what photographs have that copy nothing. Empty below 3."""
    if len(references) < 3:
        return []
    scores = (copy_paste(row, np.delete(references, place, axis=0), None) for place, row in enumerate(references))
    return [score for score in scores if score is not None]


def unit(vectors: Floats) -> Floats:
    """Rows of length 1."""
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12), np.float32)


def _angle(one: Floats, other: Floats) -> float:
    """Radians. By both legs: near 0 the arc cosine of float32 knows nothing."""
    a, b = one.astype(np.float64), other.astype(np.float64)
    return float(2 * np.arctan2(np.linalg.norm(a - b), np.linalg.norm(a + b)))


def _judged(faces: Sequence[Face]) -> Floats:
    rows: list[NDArray[np.float32]] = []
    for face in faces:
        if face.judge_embedding is None:
            raise ValueError("A face without the judge's embedding cannot be compared: look with the need `judge`.")
        rows.append(face.judge_embedding)
    return np.stack(rows) if rows else np.zeros((0, 512), np.float32)
