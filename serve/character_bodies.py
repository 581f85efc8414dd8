"""What `/v1/characters` is sent: JSON with pictures as base64, or a form with files. Counted while it is read, whatever its headers say."""

from __future__ import annotations

import base64
import binascii
from typing import Annotated, Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from deployments.errors import InvalidRequest, TooLarge
from deployments.images import from_text
from deployments.store.character_values import MOST_PICTURES
from serve.bodies import MULTIPART, counted, json_object, media_of, refuse_query, unreadable
from serve.problem import given_twice, invalid

_TEXT_BYTES = 64 * 2**10
_FILES = frozenset({"pictures", "file"})
_REMEDY = "Send JSON (content-type: application/json) or a form (multipart/form-data)."


def _several(value: object) -> object:
    """A picture alone is a list of one."""
    return [value] if isinstance(value, str | bytes) else value


def _picture(value: object) -> object:
    return from_text(value) if isinstance(value, str) else value


def _file(value: object) -> object:
    if not isinstance(value, str):
        return value
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidRequest("`file` is no base64.", "Send the file as base64, or as the file of a form.", {"param": "file"}) from error


Pictures = Annotated[
    list[Annotated[bytes, BeforeValidator(_picture)]],
    BeforeValidator(_several),
    Field(
        min_length=1,
        max_length=MOST_PICTURES,
        description="PNG, JPEG or WebP of one person; in JSON as base64 or data URI, in a form files.",
    ),
]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid")


class NewCharacter(_Body):
    """A person, by name, with pictures."""

    name: str = Field(description="What you call them.")
    pictures: Pictures


class MorePictures(_Body):
    pictures: Pictures


class CharacterChange(_Body):
    """What is left out stays as it is."""

    name: str | None = None
    best: str | None = Field(default=None, description="The id of a picture; null chooses by quality again.")


class LoraLink(_Body):
    lora_id: str


class FaceModelUpload(_Body):
    name: str
    file: Annotated[bytes, BeforeValidator(_file)] = Field(description="A face model of ComfyUI-ReActor, safetensors; in JSON as base64.")


Body = TypeVar("Body", bound=BaseModel)


async def body_of(request: Request, kind: type[Body], limit: int) -> Body:
    """Raises InvalidRequest for a body that is none of its kind, InvalidImage for base64 that is none, TooLarge above `limit` bytes."""
    refuse_query(request)
    body = counted(request, limit, TooLarge(f"The body is larger than {limit} bytes.", "Send smaller pictures, or fewer at a time."))
    fields = await _form(body) if media_of(request) == MULTIPART else json_object(await body.body(), _REMEDY)
    pictures = fields.get("pictures")
    if isinstance(pictures, list) and len(pictures) > MOST_PICTURES:  # before any of them is unpacked
        message = f"`pictures` has {len(pictures)} pictures; a character has at most {MOST_PICTURES}."
        raise InvalidRequest(message, "Send the best of them.", {"param": "pictures"})
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        raise invalid(error) from error


def documented(kind: type[BaseModel]) -> dict[str, Any]:
    """What a route takes, for the OpenAPI document."""
    schema = kind.model_json_schema()
    medias = ("application/json", MULTIPART) if _FILES & kind.model_fields.keys() else ("application/json",)
    return {"requestBody": {"required": True, "content": {media: {"schema": schema} for media in medias}}}


async def _form(request: Request) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    try:
        # One file more than may be: what is too many is then told in our words.
        async with request.form(max_files=MOST_PICTURES + 1, max_fields=8, max_part_size=_TEXT_BYTES) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile) != (name in _FILES):
                    raise InvalidRequest(f"{ascii(name[:60])} came as a {'text' if name in _FILES else 'file'}.", "Send files as files.")
                if isinstance(value, UploadFile) and name == "pictures":
                    fields.setdefault(name, []).append(await value.read())
                elif name in fields:
                    raise given_twice(name)
                else:
                    fields[name] = await value.read() if isinstance(value, UploadFile) else value
    except HTTPException as error:
        raise unreadable(error) from error
    return fields
