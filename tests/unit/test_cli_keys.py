"""`likeness keys`: from making a key to what was done with it, in the store of this machine and in one by URL."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import httpx
import pytest
import typer
from typer.testing import CliRunner, Result

from deployments.errors import InvalidRequest, LikenessError, StoreUnavailable, Unauthenticated
from deployments.store.audit import AuditEntry, AuditLog
from deployments.store.keys import KeyStore
from deployments.store.settings import STORE_ROOT_VARIABLE
from serve.callers import SCOPES
from serve.cli_keys import keys
from tests.door_places import Place

ROOT = Path(__file__).resolve().parents[2]
WIDE = {"COLUMNS": "300"}


@pytest.fixture(params=["here", "url", "variable"])
def where(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, list[str]]:
    """The URL of the store that the command works on, and what it has to be told."""
    monkeypatch.delenv("LIKENESS_STORE_URL", raising=False)
    monkeypatch.setenv(STORE_ROOT_VARIABLE, str(tmp_path / "here"))
    if request.param == "here":
        return f"sqlite:///{tmp_path / 'here' / 'likeness.db'}", []
    url = f"sqlite:///{tmp_path / 'there' / 'likeness.db'}"
    if request.param == "url":
        return url, ["--store", url]
    monkeypatch.setenv("LIKENESS_STORE_URL", url)
    return url, []


def likeness(*arguments: object) -> Result:
    return CliRunner().invoke(keys, [*map(str, arguments)], env=WIDE)


def made(*arguments: object) -> str:
    result = likeness("create", *arguments)
    assert result.exit_code == 0, result.output
    return result.stdout.strip()


def test_from_making_to_revoking(where: tuple[str, list[str]], tmp_path: Path) -> None:
    url, store = where
    assert "likeness keys create" in likeness("list", *store).stdout
    key = made("Ada [red]", "--scope", "loras", "--scope", "jobs", "--owner", "studio", "--expires", "90d", "--queued-jobs", 3, *store)
    assert re.fullmatch(r"lk_[0-9a-f]{12}_[0-9A-Za-z]{43}", key)
    with closing(KeyStore(url)) as kept:
        info = kept.verify(key)
    assert (info.owner, info.scopes, info.queued_jobs) == ("studio", frozenset({"jobs", "loras"}), 3) and info.expires_at is not None
    assert 89 < (info.expires_at - datetime.now(UTC)).total_seconds() / 86_400 <= 90
    listed = likeness("list", *store).stdout
    for text in (info.id, "Ada [red]", "studio", "jobs, loras", "3 jobs", "valid"):
        assert text in listed
    assert key not in listed and key.rpartition("_")[2] not in likeness("list", "--json", *store).stdout
    assert info.id not in likeness("list", "--owner", "bruno", *store).stdout
    assert "is revoked" in likeness("revoke", info.id, *store).stdout
    assert info.id not in likeness("list", *store).stdout and "revoked" in likeness("list", "--all", *store).stdout
    with closing(KeyStore(url)) as kept, pytest.raises(Unauthenticated):
        kept.verify(key)
    assert (tmp_path / "here").exists() == ("/here/" in url), "nothing is made where nothing was asked for"


def test_the_key_opens_a_door_and_the_audit_tells_of_it(where: tuple[str, list[str]]) -> None:
    url, store = where
    answer = json.loads(likeness("create", "k", "--scope", "all", "--json", *store).stdout)
    assert answer["scopes"] == sorted(SCOPES) and answer["owner"] == answer["id"] and answer["state"] == "valid"

    async def visit(place: Place) -> None:
        async with place.client() as http:
            headers = {"authorization": f"Bearer {answer['key']}"}
            assert (await http.get("/v1/models", headers=headers)).json()["owner"] == answer["owner"]
            assert (await http.post("/v1/loras", headers={**headers, "x-request-id": "mine-7"})).status_code == 200
            assert isinstance(await http.get("/v1/models"), httpx.Response)

    with closing(Place(url)) as place:
        asyncio.run(visit(place))
    told = likeness("audit", *store).stdout
    assert "POST /v1/loras" in told and "mine-7" in told and "401" in told and told.index("mine-7") < told.index("401")
    (entry,) = json.loads(likeness("audit", "--owner", answer["owner"], "--since", "1h", "--json", *store).stdout)["data"]
    assert (entry["key"], entry["subject"], entry["status"]) == (answer["id"], f"lora_{'a' * 24}", 200)
    assert "401" in likeness("audit", "--limit", 1, *store).stdout and "mine-7" not in likeness("audit", "--limit", 1, *store).stdout


def test_what_is_old_can_be_left_out(where: tuple[str, list[str]]) -> None:
    url, store = where
    made("k", *store)
    with closing(AuditLog(url, every_s=3600)) as log:
        old = datetime(2026, 1, 1, tzinfo=UTC)
        log.note(AuditEntry(at=old, owner=None, key=None, request="[bold]old", action="GET /v1/jobs", subject=None, status=403))
    assert "[bold]old" in likeness("audit", *store).stdout
    assert "Nothing was changed" in likeness("audit", "--since", "7d", *store).stdout


def test_without_scopes_a_key_draws(where: tuple[str, list[str]]) -> None:
    url, store = where
    with closing(KeyStore(url)) as kept:
        assert kept.verify(made("k", *store)).scopes == {"generate"}


@pytest.mark.parametrize(
    ("arguments", "kind", "says"),
    [
        (("create", "k", "--scope", "everything"), InvalidRequest, "no scope"),
        (("create", " "), InvalidRequest, "`name`"),
        (("create", "k", "--owner", "a/b"), InvalidRequest, "`owner`"),
        (("create", "k", "--expires", "soon"), InvalidRequest, "no length of time"),
        (("create", "k", "--expires", "0d"), InvalidRequest, "is past"),
        (("create", "k", "--queued-jobs", "0"), InvalidRequest, "`queued_jobs`"),
        (("revoke", "lk_nobodys"), InvalidRequest, "no API key"),
        (("audit", "--since", "-1d"), InvalidRequest, "no length of time"),
        (("list", "--store", "mysql://x"), StoreUnavailable, "neither PostgreSQL nor"),
    ],
)
def test_what_is_wrong_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], kind: type[LikenessError], says: str
) -> None:
    monkeypatch.setenv(STORE_ROOT_VARIABLE, str(tmp_path))
    result = likeness(*arguments)
    assert isinstance(result.exception, kind) and says in result.exception.message


def test_the_help_teaches() -> None:
    said = likeness("--help").stdout
    assert all(scope in said for scope in SCOPES) and "likeness keys create" in said and "$LIKENESS_STORE" in said


def test_no_model_library_and_no_ray_is_loaded() -> None:
    heavy = {"torch", "ray", "diffusers", "onnxruntime"}
    source = f"import serve.cli_keys, serve.door, sys; print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
    assert isinstance(keys, typer.Typer)
