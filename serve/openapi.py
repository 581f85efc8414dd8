"""The OpenAPI document: FastAPI's, with the problems that any route may answer. One place for all of them, since most are not the routes'
own: the door answers some, the limits of a body others, and every error goes through one table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from serve.bodies import MULTIPART
from serve.problem import MEDIA_TYPE, Problem

_SCHEMAS = "#/components/schemas"
_PROBLEM = {"schema": {"$ref": f"{_SCHEMAS}/{Problem.__name__}"}}
# What FastAPI says of parameters that it refuses itself; here they are problems as well.
_NEVER_SENT = ("HTTPValidationError", "ValidationError")
ANYWHERE: Mapping[str, str] = {
    "401": "The request brings no API key that is valid.",
    "403": "The API key is not for this, or a licence forbids it.",
    "404": "What the address or the body names is not there, or not yours.",
    "408": "The body did not come in time.",
    "413": "The body is larger than may be.",
    "422": "The request cannot be done; `code` says why, `remedy` what to do.",
    "429": "Too many requests, or as many wait as may wait; `retry-after` says when to come again.",
    "499": "The request was cancelled.",
    "500": "A fault of the server's.",
    "503": "A part of the server is not there at present; `retry-after` says when to come again.",
}
"""By status. A route that says more of one says it itself."""


class Application(FastAPI):
    """FastAPI with that document."""

    def openapi(self) -> dict[str, Any]:
        """Made when it is first asked for: no route is added after that."""
        if self.openapi_schema is None:
            document = super().openapi()
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas.setdefault(Problem.__name__, Problem.model_json_schema(ref_template=f"{_SCHEMAS}/{{model}}"))
            for operation in _operations(document):
                _tell(operation["responses"])
            for name in _NEVER_SENT:
                schemas.pop(name, None)
            self.openapi_schema = document
        return self.openapi_schema


def body_schema(kind: type[BaseModel]) -> dict[str, Any]:
    """What a route takes that reads its body itself, as JSON or as a form."""
    schema = kind.model_json_schema(ref_template=f"{_SCHEMAS}/{{model}}")
    parts = schema.pop("$defs", {})
    return {"required": True, "content": {media: {"schema": _inlined(schema, parts)} for media in ("application/json", MULTIPART)}}


def _inlined(schema: Any, parts: Mapping[str, Any]) -> Any:
    """The schema with its references replaced by what they name: FastAPI knows nothing of bodies that it does not parse."""
    if isinstance(schema, list):
        return [_inlined(item, parts) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _inlined(parts[schema["$ref"].rsplit("/", 1)[1]], parts)
    return {key: _inlined(value, parts) for key, value in schema.items()}


def _operations(document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    for path in document.get("paths", {}).values():
        yield from path.values()


def _tell(responses: dict[str, Any]) -> None:
    """What a route says of its own problems stays, as what it is: application/problem+json alone."""
    for status in sorted({*ANYWHERE, *(status for status in responses if status >= "400")}):
        own = responses.get(status, {})
        content = own.get("content", {})
        unsent = any(part.get("schema", {}).get("$ref", "").rpartition("/")[2] in _NEVER_SENT for part in content.values())
        # FastAPI puts the model of a problem beneath the media type of the route's good answers as well.
        kept = {} if unsent or MEDIA_TYPE in content else content
        text = ANYWHERE[status] if unsent or not own else own["description"]
        responses[status] = {"description": text, "content": {**kept, MEDIA_TYPE: _PROBLEM}}
