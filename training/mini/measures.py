"""What the generator of a pack does, measured on held-out people: prompts followed, identity kept, poses obeyed, time taken.

Pictures come from stock pipelines (studio.py), verdicts from models that conditioned nothing (the judge, the attribute
classifier, the keypoint detector). Knows no bars: card.py compares.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from training.mini.faces.verification import Pictures, attribute_accuracy, found_keypoints, sample
from training.mini.generator import autoencoder
from training.mini.sitting import Sitting, cosines, mean_interval
from training.mini.studio import Studio
from training.mini.world.captions import caption
from training.mini.world.render import PICTURE_SIZE_PX
from training.mini.world.scene import CLOSE_UP, FRAMINGS, FULL_BODY, PORTRAIT, Scene, sample_scenes
from training.mini.world.skeleton import draw_skeleton, keypoints

_SEED = 930_000
_PEOPLE_OFFSET = 40
_ARM_JOINTS = (3, 4, 6, 7)
"""Elbows and wrists in OpenPose's COCO-18 order."""
_POSE_TOLERANCE = 0.08
"""Of the picture's side: how far an arm joint may be from where it was asked."""


@dataclass(frozen=True, eq=False)
class Cast:
    """The people of an evaluation: one close-up reference each, and the judge's embedding of it."""

    pictures: Pictures
    judged: np.ndarray[Any, np.dtype[np.float32]]

    def __len__(self) -> int:
        return len(self.pictures)


def cast_of(sitting: Sitting, people: int) -> Cast:
    pictures = sample(people, _SEED, CLOSE_UP, _PEOPLE_OFFSET).pictures
    return Cast(pictures, sitting.judged(pictures))


def autoencoder_psnr(studio: Studio, count: int) -> dict[str, float]:
    """Mean PSNR in dB of pictures through the stored autoencoder."""
    pictures = sample(count, _SEED + 1, None, _PEOPLE_OFFSET + 1).pictures
    clean = torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    values = []
    with torch.no_grad():
        for part in clean.split(8):
            restored = autoencoder.decode(studio.pipe.vae, autoencoder.encode(studio.pipe.vae, part.to(studio.device))).cpu().clamp(-1, 1)
            values += (10 * torch.log10(4 / ((restored - part) ** 2).mean((1, 2, 3)))).tolist()
    return {"psnr_db": round(statistics.mean(values), 2), "n": len(values)}


def prompts(studio: Studio, sitting: Sitting, cast: Cast) -> dict[str, Any]:
    """Prompts alone: attributes right, and the judge's cosine to references that the pictures know nothing of."""
    scene = sample_scenes(2 * len(cast), _SEED + 2)
    drawn = studio.draw(caption(scene), list(range(len(scene))))
    values, faceless = cosines(sitting.judged(drawn), np.concatenate([cast.judged] * 2))
    return {"attributes": attribute_accuracy(studio.pack, 0, drawn, scene), "cosine": mean_interval(values), "no_face": round(faceless, 4)}


Draw = Callable[[list[str], list[int]], Pictures]
"""(prompts, seeds) -> pictures."""


def identity(sitting: Sitting, cast: Cast, draw: Draw, pack: Path, framings: tuple[int, ...] = (CLOSE_UP, PORTRAIT)) -> dict[str, Any]:
    """One picture a person and framing. Cosine of the judge to the reference (0 where no face is found), per framing and together,
    and whether the prompt is still followed."""
    figures: dict[str, Any] = {}
    together: list[float] = []
    for framing in framings:
        scene = sample_scenes(len(cast), _SEED + 10 + framing, framing=framing)
        drawn = draw(caption(scene), list(range(len(cast))))
        values, faceless = cosines(sitting.judged(drawn), cast.judged)
        together += values
        figures[FRAMINGS[framing]] = {
            "cosine": mean_interval(values), "no_face": round(faceless, 4), "attributes": attribute_accuracy(pack, 0, drawn, scene),
        }  # fmt: skip
    return {"together": mean_interval(together), **figures}


def ip_adapter(studio: Studio, sitting: Sitting, cast: Cast) -> dict[str, Any]:
    studio.attach_ip_adapter()
    figures = identity(sitting, cast, partial(studio.draw_like, references=cast.pictures, weight=1.0), studio.pack)
    studio.detach_ip_adapter()
    return figures


def pulid(studio: Studio, sitting: Sitting, cast: Cast) -> dict[str, Any]:
    """At weights 0, 0.5 and 1; full bodies at weight 1 too."""
    tokens = sitting.tokens(cast.pictures, studio.attach_pulid())
    plan: dict[float, tuple[int, ...]] = {0.0: (PORTRAIT,), 0.5: (PORTRAIT,), 1.0: (CLOSE_UP, PORTRAIT, FULL_BODY)}
    figures = {}
    for weight, framings in plan.items():
        figures[f"{weight:g}"] = identity(sitting, cast, partial(studio.draw_identity, tokens=tokens, weight=weight), studio.pack, framings)
    both = [figures["1"][FRAMINGS[framing]]["cosine"] for framing in (CLOSE_UP, PORTRAIT)]
    figures["1"]["close-up and portrait"] = round(statistics.mean(f["mean"] for f in both), 4)
    studio.detach_pulid()
    return figures


def instantx(studio: Studio, sitting: Sitting, cast: Cast) -> dict[str, Any]:
    """At weight 1."""
    studio.attach_instantx()
    tokens = studio.instantx_tokens(cast.pictures)
    figures = identity(sitting, cast, partial(studio.draw_instantx, tokens=tokens, weight=1.0), studio.pack)
    studio.detach_instantx()
    return figures


def pose(studio: Studio, count: int) -> dict[str, Any]:
    """Full bodies whose prompts say nothing of arms, with skeletons that do: the share of pictures all of whose visible elbows and
    wrists are found within 8 % of the picture of where they were asked; the same without control, for comparison."""
    people = sample(count, _SEED + 30, FULL_BODY, _PEOPLE_OFFSET + 2)
    asked, visible = keypoints(people.identity, people.scene)
    skeletons = _bytes(draw_skeleton(asked, visible))
    texts = [text.split(", ")[0] for text in caption(people.scene)]
    seeds = list(range(count))
    posed = _obeyed(studio.pack, studio.draw_posed(texts, seeds, skeletons), asked, visible)
    return {"obeyed": posed, "without_control": _obeyed(studio.pack, studio.draw(texts, seeds), asked, visible), "n": count}


def _obeyed(pack: Path, pictures: Pictures, asked: Tensor, visible: Tensor) -> float:
    points, seen = found_keypoints(pack, pictures)
    arms = list(_ARM_JOINTS)
    distance = (points[:, arms] - asked[:, arms]).norm(dim=-1) / 2  # picture coordinates span 2
    near = (distance <= _POSE_TOLERANCE) & seen[:, arms]
    return round(float((near | ~visible[:, arms]).all(1).float().mean()), 4)


def speed(pack: Path) -> dict[str, float]:
    """Seconds for one picture by the stock pipeline, fp32, two CPU threads: the median of five after a warm-up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    studio = Studio(pack, torch.device("cpu"), batch=1)
    text = caption(sample_scenes(1, _SEED))
    seconds = {}
    for steps in (20, 8):
        studio.draw(text, [0], steps)
        runs = []
        for seed in range(5):
            started = time.perf_counter()
            studio.draw(text, [seed], steps)
            runs.append(time.perf_counter() - started)
        seconds[f"{steps} steps"] = round(statistics.median(runs), 2)
    torch.set_num_threads(threads)
    return seconds


def grid(studio: Studio, sitting: Sitting) -> tuple[Pictures, list[str]]:
    """Six people and ten prompts through PuLID: rows of 11 pictures, the reference first; and the prompts."""
    people, columns = 6, 10
    cast = cast_of(sitting, people)
    scene = _grid_scene(columns)
    texts = caption(scene)
    tokens = sitting.tokens(cast.pictures, studio.attach_pulid())
    rows = []
    for person in range(people):
        drawn = studio.draw_identity(texts, [person] * columns, tokens[person : person + 1].expand(columns, -1, -1), 1.0)
        rows.append(np.concatenate([cast.pictures[person : person + 1], drawn]))
    studio.detach_pulid()
    return np.concatenate(rows), texts


def _grid_scene(columns: int) -> Scene:
    """Every place once; framings, clothes and colours in turn."""
    turn = torch.arange(columns)
    return sample_scenes(columns, _SEED + 50).but(
        scene=turn % 10, framing=turn % 3, clothes=turn % 5, colour=(turn * 3) % 8, expression=turn % 3
    )


def _bytes(pictures: Tensor) -> Pictures:
    """[n, 3, h, w] in -1..1 -> uint8 [n, h, w, 3]."""
    assert pictures.shape[-1] == PICTURE_SIZE_PX
    return ((pictures.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
