"""How much two faces are one person's: the cosine of the judge, the recogniser that conditions no picture. Nothing else is ever shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from deployments.contracts import Face, Floats, Person, PictureFaces

_EMBEDDING = 512


@dataclass(frozen=True)
class Likeness:
    """One person's likeness in one picture.

    face: which of the picture's faces was taken for theirs; None if there was none left. cosines: of it against each of the
    person's references, -1..1; None without a face.
    """

    face: int | None
    cosines: tuple[float | None, ...]


def cosines(faces: Sequence[Face], others: Sequence[Face]) -> Floats:
    """[n] and [m] faces -> [n, m], -1..1. Raises ValueError for faces that were analysed without the need `judge`."""
    return np.asarray(np.clip(_judged(faces) @ _judged(others).T, -1, 1), np.float32)


def likenesses(found: PictureFaces, persons: Sequence[Person]) -> tuple[Likeness, ...]:
    """One a person. For one person the largest face counts; for several, the assignment whose mean cosines sum up highest.

    A person who stands in the list twice (the same object, brought in by two methods) is one person and has one face.
    Raises as `cosines` does.
    """
    if not persons:
        return ()
    places: dict[int, int] = {}
    each = [places.setdefault(id(person), len(places)) for person in persons]
    distinct = dict(zip(each, persons, strict=True))
    tables = [cosines(distinct[place].faces, found.faces) for place in range(len(distinct))]
    owners = {0: 0} if len(tables) == 1 and found.faces else _assigned(tables)
    return tuple(_likeness(tables[place], owners.get(place)) for place in each)


def _assigned(tables: Sequence[Floats]) -> dict[int, int]:
    """person -> face, each face once; who is left over is missing."""
    rows, columns = linear_sum_assignment(np.stack([table.mean(0) for table in tables]), maximize=True)
    return dict(zip(rows.tolist(), columns.tolist(), strict=True))


def _likeness(table: Floats, face: int | None) -> Likeness:
    """table: [references, faces]."""
    return Likeness(face, tuple(None if face is None else float(row[face]) for row in table))


def _judged(faces: Sequence[Face]) -> Floats:
    embeddings = [face.judge_embedding for face in faces]
    known = [embedding for embedding in embeddings if embedding is not None]
    if len(known) != len(embeddings):
        raise ValueError("A face without the judge's embedding cannot be compared: analyse it with the need `judge`.")
    return np.stack(known) if known else np.zeros((0, _EMBEDDING), np.float32)
