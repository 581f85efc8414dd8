"""Which right each route needs: one table, which the door reads before a request reaches its route. An address that is not in it does not
exist, so that a route which is forgotten here is shut and not open."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

from fastapi import Request

from deployments.errors import Forbidden
from serve.callers import Caller

Right = Literal["open", "status", "docs", "generate", "faces", "characters", "loras", "jobs", "train", "admin"]
"""A scope of a key, or who needs none. open: everybody. status: everybody is told whether, and a key with `admin` what. docs: everybody
where the settings say so, else every key."""
_AUDITED = frozenset({"characters", "loras", "jobs", "train", "admin"})
_CHANGING = frozenset({"POST", "PUT", "PATCH", "DELETE"})


@dataclass(frozen=True)
class Access:
    """right: what a request needs. own_limit: the route bounds its body itself. prefix: the address as the table has it."""

    right: Right
    own_limit: bool = False
    prefix: str = ""

    def audits(self, method: str) -> bool:
        """Whether such a request changes something that stays; a plain drawing does not."""
        return self.right in _AUDITED and method in _CHANGING


ACCESS: Mapping[str, Access] = {
    "/healthz": Access("open"),
    "/readyz": Access("status"),
    "/docs": Access("docs"),
    "/openapi.json": Access("docs"),
    "/metrics": Access("admin"),
    "/v1/generate": Access("generate"),
    "/v1/images": Access("generate"),
    "/v1/workflows": Access("generate"),
    "/v1/models": Access("generate"),
    "/v1/faces": Access("faces"),
    "/v1/characters": Access("characters"),
    "/v1/loras": Access("loras"),
    "POST /v1/loras": Access("loras", own_limit=True),
    "/v1/jobs": Access("jobs"),
    "/v1/artifacts": Access("jobs"),
    "/v1/webhooks": Access("jobs"),
    "/v1/training": Access("train"),
    "POST /v1/training/jobs": Access("train", own_limit=True),
    "/v1/evaluations": Access("train"),
    "POST /v1/evaluations": Access("train", own_limit=True),
}
"""By the address of a route or of all beneath it, of one method or of all. The most exact one counts. The workflows' own addresses come
from configs/workflows/ and need `generate`."""
_NO_SUBTREE = frozenset({"/healthz", "/readyz", "/metrics", "/openapi.json"})


def access_to(method: str, path: str, workflows: Iterable[str] = ()) -> Access | None:
    """What a request needs; None for an address that does not exist. workflows: addresses of workflows."""
    if path in workflows:
        return Access("generate", prefix=path)
    above = path
    while above:
        found = ACCESS.get(f"{method} {above}") or ACCESS.get(above)
        if found is not None and (above == path or above not in _NO_SUBTREE):
            return Access(found.right, found.own_limit, above)
        above = above.rpartition("/")[0]
    return None


def require(caller: Caller, scope: str) -> None:
    """Raises Forbidden where the key is not for this: the door asks it of every route, a job of what it is to do."""
    if scope not in caller.scopes:
        has = ", ".join(sorted(caller.scopes)) or "none"
        raise Forbidden(f"The API key lacks the scope {scope!r}; it has {has}.", None, {"scope": scope})


def quota_of(request: Request) -> int | None:
    """How many jobs of the caller may wait or run; None where there is no door, or it is open."""
    quota = getattr(request.state, "queued_jobs", None)
    return quota if isinstance(quota, int) else None
