"""From what a request gives for a control (a picture, a finished condition, a pose by name) to the picture that a ControlNet is shown.

Everything comes out in the size that is drawn. Knows no ControlNet, no server and no prompt: which pose `auto` means, and whose figure is
drawn, is settled before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, cast

from deployments.contracts import RGB, ControlSource
from deployments.controls.conditions import condition
from deployments.controls.placing import covering, on_black, placed
from deployments.controls.pose_bank import Figure, PoseBank, edit_of
from deployments.controls.pose_detector import PoseDetector, people_of
from deployments.controls.skeleton import Skeleton
from deployments.controls.skeleton_picture import draw, is_drawn
from deployments.errors import InvalidRequest, MissingWeights
from deployments.images import DEFAULT_LIMITS, Limits, decode

POSE: Final = "pose"
"""The mode whose condition is a skeleton; all others are made of the pixels themselves."""
# A limb has two ends: of fewer joints there is nothing to draw.
_LEAST_JOINTS: Final = 2


class ConditionMaker:
    """Makes conditions. Holds nothing of a request: safe in several threads, as its detector is."""

    def __init__(self, bank: PoseBank, detector: PoseDetector | None, limits: Limits = DEFAULT_LIMITS) -> None:
        """detector: for pose pictures; None where none is installed. limits: of the pictures that are opened here."""
        self._bank, self._detector, self._limits = bank, detector, limits

    def condition(self, source: ControlSource, width: int, height: int) -> RGB:
        """RGB [height, width, 3]. A picture that is not of the size's shape is cut at its edges, a skeleton gets paper beside it.

        Raises InvalidRequest for a source that contradicts itself, an unknown mode, pose or edit; InvalidImage for bytes that are no
        picture, and a pose picture without a person; MissingWeights where the mode's own model is not installed.
        """
        _refuse_contradictions(source)
        if source.picture is not None:
            return self._of_picture(source, decode(source.picture, self._limits), width, height)
        # A figure that nobody has poses for is refused by the bank.
        skeleton = self._bank.skeleton(self._bank.choose(None, source.pose), cast(Figure, source.figure))
        return draw(_edited([skeleton], source.edits), width, height)

    def beginning(self, picture: bytes, width: int, height: int) -> RGB:
        """The picture that a drawing begins from: RGB [height, width, 3], cut at its edges where its shape is another."""
        return covering(decode(picture, self._limits), width, height)

    def _of_picture(self, source: ControlSource, picture: RGB, width: int, height: int) -> RGB:
        if source.mode != POSE:
            fitting = covering(picture, width, height)
            return fitting if source.prepared else condition(source.mode, fitting)
        if source.prepared or is_drawn(picture):
            if source.edits:
                raise InvalidRequest("A drawn skeleton cannot be edited.", "Send a picture of a person, or the name of a pose.")
            return on_black(picture, width, height)
        if self._detector is None:
            raise MissingWeights(
                "No pose detector is deployed, hence no skeleton can be made of a picture.", "Send a drawn skeleton, or the name of a pose."
            )
        people = _edited(people_of(self._detector, picture), source.edits)
        return draw(placed(people, width / height), width, height)


def _refuse_contradictions(source: ControlSource) -> None:
    if (source.picture is None) == (source.pose is None):
        raise InvalidRequest(f"The {source.mode} control is to have either a picture or a pose.", "Give exactly one of the two.")
    if source.mode != POSE and (source.pose is not None or source.edits):
        raise InvalidRequest(f"A {source.mode} control has no pose to name or to edit.", "Send a picture, or use the mode pose.")


def _edited(people: Sequence[Skeleton], edits: Sequence[str]) -> Sequence[Skeleton]:
    """Edits are said of one person: of several, nobody could tell whose arm is meant, and room above a head would shrink that one alone."""
    if not edits:
        return people
    if len(people) > 1:
        raise InvalidRequest(f"The pose picture shows {len(people)} people, and edits are for one.", "Send a picture of one person.")
    (skeleton,) = people
    for edit in edits:
        skeleton = edit_of(edit).of(skeleton)
    if skeleton.visible.sum() < _LEAST_JOINTS:
        raise InvalidRequest("The edits leave nothing of the pose inside the picture.", "Move or cut it less.")
    return (skeleton,)
