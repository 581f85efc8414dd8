"""DoorSettings: who may come in, and how much of what. The part `door` of AppSettings. Opens nothing."""

from __future__ import annotations

import ipaddress
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from deployments.errors import Forbidden, InvalidCatalog


def _unquoted(value: object) -> object:
    """YAML reads `on` and `off` without quotes as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class DoorSettings(BaseModel):
    """auth: whether requests need an API key. Without, everybody is one owner with every right, which only this machine may have.

    docs: whether /docs and /openapi.json may be read without a key. They say nothing of anybody.
    requests_per_minute, concurrent_requests, queued_jobs: of a key that has none of its own.
    refusals_per_minute: requests without a valid key that one address may send and be told so (an IPv6 address: all of its /64).
    body_seconds, body_bytes_per_second: a body must have come within so many seconds of waiting for it, and one more for each so many
    bytes of it: a slow line may take its time, one that holds back may not.
    audit_days: how long the audit log is kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    auth: Annotated[Literal["on", "off"], BeforeValidator(_unquoted)] = "on"
    docs: bool = True
    requests_per_minute: int = Field(default=600, ge=1)
    concurrent_requests: int = Field(default=64, ge=1)
    queued_jobs: int = Field(default=200, ge=1)
    refusals_per_minute: int = Field(default=30, ge=1)
    body_seconds: float = Field(default=30.0, gt=0)
    body_bytes_per_second: int = Field(default=32 * 2**10, ge=1)
    audit_days: int = Field(default=90, ge=1)


def refuse_open_door(settings: DoorSettings, host: str) -> None:
    """host: the address that a server is about to listen on. Raises InvalidCatalog for `auth: off` on any but this machine's own."""
    if settings.auth == "off" and not _is_loopback(host):
        raise InvalidCatalog(
            f"`auth: off` would open the server to everybody who reaches {host}.",
            "Listen on 127.0.0.1, or set `door: {auth: on}` and make keys with `likeness keys create`.",
        )


def refuse_other_pages(host: str, origin: str | None) -> None:
    """For a server with `auth: off`. host, origin: the headers of a request. Raises Forbidden unless both are this machine.

    Listening on the loopback address alone does not shut out the web: any page that a browser here shows may send requests to 127.0.0.1,
    and under a name of its own that it has lead there (DNS rebinding) read the answers. A browser says both; programs send no origin.
    """
    pages = [f"http://{host}", *([origin] if origin is not None else [])]
    if not all(_is_loopback(_host_of(page)) for page in pages):
        raise Forbidden(
            "A server with `auth: off` answers nobody but this machine, under one of its own names.",
            "Use http://127.0.0.1 or http://localhost, or set `door: {auth: on}`.",
        )


def _host_of(page: str) -> str:
    try:
        return urlsplit(page).hostname or ""
    except ValueError:  # brackets that hold no address
        return ""


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, of which nobody knows where it leads tomorrow; also the empty one, which means every address
        return False
