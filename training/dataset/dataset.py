"""The accepted pictures as a trainer takes them: crops, masks and captions in a folder, and one file that says what they are.

Made again from the same pictures with the same settings it is the same, byte for byte; what is there already is not made again. Pictures
keep their size, or are reduced: what is small goes into a smaller bucket. Buckets and the normalisation of masks are the trainer's.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.contracts import RGB, Floats
from deployments.errors import InvalidRequest
from deployments.images import DEFAULT_LIMITS, Limits, decode, encode
from training.dataset.caption import Captioner, Style, caption
from training.dataset.files import MASKS, PICTURES, remove_others, write
from training.dataset.masks import loss_weights, others_blurred
from training.dataset.settings import CurationSettings
from training.dataset.sources import PictureSource
from training.dataset.values import Box, Crop, PictureAnalysis, Verdict

DATASET: Final = "dataset.json"
_VERSION: Final = 1
_NAME_CHARACTERS: Final = 40


class DatasetPicture(BaseModel):
    """file, mask: below the folder; mask is None where every pixel counts wholly. face: the box in the written picture's pixels. source:
    the name it came by; crop: what was kept of it. recipe: of what was done with it, to know what need not be done again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str
    sha256: str
    width: int
    height: int
    caption: str
    composition: str
    face: Box
    cosine: float | None
    mask: str | None = None
    mask_sha256: str | None = None
    upscaled: bool = False
    source: str
    source_sha256: str
    crop: tuple[int, int, int, int]
    recipe: str


class Dataset(BaseModel):
    """content_sha256: of pictures, masks and captions, whatever the files are called. faces, judge: ids of the models that chose."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = _VERSION
    content_sha256: str
    trigger: str
    class_word: str
    faces: str
    judge: str
    pictures: tuple[DatasetPicture, ...] = Field(min_length=1)


@dataclass(frozen=True, eq=False)
class Maker:
    """Makes one accepted picture after another. folder: of the dataset."""

    folder: Path
    settings: CurationSettings
    style: Style
    captioner: Captioner | None
    limits: Limits = DEFAULT_LIMITS

    def make(self, source: PictureSource, analysis: PictureAnalysis, verdict: Verdict, known: DatasetPicture | None) -> DatasetPicture:
        """known: the same source's picture of an earlier run."""
        crop, face = _accepted(analysis, verdict)
        recipe = self._recipe(analysis, crop, face)
        if known is not None and known.recipe == recipe and _whole(self.folder, known):
            return known.model_copy(update={"source": source.name, "cosine": verdict.cosine})
        whole = decode(source.read(), self.limits)
        cut = others_blurred(whole, crop, face) if self.settings.blur_others else _cut(whole, crop)
        weights = None if self.settings.blur_others else loss_weights(crop, face, self.settings.mask_weight)
        said = self.captioner(cut) if self.captioner is not None else ""
        size, upscaled = _size((cut.shape[1], cut.shape[0]), self.settings)
        picture = encode(_resized(cut, size), "png", source=None)
        mask = None if weights is None else _mask(weights, size)
        composition = self.style.composition(face, crop.box)
        text = caption(self.style, composition, self.settings, said)
        stem = f"{_plain(source.name)}-{analysis.sha256[:8]}"
        write(self.folder / PICTURES / f"{stem}.png", picture)
        write(self.folder / PICTURES / f"{stem}.txt", f"{text}\n".encode())
        if mask is not None:
            write(self.folder / MASKS / f"{stem}.png", mask)
        scale = size[0] / cut.shape[1], size[1] / cut.shape[0]
        return DatasetPicture(
            file=f"{PICTURES}/{stem}.png",
            sha256=sha256(picture).hexdigest(),
            width=size[0],
            height=size[1],
            caption=text,
            composition=composition.name,
            face=_moved(face, crop, scale),
            cosine=verdict.cosine,
            mask=None if mask is None else f"{MASKS}/{stem}.png",
            mask_sha256=None if mask is None else sha256(mask).hexdigest(),
            upscaled=upscaled,
            source=source.name,
            source_sha256=analysis.sha256,
            crop=crop.box,
            recipe=recipe,
        )

    def _recipe(self, analysis: PictureAnalysis, crop: Crop, face: Box) -> str:
        chosen = self.settings.model_dump(
            mode="json", include={"trigger", "class_word", "captioner", "mask_weight", "blur_others", "upscale_px", "longest_px"}
        )
        parts = [_VERSION, analysis.sha256, crop.model_dump(mode="json"), face, chosen, self.style.model_dump(mode="json")]
        return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def write_dataset(
    maker: Maker,
    sources: Sequence[PictureSource],
    analyses: Sequence[PictureAnalysis],
    verdicts: Sequence[Verdict],
    models: tuple[str, str],
    progress: Callable[[int, int], object] | None = None,
) -> Dataset:
    """The accepted pictures, in the order of the sources. models: ids of faces and judge. Files of ours that an earlier run left are
    removed where they do not belong to this one. Raises InvalidRequest where nothing is accepted."""
    taken = [number for number, verdict in enumerate(verdicts) if verdict.reason is None]
    if not taken:
        raise InvalidRequest(f"None of the {len(sources)} pictures can be used.", "The report says why; add better pictures.")
    known = _known(maker.folder)

    def one(number: int) -> DatasetPicture:
        return maker.make(sources[number], analyses[number], verdicts[number], known.get(analyses[number].sha256))

    made: list[DatasetPicture] = []
    with ThreadPoolExecutor(maker.settings.workers, thread_name_prefix="crops") as pool:
        for picture in pool.map(one, taken):
            made.append(picture)
            if progress is not None:
                progress(len(made), len(taken))
    class_word = maker.settings.class_word or maker.style.class_word
    dataset = Dataset(
        content_sha256=_content(made),
        trigger=maker.settings.trigger,
        class_word=class_word,
        faces=models[0],
        judge=models[1],
        pictures=tuple(made),
    )
    _keep_only(maker.folder, made)
    write(maker.folder / DATASET, f"{dataset.model_dump_json(indent=2)}\n".encode())
    return dataset


def read_dataset(folder: Path) -> Dataset:
    """The dataset of a folder, every file of it checked against its sha256. Raises InvalidRequest, which names the file that is wrong."""
    dataset = _read(folder)
    if _content(dataset.pictures) != dataset.content_sha256:
        raise InvalidRequest(f"{folder / DATASET} was changed by hand.", "Curate the pictures again, or correct the file.")
    damaged = next((picture.file for picture in dataset.pictures if not _whole(folder, picture)), None)
    if damaged is not None:
        message = f"{folder / damaged}, its mask or its caption is not what {DATASET} says."
        raise InvalidRequest(message, "Curate the pictures again: what is whole is not made anew.")
    return dataset


def _read(folder: Path) -> Dataset:
    try:
        return Dataset.model_validate_json((folder / DATASET).read_bytes())
    except OSError as error:
        raise InvalidRequest(f"{folder} holds no {DATASET}.", "Make it with `likeness dataset curate`.") from error
    except ValidationError as error:
        raise InvalidRequest(f"{folder / DATASET} is no dataset: {error}", "Make it with `likeness dataset curate`.") from error


def _known(folder: Path) -> Mapping[str, DatasetPicture]:
    try:
        return {picture.source_sha256: picture for picture in _read(folder).pictures}
    except InvalidRequest:
        return {}


def _whole(folder: Path, picture: DatasetPicture) -> bool:
    """Whether its files are there and are what is said of them."""
    wanted = {picture.file: picture.sha256, picture.mask: picture.mask_sha256}
    try:
        text = (folder / picture.file).with_suffix(".txt").read_text(encoding="utf-8")
        same = (sha256((folder / file).read_bytes()).hexdigest() == hash for file, hash in wanted.items() if file is not None)
        return all(same) and text == f"{picture.caption}\n"
    except (OSError, UnicodeDecodeError):
        return False


def _keep_only(folder: Path, made: Sequence[DatasetPicture]) -> None:
    files = [Path(picture.file) for picture in made]
    remove_others(folder / PICTURES, frozenset(name for file in files for name in (file.name, file.with_suffix(".txt").name)))
    remove_others(folder / MASKS, frozenset(Path(picture.mask).name for picture in made if picture.mask is not None))


def _accepted(analysis: PictureAnalysis, verdict: Verdict) -> tuple[Crop, Box]:
    if verdict.crop is None or verdict.face is None:
        raise ValueError(f"The picture {analysis.sha256[:8]} was not accepted; only accepted ones are written.")
    return verdict.crop, analysis.faces[verdict.face].box


def _content(pictures: Sequence[DatasetPicture]) -> str:
    facts = sorted([picture.sha256, picture.mask_sha256 or "", picture.caption] for picture in pictures)
    return sha256(json.dumps(facts).encode()).hexdigest()


def _cut(picture: RGB, crop: Crop) -> RGB:
    x0, y0, x1, y1 = crop.box
    return np.ascontiguousarray(picture[y0:y1, x0:x1])


def _size(size: tuple[int, int], settings: CurationSettings) -> tuple[tuple[int, int], bool]:
    """(width, height) that is written, and whether it is more than there was."""
    scale = min(settings.longest_px / max(size), 1.0)
    if settings.upscale_px is not None:
        scale = max(scale, settings.upscale_px / min(size)) if min(size) < settings.upscale_px else scale
    return (max(round(size[0] * scale), 1), max(round(size[1] * scale), 1)), scale > 1


def _resized(picture: RGB, size: tuple[int, int]) -> RGB:
    if size == (picture.shape[1], picture.shape[0]):
        return picture
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.LANCZOS), np.uint8)


def _mask(weights: Floats, size: tuple[int, int]) -> bytes:
    levels: NDArray[Any] = cv2.resize(np.rint(weights * 255).astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
    done, packed = cv2.imencode(".png", levels)
    if not done:
        raise ValueError(f"A mask of {size[0]} x {size[1]} could not be written.")
    return packed.tobytes()


def _moved(face: Box, crop: Crop, scale: tuple[float, float]) -> Box:
    x0, y0 = crop.box[:2]
    moved = (face[0] - x0) * scale[0], (face[1] - y0) * scale[1], (face[2] - x0) * scale[0], (face[3] - y0) * scale[1]
    return tuple(round(side, 1) for side in moved)  # type: ignore[return-value]


def _plain(name: str) -> str:
    """A file's name of a picture's, without what a file system or a shell minds."""
    return re.sub(r"[^A-Za-z0-9]+", "-", Path(name).stem).strip("-").lower()[:_NAME_CHARACTERS] or "picture"
