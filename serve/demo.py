"""The main job, shown: one sample character in four scenes, with the likeness of each. `likeness demo`, and `make demo`.

Speaks through the SDK like any other caller, so it runs in this process or against a server.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from deployments import images
from deployments.contact_sheet import contact_sheet
from serve.answers import GenerateResponse
from serve.client import Client

REFERENCE = Path(__file__).resolve().parents[1] / "samples" / "characters" / "ada-1.png"
SCENES = (
    "a close-up portrait of a smiling person wearing a red t-shirt on a beach at sunset with warm light",
    "a portrait of a laughing person wearing a blue suit in a library with soft daylight, arms down",
    "a close-up portrait of a neutral person wearing a green hoodie in a forest with soft daylight",
    "a portrait of a smiling person wearing a black turtleneck in a city at night with cool blue light, left arm raised",
)
"""In mini's own words: it knows ten places, five kinds of clothes and eight colours."""
_SEED = 7


@dataclass(frozen=True)
class Shown:
    """What was written: the pictures in the order of SCENES, the sheet, the scores; and the likeness of each picture."""

    pictures: tuple[Path, ...]
    sheet: Path
    scores: Path
    cosines: tuple[float | None, ...]


def show(client: Client, out: Path, done: Callable[[int], None] = lambda scene: None) -> Shown:
    """Draws the four scenes into the folder `out`. done: told after each, 1..4."""
    answers = []
    for number, scene in enumerate(SCENES):
        # Drawn people are a style: identity acts from the first step (see the workflow's advice).
        answers.append(client.generate(workflow="flux-pulid", prompt=scene, reference_image=REFERENCE, style="stylized", seed=_SEED))
        done(number + 1)
    pictures = tuple(answer.data[0].save(out / f"scene-{number}.png") for number, answer in enumerate(answers, 1))
    cosines = tuple(answer.data[0].scores[0].cosine for answer in answers)
    return Shown(pictures, _sheet(answers, cosines, out / "sheet.png"), _scores(answers, pictures, out / "scores.json"), cosines)


def _sheet(answers: list[GenerateResponse], cosines: tuple[float | None, ...], path: Path) -> Path:
    shown = [images.decode(REFERENCE.read_bytes()), *(images.decode(answer.data[0].content) for answer in answers)]
    captions = ["the reference", *("no face" if cosine is None else f"likeness {cosine:.2f}" for cosine in cosines)]
    path.write_bytes(images.encode(contact_sheet(shown, captions, columns=len(shown))))
    return path


def _scores(answers: list[GenerateResponse], pictures: tuple[Path, ...], path: Path) -> Path:
    facts = [
        {"file": picture.name, "prompt": answer.request["prompt"], "seed": answer.data[0].seed, "timings": answer.timings}
        | {"scores": [score.model_dump() for score in answer.data[0].scores]}
        for answer, picture in zip(answers, pictures, strict=True)
    ]
    path.write_text(json.dumps({"reference": REFERENCE.name, "pictures": facts}, indent=2) + "\n", encoding="utf-8")
    return path
