"""The embedded base with PuLID, in this process, and how like its pictures of people are: what benchmarks of quality share."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deployments.catalog import load_catalog
from deployments.contracts import RGB, GenerationSpec, IdentityRequest, PersonPictures
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.face_server import FaceServer, FaceSettings
from deployments.hardware import TorchSettings
from deployments.identity.pulid_adapter import PuLIDAdapter
from deployments.identity_server import IdentityServer
from deployments.prompt_server import PromptServer, PromptSettings

_BASE, _METHOD = "flux1-mini", "pulid-mini"
_CHARACTERS = sorted((Path(__file__).parents[1] / "samples" / "characters").glob("*-1.png"))
_PROMPT = "a close-up portrait of a neutral person wearing a green hoodie in a forest with soft daylight"


@dataclass(frozen=True)
class Drawings:
    """One picture a person, and the judge's cosine of each to its person; 0 where it found no face."""

    pictures: list[RGB]
    cosines: list[float]


class Studio:
    """Everything but the denoiser, which is opened anew for each way."""

    def __init__(self, people: int) -> None:
        torch_settings = TorchSettings(torch_threads=1)
        self._pulid = load_catalog().entry(_METHOD).located("adapter")
        self._folder = load_catalog().entry(_BASE).located("pipeline")
        self._faces = FaceServer(FaceSettings(faces="faces-mini", judge="face-judge-mini", parser="face-parser-mini"))
        pictures = [PersonPictures((path.read_bytes(),)) for path in _CHARACTERS[:people]]
        self._people = self._faces.people(pictures, ("embedding", "aligned", "judge"))
        self._request = IdentityRequest(method="pulid")
        self._tokens = IdentityServer([_METHOD], torch_settings).encode(self._people, [self._request] * people).tokens
        self._embeds = PromptServer(_BASE, PromptSettings()).encode([_PROMPT], 48).embeds

    def denoiser(self, **options: Any) -> Flux1Denoiser:
        """The embedded base with PuLID. options: of Flux1Denoiser."""
        return Flux1Denoiser(self._folder, {_METHOD: partial(PuLIDAdapter, path=self._pulid)}, **options)

    def draw(self, denoiser: Flux1Denoiser) -> list[RGB]:
        """One picture a person."""
        pictures = []
        for seed, tokens in enumerate(self._tokens):
            spec = GenerationSpec(
                base=_BASE, prompt=_PROMPT, width=192, height=192, steps=20, guidance_scale=2.5, seed=seed, max_sequence_length=48,
                identities=(self._request,),
            )  # fmt: skip
            pictures.append(denoiser.draw(spec, self._embeds, [tokens]).picture)
        return pictures

    def cosines(self, pictures: list[RGB]) -> list[float]:
        """The judge's, of each picture against its person; no face counts as 0."""
        found = [self._faces.scores(picture, self._only(number))[0].cosines[0] for number, picture in enumerate(pictures)]
        return [cosine if cosine is not None else 0.0 for cosine in found]

    def _only(self, number: int) -> Any:
        return type(self._people)((self._people.persons[number],), {})


def compared(own: Drawings, exact: Drawings) -> dict[str, float]:
    """likeness: mean of the judge's cosine; change: its mean difference from the exact ones', with its standard error; pixels: mean
    absolute difference from theirs, of 255."""
    differences = [one - other for one, other in zip(own.cosines, exact.cosines, strict=True)]
    pixels = [np.abs(one.astype(int) - other).mean() for one, other in zip(own.pictures, exact.pictures, strict=True)]
    return {
        "likeness": round(statistics.mean(own.cosines), 4),
        "change": round(statistics.mean(differences), 4),
        "standard_error": round(statistics.stdev(differences) / len(differences) ** 0.5, 4),
        "pixels": round(float(statistics.mean(pixels)), 3),
    }
