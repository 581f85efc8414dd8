"""Workflows: what each request composes out of the deployments' handles. Knows no HTTP: the ingress holds its handle, as any program may.

    reference pictures -> FaceServer.people ---> IdentityServer.encode --+
    prompt -------------> PromptServer.encode ---------------------------+--> DenoiserServer.generate -> picture
    controls, pictures -> ControlServer.prepare -------------------------+                                  |
    LoRAs --------------> LoraServer.find (their hashes, in the spec) ---+                                  |
                                                                               FaceServer.scores <----------+

What one deployment answers is handed on to the next unawaited, so that it travels from replica to replica; only pictures and scores
come here.
"""

from __future__ import annotations

import asyncio
import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, cast
from uuid import uuid4

from pydantic import BaseModel, ValidationError

from deployments import images
from deployments.catalog import Entry, load_catalog
from deployments.contracts import RGB, Drawn, GenerationSpec, Guides, Identities, IdentityRequest, Need, PersonPictures, Progress
from deployments.errors import InvalidRequest, MultipleFaces, QueueFull, UnsupportedCombination
from deployments.store.settings import EVERYBODY
from serve.answers import (
    AnalyzeResponse,
    CompareResponse,
    GenerateResponse,
    ImageItem,
    LicenceInfo,
    ModelInfo,
    ModelsResponse,
    WorkflowsResponse,
)  # fmt: skip
from serve.normalise import Wanted, normalise, parse, recipe
from serve.persons import entry_of
from serve.presets import load_presets
from serve.problem import invalid
from serve.reports import drawn_with, face_info, left_out, scores_of, warnings_of, workflows_of
from serve.schemas import AnalyzeRequest, CompareRequest, GenerateRequest
from serve.settings import AppSettings

Handle = Any
"""A DeploymentHandle. Its types say neither what a method answers nor that a stream can be read."""


class _Seconds:
    """Seconds by stage, added up over the pictures of a request."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def add(self, more: Mapping[str, float]) -> None:
        for stage, value in more.items():
            self.spent[stage] = self.spent.get(stage, 0.0) + value


_Body = TypeVar("_Body", bound=BaseModel)


@dataclass(frozen=True, eq=False)
class _Party:
    """The people of a request: what the face server (None without people) and the identity server will answer."""

    people: Any
    identities: Any


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
        denoiser: Handle,
    ) -> None:
        self._settings, self._limits = settings, settings.limits.value
        self._catalog, self._presets = load_catalog(), load_presets()
        self._faces, self._prompts, self._identity, self._controls, self._loras = faces, prompts, identity, controls, loras
        self._denoiser = denoiser.options(stream=True)
        self._room, self._inside = settings.denoiser.room, 0
        self._served = [
            settings.base,
            *settings.methods,
            *settings.controlnets,
            *([settings.controls.models.keypoints] if settings.controls.models.keypoints else []),
            settings.faces.models.faces,
            settings.faces.models.judge,
            settings.faces.models.parser,
        ]

    async def generate(self, workflow: str | None, body: Mapping[str, Any]) -> GenerateResponse:
        """The pictures of a request: of a workflow's own body, or with None of any (`POST /v1/generate`). Raises LikenessError."""
        with self._admitted():
            return await self._generated(workflow, body)

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        """Counts the requests that are being drawn or wait for it. Serve's own count of a queue lets streams through (ray 2.60)."""
        if self._inside >= self._room:
            raise QueueFull(f"{self._inside} requests are being drawn or wait; no more may.")
        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1

    async def _generated(self, workflow: str | None, body: Mapping[str, Any]) -> GenerateResponse:
        started = time.perf_counter()
        request = await asyncio.to_thread(parse, workflow, body, self._presets)
        if request.response_format == "file" and self._settings.output_folder is None:
            raise InvalidRequest("This server writes no files.", "Ask for response_format b64_json.", {"param": "response_format"})
        wanted = await self._wanted(request)
        specs, first = wanted.specs, wanted.specs[0]
        # The pictures of a request differ in nothing but the seed, and every reference is hashed for it: made once.
        made = await asyncio.to_thread(recipe, wanted, drawn_with(self._settings))
        if request.output_format == "jpeg":  # which may have no room for the recipe: known now, not after the drawing
            images.parameters_text({**made, "seed": specs[-1].seed}, request.output_format)
        party = self._party(first.identities, tuple(wanted.people), request.scores)
        guides = self._guides(wanted)
        texts = (first.prompt, first.negative_prompt) if first.needs_negative else (first.prompt,)
        unread = self._prompts.unread.remote(texts, first.max_sequence_length)
        prompts = self._prompts.encode.remote(texts, first.max_sequence_length)
        seconds = _Seconds()
        finishing: list[asyncio.Task[ImageItem]] = []
        try:
            for spec in specs:
                drawn = await self._drawn(spec, party.identities, prompts, guides)
                # What went before the drawing is shared by all pictures of a request.
                seconds.add(drawn.seconds if spec is first else {stage: drawn.seconds[stage] for stage in ("denoise", "decode")})
                finishing.append(asyncio.create_task(self._finished(drawn.picture, {**made, "seed": spec.seed}, party, request, seconds)))
            items = await asyncio.gather(*finishing)
        except BaseException:
            for task in finishing:
                task.cancel()
            raise
        seconds.add({"total": time.perf_counter() - started})
        warnings = [*warnings_of(request, self._presets, first, await unread, self._settings), *left_out(drawn)]
        return self._answer(wanted, made, request, items, seconds.spent, warnings)

    async def _wanted(self, request: GenerateRequest) -> Wanted:
        settings = self._settings
        decide = partial(normalise, None, request, self._catalog, settings.base, self._presets, self._limits)
        known = await self._loras.find.remote([lora.id for lora in request.loras], EVERYBODY) if request.loras else ()
        return await asyncio.to_thread(decide, loras={info.id: info.sha256 for info in known}, controls=settings.controlnets)

    async def lora(self, method: str, *args: Any) -> Any:
        """A method of LoraServer, for the routes of `/v1/loras`: whoever holds this handle needs no other."""
        return await getattr(self._loras, method).remote(*args)

    def _guides(self, wanted: Wanted) -> Any:
        """What the control server will answer; nothing is asked of it where there is nothing to prepare."""
        if not wanted.sources and wanted.begin is None:
            return Guides()
        first = wanted.specs[0]
        return self._controls.prepare.remote(wanted.sources, wanted.begin, first.width, first.height)

    async def analyze(self, body: Mapping[str, Any]) -> AnalyzeResponse:
        """Every face of a picture."""
        request = _parsed(AnalyzeRequest, body)
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
        request = _parsed(CompareRequest, body)
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

    async def ready(self) -> dict[str, bool]:
        """Whether each deployment answers. Raises what its replicas raise."""
        parts = {
            "faces": self._faces,
            "prompts": self._prompts,
            "identity": self._identity,
            "controls": self._controls,
            "loras": self._loras,
        }
        answers = await asyncio.gather(*(handle.ready.remote() for handle in parts.values()))
        return dict(zip(parts, answers, strict=True))

    async def prompt_stats(self) -> dict[str, int]:
        """How often prompts were found, and how often encoded (see PromptServer.stats)."""
        return cast(dict[str, int], await self._prompts.stats.remote())

    def _party(self, identities: Sequence[IdentityRequest], persons: tuple[PersonPictures, ...], scores: bool) -> _Party:
        if not persons:
            return _Party(None, Identities())
        pairs = zip(identities, persons, strict=True)
        need = {part for identity, person in pairs for part in self._needs(identity, person)} | ({"judge"} if scores else set())
        people = self._faces.people.remote(persons, tuple(sorted(need)))
        return _Party(people, self._identity.encode.remote(people, tuple(identities)))

    def _needs(self, identity: IdentityRequest, person: PersonPictures) -> tuple[Need, ...]:
        """Raises UnsupportedCombination for a method that fits but is not deployed: here, since nothing has been asked of a model yet."""
        entry = entry_of(self._catalog, identity.method, self._settings.base, identity.version)
        if entry.id not in self._settings.methods:
            there = ", ".join(self._settings.methods) or "none"
            raise UnsupportedCombination(f"{entry.id} is not deployed on this server.", f"Deployed are: {there}.", {"param": "method"})
        # Several pictures are compared with one another: a stranger among them is left out.
        compared = ("embedding",) if len(person.pictures) > 1 else ()
        return cast(tuple[Need, ...], (*cast(Sequence[str], entry.options.get("need", ())), *compared))

    async def _drawn(self, spec: GenerationSpec, identities: Any, prompts: Any, guides: Any) -> Drawn:
        """Reads the denoiser's stream to its end. Whoever leaves earlier stops the drawing."""
        stream = self._denoiser.generate.remote(spec, identities, prompts, guides)
        drawn: Drawn | None = None
        try:
            async for event in stream:
                drawn = None if isinstance(event, Progress) else event
        finally:
            if drawn is None:
                stream.cancel()
        if drawn is None:
            raise RuntimeError("The denoiser ended without a picture.")
        return drawn

    async def _finished(
        self,
        picture: RGB,
        made: Mapping[str, Any],
        party: _Party,
        request: GenerateRequest,
        seconds: _Seconds,
    ) -> ImageItem:
        """Scored and encoded with its recipe inside, while the next picture is being drawn."""
        started = time.perf_counter()
        likenesses = await self._faces.scores.remote(picture, party.people) if party.people is not None and request.scores else ()
        scored = time.perf_counter()
        content = await asyncio.to_thread(images.encode, picture, request.output_format, made)
        seconds.add({"scores": scored - started, "encode": time.perf_counter() - scored})
        where = await asyncio.to_thread(self._kept, content, request.output_format) if request.response_format == "file" else None
        return ImageItem(
            b64_json=None if where else base64.b64encode(content).decode(),
            path=where,
            seed=made["seed"],
            width=made["width"],
            height=made["height"],
            format=request.output_format,
            scores=[score for person, likeness in enumerate(likenesses) for score in scores_of(person, likeness)],
        )

    def _kept(self, content: bytes, suffix: str) -> str:
        """Named by its content: the same picture is the same file."""
        folder = Path(cast(str, self._settings.output_folder))
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{sha256(content).hexdigest()[:32]}.{suffix}"
        beside = folder / f"{path.name}.{uuid4().hex}.part"  # of this request alone: another may be writing the same picture
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
        return str(path)

    def _answer(
        self,
        wanted: Wanted,
        made: dict[str, Any],
        request: GenerateRequest,
        items: list[ImageItem],
        seconds: Mapping[str, float],
        warnings: list[str],
    ) -> GenerateResponse:
        entries = self._used(wanted, request.scores and bool(wanted.specs[0].identities))
        return GenerateResponse(
            created=int(time.time()),
            model=wanted.specs[0].base,
            data=items,
            timings={stage: round(value, 4) for stage, value in seconds.items()},
            models=[entry.id for entry in entries],
            licences=[LicenceInfo.of(entry) for entry in entries],
            request=made,
            warnings=warnings,
        )

    def _used(self, wanted: Wanted, scored: bool) -> list[Entry]:
        """Every model that had a part in the pixels or in their scores."""
        models, spec = self._settings.faces.models, wanted.specs[0]
        keypoints = self._settings.controls.models.keypoints
        found = any(source.mode == "pose" and source.picture is not None and not source.prepared for source in wanted.sources)
        methods = [entry_of(self._catalog, identity.method, spec.base, identity.version).id for identity in spec.identities]
        faces = [models.faces, models.parser] if methods else []
        controls = [control.model for control in spec.controls if control.scale]
        poses = [keypoints] if found and keypoints else []
        names = dict.fromkeys([spec.base, *methods, *controls, *poses, *faces, *([models.judge] if scored else [])])
        return [self._catalog.entry(name) for name in names]


def _parsed(kind: type[_Body], body: Mapping[str, Any]) -> _Body:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from error
