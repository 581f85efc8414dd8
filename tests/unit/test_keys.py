"""API keys and the audit log: the same on SQLite and on PostgreSQL, of a secret only its hash, and nothing that was said in a request."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text, update

from deployments.errors import InvalidRequest, StoreUnavailable, Unauthenticated
from deployments.store.audit import AuditEntry, AuditLog
from deployments.store.engine import Database, open_engine, parsed
from deployments.store.key_tables import AuditRow, KeyRow
from deployments.store.keys import KeyInfo, KeyLimits, KeyStore, is_key
from deployments.store.migrate import migrate
from deployments.store.tables import Base


@pytest.fixture
def keys(url: str) -> Iterator[KeyStore]:
    with closing(KeyStore(url)) as store:
        yield store


def change(url: str, id: str, **values: object) -> None:
    with closing(Database(url)) as database, database.writing() as session:
        session.execute(update(KeyRow).where(KeyRow.id == id).values(**values))


def test_the_migration_makes_what_the_tables_say(url: str) -> None:
    engine = open_engine(parsed(url))

    def ours(name: str | None, kind: str, parents: object) -> bool:
        return kind != "table" or name in ("api_keys", "audit")

    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"include_name": ours})
        found = compare_metadata(context, Base.metadata)
    engine.dispose()
    assert [item for item in found if "api_keys" in str(item) or "audit" in str(item)] == []


def test_a_key_is_shown_once_and_only_its_hash_is_kept(url: str, keys: KeyStore, tmp_path: Path) -> None:
    info, key = keys.create(" Ada's laptop ", scopes=("jobs", "generate", "jobs"))
    assert re.fullmatch(r"lk_[0-9a-f]{12}_[0-9A-Za-z]{43}", key) and is_key(key) and key.startswith(info.id + "_")
    assert (info.owner, info.name, info.scopes) == (info.id, "Ada's laptop", frozenset({"generate", "jobs"}))
    assert keys.verify(key) == info and keys.list() == (info,)
    secret = key.rpartition("_")[2]
    with closing(Database(url)) as database, database.reading() as session:
        kept = session.execute(text("SELECT * FROM api_keys")).all()
    assert info.id in str(kept) and secret not in str(kept)
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(secret.encode() in content for content in files)


def test_secrets_use_all_of_their_alphabet_and_none_comes_twice(keys: KeyStore) -> None:
    made = {keys.create("k")[1].rpartition("_")[2] for _ in range(60)}
    assert len(made) == 60 and len(set("".join(made))) == 62


def test_what_is_not_the_key_does_not_open(keys: KeyStore) -> None:
    info, key = keys.create("k")
    other, foreign = keys.create("other")
    secret = key.rpartition("_")[2]
    flipped = key[:-1] + ("a" if key[-1] != "a" else "b")
    for wrong in (
        "",
        "lk_",
        info.id,
        secret,
        flipped,
        key + "a",
        key.upper(),
        f"{other.id}_{secret}",
        f"lk_{'0' * 12}_{secret}",
        "\0",
        "é",
        "lk_" + "x" * 10**6,
    ):
        with pytest.raises(Unauthenticated) as caught:
            keys.verify(wrong)
        assert len(str(caught.value)) < 300 and secret not in str(caught.value)
    said = set()
    for unknown in (flipped, f"lk_{'0' * 12}_{secret}"):
        with pytest.raises(Unauthenticated) as caught:
            keys.verify(unknown)
        said.add(str(caught.value))
    assert len(said) == 1, "whether there is such a key is told to nobody"
    assert keys.verify(foreign).id == other.id


def test_a_revoked_key_stays_revoked_and_is_told_to_who_has_it_alone(keys: KeyStore) -> None:
    info, key = keys.create("k")
    revoked = keys.revoke(info.id)
    assert revoked.revoked_at is not None and keys.revoke(info.id) == revoked
    with pytest.raises(Unauthenticated, match="was revoked"):
        keys.verify(key)
    with pytest.raises(Unauthenticated) as caught:
        keys.verify(key[:-1] + ("a" if key[-1] != "a" else "b"))
    assert "revoked" not in str(caught.value)
    for unknown in ("lk_" + "0" * 12, "", "\0", "x" * 10_000, "' OR 1 = 1 --"):
        with pytest.raises(InvalidRequest, match="no API key"):
            keys.revoke(unknown)


def test_a_key_expires(url: str, keys: KeyStore) -> None:
    info, key = keys.create("k", expires_at=datetime.now(UTC) + timedelta(days=1))
    assert keys.verify(key).expires_at == info.expires_at
    change(url, info.id, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(Unauthenticated, match="expired at"):
        keys.verify(key)


def test_several_keys_of_one_owner(keys: KeyStore) -> None:
    ours = [keys.create(name, owner="studio")[0].id for name in ("first", "second")]
    theirs = keys.create("third", owner="Bruno@example.org")[0].id
    assert [info.id for info in keys.list("studio")] == ours[::-1]
    assert {info.id for info in keys.list()} == {*ours, theirs}


def test_limits_come_back(keys: KeyStore) -> None:
    limits = KeyLimits(requests_per_minute=5, concurrent_requests=2, queued_jobs=1)
    info = keys.verify(keys.create("k", limits=limits)[1])
    assert (info.requests_per_minute, info.concurrent_requests, info.queued_jobs) == (5, 2, 1)


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        ({"name": " "}, "name"), ({"name": "x" * 201}, "name"), ({"name": "a\0b"}, "name"), ({"name": "\ud800"}, "name"),
        ({"owner": ""}, "owner"), ({"owner": "a/b"}, "owner"), ({"owner": "x" * 65}, "owner"), ({"owner": "-x"}, "owner"),
        ({"scopes": ()}, "scopes"), ({"scopes": ("Jobs",)}, "scopes"), ({"scopes": ("",)}, "scopes"),
        ({"limits": KeyLimits(queued_jobs=0)}, "queued_jobs"), ({"limits": KeyLimits(requests_per_minute=2**31)}, "requests_per_minute"),
        ({"expires_at": datetime(2020, 1, 1, tzinfo=UTC)}, "expires_at"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_refused(tmp_path: Path, wrong: dict[str, object], field: str) -> None:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    with closing(KeyStore(url)) as keys:
        with pytest.raises(InvalidRequest, match=f"`{field}`"):
            keys.create(**{"name": "k", **wrong})  # type: ignore[arg-type]
        assert keys.list() == ()


def test_the_last_use_is_written_once_a_minute(url: str, keys: KeyStore) -> None:
    info, key = keys.create("k")
    assert [keys.touch(info.id) for _ in range(3)] == [True, False, False]
    used = keys.verify(key).last_used_at
    assert used is not None and datetime.now(UTC) - used < timedelta(seconds=30)
    change(url, info.id, last_used_at=datetime.now(UTC) - timedelta(seconds=61))
    assert [keys.touch(info.id) for _ in range(2)] == [True, False]
    assert not keys.touch("lk_" + "0" * 12)


ENTRY = AuditEntry(
    at=datetime(2026, 5, 1, 12, 0, 0, 250_000, tzinfo=UTC), owner="ada", key="lk_0123456789ab", request="req_1",
    action="DELETE /v1/loras/{id}", subject="lora_" + "a" * 24, status=200,
)  # fmt: skip


def test_entries_come_back_in_their_order(url: str) -> None:
    nobody = AuditEntry(at=datetime.now(UTC), owner=None, key=None, request="req_2", action="POST /v1/jobs", subject=None, status=401)
    with closing(AuditLog(url, every_s=3600)) as log:
        for entry in (ENTRY, nobody):
            log.note(entry)
        assert log.entries() == () and log.flush() == 2 and log.flush() == 0
        assert log.entries() == (ENTRY, nobody)
        assert log.entries(owner="ada") == (ENTRY,) and log.entries(owner="bruno") == ()
        assert log.entries(since=datetime.now(UTC) - timedelta(hours=1)) == (nobody,)
        assert log.entries(limit=1) == (nobody,)
        assert log.forget() == 1 and log.entries() == (nobody,)


def test_noting_waits_for_nobody_and_the_thread_writes_everything(url: str) -> None:
    log = AuditLog(url, every_s=0.05)

    def note(worker: int) -> None:
        for number in range(300):
            log.note(replace(ENTRY, at=datetime.now(UTC), request=f"{worker}.{number}"))

    threads = [threading.Thread(target=note, args=(worker,)) for worker in range(4)]
    with closing(Database(url)) as database, database.writing() as session:  # SQLite's one writer is taken meanwhile
        session.execute(text("UPDATE api_keys SET name = name"))
        began = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - began < 10  # a writer would wait for 30 seconds
    log.close()
    with closing(AuditLog(url)) as again:
        found = [entry.request for entry in again.entries(limit=5000)]
    assert sorted(found) == sorted(f"{worker}.{number}" for worker in range(4) for number in range(300))
    for worker in range(4):
        mine = [int(request.partition(".")[2]) for request in found if request.startswith(f"{worker}.")]
        assert mine == sorted(mine)


def test_while_the_database_is_away_as_much_waits_as_may(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"sqlite:///{tmp_path / 'later' / 'likeness.db'}"
    log = AuditLog(url, every_s=0.02, room=10)
    for number in range(25):
        log.note(replace(ENTRY, at=datetime.now(UTC), request=str(number)))
    with pytest.raises(StoreUnavailable):
        log.flush()
    until = time.monotonic() + 20
    while "waits for the database" not in caplog.text and time.monotonic() < until:
        time.sleep(0.01)
    migrate(url)
    while not (tmp_path / "later" / "likeness.db").exists() or len(log.entries()) < 10:
        assert time.monotonic() < until
        time.sleep(0.01)
    log.close()
    assert "15 entries of the audit log were dropped" in caplog.text and caplog.text.count("waits for the database") == 1
    with closing(AuditLog(url)) as again:
        assert [entry.request for entry in again.entries()] == [str(number) for number in range(10)]


def test_closing_writes_what_waits_and_may_be_done_twice(url: str) -> None:
    log = AuditLog(url, every_s=3600)
    log.note(ENTRY)
    log.close()
    log.close()
    with closing(AuditLog(url)) as again:
        assert again.entries() == (ENTRY,)


def test_rows_hold_nothing_but_what_the_entry_says() -> None:
    assert set(AuditRow.__table__.columns.keys()) == {"id", "at", "owner", "key", "request", "action", "subject", "status"}
    assert "secret" not in " ".join(KeyInfo.__dataclass_fields__)
