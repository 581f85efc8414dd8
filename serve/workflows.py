"""Workflows: what each request composes out of the deployments' handles. Knows no HTTP: the ingress holds its handle, as any program may.

    reference pictures -> FaceServer.people ---> IdentityServer.encode --+
    prompt -------------> PromptServer.encode ---------------------------+--> DenoiserServer.generate -> picture
    controls, pictures -> ControlServer.prepare -------------------------+                                  |
    LoRAs --------------> LoraServer.find (their hashes, in the spec) ---+                                  |
                                                                               FaceServer.scores <----------+

What one deployment answers is handed on to the next unawaited, so that it travels from replica to replica; only pictures and scores
come here (see serve/drawing.py).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from functools import partial
from typing import Any, TypeVar, cast

from pydantic import BaseModel, ValidationError

from deployments import images
from deployments.catalog import load_catalog
from deployments.contracts import Need, PersonPictures, PictureProgress
from deployments.errors import InvalidRequest, MultipleFaces
from deployments.store.characters import CharacterStore
from deployments.store.settings import EVERYBODY
from deployments.urls import UrlGuard
from serve.answers import (
    AnalyzeResponse,
    CompareResponse,
    GenerateResponse,
    LicenceInfo,
    ModelInfo,
    ModelsResponse,
    WorkflowsResponse,
)  # fmt: skip
from serve.casting import Kept, played
from serve.drawing import Asked, Drawing, Handle
from serve.limits import Room
from serve.normalise import normalise, parse
from serve.picture_urls import fetched
from serve.presets import load_presets
from serve.problem import invalid
from serve.reports import face_info, workflows_of
from serve.schemas import MAX_PICTURES, MAX_REFERENCES, AnalyzeRequest, CompareRequest
from serve.settings import AppSettings

_Body = TypeVar("_Body", bound=BaseModel)


class Workflows:
    """Every handle is an argument, so that the same class runs on Ray, in one process, and in another Ray program."""

    def __init__(
        self,
        settings: AppSettings,
        faces: Handle,
        prompts: Handle,
        identity: Handle,
        controls: Handle,
        loras: Handle,
        gate: Handle,
        denoiser: Handle,
    ) -> None:
        self._settings, self._limits = settings, settings.limits.value
        self._catalog, self._presets = load_catalog(), load_presets()
        self._faces, self._prompts, self._identity, self._controls, self._loras = faces, prompts, identity, controls, loras
        self._drawing = Drawing(settings, self._catalog, self._presets, faces, prompts, identity, controls, gate, denoiser)
        self._urls = UrlGuard(settings.pictures_by_url, "pictures_by_url")
        self._characters = CharacterStore(settings.store.database, settings.store.files)
        self._room = Room(settings.denoiser.room)  # Serve's own count of a queue lets streams through (ray 2.60)
        self._served = [
            settings.base,
            *settings.methods,
            *settings.controlnets,
            *([settings.controls.models.keypoints] if settings.controls.models.keypoints else []),
            settings.faces.models.faces,
            settings.faces.models.judge,
            settings.faces.models.parser,
        ]

    async def generate(self, workflow: str | None, body: Mapping[str, Any], owner: str = EVERYBODY) -> GenerateResponse:
        """The pictures of a request: of a workflow's own body, or with None of any (`POST /v1/generate`). owner: whose LoRAs it may name.
        Raises LikenessError."""
        with self._room.one():
            return await self._drawing.draw(await self._decided(workflow, body, owner))

    async def watched(
        self, workflow: str | None, body: Mapping[str, Any], owner: str = EVERYBODY, previews: int = 0, every_s: float = 0.0
    ) -> AsyncIterator[PictureProgress | GenerateResponse]:
        """As generate, telling of the steps meanwhile; the last one is the answer. Whoever leaves earlier stops the drawing.

        previews: how many of a picture's steps bring a small picture along. every_s: so long after one step was told no other is, unless
        it brings one.
        """
        events: asyncio.Queue[PictureProgress | None] = asyncio.Queue()
        tell = Thinned(events.put_nowait, every_s)
        with self._room.one():
            asked = await self._decided(workflow, body, owner)
            drawing = asyncio.create_task(self._drawing.draw(asked, tell, previews))
            drawing.add_done_callback(lambda _: events.put_nowait(None))
            try:
                while (event := await events.get()) is not None:
                    yield event
                yield await drawing
            finally:
                drawing.cancel()
                await asyncio.wait({drawing})

    async def check(self, workflow: str | None, body: Mapping[str, Any], owner: str = EVERYBODY) -> None:
        """Refuses, as generate would, what can be known without asking a model."""
        await self._decided(workflow, body, owner)

    async def _decided(self, workflow: str | None, body: Mapping[str, Any], owner: str) -> Asked:
        settings = self._settings
        found = await self._here(body)
        request, notes = await played(
            await asyncio.to_thread(parse, workflow, found, self._presets), self._presets, partial(self._kept, owner)
        )
        if request.response_format == "file" and settings.output_folder is None:
            raise InvalidRequest("This server writes no files.", "Ask for response_format b64_json.", {"param": "response_format"})
        decide = partial(normalise, None, request, self._catalog, settings.base, self._presets, self._limits)
        known = await self._loras.find.remote([lora.id for lora in request.loras], owner) if request.loras else ()
        wanted = await asyncio.to_thread(decide, loras={info.id: info.sha256 for info in known}, controls=settings.controlnets)
        judged = settings.gate.models.applies(request.enable_safety_checker)
        self._drawing.refuse_what_is_not_deployed(wanted)
        return Asked(request, wanted, judged, notes)

    async def _here(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """The body with the pictures that it gives by address, where the settings allow that."""
        return await fetched(body, self._urls, self._settings.max_body_bytes)

    async def _kept(self, owner: str, id: str) -> Kept:
        """What there is of a character. All of their pictures together are opened at once: so many pixels, and no more."""
        pictures = await asyncio.to_thread(self._characters.references, id, owner, MAX_REFERENCES, MAX_PICTURES * self._limits.pixels)
        return Kept(pictures, await asyncio.to_thread(self._characters.lora, id, owner))

    async def character(self, method: str, *args: Any) -> Any:
        """A method of FaceServer, for the routes of `/v1/characters`: whoever holds this handle needs no other."""
        return await getattr(self._faces, method).remote(*args)

    async def lora(self, method: str, *args: Any) -> Any:
        """A method of LoraServer, for the routes of `/v1/loras`: whoever holds this handle needs no other."""
        return await getattr(self._loras, method).remote(*args)

    async def analyze(self, body: Mapping[str, Any]) -> AnalyzeResponse:
        """Every face of a picture."""
        request = _parsed(AnalyzeRequest, await self._here(body))
        need: tuple[Need, ...] = (*(("attributes",) if request.attributes else ()), *(("judge",) if request.embeddings else ()))
        (found,) = await self._faces.analyze.remote((images.from_text(request.image, self._limits),), need)
        models = self._settings.faces.models
        used = [self._catalog.entry(name) for name in (models.faces, *((models.judge,) if request.embeddings else ()))]
        return AnalyzeResponse(
            width=found.size[0],
            height=found.size[1],
            faces=[face_info(index, face) for index, face in enumerate(found.faces)],
            models=[entry.id for entry in used],
            licences=[LicenceInfo.of(entry) for entry in used],
        )

    async def compare(self, body: Mapping[str, Any]) -> CompareResponse:
        """Whether two pictures show the same person."""
        request = _parsed(CompareRequest, await self._here(body))
        sides = ((request.first, request.first_face_index), (request.second, request.second_face_index))
        persons = tuple(PersonPictures((images.from_text(text, self._limits),), face) for text, face in sides)
        try:
            found = await self._faces.people.remote(persons, ("judge",))
        except MultipleFaces as error:
            which = ("first", "second")[int(cast(int, error.details.get("person", 0)))]
            field = f"{which}_face_index"
            details = {**error.details, "param": field}
            raise MultipleFaces(
                f"The {which} picture shows several faces.", f"Name one with `{field}`: 0 is the largest.", details
            ) from None
        first, second = (person.faces[0].judge_embedding for person in found.persons)
        cosine = min(1.0, max(-1.0, float(first @ second)))
        same = cosine >= request.threshold
        return CompareResponse(
            cosine=cosine, threshold=request.threshold, verdict="same" if same else "different", model=self._settings.faces.models.judge
        )

    async def workflows(self) -> WorkflowsResponse:
        return workflows_of(self._catalog, self._presets, self._settings)

    async def models(self) -> ModelsResponse:
        return ModelsResponse(data=[ModelInfo.of(entry, entry.id in self._served) for entry in self._catalog.models.values()])

    async def prompt_stats(self) -> dict[str, int]:
        """How often prompts were found, and how often encoded (see PromptServer.stats)."""
        return cast(dict[str, int], await self._prompts.stats.remote())


class Thinned:
    """Passes on steps that come at least so long after the one before, and every small picture. The first comes twice so long after the
    beginning: what is soon done needs none, and each costs what draws."""

    def __init__(self, tell: Callable[[PictureProgress], object], every_s: float) -> None:
        self._tell, self._every_s, self._told = tell, every_s, time.monotonic() + every_s

    def __call__(self, event: PictureProgress) -> None:
        now = time.monotonic()
        if event.preview is not None or now - self._told >= self._every_s:
            self._told = now
            self._tell(event)


def _parsed(kind: type[_Body], body: Mapping[str, Any]) -> _Body:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from error
