"""Who the subject is, and which pictures show them well enough to be trained on. Works on what was measured; opens no picture.

Who is one person is decided by the recogniser that conditions pictures; every cosine shown is the judge's, which decides nothing, so that
it may judge what was trained. A face that cannot be compared (too small, hardly detected, turned away) is not another person's for that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from deployments.contracts import Floats
from deployments.curation import grouped
from deployments.errors import InvalidRequest, MultipleFaces, NoFaceDetected
from training.dataset.crop import plan
from training.dataset.duplicates import likeness
from training.dataset.settings import CurationSettings
from training.dataset.values import Crop, FaceFacts, PictureAnalysis, Reason, State, Verdict, vectors

_REMEDY: Final = "Name the person with one picture of them alone (--reference), or add pictures in which only they are sharp and close."


@dataclass(frozen=True, eq=False)
class Subject:
    """centroid: [512], length 1, of the conditioning recogniser. rivals: [n, 512], other people who are in two pictures or more.
    members: (picture, face) of what the centroid was made of. judge: [512], the sum of their judge embeddings."""

    centroid: Floats
    rivals: Floats
    members: frozenset[tuple[int, int]]
    judge: Floats


def state(face: FaceFacts, settings: CurationSettings, smallest_px: float) -> State:
    """Whether a face can be compared."""
    if face.size < smallest_px:
        return "too_small"
    if face.score < settings.surest_score:
        return "low_det"
    return "extreme_pose" if abs(face.yaw) > settings.turned_degrees else "scorable"


def subject_of(
    pictures: Sequence[PictureAnalysis], settings: CurationSettings, smallest_px: float, reference: PictureAnalysis | None = None
) -> Subject:
    """Whoever is in most pictures, or whom the reference shows: it must show one face.

    Raises NoFaceDetected, MultipleFaces, and InvalidRequest where two people are in as many pictures, or everybody in one.
    """
    readable = [
        (number, place)
        for number, picture in enumerate(pictures)
        for place, face in enumerate(picture.faces)
        if state(face, settings, smallest_px) == "scorable" and face.sharpness >= settings.blurred
    ]
    given = [] if reference is None else [_reference_face(reference)]
    faces = [*given, *(pictures[number].faces[place] for number, place in readable)]
    if not faces:
        raise NoFaceDetected("No picture shows a face that can be compared.", "Add pictures in which the face is sharp and large.")
    places = [*((-1, 0) for _ in given), *readable]
    groups = [[places[row] for row in group] for group in grouped(vectors([face.embedding for face in faces]), settings.same_person)]
    chosen = next(group for group in groups if (-1, 0) in group) if given else _largest(groups, len(pictures))
    return _subject(pictures, given, chosen, [group for group in groups if group is not chosen])


def select(
    names: Sequence[str], pictures: Sequence[PictureAnalysis], subject: Subject, settings: CurationSettings, smallest_px: float
) -> tuple[Verdict, ...]:
    """One verdict a picture. Reasons are looked for in this order: corrupt, no_face, face_too_small and blurred where nobody in the picture
    can be read, not_the_subject, face_too_small, several_faces, too_distant, blurred, near_duplicate."""
    verdicts = [_verdict(number, picture, subject, settings, smallest_px) for number, picture in enumerate(pictures)]
    for number, best in _duplicates(pictures, verdicts, settings.duplicate).items():
        verdicts[number] = verdicts[number].model_copy(
            update={"reason": "near_duplicate", "duplicate_of": names[best], "crop": None, "says": f"The same picture as {names[best]}."}
        )
    return tuple(verdicts)


def _reference_face(reference: PictureAnalysis) -> FaceFacts:
    if reference.fault is not None:
        raise InvalidRequest(f"The reference picture cannot be opened: {reference.fault}", "Give another one.")
    if not reference.faces:
        raise NoFaceDetected("The reference picture shows no face.")
    if len(reference.faces) > 1:
        message = f"The reference picture shows {len(reference.faces)} faces."
        raise MultipleFaces(message, "Give a picture of the subject alone, or cut the others off.")
    return reference.faces[0]


def _largest(groups: Sequence[list[tuple[int, int]]], pictures: int) -> list[tuple[int, int]]:
    counts = sorted((len({number for number, _ in group}) for group in groups), reverse=True)
    if counts[0] == 1 and pictures > 1:
        message = f"Nobody is recognised in two of the {pictures} pictures, so it cannot be told who is meant."
        raise InvalidRequest(message, _REMEDY, {"people": len(groups)})
    if len(counts) > 1 and counts[0] == counts[1]:
        message = f"Two people are in {counts[0]} pictures each, so it cannot be told who is meant."
        raise InvalidRequest(message, _REMEDY, {"people": len(groups)})
    return max(groups, key=lambda group: len({number for number, _ in group}))


def _subject(
    pictures: Sequence[PictureAnalysis],
    given: Sequence[FaceFacts],
    chosen: Sequence[tuple[int, int]],
    others: Sequence[Sequence[tuple[int, int]]],
) -> Subject:
    members = frozenset(place for place in chosen if place[0] >= 0)
    mine = [*given, *(pictures[number].faces[place] for number, place in sorted(members))]
    people = [[pictures[number].faces[place].embedding for number, place in group] for group in others if len(group) > 1]
    centroid = _unit(vectors([face.embedding for face in mine]).mean(0))
    rivals = np.stack([_unit(vectors(group).mean(0)) for group in people]) if people else np.zeros((0, len(centroid)), np.float32)
    judge = np.asarray(vectors([face.judge_embedding for face in mine]).sum(0), np.float32)
    return Subject(centroid, rivals, members, judge)


def _verdict(number: int, picture: PictureAnalysis, subject: Subject, settings: CurationSettings, smallest_px: float) -> Verdict:
    if picture.fault is not None:
        return Verdict(reason="corrupt", says=picture.fault)
    if not picture.faces:
        return Verdict(reason="no_face", says="No face is found.")
    units = vectors([face.embedding for face in picture.faces])
    cosines = units @ subject.centroid
    own = cosines > (units @ subject.rivals.T).max(1, initial=-1.0)
    place = int(np.argmax(np.where(own, cosines, -2.0))) if own.any() else int(np.argmax(cosines))
    face = picture.faces[place]
    said = state(face, settings, smallest_px)
    bar = settings.turned_person if said in ("extreme_pose", "low_det") else settings.same_person
    if not own[place] or cosines[place] < bar:
        return _nobody_meant(number, picture, subject, settings, smallest_px)
    crop = plan(
        face.box, [other.box for n, other in enumerate(picture.faces) if n != place], (picture.width, picture.height), settings.aspect
    )
    reason, says = _fault(face, crop, settings, smallest_px)
    cosine = _judged(subject, face, (number, place))
    return Verdict(reason=reason, state=said, face=place, cosine=cosine, crop=None if reason else crop, says=says)


def _nobody_meant(number: int, picture: PictureAnalysis, subject: Subject, settings: CurationSettings, smallest_px: float) -> Verdict:
    """Nobody in the picture is the subject, as far as can be read: of faces that are too small or blurred it is not claimed."""
    place = 0  # the largest
    face = picture.faces[place]
    said = state(face, settings, smallest_px)
    reason: Reason = "face_too_small" if said == "too_small" else "blurred" if face.sharpness < settings.blurred else "not_the_subject"
    says = {
        "face_too_small": f"The largest face is {face.size:.0f} px wide; {smallest_px:.0f} are needed.",
        "blurred": f"The sharpness of the face is {face.sharpness:.0f}; {settings.blurred:.0f} is needed.",
        "not_the_subject": "Another person." if len(picture.faces) == 1 else f"{len(picture.faces)} people, none of them the subject.",
    }[reason]
    return Verdict(reason=reason, state=said, face=place, cosine=_judged(subject, face, (number, place)), says=says)


def _fault(face: FaceFacts, crop: Crop | None, settings: CurationSettings, smallest_px: float) -> tuple[Reason | None, str]:
    if face.size < smallest_px:
        return "face_too_small", f"The face is {face.size:.0f} px wide; {smallest_px:.0f} are needed."
    if crop is None:
        return "several_faces", "Another face is so close to the subject's that it cannot be cropped away."
    x0, y0, x1, y1 = crop.box
    share = face.size / min(x1 - x0, y1 - y0)
    if share < settings.distant_share and face.size < settings.distant_times * smallest_px:
        return "too_distant", f"The face is {face.size:.0f} px wide, {share:.1%} of the picture's shorter side."
    if face.sharpness < settings.blurred:
        return "blurred", f"The sharpness of the face is {face.sharpness:.0f}; {settings.blurred:.0f} is needed."
    kept = f"Cropped; {crop.left_out} other face{'s' if crop.left_out > 1 else ''} left out." if crop.left_out else ""
    return None, f"{kept} Heads that reach in count little in the loss.".strip() if crop.masked else kept


def _duplicates(pictures: Sequence[PictureAnalysis], verdicts: Sequence[Verdict], bar: float) -> Mapping[int, int]:
    """Of those that are accepted: place -> place of the better picture that is the same one."""
    faces = {n: pictures[n].faces[v.face] for n, v in enumerate(verdicts) if v.reason is None and v.face is not None}
    best_first = sorted(faces, key=lambda n: (-faces[n].quality, -pictures[n].width * pictures[n].height, n))
    kept: list[int] = []
    found: dict[int, int] = {}
    for number in best_first:
        same = next((other for other in kept if likeness(faces[number].look, faces[other].look) >= bar), None)
        if same is None:
            kept.append(number)
        else:
            found[number] = same
    return found


def _judged(subject: Subject, face: FaceFacts, place: tuple[int, int]) -> float | None:
    """Against the subject's other faces: with itself among them, every face would be like their mean."""
    own = vectors([face.judge_embedding])[0]
    rest = subject.judge - own if place in subject.members else subject.judge
    return round(float(own @ _unit(rest)), 4) if np.linalg.norm(rest) > 1e-3 else None


def _unit(vector: Floats) -> Floats:
    return np.asarray(vector / max(float(np.linalg.norm(vector)), 1e-6), np.float32)
