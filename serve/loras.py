"""`/v1/loras`: routes over anything that answers `LoraCalls`, and the body of an upload. Knows neither Ray nor what a LoRA is.

An upload is a form with a file, or JSON with the file as base64. Its size is counted while it is read, whatever its headers say.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Protocol

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from deployments.errors import InvalidRequest, StoreUnavailable, TooLarge
from deployments.store.loras import SUFFIX, LoraInfo
from serve.answers import LoraDeleted, LoraItem, LorasResponse
from serve.bodies import MULTIPART, counted, json_object, media_of, refuse_query, unreadable
from serve.file_answers import FileAnswer, is_known
from serve.file_names import attachment, file_name
from serve.jobs import Strict, query_of
from serve.problem import MEDIA_TYPE, Problem, given_twice, invalid

_PATH, _ONE, _FILE = "/v1/loras", "/v1/loras/{id}", "/v1/loras/{id}/file"
_BINARY = "application/octet-stream"
_REMEDY = "Send JSON with `file` (base64) and `name`, or a form with the file."
# What a form or JSON has around the file: three short texts and their names.
_AROUND_BYTES = 64 * 2**10
_GONE: dict[int | str, dict[str, Any]] = {404: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": "You have no such LoRA."}}
_BAD: dict[int | str, dict[str, Any]] = {
    422: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": "No LoRA, or one for another model; `detail` names the keys."}
}
_SENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {_BINARY: {"schema": {"type": "string", "format": "binary"}}}, "description": "The safetensors file, whole."},
    304: {"description": "It is the one that `if-none-match` names."},
    **_GONE,
}
# It may be kept, and whoever keeps it asks each time: what is deleted is not there.
_KEPT = {"cache-control": "private, no-cache", "x-content-type-options": "nosniff"}


class LoraCalls(Protocol):
    """What the routes need; the methods of `deployments.lora_server.LoraServer`."""

    async def add(self, content: bytes, name: str, owner: str, trigger_word: str | None, description: str) -> LoraInfo: ...
    async def list(self, owner: str) -> Sequence[LoraInfo]: ...
    async def get(self, id: str, owner: str) -> LoraInfo: ...
    async def delete(self, id: str, owner: str) -> str: ...
    async def path(self, sha256: str) -> Path: ...


def add_lora_routes(app: FastAPI, calls: LoraCalls, max_bytes: int, owner_of: Callable[[Request], str]) -> None:
    """max_bytes: of a LoRA's file; of more, no more is read. owner_of: whose request it is; raises where nobody's."""

    async def add(request: Request, response: Response) -> LoraItem:
        """Keep a LoRA. All of it is read and fitted to the base model first: what would not wholly apply is refused."""
        owner = owner_of(request)
        upload = await _upload(request, max_bytes)
        info = await calls.add(upload.file, upload.name, owner, upload.trigger_word, upload.description)
        response.headers["location"] = f"{_PATH}/{info.id}"
        return LoraItem.of(info)

    async def listed(request: Request) -> LorasResponse:
        """Your LoRAs, the newest first."""
        query_of(request, Strict)
        return LorasResponse(data=[LoraItem.of(info) for info in await calls.list(owner_of(request))])

    async def show(id: str, request: Request) -> LoraItem:
        """One of your LoRAs."""
        query_of(request, Strict)
        return LoraItem.of(await calls.get(id, owner_of(request)))

    async def file(id: str, request: Request) -> Response:
        """The file of one of your LoRAs, as it was uploaded or trained."""
        query_of(request, Strict)
        owner = owner_of(request)
        info = await calls.get(id, owner)
        headers = {"etag": f'"{info.sha256}"', "content-disposition": attachment(file_name(info.name, SUFFIX)), **_KEPT}
        if is_known(request, headers["etag"]):
            return Response(status_code=304, headers=headers)
        path = await calls.path(info.sha256)
        try:
            opened = await asyncio.to_thread(path.open, "rb")
        except OSError as error:
            await calls.get(id, owner)  # raises where it was deleted meanwhile
            raise StoreUnavailable(f"The file of {id} cannot be read: {error.strerror}.") from error
        return FileAnswer(opened, _BINARY, headers)

    async def delete(id: str, request: Request) -> LoraDeleted:
        """Delete one of your LoRAs, and its file. A request that has not read it yet fails."""
        query_of(request, Strict)
        await calls.delete(id, owner_of(request))
        return LoraDeleted(id=id)

    app.post(_PATH, status_code=201, summary="Keep a LoRA", responses=_BAD, openapi_extra={"requestBody": _documented()})(add)
    app.get(_PATH, summary="Your LoRAs")(listed)
    app.get(_ONE, summary="One of your LoRAs", responses=_GONE)(show)
    app.get(_FILE, summary="A LoRA's file", response_class=Response, responses=_SENT)(file)
    app.delete(_ONE, summary="Delete a LoRA", responses=_GONE)(delete)


def _decoded(file: object) -> bytes:
    """Of JSON, base64; of a form, bytes already. InvalidRequest itself: pydantic's error would repeat a gigabyte."""
    if isinstance(file, bytes):
        return file
    wrong = InvalidRequest("`file` is no base64.", "Send the file as base64, or as the file of a form.", {"param": "file"})
    if not isinstance(file, str):
        raise wrong
    try:
        return base64.b64decode(file, validate=True)
    except (binascii.Error, ValueError) as error:
        raise wrong from error


class LoraUpload(BaseModel):
    """A LoRA to be kept: a safetensors file, and what is to be known of it."""

    model_config = ConfigDict(extra="forbid")

    file: Annotated[bytes, BeforeValidator(_decoded)] = Field(description="The safetensors file; in JSON as base64.")
    name: str = Field(description="What you call it. In a form, by default the file's name.")
    trigger_word: str | None = Field(default=None, description="What calls it up in a prompt. By default what the file says, if anything.")
    description: str = ""


def _documented() -> dict[str, Any]:
    schema = LoraUpload.model_json_schema()
    as_form = {**schema, "required": ["file"]}
    return {"required": True, "content": {MULTIPART: {"schema": as_form}, "application/json": {"schema": schema}}}


async def _upload(request: Request, limit: int) -> LoraUpload:
    """Raises InvalidRequest for a body that is none, or is larger than a file of `limit` bytes makes it."""
    refuse_query(request)
    as_form = media_of(request) == MULTIPART
    body = counted(request, (limit if as_form else limit * 4 // 3 + 4) + _AROUND_BYTES, _too_large(limit))
    fields = await _form(body) if as_form else json_object(await body.body(), _REMEDY)
    try:
        upload = LoraUpload.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from error
    if len(upload.file) > limit:
        raise _too_large(limit)
    return upload


async def _form(request: Request) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    try:
        async with request.form(max_files=1, max_fields=8, max_part_size=_AROUND_BYTES) as form:
            for name, value in form.multi_items():
                if name in fields:
                    raise given_twice(name)
                if isinstance(value, UploadFile) != (name == "file"):
                    raise InvalidRequest(f"{ascii(name[:60])} came as a {'file' if name != 'file' else 'text'}.", "Send `file` as a file.")
                fields[name] = value
            file = fields.get("file")
            if isinstance(file, UploadFile):
                fields.setdefault("name", _called(file.filename or ""))
                fields["file"] = await file.read()
    except HTTPException as error:
        raise unreadable(error) from error
    return fields


def _called(filename: str) -> str:
    """Without its folders, of whichever system, and its ending."""
    return re.split(r"[/\\]", filename)[-1].removesuffix(".safetensors")


def _too_large(limit: int) -> TooLarge:
    return TooLarge(f"The file is larger than {limit} bytes.", "Send a LoRA of a lower rank, or in half precision.")
