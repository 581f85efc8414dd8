"""What is kept: the same on SQLite and on PostgreSQL, to whoever owns it, whole, once, and with several processes at it."""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import ForeignKey, String, insert, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Mapped, mapped_column

from deployments.errors import InvalidRequest, LoraNotFound, MissingWeights, StoreUnavailable
from deployments.store.engine import Database, open_engine, parsed
from deployments.store.loras import LoraStore, bounded, labelled
from deployments.store.migrate import migrate
from deployments.store.settings import STORE_ROOT_VARIABLE, StoreSettings
from deployments.store.tables import Base, LoraRow
from tests.store_places import FILE, add, add_and_delete, add_here, at_once, migrate_here

CONTENT, OTHER = b"of a LoRA " * 1000, b"of another"


@pytest.fixture(params=["sqlite", "postgresql"])
def empty(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a database with nothing in it."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'new' / 'likeness.db'}"
    url: str | None = request.getfixturevalue("server")
    if url is None:
        pytest.skip("PostgreSQL, or its driver psycopg, is not installed")
    engine = open_engine(parsed(url))
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    return url


@pytest.fixture
def url(empty: str) -> str:
    migrate(empty)
    return empty


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[LoraStore]:
    store = LoraStore(url, tmp_path / "files")
    yield store
    store.close()


def files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


def test_migrations_make_what_the_tables_say_from_nothing_and_again(empty: str, tmp_path: Path) -> None:
    for _ in range(2):
        migrate(empty)
        engine = open_engine(parsed(empty))
        with engine.connect() as connection:
            assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []
        engine.dispose()
        store = LoraStore(empty, tmp_path)
        add(store, CONTENT)
        store.close()
    store = LoraStore(empty, tmp_path)
    assert len(store.list("ada")) == 2
    store.close()


def test_several_processes_may_migrate_one_database_at_once(empty: str) -> None:
    at_once(migrate_here, (empty,), (empty,))
    database = Database(empty)
    with database.reading() as session:
        assert session.execute(text("SELECT version_num FROM alembic_version")).scalars().all() == ["0004"]
    database.close()


def test_a_database_of_a_newer_version_is_left_alone(url: str) -> None:
    engine = open_engine(parsed(url))
    with engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    with pytest.raises(StoreUnavailable, match="newer version"):
        migrate(url)


def test_sqlite_keeps_a_log_and_enforces_foreign_keys(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    database = Database(url)
    with database.reading() as session:
        assert session.execute(text("PRAGMA journal_mode")).scalar() == "wal"

    class Pin(Base):
        __tablename__ = "pins"
        id: Mapped[str] = mapped_column(String(8), primary_key=True)
        lora: Mapped[str] = mapped_column(ForeignKey("loras.id"))

    try:
        with database.writing() as session:
            Base.metadata.create_all(session.connection(), tables=[Base.metadata.tables["pins"]])
        with pytest.raises(StoreUnavailable, match="FOREIGN KEY") as caught, database.writing() as session:
            session.execute(insert(Pin).values(id="1", lora="lora_nobodys"))
        assert isinstance(caught.value.__cause__, IntegrityError)
    finally:
        Base.metadata.remove(Base.metadata.tables["pins"])
        database.close()


def test_who_reads_does_not_wait_for_who_writes(url: str, store: LoraStore) -> None:
    id = add(store, CONTENT)
    database = Database(url)
    with database.writing() as session:
        session.get_one(LoraRow, id).name = "changed"
        session.flush()
        started = time.monotonic()
        assert store.get(id, "ada").name == "hers"
        assert time.monotonic() - started < 5
    assert store.get(id, "ada").name == "changed"
    database.close()


def test_a_lora_belongs_to_its_owner(store: LoraStore) -> None:
    mine, theirs = add(store, CONTENT, "ada"), add(store, CONTENT, "bruno")
    assert [info.id for info in store.list("ada")] == [mine] and [info.id for info in store.list("bruno")] == [theirs]
    for question in (store.get, store.delete):
        with pytest.raises(LoraNotFound) as foreign:
            question(theirs, "ada")
        with pytest.raises(LoraNotFound) as unknown:
            question(f"{theirs[:-1]}{'0' if theirs[-1] != '0' else '1'}", "ada")
        assert foreign.value.message.partition("'")[0] == unknown.value.message.partition("'")[0]
    with pytest.raises(LoraNotFound, match=theirs):
        store.find([mine, theirs], "ada")
    assert store.get(theirs, "bruno").id == theirs


@pytest.mark.parametrize("id", ["", "lora_", "lora_" + "0" * 25, "\0", "\ud800", "' OR 1 = 1 --", "x" * 100_000])
def test_what_cannot_be_an_id_is_not_found(store: LoraStore, id: str) -> None:
    for question in (store.get, store.delete):
        with pytest.raises(LoraNotFound) as caught:
            question(id, "ada")
        assert len(caught.value.message) < 200


def test_everything_that_was_said_comes_back(store: LoraStore) -> None:
    before = datetime.now(UTC) - timedelta(seconds=1)
    said = labelled(" Ada ", "ada person", "Twenty pictures.\nRank 8. 👩‍🎨")
    with store.arriving(CONTENT) as arrival:
        info = store.keep(arrival, "ada", said, FILE)
    assert store.get(info.id, "ada") == info and store.find([info.id], "ada") == (info,)
    assert (info.name, info.trigger_word, info.bytes, info.metadata) == ("Ada", "ada person", len(CONTENT), FILE.metadata)
    assert before < info.created_at <= datetime.now(UTC) and info.description.endswith("👩‍🎨")
    assert store.path(info.sha256).read_bytes() == CONTENT


def test_a_request_finds_its_own_in_its_order_and_the_list_is_newest_first(store: LoraStore) -> None:
    ids = [add(store, content) for content in (CONTENT, OTHER, b"third")]
    assert [info.id for info in store.list("ada")] == ids[::-1]
    assert [info.id for info in store.find([ids[1], ids[0], ids[1]], "ada")] == [ids[1], ids[0], ids[1]]
    assert store.find([], "ada") == ()


def test_the_same_content_is_kept_once_until_its_last_row_goes(store: LoraStore, tmp_path: Path) -> None:
    ids = [add(store, CONTENT, owner) for owner in ("ada", "ada", "bruno")]
    assert len(set(ids)) == 3
    path = store.path(store.get(ids[0], "ada").sha256)
    assert files(tmp_path / "files") == [path] and path.parent.name == path.name[:2]
    store.delete(ids[0], "ada")
    store.delete(ids[2], "bruno")
    assert path.read_bytes() == CONTENT
    store.delete(ids[1], "ada")
    assert files(tmp_path / "files") == []


def test_what_is_not_kept_leaves_nothing(store: LoraStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest), store.arriving(CONTENT) as arrival:
        assert arrival.path.read_bytes() == CONTENT
        raise InvalidRequest("It does not fit.")
    assert files(tmp_path / "files") == [] and store.list("ada") == ()


def test_two_processes_add_the_same_content_at_once(url: str, store: LoraStore, tmp_path: Path) -> None:
    at_once(add_here, *((url, tmp_path / "files", CONTENT, owner) for owner in ("ada", "bruno")))
    (mine,), (theirs,) = store.list("ada"), store.list("bruno")
    assert mine.id != theirs.id and mine.sha256 == theirs.sha256
    assert files(tmp_path / "files") == [store.path(mine.sha256)]


def test_a_file_is_there_as_long_as_any_row_names_it_whoever_deletes_meanwhile(url: str, store: LoraStore, tmp_path: Path) -> None:
    at_once(add_and_delete, *((url, tmp_path / "files", CONTENT, owner, 40) for owner in ("ada", "bruno")))
    assert files(tmp_path / "files") == [] and not store.list("ada")


def test_what_dying_processes_left_is_swept_up(store: LoraStore, tmp_path: Path) -> None:
    kept = store.path(store.get(add(store, CONTENT), "ada").sha256)
    orphan = kept.parents[1] / "ab" / f"{'ab' * 32}.safetensors"
    arriving = kept.parents[1] / "arriving"
    abandoned, fresh = arriving / "1.safetensors", arriving / "2.safetensors"
    for path in (orphan, abandoned, fresh):
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(OTHER)
    os.utime(abandoned, (0, 0))
    assert store.sweep() == 1
    assert sorted(files(tmp_path / "files")) == sorted([kept, fresh])


def test_a_file_that_is_gone_is_told_by_whose_fault_it_is(store: LoraStore) -> None:
    id = add(store, CONTENT)
    sha256 = store.get(id, "ada").sha256
    store.path(sha256).unlink()
    with pytest.raises(MissingWeights, match=sha256):
        store.path(sha256)
    store.delete(id, "ada")
    with pytest.raises(LoraNotFound, match="deleted while"):
        store.path(sha256)
    with pytest.raises(ValueError, match="no sha256"):
        store.path("../../etc/passwd")


def test_a_file_that_was_damaged_is_whole_after_it_came_again(store: LoraStore) -> None:
    path = store.path(store.get(add(store, CONTENT), "ada").sha256)
    path.write_bytes(b"damaged")
    add(store, CONTENT)
    assert path.read_bytes() == CONTENT


def test_a_folder_that_cannot_be_written_keeps_nothing(url: str, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the folder should be")
    store = LoraStore(url, tmp_path / "taken")
    with pytest.raises(StoreUnavailable, match="taken"):
        add(store, CONTENT)
    assert store.list("ada") == ()
    store.close()


def test_a_row_that_cannot_be_written_leaves_no_row_and_the_sweep_takes_the_file(tmp_path: Path) -> None:
    migrate(f"sqlite:///{tmp_path / 'likeness.db'}")
    store = LoraStore(f"sqlite:///{tmp_path / 'likeness.db'}", tmp_path / "files")
    with closing(sqlite3.connect(tmp_path / "likeness.db")) as connection:
        connection.execute("CREATE TRIGGER full BEFORE INSERT ON loras BEGIN SELECT RAISE(ABORT, 'disk is full'); END")
    with pytest.raises(StoreUnavailable, match="disk is full"):
        add(store, CONTENT)
    assert store.list("ada") == () and len(files(tmp_path / "files")) == 1
    assert store.sweep() == 1 and files(tmp_path / "files") == []
    store.close()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("sqlite://", "absolute path"),
        ("sqlite:///likeness.db", "absolute path"),
        ("mysql://localhost/likeness", "neither PostgreSQL"),
        ("no database", "cannot be read"),
        ("postgresql+nodriver://localhost/x", "driver"),
    ],
)
def test_a_url_that_leads_nowhere_is_told(url: str, says: str) -> None:
    with pytest.raises(StoreUnavailable, match=says) as caught:
        Database(url)
    assert "sqlite:////" in caught.value.remedy or "postgres" in caught.value.remedy


def test_a_database_that_does_not_answer_is_told_without_the_password(tmp_path: Path) -> None:
    pytest.importorskip("psycopg")
    store = LoraStore("postgresql://ada:secret-word@127.0.0.1:1/likeness", tmp_path)
    with pytest.raises(StoreUnavailable) as caught:
        store.list("ada")
    assert "127.0.0.1" in str(caught.value) and "secret-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("said", "field"),
    [
        ({"name": " "}, "name"),
        ({"name": "x" * 201}, "name"),
        ({"name": "x\0y"}, "name"),
        ({"name": "x\ny"}, "name"),
        ({"name": "x", "trigger_word": "\x1b[2J"}, "trigger_word"),
        ({"name": "x", "description": "\ud800"}, "description"),
        ({"name": "x", "description": "x" * 4001}, "description"),
    ],
)
def test_what_an_owner_says_is_checked(said: dict[str, str], field: str) -> None:
    with pytest.raises(InvalidRequest, match=f"`{field}`") as caught:
        labelled(**said)
    assert caught.value.details == {"param": field}


def test_of_long_metadata_the_short_ones_are_kept() -> None:
    short = {f"key{k}": "value" for k in range(10)}
    assert bounded({"tags": "x" * 1_000_000} | short) == short
    many = bounded({f"key{k:05}": "x" * 1000 for k in range(1000)})
    assert 25 <= len(many) <= 32


def test_the_embedded_store_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(STORE_ROOT_VARIABLE, str(tmp_path))
    settings = StoreSettings()
    assert settings.files == tmp_path and settings.database == f"sqlite:///{tmp_path / 'likeness.db'}"
    chosen = StoreSettings.model_validate({"url": "postgresql://db/likeness", "folder": "/srv/likeness"})
    assert chosen.database == "postgresql://db/likeness" and chosen.files == Path("/srv/likeness")
