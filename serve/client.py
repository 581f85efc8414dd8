"""The Python SDK: `Client` and `AsyncClient` over HTTP, or in one process over a transport. httpx only: no Ray, no torch, starts at once.

    with Client("http://localhost:8000") as client:
        answer = client.generate(workflow="flux-pulid", prompt="a portrait in a library", reference_image="me.jpg", seed=7)
        answer.data[0].save("library.png")

Pictures may be paths, bytes, PIL pictures or arrays. Errors of the server are raised as what they were there: the LikenessError subclass
with its message, remedy and details. Checks nothing itself that the server checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from deployments.errors import LikenessError, ServerUnreachable
from serve.answers import AnalyzeResponse, CompareResponse, GenerateResponse, ModelsResponse, WorkflowsResponse
from serve.attachments import with_pictures
from serve.bridge import Bridge
from serve.problem import MEDIA_TYPE, Problem, error_of

DEFAULT_URL = "http://127.0.0.1:8000"
# A picture may take minutes on a slow machine; a server that is there answers the door at once.
_TIMEOUT = httpx.Timeout(900.0, connect=10.0)
_GENERATE, _ANALYZE, _COMPARE = "/v1/generate", "/v1/faces/analyze", "/v1/faces/compare"
_Answer = TypeVar("_Answer", bound=BaseModel)


class Client:
    """The synchronous client. transport: any of httpx's, an asynchronous one (httpx.ASGITransport) too."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
        timeout: httpx.Timeout | float = _TIMEOUT,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        synchronous = transport if transport is None or isinstance(transport, httpx.BaseTransport) else Bridge(transport)
        self._http = httpx.Client(base_url=base_url, transport=synchronous, timeout=timeout, headers=headers)

    def generate(self, **fields: Any) -> GenerateResponse:
        """Pictures: the fields of `serve.schemas.GenerateRequest`, by any of their spellings."""
        return _read(self._post(_GENERATE, fields), GenerateResponse)

    def analyze(self, image: Any, **fields: Any) -> AnalyzeResponse:
        """The faces of a picture, in the order that `face_index` counts them."""
        return _read(self._post(_ANALYZE, {"image": image, **fields}), AnalyzeResponse)

    def compare(self, first: Any, second: Any, **fields: Any) -> CompareResponse:
        """Whether two pictures show the same person."""
        return _read(self._post(_COMPARE, {"first": first, "second": second, **fields}), CompareResponse)

    def workflows(self) -> WorkflowsResponse:
        return _read(self._send("GET", "/v1/workflows"), WorkflowsResponse)

    def models(self) -> ModelsResponse:
        return _read(self._send("GET", "/v1/models"), ModelsResponse)

    def ready(self) -> bool:
        """Whether the server can draw now. False as well where nobody answers."""
        try:
            return self._send("GET", "/readyz").is_success
        except ServerUnreachable:
            return False

    def close(self) -> None:
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _post(self, path: str, fields: Mapping[str, Any]) -> httpx.Response:
        return self._send("POST", path, with_pictures(fields))

    def _send(self, method: str, path: str, body: object = None) -> httpx.Response:
        try:
            return self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from error


class AsyncClient:
    """The same, for asyncio. transport: an asynchronous one of httpx's."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout: httpx.Timeout | float = _TIMEOUT,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=base_url, transport=transport, timeout=timeout, headers=headers)

    async def generate(self, **fields: Any) -> GenerateResponse:
        """As Client.generate. Cancelling the task closes the connection, which frees the GPU within a step."""
        return _read(await self._post(_GENERATE, fields), GenerateResponse)

    async def analyze(self, image: Any, **fields: Any) -> AnalyzeResponse:
        return _read(await self._post(_ANALYZE, {"image": image, **fields}), AnalyzeResponse)

    async def compare(self, first: Any, second: Any, **fields: Any) -> CompareResponse:
        return _read(await self._post(_COMPARE, {"first": first, "second": second, **fields}), CompareResponse)

    async def workflows(self) -> WorkflowsResponse:
        return _read(await self._send("GET", "/v1/workflows"), WorkflowsResponse)

    async def models(self) -> ModelsResponse:
        return _read(await self._send("GET", "/v1/models"), ModelsResponse)

    async def ready(self) -> bool:
        try:
            return (await self._send("GET", "/readyz")).is_success
        except ServerUnreachable:
            return False

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.close()

    async def _post(self, path: str, fields: Mapping[str, Any]) -> httpx.Response:
        return await self._send("POST", path, with_pictures(fields))

    async def _send(self, method: str, path: str, body: object = None) -> httpx.Response:
        try:
            return await self._http.request(method, path, json=body)
        except httpx.TransportError as error:
            raise _unreachable(self._http.base_url, error) from error


def _unreachable(url: httpx.URL, error: httpx.TransportError) -> ServerUnreachable:
    return ServerUnreachable(f"{url} does not answer: {error or type(error).__name__}.", details={"url": str(url)})


def _read(response: httpx.Response, kind: type[_Answer]) -> _Answer:
    """The answer, or the error that it is. Raises ServerUnreachable for an answer that is not Likeness's."""
    if response.is_success:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            message = f"{response.url} answered something that is no {kind.__name__}: {error.error_count()} fields differ."
            raise ServerUnreachable(message, "Check the address; use a client of the server's version.") from error
    raise _error(response)


def _error(response: httpx.Response) -> LikenessError:
    if response.headers.get("content-type", "").startswith(MEDIA_TYPE):
        try:
            return error_of(Problem.model_validate_json(response.content))
        except ValidationError:
            pass  # Then it is told as any other answer that is not ours.
    text = " ".join(response.text.split())[:200]
    return ServerUnreachable(
        f"{response.url} answered {response.status_code}: {text or response.reason_phrase}", details={"status": response.status_code}
    )
