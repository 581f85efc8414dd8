"""FaceServer: reference pictures in, faces out, and the likeness of what was drawn. onnxruntime only; no torch in this process.

A thin Ray server: what is done with a picture is deployments/faces/. Its methods are synchronous, so that Serve runs them in
`max_ongoing_requests` threads.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.catalog import license_policy, load_catalog, refuse_licence
from deployments.contracts import RGB, Need, People, PersonPictures, PictureFaces
from deployments.images import DEFAULT_LIMITS, Limits

if TYPE_CHECKING:
    from deployments.faces.comparison import Likeness


class FaceSettings(BaseModel):
    """faces, judge, parser: ids of the catalogue. provider: of onnxruntime; checked on the session. threads: of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    faces: str
    judge: str
    parser: str
    provider: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)


class FaceServer:
    def __init__(self, settings: FaceSettings, limits: Limits = DEFAULT_LIMITS) -> None:
        """limits: of the pictures that are opened here."""
        from deployments.faces.analysis import FaceAnalyser

        catalog = load_catalog()
        entries = [catalog.entry(name) for name in (settings.faces, settings.judge, settings.parser)]
        for entry in entries:
            refuse_licence(entry, license_policy())
        faces, judge, parser = entries
        options: dict[str, Any] = dict(faces.options)
        self._analyser = FaceAnalyser(
            faces.located("models"),
            judge.located("model"),
            parser.located("model"),
            det_size=tuple(options["det_size"]),
            provider=settings.provider,
            threads=settings.threads,
            limits=limits,
            **({"smallest_px": float(options["smallest_px"])} if "smallest_px" in options else {}),
        )

    def analyze(self, pictures: Sequence[bytes], need: Sequence[Need] = ()) -> tuple[PictureFaces, ...]:
        """Every face of every picture; see FaceAnalyser.analyse."""
        return self._analyser.analyse(pictures, need)

    def people(self, persons: Sequence[PersonPictures], need: Sequence[Need]) -> People:
        """The chosen face of each reference; see FaceAnalyser.people."""
        started = time.perf_counter()
        found = self._analyser.people(persons, need)
        return People(found, {"faces": time.perf_counter() - started})

    def scores(self, picture: RGB, people: People) -> tuple[Likeness, ...]:
        """Each person's likeness in a drawn picture."""
        return self._analyser.scores([picture], people.persons)[0]

    def ready(self) -> bool:
        return True
