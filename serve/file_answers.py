"""Files as answers: a file that is open already, sent in pieces, and whether who asks has it already. Knows nobody's files.

A file is opened before its answer begins, while it can still be a 404. Who deletes it then takes nothing from whoever is reading.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from typing import BinaryIO

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

_PIECE_BYTES = 2**18


class FileAnswer(StreamingResponse):
    """Closes the file when the answer has ended, however it did."""

    def __init__(self, file: BinaryIO, media_type: str, headers: Mapping[str, str]) -> None:
        """file: at its beginning."""
        self._file = file
        length = {"content-length": str(os.fstat(file.fileno()).st_size)}
        # Read in threads: Starlette does so with an iterator that is none of asyncio's.
        super().__init__(iter(partial(file.read, _PIECE_BYTES), b""), headers={**headers, **length}, media_type=media_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file:
            await super().__call__(scope, receive, send)


def is_known(request: Request, etag: str) -> bool:
    """Whether the request says that it has what this tag (with its quotes) names: the answer is 304 then."""
    known = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
    return etag in known or "*" in known
