"""How routes read a body: what it says it is, its bytes counted while they come, a JSON object, a form. Knows no field of any.

Whatever a header says of the length, no more is read than may be.
"""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

from fastapi import Request
from starlette.datastructures import FormData
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.types import Message

from deployments.errors import InvalidRequest, LikenessError, TooLarge
from serve.problem import once

MULTIPART = "multipart/form-data"
# Of a length that is no number of bytes any more; int() of many digits takes long.
_LENGTH_DIGITS = 18


def media_of(request: Request) -> str:
    """`application/json`, say; without its parameters, in lower case."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def refuse_query(request: Request) -> None:
    """Raises InvalidRequest: a field that stands there would be left out in silence."""
    if request.url.query:
        raise InvalidRequest("What stands behind the `?` of the address is not read.", "Put every field into the body.")


def counted(request: Request, limit: int, refusal: LikenessError) -> Request:
    """The same request, whose body raises `refusal` once it is longer than `limit` bytes. Raises it at once where the length is told."""
    length = request.headers.get("content-length", "")
    if length.isascii() and length.isdecimal() and (len(length) > _LENGTH_DIGITS or int(length) > limit):
        raise refusal
    total = 0

    async def counting() -> Message:
        nonlocal total
        message = await request.receive()
        total += len(message.get("body", b""))
        if total > limit:
            raise refusal
        return message

    return Request(request.scope, counting)


@asynccontextmanager
async def form_of(request: Request, max_files: int, max_text_bytes: int) -> AsyncIterator[FormData]:
    """The form of a request, as `Request.form` reads it, for the length of the context. max_text_bytes: of all its parts that are no files
    together; those stay in memory while it comes, and files do not. Raises InvalidRequest, TooLarge."""
    try:
        async with aclosing(request.stream()) as stream:
            form = await _Parser(request.headers, stream, max_files=max_files, max_part_size=max_text_bytes).parse()
    except MultiPartException as error:
        raise unreadable(HTTPException(400, error.message)) from error
    try:
        yield form
    finally:
        await form.close()


class _Parser(MultiPartParser):
    """Starlette's bounds each text; this one all of them."""

    _texts = 0

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._current_part.file is None:
            self._texts += end - start
            if self._texts > self.max_part_size:
                raise TooLarge(f"The form has more than {self.max_part_size} bytes of text.", "Send its pictures as files, not as text.")
        super().on_part_data(data, start, end)


def json_object(content: bytes, remedy: str) -> dict[str, Any]:
    """Raises InvalidRequest for what is no JSON object, or has a name twice."""
    try:
        fields = json.loads(content, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest("The body is no JSON.", remedy) from error
    if not isinstance(fields, dict):
        raise InvalidRequest("The body is not a JSON object.", remedy)
    return fields


def unreadable(error: HTTPException) -> InvalidRequest:
    """error: how Starlette refuses a form."""
    return InvalidRequest(f"The form cannot be read: {error.detail}", "Send multipart/form-data as a browser or curl -F does.")
