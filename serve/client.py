"""The Python SDK: `Client` and `AsyncClient` over HTTP, or in one process over a transport. httpx only: no Ray, no torch, starts at once.

    with Client("http://localhost:8000") as client:
        answer = client.generate(workflow="flux-pulid", prompt="a portrait in a library", reference_image="me.jpg", seed=7)
        answer.data[0].save("library.png")

Pictures may be paths, bytes, PIL pictures or arrays. Errors of the server are raised as what they were there: the LikenessError subclass
with its message, remedy and details. Checks nothing itself that the server checks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import httpx

from deployments.errors import ServerUnreachable
from serve.answers import AnalyzeResponse, CompareResponse, GenerateResponse, ModelsResponse, WorkflowsResponse
from serve.attachments import with_pictures
from serve.bridge import Bridge
from serve.client_answers import read, unreachable
from serve.client_characters import AsyncCharacters, Characters
from serve.client_jobs import AsyncJob, AsyncJobs, Job, Jobs
from serve.client_loras import AsyncLoras, Loras
from serve.client_training import AsyncEvaluations, AsyncTrainings, Evaluations, Trainings

DEFAULT_URL = "http://127.0.0.1:8000"
KEY_VARIABLE = "LIKENESS_KEY"
# A picture may take minutes on a slow machine; a server that is there answers the door at once.
_TIMEOUT = httpx.Timeout(900.0, connect=10.0)
_GENERATE, _ANALYZE, _COMPARE = "/v1/generate", "/v1/faces/analyze", "/v1/faces/compare"


class Client:
    """The synchronous client. transport: any of httpx's, an asynchronous one (httpx.ASGITransport) too. key: an API key (`lk_...`); by
    default that of $LIKENESS_KEY, where there is one."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        transport: httpx.BaseTransport | httpx.AsyncBaseTransport | None = None,
        timeout: httpx.Timeout | float = _TIMEOUT,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> None:
        synchronous = transport if transport is None or isinstance(transport, httpx.BaseTransport) else Bridge(transport)
        self._http = httpx.Client(base_url=base_url, transport=synchronous, timeout=timeout, headers=_with_key(headers, key))
        self.loras, self.characters, self.jobs = Loras(self._http), Characters(self._http), Jobs(self._http)
        self.training, self.evaluations = Trainings(self.jobs), Evaluations(self.jobs)

    def generate(self, **fields: Any) -> GenerateResponse:
        """Pictures: the fields of `serve.schemas.GenerateRequest`, by any of their spellings."""
        return read(self._post(_GENERATE, fields), GenerateResponse)

    def submit(self, **fields: Any) -> Job:
        """The same as a job, which no crash loses; see `Jobs.submit`."""
        return self.jobs.submit(**fields)

    def analyze(self, image: Any, **fields: Any) -> AnalyzeResponse:
        """The faces of a picture, in the order that `face_index` counts them."""
        return read(self._post(_ANALYZE, {"image": image, **fields}), AnalyzeResponse)

    def compare(self, first: Any, second: Any, **fields: Any) -> CompareResponse:
        """Whether two pictures show the same person."""
        return read(self._post(_COMPARE, {"first": first, "second": second, **fields}), CompareResponse)

    def workflows(self) -> WorkflowsResponse:
        return read(self._send("GET", "/v1/workflows"), WorkflowsResponse)

    def models(self) -> ModelsResponse:
        return read(self._send("GET", "/v1/models"), ModelsResponse)

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
            raise unreachable(self._http.base_url, error) from error


class AsyncClient:
    """The same, for asyncio. transport: an asynchronous one of httpx's."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        transport: httpx.AsyncBaseTransport | None = None,
        timeout: httpx.Timeout | float = _TIMEOUT,
        headers: Mapping[str, str] | None = None,
        key: str | None = None,
    ) -> None:
        self._http = httpx.AsyncClient(base_url=base_url, transport=transport, timeout=timeout, headers=_with_key(headers, key))
        self.loras, self.characters, self.jobs = AsyncLoras(self._http), AsyncCharacters(self._http), AsyncJobs(self._http)
        self.training, self.evaluations = AsyncTrainings(self.jobs), AsyncEvaluations(self.jobs)

    async def generate(self, **fields: Any) -> GenerateResponse:
        """As Client.generate. Cancelling the task closes the connection, which frees the GPU within a step."""
        return read(await self._post(_GENERATE, fields), GenerateResponse)

    async def submit(self, **fields: Any) -> AsyncJob:
        return await self.jobs.submit(**fields)

    async def analyze(self, image: Any, **fields: Any) -> AnalyzeResponse:
        return read(await self._post(_ANALYZE, {"image": image, **fields}), AnalyzeResponse)

    async def compare(self, first: Any, second: Any, **fields: Any) -> CompareResponse:
        return read(await self._post(_COMPARE, {"first": first, "second": second, **fields}), CompareResponse)

    async def workflows(self) -> WorkflowsResponse:
        return read(await self._send("GET", "/v1/workflows"), WorkflowsResponse)

    async def models(self) -> ModelsResponse:
        return read(await self._send("GET", "/v1/models"), ModelsResponse)

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
            raise unreachable(self._http.base_url, error) from error


def _with_key(headers: Mapping[str, str] | None, key: str | None) -> dict[str, str]:
    found = key if key is not None else os.environ.get(KEY_VARIABLE)
    return {**({"authorization": f"Bearer {found}"} if found else {}), **(headers or {})}
