"""ControlServer: pictures and poses in, what a drawing is led by out, in its size. onnxruntime and OpenCV only; no torch in this process.

A thin Ray server: what is done with a source is deployments/controls/. Its methods are synchronous, so that Serve runs them in
`max_ongoing_requests` threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.catalog import load_catalog
from deployments.contracts import ControlSource, Guides
from deployments.images import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from deployments.controls.pose_detector import PoseDetector


class ControlSettings(BaseModel):
    """keypoints: id of the catalogue, what finds people in pose pictures; None: such pictures are refused, drawn skeletons and named poses
    are not. provider: of onnxruntime; checked on the session. threads: of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keypoints: str | None = None
    provider: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)


class ControlServer:
    def __init__(self, settings: ControlSettings, limits: Limits = DEFAULT_LIMITS) -> None:
        """limits: of the pictures that are opened here."""
        from deployments.controls.pose_bank import load_pose_bank
        from deployments.controls.preparing import ConditionMaker

        self._maker = ConditionMaker(load_pose_bank(), _detector(settings), limits)

    def prepare(self, sources: Sequence[ControlSource], begin: bytes | None, width: int, height: int) -> Guides:
        """One condition for each source, in their order, and the picture to begin from, all of width x height pixels.

        begin: encoded bytes. Raises what ConditionMaker raises; nothing is handed on then.
        """
        started = time.perf_counter()
        conditions = tuple(self._maker.condition(source, width, height) for source in sources)
        beginning = None if begin is None else self._maker.beginning(begin, width, height)
        return Guides(conditions, beginning, {"controls": time.perf_counter() - started})

    def ready(self) -> bool:
        return True


def _detector(settings: ControlSettings) -> PoseDetector | None:
    """What the entry names, with each of its networks opened and given by its name. Raises LicenseRefused before one is opened."""
    if settings.keypoints is None:
        return None
    from deployments.sessions import open_session

    catalog = load_catalog()
    entry = catalog.entry(settings.keypoints)
    kind: Any = catalog.resolve(entry)
    networks = {name: open_session(entry.located(name), settings.provider, settings.threads) for name in entry.weights}
    detector: PoseDetector = kind(**networks)
    return detector
