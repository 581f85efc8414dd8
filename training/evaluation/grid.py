"""The comparison grid: a row for each person and prompt, a column for each configuration, the best reference first. Of the first seed."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from deployments.contact_sheet import contact_sheet
from deployments.contracts import RGB
from deployments.images import decode, encode
from training.evaluation.rows import Row
from training.evaluation.run import Evaluation

_SMALL_PX = 1100
"""Width of the small grid, for a page."""
_LEAST_PX = 96
_GAPS_PX = 16


def write(evaluation: Evaluation, full: Path, small: Path) -> None:
    """full: every picture in its own size; small: about _SMALL_PX wide, where that leaves a picture _LEAST_PX."""
    pictures, captions, columns = _cells(evaluation)
    full.write_bytes(encode(contact_sheet(pictures, captions, columns)))
    side = max(_LEAST_PX, _SMALL_PX // columns - _GAPS_PX)
    small.write_bytes(encode(contact_sheet([_reduced(picture, side) for picture in pictures], captions, columns)))


def _cells(evaluation: Evaluation) -> tuple[list[RGB], list[str], int]:
    plan = evaluation.plan
    shown = [item for item in plan.configurations if item.name not in evaluation.left_out]
    rows = {row.key: row for row in evaluation.rows}
    pictures: list[RGB] = []
    captions: list[str] = []
    for name, person in evaluation.known.items():
        reference = decode(person.subject.references[0])
        for prompt in plan.prompts:
            drawn = [rows[key] for item in shown if (key := (name, item.name, prompt.name, plan.seeds[0])) in rows]
            images = [decode((evaluation.folder / row.picture).read_bytes()) for row in drawn]
            pictures += [_reduced(reference, max(image.shape[1] for image in images)), *images]
            labels = [next(item.label for item in shown if item.name == row.key.configuration) for row in drawn]
            captions += [f"{name}\n{prompt.name}", *(f"{label}\n{_said(row)}" for label, row in zip(labels, drawn, strict=True))]
    return pictures, captions, len(shown) + 1


def _said(row: Row) -> str:
    followed = [f"{name} {value:.2f}" if 0 < value < 1 else f"{name} {'yes' if value else 'no'}" for name, value in row.adherence.items()]
    identity = "no face" if row.identity is None else f"{row.identity:.3f}"
    return "\n".join([identity, *(["  ".join(followed)] if followed else [])])


def _reduced(picture: RGB, width: int) -> RGB:
    """At most so wide, never enlarged."""
    import numpy as np

    if picture.shape[1] <= width:
        return picture
    height = max(1, round(picture.shape[0] * width / picture.shape[1]))
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS), np.uint8)
