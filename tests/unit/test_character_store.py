"""Characters as they are kept: the same on SQLite and on PostgreSQL, to whoever owns them, and gone without a trace when they go."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import text

from deployments.errors import CharacterNotFound, InvalidRequest, LoraNotFound, StoreUnavailable
from deployments.store import character_tables
from deployments.store.character_values import MOST_PICTURES, Character, Judgement, NewPicture, Notice, PictureFacts, Verdict
from deployments.store.characters import CharacterStore
from deployments.store.engine import Database, open_engine, parsed
from deployments.store.loras import LoraStore
from deployments.store.migrate import migrate
from deployments.store.tables import Base
from tests.store_places import add as add_lora

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def store(url: str, tmp_path: Path) -> Iterator[CharacterStore]:
    store = CharacterStore(url, tmp_path / "files")
    yield store
    store.close()


def new(seed: int) -> NewPicture:
    """A picture with what was measured of it: bytes that stand nowhere else."""
    content = b"picture " + hashlib.sha256(b"%d" % seed).digest() * 200
    embedding, judge = (hashlib.shake_256(b"%s %d" % (kind, seed)).digest(2048) for kind in (b"own", b"judge"))
    facts = PictureFacts(
        sha256=hashlib.sha256(content).hexdigest(), format="jpeg", width=640, height=480, faces=1, box=(1.0, 2.0, 3.5, 4.0), score=0.9,
        landmarks=((1.0, 2.0),) * 5, age=30, sex="F", size=90.5, sharpness=300.0, frontality=0.9, yaw=-3.0, compression=0.1, quality=0.5,
        embedding=embedding, judge_embedding=judge,
    )  # fmt: skip
    return NewPicture(content=content, facts=facts)


def judgement(count: int, best: int | None = 0) -> Judgement:
    """All of them are kept, the best first, then in their order."""
    order = [place for place in ([] if best is None else [best]) + list(range(count)) if place < count]
    ranks = {place: rank for rank, place in enumerate(dict.fromkeys(order))}
    return Judgement(
        verdicts=tuple(Verdict(rank=ranks[place], cosine=0.5) for place in range(count)),
        best=best if count else None,
        embedding=hashlib.shake_256(b"mean").digest(2048),
        centroid=hashlib.shake_256(b"centroid").digest(2048),
        spread=(0.9, 0.8),
        notices=(Notice(code="two_people", message="Two.", groups=((0,), tuple(range(1, count)))),),
        recogniser="faces-mini",
        judge="face-judge-mini",
    )


def make(store: CharacterStore, *seeds: int, owner: str = "ada", best: int = 0) -> Character:
    return store.create(owner, "Ada", [new(seed) for seed in seeds], judgement(len(seeds), best))


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_the_migration_makes_what_the_tables_say(url: str) -> None:
    engine = open_engine(parsed(url))
    names = {name for name, table in Base.metadata.tables.items() if table in vars(character_tables).values() or "character" in name}
    with engine.connect() as connection:
        only = {"include_object": lambda item, name, kind, *_: kind != "table" or name in names}
        assert compare_metadata(MigrationContext.configure(connection, opts=only), Base.metadata) == []
    engine.dispose()
    assert len(names) == 3


def test_everything_that_was_found_comes_back(store: CharacterStore, tmp_path: Path) -> None:
    made = store.create(" ada ", " Ada 👩‍🎨 ", [new(1), new(2), new(3)], judgement(3, best=1))
    assert store.get(made.id, " ada ") == made and (made.name, made.recogniser, made.judge) == ("Ada 👩‍🎨", "faces-mini", "face-judge-mini")
    assert [picture.facts for picture in made.pictures] == [new(seed).facts for seed in (1, 2, 3)]
    assert [picture.verdict.rank for picture in made.pictures] == [1, 0, 2] and made.best == made.pictures[1].id and not made.best_by_hand
    assert made.spread == (0.9, 0.8) and made.centroid == judgement(3).centroid and made.embedding == judgement(3).embedding
    (warning,) = made.warnings
    assert warning.groups == ((made.pictures[0].id,), (made.pictures[1].id, made.pictures[2].id))
    assert [path.read_bytes() for path in files(tmp_path / "files" / "characters" / made.id)] == [
        content for _, content in sorted((picture.id, new(seed).content) for picture, seed in zip(made.pictures, (1, 2, 3), strict=True))
    ]
    assert store.picture(made.id, made.pictures[2].id, " ada ") == (new(3).content, "jpeg")
    (entry,) = store.list(" ada ")
    assert (entry.id, entry.pictures, entry.kept, entry.best, entry.from_face_model) == (made.id, 3, 3, made.best, False)


def test_references_are_the_best_first_and_no_more_than_asked(store: CharacterStore) -> None:
    made = make(store, *range(25), best=7)
    wanted = [7, *(place for place in range(25) if place != 7)]
    assert store.references(made.id, "ada", 30) == tuple(new(seed).content for seed in wanted)
    assert store.references(made.id, "ada") == tuple(new(seed).content for seed in wanted[:20])
    assert store.references(made.id, "ada", limit=1) == (new(7).content,)
    size = 640 * 480
    assert store.references(made.id, "ada", pixels=3 * size + 1) == tuple(new(seed).content for seed in wanted[:3])
    assert store.references(made.id, "ada", pixels=1) == (new(7).content,)
    aside = replace(judgement(25), verdicts=(Verdict(reason="no_face"),) * 25, best=None)
    assert store.change(made, "ada", aside)
    with pytest.raises(InvalidRequest, match="no picture that can be used"):
        store.references(made.id, "ada")


def test_another_owners_character_does_not_exist(store: CharacterStore) -> None:
    made = make(store, 1, owner="bruno")
    for ask in (
        lambda id: store.get(id, "ada"), lambda id: store.delete(id, "ada"), lambda id: store.references(id, "ada"),
        lambda id: store.lora(id, "ada"), lambda id: store.rename(id, "ada", "x"), lambda id: store.attach_lora(id, "lora_x", "ada"),
        lambda id: store.picture(id, made.pictures[0].id, "ada"), lambda id: store.change(replace(made, id=id), "ada", judgement(1)),
    ):  # fmt: skip
        for id in (made.id, f"character_{'0' * 24}", "", "\0", "\ud800", "' OR 1 = 1 --", "x" * 10_000, "../" + made.id):
            with pytest.raises(CharacterNotFound) as caught:
                ask(id)
            assert len(caught.value.message) < 200
    with pytest.raises(CharacterNotFound, match="no picture"):
        store.picture(made.id, "../../likeness.db", "bruno")
    assert store.list("ada") == () and store.get(made.id, "bruno") == made


def test_pictures_come_and_go_and_their_files_with_them(store: CharacterStore, tmp_path: Path) -> None:
    first = make(store, 1, 2)
    gone = first.pictures[0].id
    assert store.change(first, "ada", judgement(2), add=[new(3)], remove={gone})
    second = store.get(first.id, "ada")
    assert [picture.facts.sha256 for picture in second.pictures] == [new(seed).facts.sha256 for seed in (2, 3)]
    assert second.revision > first.revision and second.pictures[0].id == first.pictures[1].id
    assert {path.read_bytes() for path in files(tmp_path / "files")} == {new(2).content, new(3).content}
    with pytest.raises(CharacterNotFound):
        store.picture(first.id, gone, "ada")
    assert store.change(second, "ada", judgement(2, best=1), by_hand=True)
    assert store.get(first.id, "ada").best == second.pictures[1].id and store.get(first.id, "ada").best_by_hand
    store.rename(first.id, "ada", "Ada L.")
    assert store.get(first.id, "ada").name == "Ada L."


def test_what_was_not_seen_is_not_overwritten(store: CharacterStore, tmp_path: Path) -> None:
    seen = make(store, 1)
    assert store.change(seen, "ada", judgement(2), add=[new(2)])
    assert not store.change(seen, "ada", judgement(2), add=[new(3)])
    assert len(files(tmp_path / "files")) == 2 and len(store.get(seen.id, "ada").pictures) == 2
    store.delete(seen.id, "ada")
    with pytest.raises(CharacterNotFound):
        store.change(seen, "ada", judgement(2), add=[new(4)])
    assert files(tmp_path / "files") == []


def test_there_are_at_most_fifty_pictures(store: CharacterStore, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="51 pictures"):
        make(store, *range(MOST_PICTURES + 1))
    full = make(store, *range(MOST_PICTURES))
    with pytest.raises(InvalidRequest, match="51 pictures") as caught:
        store.change(full, "ada", judgement(51), add=[new(99)])
    assert caught.value.details == {"param": "pictures"} and len(files(tmp_path / "files")) == 50


@pytest.mark.parametrize(("name", "says"), [("", "empty"), (" \t", "empty"), ("x" * 201, "201"), ("a\0", "control"), ("\ud800", "control")])
def test_names_are_checked(store: CharacterStore, name: str, says: str) -> None:
    with pytest.raises(InvalidRequest, match=says):
        store.create("ada", name, [new(1)], judgement(1))
    assert store.list("ada") == ()


def test_a_face_model_has_an_embedding_and_no_picture(store: CharacterStore) -> None:
    made = store.keep_face_model("ada", "hers", b"file", b"\1" * 2048, None)
    assert (made.face_model, made.embedding, made.pictures, made.best) == (b"file", b"\1" * 2048, (), None)
    assert [warning.code for warning in made.warnings] == ["unknown_recogniser"]
    assert store.keep_face_model("ada", "hers", b"file", b"\1" * 2048, "faces-mini").warnings == ()
    with pytest.raises(InvalidRequest, match="face model"):
        store.references(made.id, "ada")
    assert store.list("ada")[0].from_face_model
    assert store.delete(made.id, "ada") == ()


def test_the_newest_lora_is_its_own_until_it_is_deleted(url: str, store: CharacterStore, tmp_path: Path) -> None:
    loras = LoraStore(url, tmp_path / "files")
    mine, newer, theirs = add_lora(loras, b"one"), add_lora(loras, b"two"), add_lora(loras, b"three", "bruno")
    made = make(store, 1)
    assert store.lora(made.id, "ada") is None
    for lora in (mine, newer):
        store.attach_lora(made.id, lora, "ada")
        assert store.lora(made.id, "ada") == (lora, None) == store.get(made.id, "ada").lora
    for nobodys in (theirs, "lora_none", "\0", "", "\ud800"):
        with pytest.raises(LoraNotFound):
            store.attach_lora(made.id, nobodys, "ada")
    loras.delete(newer, "ada")
    assert store.lora(made.id, "ada") == (mine, None)
    store.attach_lora(made.id, mine, "ada")
    store.delete(made.id, "ada")
    assert loras.get(mine, "ada").id == mine
    database = Database(url)
    with database.reading() as session:
        assert session.execute(text("SELECT count(*) FROM character_loras")).scalar() == 0
    database.close()
    loras.close()


def test_deleting_leaves_no_row_and_no_file(url: str, store: CharacterStore, tmp_path: Path) -> None:
    kept, gone = make(store, 1, 2), make(store, 1, 3)
    assert set(store.delete(gone.id, "ada")) == {new(1).facts.sha256, new(3).facts.sha256}
    with pytest.raises(CharacterNotFound):
        store.get(gone.id, "ada")
    assert store.get(kept.id, "ada") == kept and len(store.references(kept.id, "ada")) == 2
    assert not (tmp_path / "files" / "characters" / gone.id).exists()
    database = Database(url)
    with database.reading() as session:
        assert session.execute(text("SELECT count(*) FROM character_pictures")).scalar() == 2
    database.close()


def everything(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in files(folder))


def test_on_sqlite_no_byte_of_a_deleted_face_is_left(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    store = CharacterStore(url, tmp_path)
    other = make(store, 50, 51)
    character = make(store, *range(12))
    # Two stays: what leaves one by one is zeroed too.
    assert store.change(character, "ada", judgement(11), remove={character.pictures[11].id})
    secrets = [
        part for seed in range(12) for part in (new(seed).content, new(seed).facts.embedding, new(seed).facts.judge_embedding) if part
    ]
    # A row of the database is cut into pages: it is looked for in pieces.
    pieces = [secret[start : start + 64] for secret in secrets for start in range(0, len(secret) - 64, 512)]
    before = everything(tmp_path)
    assert sum(piece in before for piece in pieces) > 0.8 * len(pieces)
    assert not any(piece in before for piece in pieces[-len(pieces) // 12 :])
    store.delete(character.id, "ada")
    after = everything(tmp_path)
    assert [piece for piece in pieces if piece in after] == [] and character.id.encode() not in after
    assert new(50).content in after and store.get(other.id, "ada") == other
    store.close()


def test_who_reads_meanwhile_keeps_the_log_and_the_sweep_empties_it(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'likeness.db'}"
    migrate(url)
    store, database = CharacterStore(url, tmp_path), Database(url)
    gone, face = make(store, 1), new(1).facts.embedding or b""
    pieces = [face[start : start + 64] for start in range(0, 2048, 64)]
    with database.reading() as session:
        session.execute(text("SELECT count(*) FROM characters")).scalar()
        store.delete(gone.id, "ada")
        assert any(piece in everything(tmp_path) for piece in pieces)
    store.sweep()
    assert not any(piece in everything(tmp_path) for piece in pieces)
    database.close()
    store.close()


def test_a_deletion_that_died_halfway_is_finished_by_the_sweep(url: str, store: CharacterStore, tmp_path: Path) -> None:
    kept, gone = make(store, 1), make(store, 2, 3)
    source = (
        "import os, shutil, sys; from pathlib import Path; from deployments.store.characters import CharacterStore\n"
        "shutil.rmtree = lambda *_: os._exit(9)\n"
        "CharacterStore(sys.argv[1], Path(sys.argv[2])).delete(sys.argv[3], 'ada')"
    )
    run = subprocess.run([sys.executable, "-c", source, url, str(tmp_path / "files"), gone.id], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 9, run.stderr
    folder = tmp_path / "files" / "characters"
    assert len(files(folder / gone.id)) == 2
    orphan, old, fresh = folder / kept.id / f"picture_{'0' * 24}.png", folder / "arriving" / "old.png", folder / "arriving" / "fresh.png"
    for path in (orphan, old, fresh):
        path.write_bytes(b"left")
    os.utime(old, (0, 0))
    assert store.sweep() == 4
    assert not (folder / gone.id).exists() and set(files(folder)) == {fresh, folder / kept.id / f"{kept.pictures[0].id}.jpeg"}
    assert store.references(kept.id, "ada") == (new(1).content,)
    assert store.sweep() == 0


def test_many_add_and_delete_and_sweep_at_once(url: str, tmp_path: Path) -> None:
    def work(seed: int) -> None:
        store = CharacterStore(url, tmp_path / "files")
        for number in range(6):
            made = make(store, seed, seed + 1, owner=f"owner{seed}")
            assert store.change(made, f"owner{seed}", judgement(3), add=[new(1000 + number)])
            assert len(store.references(made.id, f"owner{seed}")) == 3
            if seed % 2:
                store.sweep()
            store.delete(made.id, f"owner{seed}")
        store.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(work, range(4)))
    assert files(tmp_path / "files") == []


def test_of_two_that_change_one_character_at_once_one_is_told(url: str, tmp_path: Path) -> None:
    store = CharacterStore(url, tmp_path / "files")
    seen = make(store, 1)

    def change(seed: int) -> bool:
        own = CharacterStore(url, tmp_path / "files")
        try:
            return own.change(seen, "ada", judgement(2), add=[new(seed)])
        finally:
            own.close()

    with ThreadPoolExecutor(6) as threads:
        assert sorted(threads.map(change, range(2, 8))) == [False] * 5 + [True]
    assert len(store.get(seen.id, "ada").pictures) == 2 == len(files(tmp_path / "files"))
    store.close()


def test_a_file_that_is_gone_and_a_folder_that_cannot_be_written_are_told(store: CharacterStore, url: str, tmp_path: Path) -> None:
    made = make(store, 1)
    (path,) = files(tmp_path / "files")
    path.unlink()
    with pytest.raises(StoreUnavailable, match=made.pictures[0].id):
        store.references(made.id, "ada")
    (tmp_path / "taken").write_text("a file where the folder should be")
    blocked = CharacterStore(url, tmp_path / "taken")
    with pytest.raises(StoreUnavailable, match="taken"):
        make(blocked, 2)
    assert len(blocked.list("ada")) == 1
    blocked.close()
