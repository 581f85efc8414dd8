"""Pictures as the VAE's moments and captions as embeddings, on disk and in memory: what a step reads in place of encoders.

Moments and not samples, so that each step may draw its own latent. Files are named after everything that determines them: they survive a
crash, serve the next training of the same pictures, and never have to be invalidated. Knows no transformer and no noise.
"""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor
from torch.nn import functional

from deployments.contracts import PromptEmbeds
from deployments.denoisers.latents import from_picture, pack
from deployments.errors import InvalidImage
from training.buckets import Bucket, Place, places_of

_FORM = 1
"""Raised whenever the same picture would give other moments."""
Told = Callable[[str, int, int], None]
"""(what is being done, how many are done, of how many)."""
Moments = Callable[[Tensor], tuple[Tensor, Tensor]]
"""A picture as `from_picture` makes it, [1, 3, H, W] -> mean and std of the VAE's posterior, [c, h, w] fp32 each, normalised as the base's
transformer reads latents; on any device."""


@dataclass(frozen=True)
class Example:
    """One picture (PNG, JPEG, WebP) to train on. caption: with the trigger word in it.

    mask: a grey picture of the same size, 255 where everything counts, darker where less does. face: the subject's, (left, top, right,
    bottom) in pixels. prior: it shows the class and not the subject, and keeps the model from forgetting what others look like.
    """

    picture: Path
    caption: str
    mask: Path | None = None
    face: tuple[float, float, float, float] | None = None
    prior: bool = False


@dataclass(frozen=True, eq=False)
class Item:
    """An example in one bucket, on the CPU in fp32. mean, std: [c, h, w] of the VAE's posterior, normalised. weights: [tokens] of the loss,
    with a mean of 1, or None where all places count the same. caption: its row in the set's prompts."""

    bucket: Bucket
    mean: Tensor
    std: Tensor
    weights: Tensor | None
    caption: int
    prior: bool


@dataclass(frozen=True, eq=False)
class TrainingSet:
    """trained, held_out: no picture is in both. prompts: one row a caption; the last one is the empty caption's.
    hash: of all contents and captions. trigger_word: may be empty."""

    trained: tuple[Item, ...]
    held_out: tuple[Item, ...]
    prompts: PromptEmbeds
    hash: str
    trigger_word: str = ""

    @property
    def empty_caption(self) -> int:
        return len(self.prompts.states) - 1

    @cached_property
    def text_lengths(self) -> tuple[int, ...]:
        """Tokens of each row of `prompts`."""
        return self.prompts.lengths


class Captions(Protocol):
    """deployments.prompts.cache:PromptCache is one."""

    def encode(self, texts: Sequence[str], max_length: int) -> PromptEmbeds: ...


class MomentsCache:
    """Moments by the content of picture and VAE, one safetensors file each. Safe between processes: a file appears by being renamed."""

    def __init__(self, folder: Path, opened: Callable[[], Moments], revision: str) -> None:
        """opened: opens the base's VAE; called when the first picture lacks. revision: names its weights."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._open, self._revision = folder, opened, revision
        self._moments: Moments | None = None
        self.encoded = 0

    def moments(self, content: bytes, place: Place) -> tuple[Tensor, Tensor]:
        """mean and std [c, h, w], normalised as the transformer wants them. Raises InvalidImage."""
        path = self._folder / f"{self._key(content, place)}.safetensors"
        try:
            found = load(path.read_bytes())
            return found["mean"], found["std"]
        except (FileNotFoundError, SafetensorError, KeyError):
            pass  # not there, or cut short by a full disk: written anew
        mean, std = self._encode(content, place)
        part = path.with_name(f".{path.name}.{os.getpid()}.part")
        part.write_bytes(save({"mean": mean, "std": std}))
        os.replace(part, path)
        return mean, std

    def close(self) -> None:
        """Forgets the VAE: its memory is the training's."""
        self._moments = None

    @torch.no_grad()
    def _encode(self, content: bytes, place: Place) -> tuple[Tensor, Tensor]:
        if self._moments is None:
            self._moments = self._open()
        self.encoded += 1
        mean, std = self._moments(from_picture(_cut(_opened(content).convert("RGB"), place)))
        return mean.cpu().contiguous(), std.cpu().contiguous()

    def _key(self, content: bytes, place: Place) -> str:
        return hashlib.sha256(f"{_FORM} {self._revision} {hashlib.sha256(content).hexdigest()} {place}".encode()).hexdigest()


def prepare(
    examples: Sequence[Example],
    captions: Captions,
    cache: MomentsCache,
    *,
    resolutions: Sequence[int],
    divisor: int,
    max_length: int,
    mask_weight: float,
    face_share: float = 0.0,
    held_out: int = 0,
    trigger_word: str = "",
    told: Told = lambda what, done, of: None,
) -> TrainingSet:
    """Encodes whatever is not cached. divisor: pixels of a token's side. held_out: of the subject's pictures, spread over their order.

    Raises InvalidImage naming the file, and what `captions` raises.
    """
    subjects = [k for k, example in enumerate(examples) if not example.prior]
    if held_out >= len(subjects):
        raise InvalidImage(f"{len(subjects)} pictures show the subject, and {held_out} are to be held out.", "Bring more pictures.")
    kept_out = {subjects[(2 * k + 1) * len(subjects) // (2 * held_out)] for k in range(held_out)}
    rows = {text: row for row, text in enumerate(dict.fromkeys(example.caption for example in examples))}
    items: dict[bool, list[Item]] = {True: [], False: []}
    digest = hashlib.sha256()
    for number, example in enumerate(examples):
        told("pictures", number, len(examples))
        items[number in kept_out] += _items(
            example, rows[example.caption], cache, resolutions, divisor, mask_weight, face_share, digest.update
        )
    cache.close()
    told("captions", 0, len(rows))
    prompts = captions.encode([*rows, ""], max_length)
    return TrainingSet(tuple(items[False]), tuple(items[True]), prompts, digest.hexdigest(), trigger_word)


def _items(
    example: Example, caption: int, cache: MomentsCache, resolutions: Sequence[int], divisor: int, mask_weight: float, face_share: float,
    seen: Any,
) -> list[Item]:  # fmt: skip
    try:
        content = example.picture.read_bytes()
        mask = None if example.mask is None else example.mask.read_bytes()
        picture = _opened(content)
    except OSError as error:
        raise InvalidImage(f"{example.picture.name} cannot be read: {error}") from error
    except InvalidImage as error:
        raise InvalidImage(f"{example.picture.name}: {error.message}") from error
    face = None if example.face is None or not face_share else example.face
    parts = [content, mask or b"", example.caption.encode(), b"prior" if example.prior else b""]
    for part in parts if face is None else [*parts, str(face).encode()]:
        seen(hashlib.sha256(part).digest())
    found = []
    for place in places_of(*picture.size, resolutions, divisor):
        mean, std = cache.moments(content, place)
        weights = None if mask is None else token_weights(_cut(_opened(mask).convert("L"), place), mean.shape, mask_weight)
        if face is not None:
            weights = face_weights(_cut(_painted(face, picture.size), place), mean.shape, face_share, weights)
        found.append(Item(place.bucket, mean, std, weights, caption, example.prior))
    return found


def token_weights(mask: np.ndarray[Any, np.dtype[np.uint8]], latent: Sequence[int], least: float) -> Tensor:
    """mask: [H, W] -> [tokens]. latent: its shape [c, h, w]. No place counts less than `least`, and the mean is 1: a picture of which
    little counts is not worth less than another (ai-toolkit divides by the mean of the whole batch, where it takes from its neighbour)."""
    tokens = _tokens(mask, latent, least)
    return tokens / tokens.mean()


def face_weights(face: np.ndarray[Any, np.dtype[np.uint8]], latent: Sequence[int], share: float, weights: Tensor | None) -> Tensor:
    """face: [H, W], 255 within it. weights: [tokens] as they would be without, None for equal ones -> [tokens] of the same mean, of which
    the face has `share`, unless it has more already; unchanged where no face is left in the picture.

    A LoRA has few steps to learn somebody, and of a full figure the face is a small part: the rest would be learnt instead.
    """
    inside = _tokens(face, latent, 0.0)
    even = torch.ones_like(inside) if weights is None else weights
    has = float((even * inside).sum() / even.sum())
    if has >= share or has == 0:
        return even
    return even * (share / has * inside + (1 - share) / (1 - has) * (1 - inside))


def _tokens(picture: np.ndarray[Any, np.dtype[np.uint8]], latent: Sequence[int], least: float) -> Tensor:
    """[H, W] of 0..255 -> [tokens] of least..1."""
    small = functional.adaptive_avg_pool2d(torch.from_numpy(picture.copy())[None, None].float() / 255, (latent[1], latent[2]))
    return pack(small.clamp(min=least))[0].mean(-1)


def _painted(face: tuple[float, float, float, float], size: tuple[int, int]) -> Image.Image:
    """Grey picture of a size (width, height), white within the box."""
    painted = Image.new("L", size)
    left, top, right, bottom = (round(edge) for edge in face)
    painted.paste(255, (max(left, 0), max(top, 0), min(right, size[0]), min(bottom, size[1])))
    return painted


def _opened(content: bytes) -> Image.Image:
    """Turned as its EXIF says. Pixels are decoded here, so that what is cut short is found here."""
    try:
        picture = Image.open(io.BytesIO(content))
        picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InvalidImage(f"It is no picture that can be opened: {error}.") from error
    return ImageOps.exif_transpose(picture)


def _cut(picture: Image.Image, place: Place) -> np.ndarray[Any, np.dtype[np.uint8]]:
    if picture.size != (place.width, place.height):
        picture = picture.resize((place.width, place.height), Image.Resampling.LANCZOS)
    box = (place.left, place.top, place.left + place.bucket.width, place.top + place.bucket.height)
    return np.asarray(picture.crop(box), np.uint8)
