"""Every face of a picture, and what was asked about each: stock insightface, a second recogniser that only judges, and a parser.

Runs on onnxruntime alone; no torch is imported here. Knows no identity method: what these read of a face stands in contracts.Face.
Faces are worked on one by one, so that nobody's numbers depend on who else is in the picture or the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from insightface.app import FaceAnalysis
from insightface.app.common import Face as DetectedFace
from insightface.model_zoo import get_model
from insightface.utils import face_align

from deployments.contracts import RGB, Face, Floats, Need, Person, PersonPictures, PictureFaces
from deployments.errors import DamagedWeights, InvalidImage, InvalidRequest, MissingWeights
from deployments.faces.alignment import ffhq_crop, reduced, usable
from deployments.faces.choice import Reference, alone, choose, side_lengths
from deployments.faces.comparison import Likeness, likenesses
from deployments.faces.parsing import FaceParser
from deployments.images import DEFAULT_LIMITS, Limits, decode, pixels_of
from deployments.sessions import UNREADABLE, Provider, require, require_file, session_arguments

_TASKS = ("detection", "recognition", "genderage")
_SCORE_FROM = 0.5  # FaceAnalysis.prepare's own default
_SMALLEST_FACE_PX = 60.0
"""Below, a recogniser's crop of 112 px is more than half invented. Published references are taken from faces of hundreds."""
_TOGETHER = 8
"""The references of a request may have as many pixels as this many pictures of the largest size: 1.2 GB by default."""
# insightface's numbers of devices: its CPU is -1.
_DEVICES: dict[Provider, int] = {"cpu": -1, "cuda": 0}


class FaceAnalyser:
    """The face models of one folder. Safe to call from several threads: it holds no state of a call."""

    def __init__(
        self,
        models: Path,
        judge: Path,
        parser: Path,
        *,
        det_size: tuple[int, int] = (640, 640),
        provider: Provider = "cpu",
        threads: int = 1,
        smallest_px: float = _SMALLEST_FACE_PX,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """models: a folder that FaceAnalysis opens; judge: an ArcFace ONNX file; parser: see FaceParser. det_size: width, height in
        pixels, multiples of 32, to which a picture is fitted before faces are searched. threads: of one run, 0 is one a core.
        smallest_px: shorter side of the box of a reference's face. limits: of the pictures.

        Raises MissingWeights, DamagedWeights, ProviderUnavailable.
        """
        if any(side < 32 or side % 32 for side in det_size):
            raise ValueError(f"det_size is {det_size}; the detector's strides need multiples of 32.")
        arguments = session_arguments(provider, threads)
        self._models = _opened(models, arguments, det_size, provider)
        self._judge = _judge(judge, arguments, provider)
        self._parser = FaceParser(parser, provider, threads)
        self._det_size, self._smallest_px, self._limits = det_size, smallest_px, limits

    @property
    def smallest_px(self) -> float:
        """Shorter side of the box of a reference's face, at least."""
        return self._smallest_px

    def analyse(self, pictures: Sequence[bytes], need: Sequence[Need] = ()) -> tuple[PictureFaces, ...]:
        """Every face of every picture, one item a picture. Raises InvalidImage, which names the picture."""
        return self.analyse_pixels([self._decoded(data, f"Picture {n}", {"picture": n}) for n, data in enumerate(pictures)], need)

    def analyse_pixels(self, pictures: Sequence[RGB], need: Sequence[Need] = ()) -> tuple[PictureFaces, ...]:
        """The same, of pictures that are open already."""
        return tuple(self._found(picture, need) for picture in pictures)

    def people(self, persons: Sequence[PersonPictures], need: Sequence[Need]) -> tuple[Person, ...]:
        """The chosen face in each reference picture of each person, completed; see choice.py for who is chosen, and for what of a
        picture of several people is handed on. Who is given twice (the same object) is the same Person twice.

        Raises InvalidRequest, InvalidImage, NoFaceDetected, MultipleFaces, FaceTooSmall, naming person and picture.
        """
        self._refuse_too_many_pixels(persons)
        known: dict[int, Person] = {}
        for number, pictures in enumerate(persons):
            if id(pictures) not in known:
                known[id(pictures)] = self._person(pictures, number, len(persons), need)
        return tuple(known[id(pictures)] for pictures in persons)

    def scores(self, pictures: Sequence[RGB], persons: Sequence[Person]) -> tuple[tuple[Likeness, ...], ...]:
        """For each drawn picture each person's likeness. The persons' faces need `judge`."""
        return tuple(likenesses(found, persons) for found in self.analyse_pixels(pictures, ("judge",)))

    def _person(self, given: PersonPictures, number: int, people: int, need: Sequence[Need]) -> Person:
        if not given.pictures:
            raise InvalidRequest(f"Person {number} has no reference picture.", "Send at least one.", {"person": number})
        faces, pictures = [], []
        for index, data in enumerate(given.pictures):
            reference = Reference(person=number, people=people, picture=index)
            picture = self._decoded(data, str(reference), reference.details)
            found = self._found(picture)
            place = choose(found, given.face_index, self._smallest_px, reference)
            shown, face = alone(picture, found, place, self._completed(picture, found.faces[place], need))
            faces.append(face)
            pictures.append(shown)
        return Person(tuple(faces), tuple(pictures))

    def _refuse_too_many_pixels(self, persons: Sequence[PersonPictures]) -> None:
        """Before the first is unpacked: all of them stay in memory until they are encoded, and a small file may hold many pixels."""
        distinct = {id(person): person for person in persons}.values()
        pixels = sum(pixels_of(data, self._limits) for person in distinct for data in person.pictures)
        allowed = _TOGETHER * self._limits.pixels
        if pixels > allowed:
            raise InvalidImage(
                f"The reference pictures have {pixels} pixels together; {allowed} are allowed.", "Send fewer pictures, or smaller ones."
            )

    def _decoded(self, data: bytes, name: str, details: dict[str, object]) -> RGB:
        try:
            return decode(data, self._limits)
        except InvalidImage as error:
            raise InvalidImage(f"{name}: {error.message}", error.remedy, details) from error

    def _found(self, picture: RGB, need: Sequence[Need] = ()) -> PictureFaces:
        faces = sorted(self._detected(picture), key=lambda face: (-float(np.prod(side_lengths(face))), float(face.box[0])))
        height, width = picture.shape[:2]
        return PictureFaces((width, height), tuple(self._completed(picture, face, need) for face in faces))

    def _detected(self, picture: RGB) -> list[Face]:
        height, width = picture.shape[:2]
        fit = min(self._det_size[0] / width, self._det_size[1] / height)
        if fit * min(width, height) < 1:  # a line, of which the detector would be shown nothing
            return []
        boxes, points = self._models["detection"].detect(_bgr(picture))
        pairs = [(np.asarray(box, np.float32), np.asarray(spots, np.float32)) for box, spots in zip(boxes, points, strict=True)]
        return [Face(box=box[:4], score=float(box[4]), landmarks=spots) for box, spots in pairs if usable(spots)]

    def _completed(self, picture: RGB, face: Face, need: Sequence[Need]) -> Face:
        """The face with what was asked for; each part from the same five points."""
        if not need:
            return face
        near, spots = reduced(picture, face.landmarks)
        if "embedding" in need:
            face = replace(face, embedding=_embedding(self._models["recognition"], near, spots))
        if "judge" in need:
            raw = _embedding(self._judge, near, spots)
            face = replace(face, judge_embedding=raw / np.linalg.norm(raw))
        if "attributes" in need:
            age, sex = self._attributes(picture, face)
            face = replace(face, age=age, sex=sex)
        if "aligned" in need:
            crop = ffhq_crop(near, spots)
            face = replace(face, aligned=crop, labels=self._parser.labels(crop))
        return face

    def _attributes(self, picture: RGB, face: Face) -> tuple[int, Literal["F", "M"]]:
        if "genderage" not in self._models:
            raise MissingWeights("These face models tell neither age nor sex.", "Add a genderage model, or do not ask for attributes.")
        male, age = self._models["genderage"].get(_bgr(picture), DetectedFace(bbox=face.box, kps=face.landmarks))
        return int(age), "M" if male else "F"


def _opened(folder: Path, arguments: dict[str, Any], det_size: tuple[int, int], provider: Provider) -> dict[str, Any]:
    """insightface's models by task. An absolute path that exists: it would look for another in its own home, and on the network."""
    if not folder.is_dir():
        raise MissingWeights(f"The folder of face models {folder} is not there.", "Fetch it, or correct the catalogue's entry.")
    path = str(folder.resolve())
    try:
        analysis = FaceAnalysis(name=path, root=path, allowed_modules=list(_TASKS), **arguments)
    except AssertionError as error:  # how insightface says that it found no detector
        raise MissingWeights(
            f"{folder} holds no face detector.", "It must hold the ONNX files themselves, not a folder of them."
        ) from error
    except UNREADABLE as error:
        raise DamagedWeights(f"A face model in {folder} cannot be opened: {error}") from error
    analysis.prepare(ctx_id=_DEVICES[provider], det_thresh=_SCORE_FROM, det_size=det_size)
    if "recognition" not in analysis.models:
        raise MissingWeights(f"{folder} holds no face recogniser.", "It must hold the ONNX files themselves, not a folder of them.")
    for task, model in analysis.models.items():
        require(provider, model.session, f"The {task} model of {folder}")
    return dict(analysis.models)


def _judge(path: Path, arguments: dict[str, Any], provider: Provider) -> Any:
    require_file(path)
    try:
        model = get_model(str(path.resolve()), **arguments)
    except UNREADABLE as error:
        raise DamagedWeights(f"The judge {path} cannot be opened: {error}") from error
    if getattr(model, "taskname", None) != "recognition":
        raise DamagedWeights(f"The judge {path} is no face recogniser.", "Use an ArcFace ONNX file.")
    require(provider, model.session, f"The judge {path}")
    return model


def _embedding(recogniser: Any, picture: RGB, landmarks: Floats) -> Floats:
    """[512], raw: as the recogniser gives it, of its own crop."""
    crop = face_align.norm_crop(_bgr(picture), landmarks, recogniser.input_size[0])
    return np.asarray(recogniser.get_feat([crop])[0], np.float32)


def _bgr(picture: RGB) -> RGB:
    """insightface reads OpenCV's order."""
    return np.ascontiguousarray(picture[..., ::-1])
