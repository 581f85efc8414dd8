"""Answers as the SDK reads them: the one that was asked for, or the error that the server told. Asks nothing itself."""

from __future__ import annotations

from typing import TypeVar

import httpx
from pydantic import BaseModel, ValidationError

from deployments.errors import LikenessError, QueueFull, ServerUnreachable
from serve.problem import MEDIA_TYPE, Problem, error_of

Answer = TypeVar("Answer", bound=BaseModel)


def read(response: httpx.Response, kind: type[Answer]) -> Answer:
    """The answer, or the error that it is, raised. Raises ServerUnreachable for an answer that is not Likeness's."""
    if response.is_success:
        try:
            return kind.model_validate_json(response.content)
        except ValidationError as error:
            message = f"{response.url} answered something that is no {kind.__name__}: {error.error_count()} fields differ."
            raise ServerUnreachable(message, "Check the address; use a client of the server's version.") from error
    raise _error(response)


def unreachable(url: httpx.URL, error: httpx.TransportError) -> ServerUnreachable:
    """Nobody answers at this address."""
    return ServerUnreachable(f"{url} does not answer: {error or type(error).__name__}.", details={"url": str(url)})


def _error(response: httpx.Response) -> LikenessError:
    if response.headers.get("content-type", "").startswith(MEDIA_TYPE):
        try:
            return error_of(Problem.model_validate_json(response.content))
        except ValidationError:
            pass  # Then it is told as any other answer that is not ours.
    text = " ".join(response.text.split())[:200]
    if response.status_code == 429:  # of a proxy before the server, Ray Serve's own too
        return QueueFull(f"{response.url} is busy: {text or response.reason_phrase}.")
    return ServerUnreachable(
        f"{response.url} answered {response.status_code}: {text or response.reason_phrase}", details={"status": response.status_code}
    )
