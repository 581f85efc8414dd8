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
from deployments.errors import InvalidImage, MissingWeights
from deployments.images import DEFAULT_LIMITS, Limits, decode
from deployments.store.character_values import PictureFacts

if TYPE_CHECKING:
    from deployments.curation import Curated
    from deployments.faces.analysis import FaceAnalyser
    from deployments.faces.comparison import Likeness


class FaceSettings(BaseModel):
    """faces, judge, parser: ids of the catalogue. provider: of onnxruntime; checked on the session. threads: of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    faces: str
    judge: str
    parser: str
    provider: Literal["cpu", "cuda"] = "cpu"
    threads: int = Field(default=1, ge=1)


def face_analyser(settings: FaceSettings, limits: Limits = DEFAULT_LIMITS) -> FaceAnalyser:
    """The models that the settings name, opened in this process. limits: of the pictures that are opened by it.

    Raises UnknownModel, LicenseRefused, MissingWeights, DamagedWeights, ProviderUnavailable.
    """
    from deployments.faces.analysis import FaceAnalyser

    catalog = load_catalog()
    entries = [catalog.entry(name) for name in (settings.faces, settings.judge, settings.parser)]
    for entry in entries:
        refuse_licence(entry, license_policy())
    faces, judge, parser = entries
    options: dict[str, Any] = dict(faces.options)
    return FaceAnalyser(
        faces.located("models"),
        judge.located("model"),
        parser.located("model"),
        det_size=tuple(options["det_size"]),
        provider=settings.provider,
        threads=settings.threads,
        limits=limits,
        **({"smallest_px": float(options["smallest_px"])} if "smallest_px" in options else {}),
    )


class FaceServer:
    def __init__(self, settings: FaceSettings, limits: Limits = DEFAULT_LIMITS) -> None:
        """limits: of the pictures that are opened here."""
        self._settings, self._limits = settings, limits
        self._analyser = face_analyser(settings, limits)

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

    def curate(self, pictures: Sequence[bytes], known: Sequence[PictureFacts] = (), best: int | None = None) -> Curated:
        """What new pictures of a character show, and what is to be known of all of its pictures, those that are known first.

        best: the place among all of them of the one that was chosen by hand. Raises InvalidImage, which names the new picture.
        """
        from deployments.curation import Curated, judged

        facts = tuple(self._measured(data, number) for number, data in enumerate(pictures))
        together = (*known, *facts)
        return Curated(facts, judged(together, self._analyser.smallest_px, best, self._settings.faces, self._settings.judge))

    def _measured(self, data: bytes, number: int) -> PictureFacts:
        """One at a time: fifty photographs, unpacked, would not fit into memory."""
        from deployments.curation import measured

        try:
            picture = decode(data, self._limits)
        except InvalidImage as error:
            raise InvalidImage(f"Picture {number}: {error.message}", error.remedy, {"picture": number}) from error
        need: tuple[Need, ...] = ("embedding", "judge", "aligned")
        try:
            (found,) = self._analyser.analyse_pixels([picture], (*need, "attributes"))
        except MissingWeights:  # face models without one for age and sex, which are then not known
            (found,) = self._analyser.analyse_pixels([picture], need)
        return measured(data, picture, found)

    def ready(self) -> bool:
        return True
