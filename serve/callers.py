"""Who asks: the owner and the rights behind a request. Set by the door (serve/door.py), read by routes; knows no key and no database."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import Request

from deployments.store.settings import EVERYBODY

SCOPES = ("generate", "faces", "characters", "loras", "jobs", "train", "admin")
"""What a key may be for. `generate`: every workflow and what lists them; `jobs`: submitting and looking after jobs (a job's workflow needs
its own scope too); `admin`: metrics and what concerns every owner."""


@dataclass(frozen=True)
class Caller:
    """owner: whose things these are. key: the id of the API key, None where the door is open. request: the id of this request, which
    stands in every log line about it."""

    owner: str = EVERYBODY
    key: str | None = None
    scopes: frozenset[str] = frozenset(SCOPES)
    request: str = ""


def caller_of(request: Request) -> Caller:
    """The caller that the door found; everybody, where there is no door."""
    found = getattr(request.state, "caller", None)
    return found if isinstance(found, Caller) else Caller()
