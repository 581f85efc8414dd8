"""The pose bank: named poses for each framing, configs/poses/<name>.yaml, so that a request can have a pose without a picture of one.

A pose is drawn for a figure: `human` has a person's proportions, `character-world` those of the embedded pack's people, whose heads are a
third of them; a ControlNet obeys the proportions that it was trained on. A file holds the joints themselves, or another pose and the
edits that make this one of it. Knows no request, no prompt and no model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, Self

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.catalog import CATALOG_PATH
from deployments.controls.framing import Framing
from deployments.controls.skeleton import JOINTS, Side, Skeleton, arm_at, cropped, head_room, mirrored
from deployments.errors import InvalidCatalog, InvalidRequest

POSES_PATH = CATALOG_PATH.parent / "poses"
AUTO = "auto"
"""The name that asks for the framing's own pose."""

_SHOWN = 80

Figure = Literal["human", "character-world"]
Point = tuple[float, float]
Share = Annotated[float, Field(ge=0, lt=1)]
# Far enough outside of a picture, and no number beyond which arithmetic fails.
Coordinate = Annotated[float, Field(ge=-10, le=10)]
_NARROWEST = 0.01


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Joints(_Record):
    """aspect: width / height of the picture. joints: by the names of skeleton.JOINTS, x and y in 0..1 of it; one that is left out is
    nowhere, one beyond the picture is not drawn, and may come in by an edit."""

    aspect: float = Field(gt=0)
    joints: dict[str, Point]

    @model_validator(mode="after")
    def _names(self) -> Self:
        unknown = sorted(self.joints.keys() - set(JOINTS))
        if unknown:
            raise ValueError(f"no such joint: {', '.join(unknown)}")
        return self

    def skeleton(self) -> Skeleton:
        nowhere = (float("nan"), float("nan"))
        return Skeleton(np.array([self.joints.get(name, nowhere) for name in JOINTS], np.float32), self.aspect)


class ArmEdit(_Record):
    """As skeleton.arm_at: degrees from hanging, outwards."""

    arm: Side
    angle: float = Field(ge=-360, le=360)
    bend: float | None = Field(None, ge=-360, le=360)
    reach: float = Field(1.0, gt=0, le=10)

    def of(self, skeleton: Skeleton) -> Skeleton:
        return arm_at(skeleton, self.arm, self.angle, self.bend, self.reach)


class HeadRoomEdit(_Record):
    """As skeleton.head_room: a share of the picture's height."""

    head_room: Share

    def of(self, skeleton: Skeleton) -> Skeleton:
        return head_room(skeleton, self.head_room)


class CropEdit(_Record):
    """As skeleton.cropped: left, top, right, bottom in 0..1 of the picture."""

    crop: tuple[Coordinate, Coordinate, Coordinate, Coordinate]

    def of(self, skeleton: Skeleton) -> Skeleton:
        x0, y0, x1, y1 = self.crop
        if min(x1 - x0, y1 - y0) < _NARROWEST:
            raise InvalidRequest(
                f"The rectangle {list(self.crop)} has no inside.", f"Give left, top, right and bottom, at least {_NARROWEST} apart."
            )
        return cropped(skeleton, x0, y0, x1, y1)


class MoveEdit(_Record):
    """Joints shifted by so much of the picture's width and height."""

    move: dict[str, tuple[Coordinate, Coordinate]]

    def of(self, skeleton: Skeleton) -> Skeleton:
        return skeleton.shifted(self.move)


class MirrorEdit(_Record):
    """As skeleton.mirrored."""

    mirror: Literal[True]

    def of(self, skeleton: Skeleton) -> Skeleton:
        return mirrored(skeleton)


Edit = ArmEdit | HeadRoomEdit | CropEdit | MoveEdit | MirrorEdit
_EDITS: Mapping[str, type[Edit]] = {"arm": ArmEdit, "head_room": HeadRoomEdit, "crop": CropEdit, "move": MoveEdit, "mirror": MirrorEdit}


def edit_of(text: str) -> Edit:
    """The edit that a JSON object says in the words of the pose files: `{"arm": "left", "angle": 160}`, `{"head_room": 0.18}`.

    Raises InvalidRequest, which names what is wrong with it.
    """
    try:
        fields = json.loads(text)
        (kind,) = [kind for word, kind in _EDITS.items() if word in fields]
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or kind.__name__
        raise InvalidRequest(f"The edit {text[:_SHOWN]} of a pose: {place}: {first['msg']}.") from error
    except (ValueError, TypeError) as error:
        raise InvalidRequest(
            f"{text[:_SHOWN]!r} is no edit of a pose.", f"Give an object with one of {', '.join(_EDITS)}, as the pose files have them."
        ) from error


class Pose(_Record):
    """One file. default: it is what `auto` takes for its framing. Either figures, or like (another pose's name) and edits, by figure."""

    description: str
    framing: Framing
    default: bool = False
    figures: dict[Figure, Joints] = Field(default_factory=dict)
    like: str | None = None
    edits: dict[Figure, tuple[Edit, ...]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _either(self) -> Self:
        if bool(self.figures) == (self.like is not None) or (self.edits and self.like is None):
            raise ValueError("a pose has either `figures`, or `like` and `edits`")
        return self


class PoseBank:
    """Every pose of a folder. Immutable: an edited skeleton is the caller's own."""

    def __init__(self, poses: Mapping[str, Pose]) -> None:
        """Raises InvalidCatalog: a framing without exactly one default, `like` of what is not there or leads back to itself, edits that
        the joints don't allow."""
        self.poses = dict(poses)
        self._skeletons = {name: self._made(name, ()) for name in self.poses}
        defaults: dict[str, list[str]] = {framing: [] for framing in ("headshot", "half", "full")}
        for name, pose in self.poses.items():
            if pose.default:
                defaults[pose.framing].append(name)
        wrong = [f"{framing}: {', '.join(names) or 'none'}" for framing, names in defaults.items() if len(names) != 1]
        if wrong:
            raise InvalidCatalog(f"Each framing has one default pose, but there are for {'; '.join(wrong)}.", "Set `default: true` in one.")
        self._defaults = {framing: names[0] for framing, names in defaults.items()}

    def names(self, framing: Framing | None = None) -> tuple[str, ...]:
        """Sorted; of one framing, or all."""
        return tuple(sorted(name for name, pose in self.poses.items() if framing in (None, pose.framing)))

    def choose(self, framing: Framing | None, name: str | None = None) -> str:
        """The pose that is meant: the named one, whatever the framing; for None or "auto" the framing's default.

        Raises InvalidRequest for a name that is not there, and where nothing says which framing is meant.
        """
        if name is not None and name != AUTO:
            if name not in self.poses:
                close = get_close_matches(name, self.poses, n=1)
                meant = f" Did you mean {close[0]}?" if close else ""
                raise InvalidRequest(f"There is no pose {name!r}.{meant}", f"Use one of: {', '.join(self.names())}.")
            return name
        if framing is None:
            raise InvalidRequest(
                "A pose is to be chosen by the framing, and the prompt names none.",
                f'Say "headshot", "portrait" or "full body" in the prompt, or name a pose: {", ".join(self.names())}.',
            )
        return self._defaults[framing]

    def skeleton(self, name: str, figure: Figure = "human") -> Skeleton:
        """Raises InvalidRequest if the pose is not there, or not for this figure."""
        skeletons = self._skeletons[self.choose(None, name)]
        if figure not in skeletons:
            raise InvalidRequest(f"The pose {name} is not drawn for the figure {figure}.", f"It is for {', '.join(skeletons)}.")
        return skeletons[figure]

    def _made(self, name: str, above: tuple[str, ...]) -> dict[Figure, Skeleton]:
        """The pose for every figure that it has. above: the poses that are made of this one."""
        pose = self.poses[name]
        if pose.like is None:
            return {figure: joints.skeleton() for figure, joints in pose.figures.items()}
        if pose.like not in self.poses or pose.like in (*above, name):
            raise InvalidCatalog(f"The pose {name} is to be like {pose.like}, which is not there or is itself made of {name}.")
        made = self._made(pose.like, (*above, name))
        if not pose.edits.keys() <= made.keys():
            raise InvalidCatalog(
                f"The pose {name} edits figures that {pose.like} does not have: {', '.join(pose.edits.keys() - made.keys())}."
            )
        return {figure: _edited(skeleton, pose.edits.get(figure, ()), name) for figure, skeleton in made.items()}


def load_pose_bank(folder: Path = POSES_PATH) -> PoseBank:
    """Every *.yaml of the folder, a pose by its file's name. Raises InvalidCatalog, which names the file and the field."""
    return PoseBank({path.stem: _read(path) for path in sorted(folder.glob("*.yaml"))})


def _read(path: Path) -> Pose:
    try:
        return Pose.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise InvalidCatalog(f"{path} cannot be read: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "the whole"
        raise InvalidCatalog(f"{path}, {place}: {first['msg']}.") from error


def _edited(skeleton: Skeleton, edits: tuple[Edit, ...], name: str) -> Skeleton:
    for edit in edits:
        try:
            skeleton = edit.of(skeleton)
        except InvalidRequest as error:
            raise InvalidCatalog(f"The pose {name}: {error.message}") from error
    return skeleton
