"""One request, drawn: from what it wants to its pictures, each scored and encoded with its recipe inside. Knows no HTTP and no queue.

What one deployment answers is handed on to the next unawaited, so that it travels from replica to replica; only pictures and scores
come here.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, cast
from uuid import uuid4

from deployments import images, metrics
from deployments.catalog import Catalog, Entry
from deployments.contracts import (
    RGB,
    Drawn,
    GenerationSpec,
    Guides,
    Identities,
    IdentityRequest,
    Need,
    PersonPictures,
    PictureProgress,
    Progress,
)
from deployments.errors import UnsupportedCombination
from deployments.provenance import signer_of
from serve.answers import GenerateResponse, ImageItem, LicenceInfo
from serve.normalise import Wanted, recipe
from serve.persons import entry_of
from serve.presets import Preset
from serve.reports import drawn_with, left_out, scores_of, warnings_of
from serve.schemas import GenerateRequest
from serve.settings import AppSettings

Handle = Any
"""A DeploymentHandle. Its types say neither what a method answers nor that a stream can be read."""

_LOG = logging.getLogger("likeness.drawing")
Told = Callable[[PictureProgress], object]


def _seen(wanted: Wanted) -> tuple[bytes, ...]:
    """Every picture that came with a request, once; masks are shapes, and were opened already."""
    people = [picture for person in wanted.people for picture in person.pictures]
    sources = [source.picture for source in wanted.sources if source.picture is not None]
    return tuple(dict.fromkeys([*people, *sources, *([wanted.begin] if wanted.begin is not None else [])]))


def _name(request: GenerateRequest) -> str:
    return request.workflow or "generate"


class Asked(NamedTuple):
    """A request, and what was decided of it. judged: whether the content gate looks at its pictures. notes: what was added to
    it, in words."""

    request: GenerateRequest
    wanted: Wanted
    judged: bool = False
    notes: tuple[str, ...] = ()


class _Seconds:
    """Seconds by stage, added up over the pictures of a request."""

    def __init__(self) -> None:
        self.spent: dict[str, float] = {}

    def add(self, more: Mapping[str, float]) -> None:
        for stage, value in more.items():
            self.spent[stage] = self.spent.get(stage, 0.0) + value


@dataclass(frozen=True, eq=False)
class _Party:
    """The people of a request: what the face server (None without people) and the identity server will answer."""

    people: Any
    identities: Any


@dataclass(frozen=True)
class _Reporting:
    """Of one picture's steps, to whoever wants to be told."""

    told: Told | None
    picture: int
    pictures: int
    previews: int

    def __call__(self, event: Progress) -> None:
        if self.told is not None:
            preview = images.encode(event.preview, "jpeg") if event.preview is not None else None
            self.told(PictureProgress(self.picture, self.pictures, event.step, event.total, preview))


class Drawing:
    """The servers that take part in a picture, by their handles."""

    def __init__(
        self,
        settings: AppSettings,
        catalog: Catalog,
        presets: Mapping[str, Preset],
        faces: Handle,
        prompts: Handle,
        identity: Handle,
        controls: Handle,
        gate: Handle,
        denoiser: Handle,
    ) -> None:
        self._settings, self._catalog, self._presets = settings, catalog, presets
        self._faces, self._prompts, self._identity, self._controls, self._gate = faces, prompts, identity, controls, gate
        self._signer = signer_of(settings.provenance)
        self._denoiser = denoiser.options(stream=True)

    async def draw(self, asked: Asked, told: Told | None = None, previews: int = 0) -> GenerateResponse:
        """The pictures of a request. told: called after every step. previews: how many of a picture's steps bring a small picture along.
        Raises ModeratedInput and ModeratedOutput, besides what the servers do."""
        started = time.perf_counter()
        request, wanted = asked.request, asked.wanted
        if asked.judged and self._settings.gate.models.input and (seen := _seen(wanted)):
            await self._gate.admit.remote(seen)
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
        peaks: list[int] = []
        try:
            for place, spec in enumerate(specs):
                reporting = _Reporting(told, place, len(specs), previews)
                drawn = await self._drawn(spec, party.identities, prompts, guides, reporting, _name(request))
                if asked.judged and self._settings.gate.models.output:
                    await self._gate.release.remote((drawn.picture,))
                # What went before the drawing is shared by all pictures of a request.
                seconds.add(drawn.seconds if spec is first else {stage: drawn.seconds[stage] for stage in ("denoise", "decode")})
                peaks += [drawn.peak_bytes] if drawn.peak_bytes is not None else []
                finishing.append(asyncio.create_task(self._finished(drawn.picture, {**made, "seed": spec.seed}, party, request, seconds)))
            items = await asyncio.gather(*finishing)
        except BaseException:
            for task in finishing:
                task.cancel()
            raise
        seconds.add({"total": time.perf_counter() - started})
        self._count(request, first, items, seconds.spent)
        warnings = [*asked.notes, *warnings_of(request, self._presets, first, await unread, self._settings), *left_out(drawn)]
        return self._answer(wanted, made, request, items, seconds.spent, max(peaks, default=None), warnings)

    def _guides(self, wanted: Wanted) -> Any:
        """What the control server will answer; nothing is asked of it where there is nothing to prepare."""
        if not wanted.sources and wanted.begin is None:
            return Guides()
        first = wanted.specs[0]
        return self._controls.prepare.remote(wanted.sources, wanted.begin, first.width, first.height)

    def _party(self, identities: Sequence[IdentityRequest], persons: tuple[PersonPictures, ...], scores: bool) -> _Party:
        if not persons:
            return _Party(None, Identities())
        pairs = zip(identities, persons, strict=True)
        need = {part for identity, person in pairs for part in self._needs(identity, person)} | ({"judge"} if scores else set())
        people = self._faces.people.remote(persons, tuple(sorted(need)))
        return _Party(people, self._identity.encode.remote(people, tuple(identities)))

    def refuse_what_is_not_deployed(self, wanted: Wanted) -> None:
        """Raises UnsupportedCombination for a method that fits but is not there: before anything is asked of a model."""
        for identity in wanted.specs[0].identities:
            self._entry(identity)

    def _needs(self, identity: IdentityRequest, person: PersonPictures) -> tuple[Need, ...]:
        # Several pictures are compared with one another: a stranger among them is left out.
        compared = ("embedding",) if len(person.pictures) > 1 else ()
        return cast(tuple[Need, ...], (*cast(Sequence[str], self._entry(identity).options.get("need", ())), *compared))

    def _entry(self, identity: IdentityRequest) -> Entry:
        entry = entry_of(self._catalog, identity.method, self._settings.base, identity.version)
        if entry.id not in self._settings.methods:
            there = ", ".join(self._settings.methods) or "none"
            raise UnsupportedCombination(f"{entry.id} is not deployed on this server.", f"Deployed are: {there}.", {"param": "method"})
        return entry

    def _count(self, request: GenerateRequest, spec: GenerationSpec, items: Sequence[ImageItem], seconds: Mapping[str, float]) -> None:
        methods = [identity.method for identity in spec.identities]
        scores = [(methods[score.person], score.cosine) for item in items for score in item.scores]
        metrics.drawn(_name(request), spec.base, seconds, scores, len(items))
        facts = {"workflow": _name(request), "pictures": len(items), "seconds": {k: round(v, 4) for k, v in seconds.items()}}
        _LOG.info("a request was drawn", extra=facts)

    async def _drawn(self, spec: GenerationSpec, identities: Any, prompts: Any, guides: Any, reporting: _Reporting, workflow: str) -> Drawn:
        """Reads the denoiser's stream to its end. Whoever leaves earlier stops the drawing."""
        stream = self._denoiser.generate.remote(spec, identities, prompts, guides, reporting.previews)
        drawn: Drawn | None = None
        began: float | None = None
        try:
            async for event in stream:
                if isinstance(event, Progress):
                    began = began or time.perf_counter()
                    reporting(event)
                else:
                    drawn = event
        except asyncio.CancelledError:
            metrics.cancelled("drawing" if began else "waiting")
            raise
        finally:
            if drawn is None:
                stream.cancel()
                if began is not None:  # the first step is not known, the rest is
                    metrics.stopped(workflow, spec.base, time.perf_counter() - began)
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
        content = await asyncio.to_thread(self._encoded, picture, request.output_format, made)
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

    def _encoded(self, picture: RGB, kind: images.Format, made: Mapping[str, Any]) -> bytes:
        content = images.encode(picture, kind, made)
        return content if self._signer is None else self._signer.signed(content, kind)

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
        peak: int | None,
        warnings: list[str],
    ) -> GenerateResponse:
        entries = self._used(wanted, request.scores and bool(wanted.specs[0].identities))
        return GenerateResponse(
            created=int(time.time()),
            model=wanted.specs[0].base,
            data=items,
            timings={stage: round(value, 4) for stage, value in seconds.items()},
            peak_bytes=peak,
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
