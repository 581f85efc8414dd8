"""The figures of a configuration's pictures, or of some of them: identity, faces found, prompts followed, time. From rows alone.

Two means, since one hides something: `mean_of_faces` leaves out pictures without a face, `mean_no_face_as_0` counts them as nobody's. Every
comparison uses the second: a configuration does not gain by drawing no faces. No outlier is ever left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, get_args

import numpy as np

from training.evaluation.likeness import Known, leave_one_out, real_copy_paste
from training.evaluation.plan import Framing
from training.evaluation.rows import Band, Row
from training.evaluation.statistics import Spread, difference, spread

SLICES: Final[Mapping[str, Callable[[Row], str | None]]] = {
    "framing": lambda row: row.framing,
    "yaw": lambda row: row.band,
    "sex": lambda row: row.sex,
}
"""What pictures are told apart by; those of which it is not known (no face, no turn) are in none."""

_ORDER: Final = (*get_args(Framing), *get_args(Band), "F", "M")

Figures = dict[str, Any]


def figures(rows: Sequence[Row], known: Mapping[str, Known], threshold: float) -> Figures:
    """Of one configuration's pictures. identity: of the judge, cosines to the centroid of the references. Numbers that nothing gives are
    None. relative_identity: median of cosine over the leave-one-out median of the same person's photographs; above 1 is an alarm, not a
    win: no photograph of the person is as much like the others."""
    seen = [row for row in rows if row.identity is not None]
    clusters = [row.cluster for row in seen]
    own = spread([row.identity_or_zero for row in seen], clusters)
    return {
        "pictures": len(rows),
        "no_face_rate": _share(rows, lambda row: row.measured.faces == 0),
        "several_faces_rate": _share(rows, lambda row: row.measured.faces > 1),
        "identity": {
            "mean_of_faces": own and own.mean,
            "interval": own and [own.low, own.high],
            "median": own and own.median,
            "std": own and own.std,
            "mean_no_face_as_0": float(np.mean([row.identity_or_zero for row in rows])),
        },
        "above_threshold": _share(rows, lambda row: row.identity is not None and row.identity >= threshold),
        "relative_identity": _relative(seen, known),
        "held_out": _spread(seen, lambda row: row.measured.held_out),
        "nearest_reference": _nearest(seen),
        "copy_paste": _spread(seen, lambda row: row.measured.copy_paste),
        "adherence": {name: _mean([row.adherence[name] for row in rows if name in row.adherence]) for name in _measures(rows)},
        "peak_bytes": max((row.peak_bytes for row in rows if row.peak_bytes is not None), default=None),
        "seconds": {"mean": _mean([row.seconds for row in rows]), "median": float(np.median([row.seconds for row in rows]))},
    }


def by_slice(rows: Sequence[Row], known: Mapping[str, Known], threshold: float) -> dict[str, Any]:
    """slice -> its value -> figures."""
    found: dict[str, Any] = {}
    for name, of in SLICES.items():
        there = {value for row in rows if (value := of(row)) is not None}
        ordered = [value for value in _ORDER if value in there]
        found[name] = {value: figures([row for row in rows if of(row) == value], known, threshold) for value in ordered}
    return found


def differences(configurations: Mapping[str, Sequence[Row]]) -> list[Figures]:
    """Of every two, in their order: identity of `of` less that of `than`, in pairs of the same person, prompt and seed, no face as 0."""
    names = list(configurations)
    found = []
    for place, of in enumerate(names):
        for than in names[:place]:
            one, other = ({row.pair: row.identity_or_zero for row in configurations[name]} for name in (than, of))
            clusters = {row.pair: row.cluster for name in (than, of) for row in configurations[name]}
            gap = difference(one, other, clusters)
            if gap is not None:
                found.append({"of": of, "than": than, **asdict(gap), "clear": gap.clear})
    return found


def differences_by_framing(configurations: Mapping[str, Sequence[Row]]) -> dict[str, list[Figures]]:
    """The same, among the prompts of each framing: what acts on full bodies alone (a pose) is thinned out by all others."""
    there = {row.framing for rows in configurations.values() for row in rows}
    return {
        framing: differences({name: [row for row in rows if row.framing == framing] for name, rows in configurations.items()})
        for framing in get_args(Framing)
        if framing in there
    }


def photographs(person: Known) -> Figures:
    """What the subject's own pictures reach among themselves: the ceiling (leave-one-out), and the copy-paste score of copying nothing."""
    ceiling, copied = leave_one_out(person.references), real_copy_paste(person.references)
    return {
        "references": len(person.references),
        "held_out": len(person.held_out),
        "without_face": person.faceless,
        "sex": person.sex,
        "leave_one_out": _plain(spread(ceiling, range(len(ceiling)))),
        "copy_paste": _plain(spread(copied, range(len(copied)))),
    }


def _relative(seen: Sequence[Row], known: Mapping[str, Known]) -> float | None:
    medians = {name: float(np.median(values)) for name, person in known.items() if (values := leave_one_out(person.references))}
    ceilings = {name: median for name, median in medians.items() if median > 0}  # pictures of strangers have no ceiling
    shares = [row.identity_or_zero / ceilings[row.key.subject] for row in seen if row.key.subject in ceilings]
    return float(np.median(shares)) if shares else None


def _nearest(seen: Sequence[Row]) -> Figures:
    """most_common_share: of pictures that are nearest to one and the same reference; 1 / their number is even."""
    if not seen:
        return {"cosine": None, "most_common_share": None}
    places = Counter((row.key.subject, row.measured.nearest_reference) for row in seen)
    return {"cosine": _mean([row.measured.nearest or 0.0 for row in seen]), "most_common_share": max(places.values()) / len(seen)}


def _spread(rows: Sequence[Row], value: Callable[[Row], float | None]) -> Figures | None:
    pairs = [(found, row.cluster) for row in rows if (found := value(row)) is not None]
    return _plain(spread([found for found, _ in pairs], [cluster for _, cluster in pairs]))


def _plain(found: Spread | None) -> Figures | None:
    return None if found is None else asdict(found)


def _measures(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row.adherence))


def _share(rows: Sequence[Row], holds: Callable[[Row], bool]) -> float:
    return float(np.mean([holds(row) for row in rows]))


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None
