"""Errors on the wire: LikenessError <-> application/problem+json (RFC 9457), in both directions. Knows no HTTP framework."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from deployments.errors import InvalidRequest, LikenessError

MEDIA_TYPE = "application/problem+json"
RETRY_AFTER_S = 2
"""Of an answer that says when to come again, where nothing tells how long that takes: a picture of the embedded model."""
_TYPE_PREFIX = "urn:likeness:problem:"
# Of a rejected value, what an error may repeat: a picture in base64 would fill the log.
_SHOWN_CHARACTERS = 60
# Of the findings: a body may hold a million wrong fields.
_SHOWN_FINDINGS = 20
# What pydantic puts behind a field's name to say which of its several kinds was tried.
_KIND = re.compile(r"(int|str|float|bool)$|(constrained|literal|function|list|tagged|lax|json)\b.*[-\[]")


class Problem(BaseModel):
    """What is wrong, in RFC 9457's fields and some of ours. `code` is stable: programs read it, people read `detail` and `remedy`."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "type": "urn:likeness:problem:multiple_faces",
                    "title": "A picture shows several faces and the request does not say which one is meant.",
                    "status": 422,
                    "detail": "Picture 0 of person 0 shows 2 faces.",
                    "code": "multiple_faces",
                    "param": "reference_image",
                    "remedy": "Name one with `face_index`: 0 is the largest face.",
                    "details": {"boxes": [[12, 20, 80, 101], [110, 25, 160, 90]]},
                }
            ]
        }
    )

    type: str = Field(default="about:blank", description="`code` as a URI.")
    title: str = Field(description="What kind of problem this is; the same for every occurrence.")
    status: int = Field(ge=400, le=599)
    detail: str = Field(default="", description="What is wrong this time.")
    code: str = Field(default="internal_error", description="Stable name of the kind.")
    param: str | None = Field(default=None, description="The field of the request that is at fault, where one is.")
    remedy: str = Field(default="", description="What to do about it.")
    retryable: bool = Field(default=False, description="Whether the same request, sent again unchanged, may succeed by itself.")
    request_id: str | None = Field(default=None, description="What the server's log calls this request.")
    details: dict[str, Any] = Field(
        default_factory=dict, description="Facts for a program: boxes of the faces found, keys that are missing."
    )


def problem_of(error: LikenessError) -> Problem:
    """The problem that an error is on the wire. `details["param"]`, where the raiser gave it, becomes `param`."""
    details = dict(error.details)
    param = details.pop("param", None)
    return Problem(
        type=f"{_TYPE_PREFIX}{error.code}",
        title=" ".join((type(error).__doc__ or "").split()),
        status=error.status,
        detail=error.message,
        code=error.code,
        param=str(param) if param is not None else None,
        remedy=error.remedy,
        retryable=error.retryable,
        details=details,
    )


def error_of(problem: Problem) -> LikenessError:
    """The error that a problem was. A code that this version doesn't know becomes a LikenessError with `details["code"]`."""
    kind = next((kind for kind in _kinds(LikenessError) if kind.code == problem.code), None)
    details: dict[str, object] = dict(problem.details)
    if problem.param is not None:
        details["param"] = problem.param
    if kind is None:
        kind, details = LikenessError, {**details, "code": problem.code, "status": problem.status}
    return kind(problem.detail or problem.title, problem.remedy or None, details)


def invalid(error: ValidationError) -> InvalidRequest:
    """pydantic's findings as one InvalidRequest: the first in words, as many as help under `details["errors"]`."""
    by_field: dict[object, dict[str, object]] = {}
    for item in error.errors(include_url=False, include_context=False):
        finding = _finding(item)
        # A field of several kinds (an index, or "largest") is wrong once for each; the first says enough.
        by_field.setdefault(finding["param"], finding)
    found = list(by_field.values())[:_SHOWN_FINDINGS]
    first = found[0]
    where = f"`{first['param']}`: " if first["param"] else ""
    others = ", ".join(str(item["param"]) for item in found[1:]) + (", ..." if len(found) < len(by_field) else "")
    more = f" ({len(by_field) - 1} more: {others}.)" if len(found) > 1 else ""
    details: dict[str, object] = {"errors": found}
    if first["param"]:
        details["param"] = first["param"]
    return InvalidRequest(f"{where}{first['reason']}{more}", None, details)


def _finding(item: Mapping[str, Any]) -> dict[str, object]:
    unknown = item["type"] == "extra_forbidden"
    # The last part of an unknown field is what the caller wrote, even if it is called `int`.
    last = len(item["loc"]) - 1 if unknown else -1
    parts = [part for place, part in enumerate(item["loc"]) if isinstance(part, int) or place == last or not _KIND.match(part)]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{_cut(part)}" for part in parts).lstrip(".")
    if unknown:
        reason = "there is no such field."
    elif item["type"] == "missing":
        reason = "this field is needed."
    else:
        reason = f"{str(item['msg']).removeprefix('Value error, ')}{_shown(item['input'])}."
    return {"param": param, "reason": reason}


def _cut(name: str) -> str:
    return name if len(name) <= _SHOWN_CHARACTERS else f"{name[:_SHOWN_CHARACTERS]}…"


def _shown(value: object) -> str:
    """The rejected value, where it is short enough to help and no whole body."""
    if isinstance(value, Mapping | list):
        return ""
    if isinstance(value, str | bytes) and len(value) > _SHOWN_CHARACTERS:  # cut first: spelt whole, a file would be four times itself
        length = f"{len(value)} {'characters' if isinstance(value, str) else 'bytes'}"
        return f", not {repr(value[:_SHOWN_CHARACTERS])[:_SHOWN_CHARACTERS]}… ({length})"
    text = repr(value)
    return f", not {text}" if len(text) <= _SHOWN_CHARACTERS else f", not {text[:_SHOWN_CHARACTERS]}… ({len(text)} characters)"


def _kinds(kind: type[LikenessError]) -> Iterator[type[LikenessError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from _kinds(child)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON. Of a name given twice the last would count, in silence."""
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise given_twice(name)
        fields[name] = value
    return fields


def given_twice(name: str) -> InvalidRequest:
    return InvalidRequest(f"The field {ascii(name[:60])} is given twice.", "Give it once.")
