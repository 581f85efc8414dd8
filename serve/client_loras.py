"""The LoRAs of the SDK: `client.loras.add("ada.safetensors")`, `.list()`, `.get(id)`, `.delete(id)`,
`.download(id, "ada.safetensors")`; the same awaited on `AsyncClient`.

Files go up and come down as a stream: they may be larger than memory. Opens no LoRA: the server checks it.
"""

from __future__ import annotations

import io
import os
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, overload
from urllib.parse import quote

import httpx

from deployments.errors import InvalidRequest
from serve.answers import LoraDeleted, LoraItem, LorasResponse
from serve.client_answers import Answer, read, unreachable
from serve.client_downloads import Download, Progress
from serve.file_names import file_name

_PATH = "/v1/loras"
_SUFFIX = ".safetensors"
Place = str | os.PathLike[str]
File = Place | bytes


class Loras:
    """Over the connection of a `Client`."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def add(
        self,
        file: File,
        *,
        name: str | None = None,
        trigger_word: str | None = None,
        description: str | None = None,
        progress: Progress | None = None,
    ) -> LoraItem:
        """Keeps a LoRA on the server. file: the path of a safetensors file, or its bytes. name: by default the file's.

        Raises InvalidLora and LoraIncompatible, which name what is wrong, InvalidRequest for a file that cannot be read here.
        """
        with _opened(file, progress) as stream:
            return self._ask("POST", _PATH, LoraItem, **_form(file, stream, name, trigger_word, description))

    def list(self) -> LorasResponse:
        """Yours, the newest first."""
        return self._ask("GET", _PATH, LorasResponse)

    def get(self, id: str) -> LoraItem:
        """Raises LoraNotFound."""
        return self._ask("GET", _one(id), LoraItem)

    def delete(self, id: str) -> LoraDeleted:
        """Raises LoraNotFound."""
        return self._ask("DELETE", _one(id), LoraDeleted)

    @overload
    def download(self, id: str, path: None = None, *, progress: Progress | None = None) -> bytes: ...
    @overload
    def download(self, id: str, path: Place, *, progress: Progress | None = None) -> Path: ...
    def download(self, id: str, path: Place | None = None, *, progress: Progress | None = None) -> bytes | Path:
        """The file of a LoRA: its bytes, or where it was written. path: of the file (`*.safetensors`) or of a folder for it, where it is
        called as the LoRA is; made where it is not there. What is there is replaced once the new file is whole.

        Raises LoraNotFound, InvalidRequest for a path that cannot be written, ServerUnreachable also for a file that is cut off.
        """
        place = destination(path, self.get(id).name) if path is not None else None
        with Download(place, progress) as download:
            try:
                with self._http.stream("GET", _file(id)) as answer:
                    if not answer.is_success:
                        answer.read()
                    download.begin(_length(answer))
                    for piece in answer.iter_bytes():
                        download.add(piece)
            except httpx.TransportError as error:
                raise unreachable(self._http.base_url, error) from error
            return download.keep()

    def _ask(self, method: str, path: str, kind: type[Answer], **content: Any) -> Answer:
        try:
            return read(self._http.request(method, path, **content), kind)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error


class AsyncLoras:
    """Over the connection of an `AsyncClient`."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def add(
        self,
        file: File,
        *,
        name: str | None = None,
        trigger_word: str | None = None,
        description: str | None = None,
        progress: Progress | None = None,
    ) -> LoraItem:
        """As Loras.add."""
        with _opened(file, progress) as stream:
            return await self._ask("POST", _PATH, LoraItem, **_form(file, stream, name, trigger_word, description))

    async def list(self) -> LorasResponse:
        return await self._ask("GET", _PATH, LorasResponse)

    async def get(self, id: str) -> LoraItem:
        return await self._ask("GET", _one(id), LoraItem)

    async def delete(self, id: str) -> LoraDeleted:
        return await self._ask("DELETE", _one(id), LoraDeleted)

    @overload
    async def download(self, id: str, path: None = None, *, progress: Progress | None = None) -> bytes: ...
    @overload
    async def download(self, id: str, path: Place, *, progress: Progress | None = None) -> Path: ...
    async def download(self, id: str, path: Place | None = None, *, progress: Progress | None = None) -> bytes | Path:
        """As Loras.download."""
        place = destination(path, (await self.get(id)).name) if path is not None else None
        with Download(place, progress) as download:
            try:
                async with self._http.stream("GET", _file(id)) as answer:
                    if not answer.is_success:
                        await answer.aread()
                    download.begin(_length(answer))
                    async for piece in answer.aiter_bytes():
                        download.add(piece)
            except httpx.TransportError as error:
                raise unreachable(self._http.base_url, error) from error
            return download.keep()

    async def _ask(self, method: str, path: str, kind: type[Answer], **content: Any) -> Answer:
        try:
            return read(await self._http.request(method, path, **content), kind)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error


def destination(path: Place, name: str) -> Path:
    """Where the file of a LoRA goes. path: `*.safetensors`, or a folder. name: the LoRA's."""
    found = Path(path)
    return found if found.suffix == _SUFFIX else found / file_name(name, _SUFFIX)


class _Watched(io.BufferedReader):
    """A file that tells how far it was read. httpx reads it in pieces of 64 KiB."""

    def __init__(self, raw: io.RawIOBase, total: int, progress: Progress | None) -> None:
        super().__init__(raw)
        self._total, self._progress = total, progress

    def read(self, size: int | None = -1, /) -> bytes:
        piece = super().read(size)
        if self._progress is not None and piece:
            self._progress(self.tell(), self._total)
        return piece


def _opened(file: File, progress: Progress | None) -> AbstractContextManager[_Watched]:
    if isinstance(file, bytes):
        return _Watched(_Bytes(file), len(file), progress)
    try:
        raw = io.FileIO(file)
    except OSError as error:
        raise InvalidRequest(f"The file {os.fspath(file)} cannot be read: {error.strerror}.", "Check the path.") from error
    return _Watched(raw, os.fstat(raw.fileno()).st_size, progress)


class _Bytes(io.RawIOBase):
    """Bytes as a raw file."""

    def __init__(self, content: bytes) -> None:
        self._inner = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        return self._inner.readinto(buffer)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        return self._inner.seek(offset, whence)


def _form(file: File, stream: _Watched, name: str | None, trigger_word: str | None, description: str | None) -> dict[str, Any]:
    said = {"name": name, "trigger_word": trigger_word, "description": description}
    called = "lora.safetensors" if isinstance(file, bytes) else Path(file).name
    data = {field: text for field, text in said.items() if text is not None}
    return {"files": {"file": (called, stream, "application/octet-stream")}, "data": data}


def _one(id: str) -> str:
    return f"{_PATH}/{quote(id, safe='')}"


def _file(id: str) -> str:
    return f"{_one(id)}/file"


def _length(answer: httpx.Response) -> int:
    """Bytes that are to come, 0 where that is not told. Raises the error that the answer is."""
    if not answer.is_success:
        read(answer, LoraItem)
    length = answer.headers.get("content-length", "")
    return int(length) if length.isdecimal() else 0
