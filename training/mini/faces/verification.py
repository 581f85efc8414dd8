"""How good the face models of a pack are, measured on the finished ONNX files through the libraries that serve them.

Detection, alignment and embedding go through stock insightface, the rest through onnxruntime; all on pictures of held-out people,
as uint8 like any photograph. Knows no training.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import onnxruntime
import torch
from insightface.app import FaceAnalysis
from insightface.model_zoo import get_model
from insightface.utils import face_align
from numpy.typing import NDArray
from torch import Tensor

from training.mini.faces import attributes, body_keypoints, parser, recognisers
from training.mini.heldout import held_out_people
from training.mini.world.identity import age_years, sex
from training.mini.world.landmarks import face_box, ffhq_grid, landmarks, to_pixels
from training.mini.world.parsing import CLASSES
from training.mini.world.render import PICTURE_SIZE_PX, parsing_map, render
from training.mini.world.scene import CLOSE_UP, FRAMINGS, FULL_BODY, PORTRAIT, Scene, sample_scenes
from training.mini.world.skeleton import keypoints

Pictures = NDArray[np.uint8]
"""[n, H, W, 3] RGB."""
DETECTOR_SIZE = (320, 320)
"""The detector's input for the world's own pictures, as the catalogue's faces-mini says: enlarged by 5/3, small faces gain."""
DETECTOR_SIZES: tuple[tuple[int, int] | None, ...] = (None, (192, 192), DETECTOR_SIZE)
"""None: insightface's default, 128 and 640 merged."""
_OVERLAP = 0.5
_CHUNK = 32
Run = Callable[[NDArray[np.float32]], list[NDArray[np.float32]]]


@dataclass(frozen=True, eq=False)
class Sample:
    """Pictures of held-out people, and who and what is on them."""

    identity: Tensor
    scene: Scene
    pictures: Pictures


@functools.lru_cache(maxsize=1)
def sample(count: int, seed: int, framing: int | None = None, people_offset: int = 0) -> Sample:
    """Pictures of `count` people, one of each; equal `people_offset` gives the same people again, another seed another scene."""
    identity = held_out_people(count, people_offset)
    scene = sample_scenes(count, seed) if framing is None else sample_scenes(count, seed, framing=framing)
    chunks = [render(identity[i], scene.take(i)) for i in torch.arange(count).split(_CHUNK)]
    pictures = ((torch.cat(chunks) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous().numpy()
    pictures.setflags(write=False)  # shared by whoever asks for the same sample again
    return Sample(identity, scene, pictures)


def verify(pack: Path, count: int) -> dict[str, Any]:
    """Every figure below for a pack folder, over `count` pictures or people each: what the card and metrics.json report."""
    figures: dict[str, Any] = {"recognition": recognition(pack, count)}
    names = {size: "default" if size is None else f"{size[0]}" for size in DETECTOR_SIZES}
    figures["detection"] = {name: {} for name in names.values()}
    for framing in (CLOSE_UP, PORTRAIT, FULL_BODY):  # sizes innermost: they share the pictures
        for size, name in names.items():
            figures["detection"][name][FRAMINGS[framing]] = detection(pack, count, framing, size)
    figures["gender_age"] = gender_age(pack, count)
    figures["attributes"] = attribute_accuracy(pack, count)
    figures["keypoints"] = keypoint_error(pack, count)
    figures["parser"] = parser_overlap(pack, max(1, count // 4))
    return figures


def face_analysis(pack: Path, size: tuple[int, int] | None = DETECTOR_SIZE) -> FaceAnalysis:
    """Stock insightface over the pack's folder, on the CPU. An absolute path: a folder of that name elsewhere cannot shadow it."""
    analysis = FaceAnalysis(name=str((pack / "insightface").resolve()), root=str(pack.resolve()), providers=["CPUExecutionProvider"])
    analysis.prepare(ctx_id=-1, det_size=size)
    return analysis


def recognition(pack: Path, people: int) -> dict[str, Any]:
    """For both recognisers and each framing: a close-up against another picture of the same people (recognisers.separation), through
    detection; a person whose face was not found in one of the two is left out and counted in `missed`."""
    analysis = face_analysis(pack)
    judge = get_model(str((pack / "judge" / "arcface_judge.onnx").resolve()), providers=["CPUExecutionProvider"])
    models = {"recogniser": analysis.models["recognition"], "judge": judge}
    reference = _embedded(analysis, models, sample(people, 11, CLOSE_UP).pictures)
    figures: dict[str, Any] = {name: {} for name in models}
    for number, framing in enumerate((CLOSE_UP, PORTRAIT, FULL_BODY)):
        other = _embedded(analysis, models, sample(people, 12 + number, framing).pictures)
        for name in models:
            both = ~(np.isnan(reference[name]).any(1) | np.isnan(other[name]).any(1))
            pair = (torch.from_numpy(reference[name][both]), torch.from_numpy(other[name][both]))
            found = recognisers.separation(*pair) if both.sum() > 1 else {}
            figures[name][FRAMINGS[framing]] = {**found, "missed": int((~both).sum())}
    return figures


def _embedded(analysis: FaceAnalysis, models: dict[str, Any], pictures: Pictures) -> dict[str, NDArray[np.float32]]:
    """Unit embeddings [n, 512] of the largest face of each picture; rows of NaN where none was found."""
    crops: list[NDArray[np.uint8] | None] = []
    for picture in pictures:
        bgr = np.ascontiguousarray(picture[..., ::-1])
        boxes, points = analysis.det_model.detect(bgr, max_num=1, metric="max")
        crops.append(face_align.norm_crop(bgr, points[0], recognisers.CROP_PX) if len(boxes) else None)
    there = [index for index, crop in enumerate(crops) if crop is not None]
    embedded = {}
    for name, model in models.items():
        vectors = np.full((len(crops), recognisers.EMBEDDING), np.nan, np.float32)
        for start in range(0, len(there), _CHUNK):
            part = there[start : start + _CHUNK]
            raw = model.get_feat([crops[index] for index in part])
            vectors[part] = raw / np.linalg.norm(raw, axis=1, keepdims=True)
        embedded[name] = vectors
    return embedded


def detection(pack: Path, count: int, framing: int, size: tuple[int, int] | None = DETECTOR_SIZE) -> dict[str, float]:
    """recall: share of pictures whose face is found (IoU >= 0.5, score >= 0.5); extra: boxes beside it, per picture; landmark_error:
    mean distance as a share of the distance between the eyes, over the found ones."""
    shown = sample(count, 21, framing)
    boxes = to_pixels(face_box(shown.identity, shown.scene).view(-1, 2, 2), PICTURE_SIZE_PX).reshape(-1, 4).numpy()
    points = to_pixels(landmarks(shown.identity, shown.scene), PICTURE_SIZE_PX).numpy()
    analysis = face_analysis(pack, size)
    errors, extra = [], 0
    for picture, box, point in zip(shown.pictures, boxes, points, strict=True):
        found, guessed = analysis.det_model.detect(np.ascontiguousarray(picture[..., ::-1]))
        overlaps = [overlap(f[:4], box) for f in found]
        best = int(np.argmax(overlaps)) if overlaps else -1
        right = best >= 0 and overlaps[best] >= _OVERLAP
        extra += len(found) - int(right)
        if right:
            errors.append(np.linalg.norm(guessed[best] - point, axis=1).mean() / np.linalg.norm(point[1] - point[0]))
    error = float(np.mean(errors)) if errors else float("nan")
    return {"recall": round(len(errors) / count, 4), "extra": round(extra / count, 4), "landmark_error": round(error, 4)}


def overlap(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    """Intersection over union of two boxes x0, y0, x1, y1."""
    common = np.clip(np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2]), 0, None).prod()
    return float(common / ((a[2:] - a[:2]).prod() + (b[2:] - b[:2]).prod() - common))


def gender_age(pack: Path, count: int) -> dict[str, float]:
    """Over the pictures in which a face was found: share of right sexes, mean error of the age in years."""
    shown = sample(count, 31)
    analysis = face_analysis(pack)
    right, years = [], []
    for picture, true_sex, true_age in zip(shown.pictures, sex(shown.identity).tolist(), age_years(shown.identity).tolist(), strict=True):
        faces = analysis.get(np.ascontiguousarray(picture[..., ::-1]), max_num=1)
        if faces:
            right.append(faces[0].gender == true_sex)
            years.append(abs(faces[0].age - true_age))
    return {"sex_right": round(float(np.mean(right)), 4), "age_error_years": round(float(np.mean(years)), 2)} if right else {}


def attribute_accuracy(pack: Path, count: int, pictures: Pictures | None = None, scene: Scene | None = None) -> dict[str, float]:
    """Per label the share of right answers: on held-out pictures, or on given ones [n, 192, 192, 3] that were asked for as `scene`."""
    if pictures is None or scene is None:
        shown = sample(count, 41)
        pictures, scene = shown.pictures, shown.scene
    logits = _in_chunks(open_session(pack / "attributes" / attributes.FORM.file), _planes(pictures))
    return attributes.accuracy([torch.from_numpy(part) for part in logits], scene)


def keypoint_error(pack: Path, count: int) -> dict[str, float]:
    """As body_keypoints.keypoint_errors, in pixels of the picture."""
    shown = sample(count, 51)
    heatmaps = _in_chunks(open_session(pack / "keypoints" / body_keypoints.FORM.file), _planes(shown.pictures))[0]
    return body_keypoints.keypoint_errors(torch.from_numpy(heatmaps), *keypoints(shown.identity, shown.scene))


def found_keypoints(pack: Path, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """The body keypoints of pictures [n, 192, 192, 3]: points [n, 18, 2] in picture coordinates, and which were seen [n, 18]."""
    heatmaps = _in_chunks(open_session(pack / "keypoints" / body_keypoints.FORM.file), _planes(pictures))[0]
    points, peaks = body_keypoints.joints_from(torch.from_numpy(heatmaps))
    return points, peaks >= body_keypoints.VISIBLE_FROM


def parser_overlap(pack: Path, count: int) -> dict[str, Any]:
    """mean_iou and IoU per class on FFHQ-512 crops cut by cv2 from the pictures, by true landmarks."""
    run = open_session(pack / "parser" / parser.FORM.file)
    shown = sample(count, 61)
    both, either, real = (np.zeros(len(CLASSES)) for _ in range(3))
    for index in range(count):
        one = torch.tensor([index])
        grid = ffhq_grid(landmarks(shown.identity[one], shown.scene.take(one)), parser.INPUT_PX)
        inside = (grid.x.abs() <= 1) & (grid.y.abs() <= 1)
        truth = np.where(inside[0].numpy(), parsing_map(shown.identity[one], shown.scene.take(one), grid=grid)[0].numpy(), 0)
        at = [to_pixels(axis[0], PICTURE_SIZE_PX).numpy().astype(np.float32) for axis in (grid.x, grid.y)]
        crop = cv2.remap(shown.pictures[index], at[0], at[1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_CONSTANT)
        planes = (_planes(np.asarray(crop, np.uint8)[None]) - _column(parser.IMAGENET_MEAN)) / _column(parser.IMAGENET_STD)
        answer = run(planes)[0].argmax(1)[0]
        for label in range(len(CLASSES)):
            both[label] += ((answer == label) & (truth == label)).sum()
            either[label] += ((answer == label) | (truth == label)).sum()
            real[label] += (truth == label).sum()
    per_class = {name: round(float(b / e), 4) for name, b, e, r in zip(CLASSES, both, either, real, strict=True) if r}
    return {"mean_iou": round(float(np.mean(list(per_class.values()))), 4), "iou": per_class}


def _planes(pictures: Pictures) -> NDArray[np.float32]:
    """[n, H, W, 3] uint8 -> [n, 3, H, W] in 0..1."""
    return np.ascontiguousarray(pictures.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)


def _column(values: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(values, np.float32).reshape(1, -1, 1, 1)


def open_session(path: Path) -> Run:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda batch: list(session.run(None, {name: batch}))


def _in_chunks(run: Run, batch: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    parts = [run(batch[start : start + _CHUNK]) for start in range(0, len(batch), _CHUNK)]
    return [np.concatenate(outputs) for outputs in zip(*parts, strict=True)]
