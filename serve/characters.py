"""`/v1/characters`: people by name. Routes, and the desk that brings together who looks at pictures and who keeps them.

Knows neither Ray nor how a face is found: `curate` is whatever answers as FaceServer.curate does.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from fastapi import FastAPI, Request, Response
from pydantic import Field

from deployments.errors import InvalidImage, InvalidRequest, NoFaceDetected, StoreUnavailable
from deployments.picture_metadata import without_metadata
from deployments.store.character_values import MOST_PICTURES, Character, CharacterSummary, Judgement, NewPicture, PictureFacts
from deployments.store.characters import CharacterStore, named, no_picture
from serve.callers import caller_of
from serve.character_answers import REASONS, CharacterDeleted, CharacterEntry, CharacterItem, CharactersResponse
from serve.character_bodies import CharacterChange, FaceModelUpload, LoraLink, MorePictures, NewCharacter, body_of, documented
from serve.jobs import Strict, query_of
from serve.jobs import documented as queried
from serve.problem import MEDIA_TYPE, Problem

if TYPE_CHECKING:
    from deployments.curation import Curated

_ALL = "/v1/characters"
_ONE = f"{_ALL}/{{id}}"
_PICTURE = f"{_ONE}/pictures/{{picture}}"
_TRIES = 20
"""A set that others change meanwhile is judged anew; each time one of them was quicker."""
_GONE: dict[int | str, dict[str, Any]] = {
    404: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": "You have no such character, or it no such picture."}
}
_BAD: dict[int | str, dict[str, Any]] = {422: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": "`code` says why."}}
# A face is nobody's to keep but the server's, which forgets it when it is told to.
_UNKEPT = {"cache-control": "no-store, private", "x-content-type-options": "nosniff"}


class Curate(Protocol):
    """FaceServer.curate, wherever it runs."""

    def __call__(self, pictures: Sequence[bytes], known: Sequence[PictureFacts], best: int | None) -> Awaitable[Curated]: ...


class CharacterQuery(Strict):
    """How much of a character."""

    centroid: bool = Field(default=False, description="With the judge's mean embedding.")


class CharacterDesk:
    """What the routes need."""

    def __init__(self, store: CharacterStore, curate: Curate) -> None:
        self._store, self._curate = store, curate

    async def create(self, owner: str, name: str, pictures: Sequence[bytes]) -> Character:
        """Raises InvalidRequest, InvalidImage for one that cannot be opened, NoFaceDetected where none of them can be used."""
        called = named(name)
        stripped = await _stripped(pictures)
        curated = await self._curate(stripped, (), None)
        _refuse_unusable(curated.judgement)
        return await asyncio.to_thread(self._store.create, owner, called, _new(stripped, curated.facts), curated.judgement)

    async def add(self, id: str, owner: str, pictures: Sequence[bytes]) -> Character:
        """More pictures; all of them are judged together. Raises CharacterNotFound, InvalidRequest, InvalidImage."""
        seen = await self._pictured(id, owner, adding=len(pictures))
        return await self._changed(seen, owner, add=await _stripped(pictures))

    async def remove(self, id: str, picture: str, owner: str) -> Character:
        seen = await self._pictured(id, owner)
        return await self._changed(seen, owner, remove=frozenset({picture}))

    async def update(self, id: str, owner: str, name: str | None, best: str | None, automatic: bool) -> Character:
        """automatic: the best picture is chosen by quality again."""
        if name is not None:
            await asyncio.to_thread(self._store.rename, id, owner, name)
        if best is not None or automatic:
            seen = await self._pictured(id, owner)
            return await self._changed(seen, owner, best=best, automatic=automatic)
        return await self.get(id, owner)

    async def get(self, id: str, owner: str) -> Character:
        return await asyncio.to_thread(self._store.get, id, owner)

    async def list(self, owner: str) -> tuple[CharacterSummary, ...]:
        return await asyncio.to_thread(self._store.list, owner)

    async def delete(self, id: str, owner: str) -> tuple[str, ...]:
        """Returns the sha256 of the pictures that are gone."""
        return await asyncio.to_thread(self._store.delete, id, owner)

    async def picture(self, id: str, picture: str, owner: str) -> tuple[bytes, str]:
        return await asyncio.to_thread(self._store.picture, id, picture, owner)

    async def attach_lora(self, id: str, lora: str, owner: str) -> Character:
        await asyncio.to_thread(self._store.attach_lora, id, lora, owner)
        return await self.get(id, owner)

    async def face_model(self, id: str, owner: str) -> bytes:
        """The character as a face model of ReActor. Raises InvalidRequest where no picture of it can be used."""
        from deployments.face_models import face_model_of

        return face_model_of(await self.get(id, owner))

    async def import_face_model(self, owner: str, name: str, file: bytes) -> Character:
        from deployments.face_models import read_face_model

        model = read_face_model(file)
        return await asyncio.to_thread(self._store.keep_face_model, owner, name, file, model.packed, model.recogniser)

    async def _pictured(self, id: str, owner: str, adding: int = 0) -> Character:
        seen = await self.get(id, owner)
        if seen.face_model is not None:
            raise InvalidRequest(f"The character {id} is a face model and has no pictures.", "Make a character of pictures.")
        if len(seen.pictures) + adding > MOST_PICTURES:  # before they are looked at
            message = f"The character would have {len(seen.pictures) + adding} pictures; at most {MOST_PICTURES} are kept."
            raise InvalidRequest(message, "Send fewer, or remove some first.", {"param": "pictures"})
        return seen

    async def _changed(
        self,
        seen: Character,
        owner: str,
        *,
        add: Sequence[bytes] = (),
        remove: Collection[str] = frozenset(),
        best: str | None = None,
        automatic: bool = False,
    ) -> Character:
        """Judged anew together with what others did meanwhile. What is new is looked at once."""
        new: tuple[PictureFacts, ...] | None = None
        for _ in range(_TRIES):
            ids = {picture.id for picture in seen.pictures}
            for wanted in (*remove, *([best] if best is not None else [])):
                if wanted not in ids:
                    raise no_picture(wanted)
            stay = [picture for picture in seen.pictures if picture.id not in remove]
            chosen = best if best is not None else (seen.best if seen.best_by_hand and not automatic else None)
            place = next((number for number, picture in enumerate(stay) if picture.id == chosen), None)
            known = tuple(picture.facts for picture in stay)
            curated = await self._curate(add if new is None else (), known + (new or ()), place)
            new = curated.facts if new is None else new
            if best is not None and curated.judgement.best != place:
                raise _not_to_be_best(curated.judgement, place)
            done = await asyncio.to_thread(
                self._store.change, seen, owner, curated.judgement, add=_new(add, new), remove=remove, by_hand=place is not None
            )
            if done:
                return await self.get(seen.id, owner)
            seen = await self.get(seen.id, owner)
        raise StoreUnavailable(f"The character {seen.id} is being changed by many at once.", "Send the request again.")


def add_character_routes(app: FastAPI, desk: CharacterDesk, max_body_bytes: int, owner_of: Callable[[Request], str] | None = None) -> None:
    """max_body_bytes: of a request with pictures; of more, no more is read. owner_of: whose request it is; by default the caller's."""
    whose = owner_of if owner_of is not None else (lambda request: caller_of(request).owner)

    async def create(request: Request, response: Response) -> CharacterItem:
        """Make a character of 1 to 50 pictures of one person. Each is looked at: what is of no use is set aside, with the reason. What the
        files say beside the picture (place, time, camera) is not kept."""
        owner, body = whose(request), await body_of(request, NewCharacter, max_body_bytes)
        character = await desk.create(owner, body.name, body.pictures)
        response.headers["location"] = f"{_ALL}/{character.id}"
        return CharacterItem.of(character)

    async def listed(request: Request) -> CharactersResponse:
        """Your characters, the newest first."""
        query_of(request, Strict)
        return CharactersResponse(data=[CharacterEntry.of(summary) for summary in await desk.list(whose(request))])

    async def show(id: str, request: Request) -> CharacterItem:
        """One of your characters: its pictures, which is best, how much they are alike, and what is to be known of them."""
        asked = query_of(request, CharacterQuery)
        return CharacterItem.of(await desk.get(id, whose(request)), asked.centroid)

    async def update(id: str, request: Request) -> CharacterItem:
        """Another name, or another best picture: whoever it shows is the person. `best: null` chooses by quality again."""
        owner, body = whose(request), await body_of(request, CharacterChange, max_body_bytes)
        automatic = "best" in body.model_fields_set and body.best is None
        return CharacterItem.of(await desk.update(id, owner, body.name, body.best, automatic))

    async def delete(id: str, request: Request) -> CharacterDeleted:
        """Delete a character: its pictures, its embeddings, and its ties to LoRAs. What was drawn of it stays with the jobs that drew it,
        until they are deleted or expire; jobs that still wait for it fail."""
        query_of(request, Strict)
        await desk.delete(id, whose(request))
        return CharacterDeleted(id=id)

    app.post(_ALL, status_code=201, summary="Make a character", responses=_BAD, openapi_extra=documented(NewCharacter))(create)
    app.get(_ALL, summary="Your characters")(listed)
    app.get(_ONE, summary="One of your characters", responses=_GONE, openapi_extra=queried(CharacterQuery))(show)
    app.patch(_ONE, summary="Rename, or choose the best", responses=_GONE | _BAD, openapi_extra=documented(CharacterChange))(update)
    app.delete(_ONE, summary="Delete a character", responses=_GONE)(delete)
    _add_picture_routes(app, desk, max_body_bytes, whose)
    _add_model_routes(app, desk, max_body_bytes, whose)


def _add_picture_routes(app: FastAPI, desk: CharacterDesk, max_body_bytes: int, whose: Callable[[Request], str]) -> None:
    async def more(id: str, request: Request) -> CharacterItem:
        """More pictures. All of them are judged together."""
        owner, body = whose(request), await body_of(request, MorePictures, max_body_bytes)
        return CharacterItem.of(await desk.add(id, owner, body.pictures))

    async def picture(id: str, picture: str, request: Request) -> Response:
        """The file of a picture, without what it said beside the picture."""
        query_of(request, Strict)
        content, format = await desk.picture(id, picture, whose(request))
        return Response(content, media_type=f"image/{format}", headers=_UNKEPT)

    async def remove(id: str, picture: str, request: Request) -> CharacterItem:
        """Delete one picture. The others are judged anew."""
        query_of(request, Strict)
        return CharacterItem.of(await desk.remove(id, picture, whose(request)))

    body = documented(MorePictures)
    app.post(f"{_ONE}/pictures", status_code=201, summary="More pictures", responses=_GONE | _BAD, openapi_extra=body)(more)
    files: dict[int | str, dict[str, Any]] = {200: {"content": {f"image/{kind}": {} for kind in ("png", "jpeg", "webp")}}}
    app.get(_PICTURE, summary="A picture's file", response_class=Response, responses=_GONE | files)(picture)
    app.delete(_PICTURE, summary="Delete a picture", responses=_GONE)(remove)


def _add_model_routes(app: FastAPI, desk: CharacterDesk, max_body_bytes: int, whose: Callable[[Request], str]) -> None:
    async def attach(id: str, request: Request) -> CharacterItem:
        """Say that one of your LoRAs is of this character; the newest is its own."""
        owner, body = whose(request), await body_of(request, LoraLink, max_body_bytes)
        return CharacterItem.of(await desk.attach_lora(id, body.lora_id, owner))

    async def export(id: str, request: Request) -> Response:
        """The character as ComfyUI-ReActor keeps a face model: one embedding, of the recogniser that its metadata names."""
        query_of(request, Strict)
        content = await desk.face_model(id, whose(request))
        disposition = {"content-disposition": f'attachment; filename="{id}.safetensors"'}
        return Response(content, media_type="application/octet-stream", headers=_UNKEPT | disposition)

    async def take(request: Request, response: Response) -> CharacterItem:
        """A character of a face model that ComfyUI-ReActor saved: an embedding, with which only methods work that need no picture."""
        owner, body = whose(request), await body_of(request, FaceModelUpload, max_body_bytes)
        character = await desk.import_face_model(owner, body.name, body.file)
        response.headers["location"] = f"{_ALL}/{character.id}"
        return CharacterItem.of(character)

    app.post(f"{_ONE}/loras", summary="A LoRA of a character", responses=_GONE | _BAD, openapi_extra=documented(LoraLink))(attach)
    file: dict[int | str, dict[str, Any]] = {200: {"content": {"application/octet-stream": {}}}}
    app.get(f"{_ONE}/face-model", summary="Export a face model", response_class=Response, responses=_GONE | _BAD | file)(export)
    extra = documented(FaceModelUpload)
    app.post(f"{_ALL}/import", status_code=201, summary="Import a face model", responses=_BAD, openapi_extra=extra)(take)


async def _stripped(pictures: Sequence[bytes]) -> tuple[bytes, ...]:
    return await asyncio.to_thread(lambda: tuple(_bare(data, number) for number, data in enumerate(pictures)))


def _bare(data: bytes, number: int) -> bytes:
    try:
        return without_metadata(data)
    except InvalidImage as error:
        raise InvalidImage(f"Picture {number}: {error.message}", error.remedy, {"picture": number}) from error


def _new(contents: Sequence[bytes], facts: Sequence[PictureFacts]) -> list[NewPicture]:
    return [NewPicture(content=content, facts=fact) for content, fact in zip(contents, facts, strict=True)]


def _refuse_unusable(judgement: Judgement) -> None:
    if judgement.best is None:
        reasons = [verdict.reason for verdict in judgement.verdicts]
        said = " ".join(f"Picture {number}: {REASONS[str(reason)]}" for number, reason in enumerate(reasons[:5]))
        raise NoFaceDetected(f"None of the pictures can be used. {said}", details={"param": "pictures", "reasons": reasons})


def _not_to_be_best(judgement: Judgement, place: int | None) -> InvalidRequest:
    reason = judgement.verdicts[place].reason if place is not None else None
    return InvalidRequest(f"This picture cannot be the best. {REASONS.get(str(reason), '')}", "Choose another.", {"param": "best"})
