"""The characters of the SDK: `client.characters.create("Ada", ["1.jpg", "2.jpg"])`, `.add`, `.list`, `.get`, `.best`, `.delete`, and face
models in and out; the same awaited on `AsyncClient`. Opens no picture: the server checks them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx

from deployments.errors import InvalidRequest
from serve.attachments import data_uri
from serve.character_answers import CharacterDeleted, CharacterItem, CharactersResponse
from serve.client_answers import Answer, read, unreachable

_PATH = "/v1/characters"


class Characters:
    """Over the connection of a `Client`."""

    def __init__(self, http: httpx.Client) -> None:
        self._http = http

    def create(self, name: str, pictures: Sequence[Any]) -> CharacterItem:
        """A new character. pictures: 1 to 50 paths, bytes, PIL pictures or arrays. Raises NoFaceDetected where none can be used."""
        return self._ask("POST", _PATH, CharacterItem, json=_sent(pictures, name=name))

    def add(self, id: str, pictures: Sequence[Any]) -> CharacterItem:
        """More pictures of one. Raises CharacterNotFound."""
        return self._ask("POST", f"{_one(id)}/pictures", CharacterItem, json=_sent(pictures))

    def list(self) -> CharactersResponse:
        """Yours, the newest first."""
        return self._ask("GET", _PATH, CharactersResponse)

    def get(self, id: str, *, centroid: bool = False) -> CharacterItem:
        """Raises CharacterNotFound. centroid: with the judge's mean embedding."""
        return self._ask("GET", _one(id), CharacterItem, params={"centroid": "true"} if centroid else None)

    def rename(self, id: str, name: str) -> CharacterItem:
        return self._ask("PATCH", _one(id), CharacterItem, json={"name": name})

    def set_best(self, id: str, picture: str | None) -> CharacterItem:
        """The picture to be used where only one can be: whoever it shows is the person. None: chosen by quality again."""
        return self._ask("PATCH", _one(id), CharacterItem, json={"best": picture})

    def picture(self, id: str, picture: str) -> bytes:
        """The file of one of its pictures."""
        return self._bytes(_picture(id, picture))

    def remove_picture(self, id: str, picture: str) -> CharacterItem:
        return self._ask("DELETE", _picture(id, picture), CharacterItem)

    def attach_lora(self, id: str, lora: str) -> CharacterItem:
        """Says that one of your LoRAs is of this character. Raises LoraNotFound."""
        return self._ask("POST", f"{_one(id)}/loras", CharacterItem, json={"lora_id": lora})

    def export(self, id: str) -> bytes:
        """As a face model of ComfyUI-ReActor, a safetensors file."""
        return self._bytes(f"{_one(id)}/face-model")

    def import_face_model(self, file: str | Path | bytes, name: str | None = None) -> CharacterItem:
        """A character of such a file. name: by default the file's."""
        return self._ask("POST", f"{_PATH}/import", CharacterItem, **_model(file, name))

    def delete(self, id: str) -> CharacterDeleted:
        """With its pictures and everything that was measured of them. Raises CharacterNotFound."""
        return self._ask("DELETE", _one(id), CharacterDeleted)

    def _ask(self, method: str, path: str, kind: type[Answer], **content: Any) -> Answer:
        return read(self._send(method, path, **content), kind)

    def _bytes(self, path: str) -> bytes:
        return _content(self._send("GET", path))

    def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            return self._http.request(method, path, **content)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error


class AsyncCharacters:
    """Over the connection of an `AsyncClient`; each method as that of Characters."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http

    async def create(self, name: str, pictures: Sequence[Any]) -> CharacterItem:
        return await self._ask("POST", _PATH, CharacterItem, json=_sent(pictures, name=name))

    async def add(self, id: str, pictures: Sequence[Any]) -> CharacterItem:
        return await self._ask("POST", f"{_one(id)}/pictures", CharacterItem, json=_sent(pictures))

    async def list(self) -> CharactersResponse:
        return await self._ask("GET", _PATH, CharactersResponse)

    async def get(self, id: str, *, centroid: bool = False) -> CharacterItem:
        return await self._ask("GET", _one(id), CharacterItem, params={"centroid": "true"} if centroid else None)

    async def rename(self, id: str, name: str) -> CharacterItem:
        return await self._ask("PATCH", _one(id), CharacterItem, json={"name": name})

    async def set_best(self, id: str, picture: str | None) -> CharacterItem:
        return await self._ask("PATCH", _one(id), CharacterItem, json={"best": picture})

    async def picture(self, id: str, picture: str) -> bytes:
        return await self._bytes(_picture(id, picture))

    async def remove_picture(self, id: str, picture: str) -> CharacterItem:
        return await self._ask("DELETE", _picture(id, picture), CharacterItem)

    async def attach_lora(self, id: str, lora: str) -> CharacterItem:
        return await self._ask("POST", f"{_one(id)}/loras", CharacterItem, json={"lora_id": lora})

    async def export(self, id: str) -> bytes:
        return await self._bytes(f"{_one(id)}/face-model")

    async def import_face_model(self, file: str | Path | bytes, name: str | None = None) -> CharacterItem:
        return await self._ask("POST", f"{_PATH}/import", CharacterItem, **_model(file, name))

    async def delete(self, id: str) -> CharacterDeleted:
        return await self._ask("DELETE", _one(id), CharacterDeleted)

    async def _ask(self, method: str, path: str, kind: type[Answer], **content: Any) -> Answer:
        return read(await self._send(method, path, **content), kind)

    async def _bytes(self, path: str) -> bytes:
        return _content(await self._send("GET", path))

    async def _send(self, method: str, path: str, **content: Any) -> httpx.Response:
        try:
            return await self._http.request(method, path, **content)
        except httpx.TransportError as error:
            raise unreachable(self._http.base_url, error) from error


def _sent(pictures: Sequence[Any], **fields: str) -> dict[str, Any]:
    return {**fields, "pictures": [data_uri(picture) for picture in pictures]}


def _model(file: str | Path | bytes, name: str | None) -> dict[str, Any]:
    if isinstance(file, bytes):
        content, called = file, "face model"
    else:
        path = Path(file)
        try:
            content, called = path.read_bytes(), path.stem
        except OSError as error:
            raise InvalidRequest(f"The file {path} cannot be read: {error.strerror}.", "Check the path.") from error
    return {"files": {"file": ("model.safetensors", content, "application/octet-stream")}, "data": {"name": name or called}}


def _content(response: httpx.Response) -> bytes:
    if not response.is_success:
        read(response, CharacterDeleted)  # raises the error that the answer is
    return response.content


def _one(id: str) -> str:
    return f"{_PATH}/{quote(id, safe='')}"


def _picture(id: str, picture: str) -> str:
    return f"{_one(id)}/pictures/{quote(picture, safe='')}"
