"""Sixty pictures as somebody would send them to have a LoRA trained: of one person, of others, of groups, and what is wrong with pictures.

Drawn by the character world, of people that no model was trained on. Names say what a picture is: `good-07.png`, `blurred-02.png`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import count

import torch
from PIL import Image, ImageFilter
from PIL.Image import Resampling
from torch import Tensor

from training.mini.heldout import character_identity
from training.mini.world.groups import paint_group, sample_group
from training.mini.world.render import render
from training.mini.world.scene import CLOSE_UP, FULL_BODY, PORTRAIT, Scene, sample_scenes

PEOPLE = "Farid", "Greta", "Ada"
_SEED = 930_000
_SIZES = (192, 224, 256)
_FRAMINGS = (CLOSE_UP, PORTRAIT, FULL_BODY)


def planted(subject: str = PEOPLE[0], first: str = PEOPLE[1], second: str = PEOPLE[2], seed: int = _SEED) -> dict[str, bytes]:
    """Name -> file: 18 good ones of the subject alone and 2 of a group that can be cropped, 8 each of two others, 4 groups without the
    subject, 4 cheek to cheek, 6 blurred, 6 duplicates, 4 from far away."""
    seeds = count(seed)
    alone = {f"good-{n:02}.png": drawn(subject, next(seeds), _FRAMINGS[n % 3], _SIZES[n % len(_SIZES)]) for n in range(18)}
    pictures = {name: png(image) for name, image in alone.items()}
    pictures |= {f"good-{18 + n}.png": png(group([subject, first], next(seeds), 256)) for n in range(2)}
    for number, other in enumerate((first, second), 1):
        pictures |= {f"other{number}-{n}.png": png(drawn(other, next(seeds), _FRAMINGS[n % 3])) for n in range(8)}
    pictures |= {f"strangers-{n}.png": png(group([first, second], next(seeds))) for n in range(4)}
    pictures |= {f"cheek-{n}.png": png(group([second, subject], next(seeds), 256, 0.5)) for n in range(4)}
    soft = (drawn(subject, next(seeds), _FRAMINGS[n % 3]).filter(ImageFilter.GaussianBlur(2.5)) for n in range(6))
    pictures |= {f"blurred-{n}.png": png(image) for n, image in enumerate(soft)}
    originals = [alone[f"good-{n:02}.png"] for n in (0, 3, 4, 7, 11, 14)]
    pictures |= {f"twin-{n}.jpg": data for n, data in enumerate(_saved_anew(originals))}
    return pictures | {f"distant-{n}.png": png(distant(subject, next(seeds))) for n in range(4)}


def drawn(person: str, seed: int, framing: int, size: int = 192) -> Image.Image:
    return _image(render(character_identity(person), sample_scenes(1, seed, framing=framing), size))


def distant(person: str, seed: int, size: int = 448, head: float = 0.048) -> Image.Image:
    """Somebody as a small figure in a large place. head: length of a head unit, of half the picture."""
    scene = sample_scenes(1, seed, framing=FULL_BODY)
    return _image(render(character_identity(person), scene.but(head_size=torch.full((1,), head)), size))


def group(people: list[str], seed: int, size: int = 192, apart: float | None = None) -> Image.Image:
    """Side by side. apart: of the heads' middles, of half the picture; None is the world's own."""
    members = sample_group(1, len(people), seed)
    if apart is not None:
        members = [_moved(scene, (place - (len(people) - 1) / 2) * apart) for place, scene in enumerate(members)]
    return _image(paint_group(torch.cat([character_identity(name) for name in people])[None], members, size).picture)


def png(image: Image.Image) -> bytes:
    return saved(image, "PNG")


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def _saved_anew(originals: list[Image.Image]) -> Iterator[bytes]:
    """Compressed; and besides smaller, cropped a little, brighter."""
    for number, image in enumerate(originals):
        width, height = image.size
        if number % 3 == 1:
            image = image.crop((width // 25, height // 30, width - width // 20, height))
        if number % 3 == 2:
            image = image.resize((width * 4 // 5, height * 4 // 5), Resampling.LANCZOS).point(lambda value: min(value * 1.08, 255))
        yield saved(image, "JPEG", quality=80)


def _moved(scene: Scene, x: float) -> Scene:
    return scene.but(head_x=torch.full((1,), x))


def _image(picture: Tensor) -> Image.Image:
    """[1, 3, h, w] in -1..1."""
    pixels = ((picture[0].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()
    return Image.fromarray(pixels)
