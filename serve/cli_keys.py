"""`likeness keys`: who may come in through a server's door. Works on the store itself, so that nobody can make keys over the network."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from rich.markup import escape

from deployments.errors import InvalidRequest
from deployments.store.audit import AuditLog
from deployments.store.keys import KeyInfo, KeyLimits, KeyStore
from deployments.store.migrate import migrate
from deployments.store.settings import StoreSettings
from serve.callers import SCOPES
from serve.cli_output import ERR, OUT, table

_HELP = f"""API keys: who may use a server, and for what.

    likeness keys create "Ada's laptop" --scope generate --scope loras

prints the key, once: only its hash is kept. Whoever calls sends it as `Authorization: Bearer lk_...`; the
command line and the SDK do, once it stands in $LIKENESS_KEY.

Scopes: {", ".join(SCOPES)}. LoRAs, characters and jobs belong to the owner of the key; other owners' are not there for it. Keys are made in
the store that the server has: the one of this machine ($LIKENESS_STORE), or --store with the URL that its settings name."""
keys = typer.Typer(help=_HELP, no_args_is_help=True)

Store = Annotated[
    str | None,
    typer.Option(
        "--store", envvar="LIKENESS_STORE_URL", help="URL of the server's database; without one, that of this machine ($LIKENESS_STORE)."
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print everything that is known, as JSON.")]
_SPAN = re.compile(r"(\d{1,6})([smhdw])")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 604_800}


@keys.command()
def create(
    name: Annotated[str, typer.Argument(help="What you call it: who has it, on which machine.", show_default=False)],
    scope: Annotated[
        list[str] | None, typer.Option(help=f"What it is for: {', '.join(SCOPES)}, or all. Give it again for more. [default: generate]")
    ] = None,
    owner: Annotated[
        str | None,
        typer.Option(
            help="Whose things it reaches: an owner of other keys, or `local` for what was kept without keys. By default its own."
        ),
    ] = None,
    expires: Annotated[str | None, typer.Option(help="After how long it ends: 12h, 90d, 52w. By default never.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests that it may send in a minute; else the server's.")] = None,
    concurrent_requests: Annotated[int | None, typer.Option(help="Requests that are answered at once; else the server's.")] = None,
    queued_jobs: Annotated[int | None, typer.Option(help="Jobs that may wait or run; else the server's.")] = None,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Make a key and print it, once. To replace a key, make another with the same --owner, and revoke the old one."""
    limits = KeyLimits(requests_per_minute=requests_per_minute, concurrent_requests=concurrent_requests, queued_jobs=queued_jobs)
    until = None if expires is None else datetime.now(UTC) + _span(expires)
    with _keys(store) as kept:
        info, key = kept.create(name, owner, _scopes(scope or ["generate"]), until, limits)
    if as_json:
        OUT.print_json(json.dumps({**_facts(info), "key": key}))
        return
    OUT.print(key, markup=False)
    ERR.print(f"{info.name}: {', '.join(sorted(info.scopes))}; owner {info.owner}; ends {_time(info.expires_at) or 'never'}.", markup=False)
    ERR.print("It is not shown again. Send it as the header `Authorization: Bearer <key>`, or set $LIKENESS_KEY.", markup=False)


@keys.command("list")
def list_keys(
    owner: Annotated[str | None, typer.Option(help="Only this owner's.")] = None,
    every: Annotated[bool, typer.Option("--all", help="Also those that are revoked or have expired.")] = False,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """The keys, the newest first; never their secrets."""
    with _keys(store) as kept:
        found = [info for info in kept.list(owner) if every or _state(info) == "valid"]
    if as_json:
        OUT.print_json(json.dumps({"data": [_facts(info) for info in found]}))
        return
    lines = table("id", "name", "owner", "scopes", "limits", "made", "last used", "state")
    for info in found:
        said = (info.name, info.owner, ", ".join(sorted(info.scopes)), _limits(info))
        times = (_time(info.created_at), _time(info.last_used_at))
        lines.add_row(info.id, *(escape(text) for text in said), *times, _state(info))
    OUT.print(lines if found else "No key: likeness keys create NAME")


@keys.command()
def revoke(
    id: Annotated[str, typer.Argument(help="The id of a key: lk_..., see `likeness keys list`.", show_default=False)],
    store: Store = None,
) -> None:
    """End a key for good, within five seconds on every server. What its owner has stays."""
    with _keys(store) as kept:
        info = kept.revoke(id)
    OUT.print(f"{info.id} ({info.name}) is revoked.", markup=False)


@keys.command()
def audit(
    owner: Annotated[str | None, typer.Option(help="Only what this owner's keys did.")] = None,
    since: Annotated[str | None, typer.Option(help="Only as old as this: 15m, 12h, 7d.")] = None,
    limit: Annotated[int, typer.Option(help="The newest so many.", min=1)] = 100,
    as_json: AsJson = False,
    store: Store = None,
) -> None:
    """Who changed what, and who was refused: the newest last. No contents are kept, only ids."""
    url = _url(store)
    with closing(AuditLog(url)) as log:
        found = log.entries(owner, None if since is None else datetime.now(UTC) - _span(since), limit)
    if as_json:
        OUT.print_json(json.dumps({"data": [{**asdict(entry), "at": entry.at.isoformat()} for entry in found]}))
        return
    lines = table("time (UTC)", "owner", "key", "action", "subject", "status", "request")
    for entry in found:
        said = (entry.owner or "", entry.key or "", entry.action, entry.subject or "", str(entry.status), entry.request)
        lines.add_row(f"{entry.at:%Y-%m-%d %H:%M:%S}", *(escape(text) for text in said))
    OUT.print(lines if found else "Nothing was changed, and nobody refused.")


def _url(store: str | None) -> str:
    """Of a database with the tables of this version."""
    url = store if store is not None else StoreSettings().database
    migrate(url)
    return url


@contextmanager
def _keys(store: str | None) -> Iterator[KeyStore]:
    with closing(KeyStore(_url(store))) as kept:
        yield kept


def _scopes(given: list[str]) -> list[str]:
    """Raises InvalidRequest for what is no scope."""
    unknown = [scope for scope in given if scope not in (*SCOPES, "all")]
    if unknown:
        raise InvalidRequest(f"{ascii(unknown[0][:60])} is no scope.", f"Use {', '.join(SCOPES)}, or all.", {"param": "scope"})
    return list(SCOPES) if "all" in given else given


def _span(said: str) -> timedelta:
    parts = _SPAN.fullmatch(said)
    if parts is None:
        raise InvalidRequest(f"{ascii(said[:60])} is no length of time.", "Say a number and s, m, h, d or w: 12h, 90d.")
    return timedelta(seconds=int(parts[1]) * _SECONDS[parts[2]])


def _state(info: KeyInfo) -> str:
    if info.revoked_at is not None:
        return "revoked"
    return "expired" if info.expires_at is not None and info.expires_at <= datetime.now(UTC) else "valid"


def _limits(info: KeyInfo) -> str:
    own = {"a minute": info.requests_per_minute, "at once": info.concurrent_requests, "jobs": info.queued_jobs}
    return ", ".join(f"{value} {what}" for what, value in own.items() if value is not None)


def _time(at: datetime | None) -> str:
    return "" if at is None else at.astimezone().strftime("%Y-%m-%d %H:%M")


def _facts(info: KeyInfo) -> dict[str, Any]:
    facts = {name: value.isoformat() if isinstance(value, datetime) else value for name, value in asdict(info).items()}
    return {**facts, "scopes": sorted(info.scopes), "state": _state(info)}
