"""Characters of owners: people by name, with their pictures, what was found in them, and the LoRAs that were trained on them.

Every method takes the owner: another owner's character does not exist. A picture is a file of this character alone, in
`characters/<character>/<picture>.<ext>`: there before its row is seen, gone after its row is. Deleting deletes: rows and links in one
transaction, then the files; what a dying process leaves of the latter, `sweep` removes. Opens no picture and compares no face: what was
found comes as values.

On SQLite deleted rows are overwritten with zeros, and the write-ahead log is emptied after each deletion (where somebody reads at that
moment, by the next sweep). PostgreSQL keeps deleted rows in its files and its log until it vacuums and recycles them.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from deployments.errors import CharacterNotFound, InvalidRequest, LoraNotFound, StoreUnavailable
from deployments.store.character_rows import character_of, newest_lora, picture_row
from deployments.store.character_tables import CharacterLoraRow, CharacterPictureRow, CharacterRow
from deployments.store.character_values import (
    MOST_PICTURES,
    Character,
    CharacterPicture,
    CharacterSummary,
    Judgement,
    NewPicture,
)
from deployments.store.engine import Database, parsed
from deployments.store.tables import LoraRow

FOLDER = "characters"
NAME_CHARACTERS = 200
REFERENCE_PIXELS = 400_000_000
"""As many as FaceAnalyser takes together by default: eight pictures of the largest size, or twenty of 20 megapixels."""
_ARRIVING = "arriving"
_ID, _LORA_ID = re.compile(r"character_[0-9a-f]{24}"), re.compile(r"lora_[0-9a-f]{24}")
_ID_SHOWN = 60
# Longer than a request takes: what lies among the arriving since then was left by a process that died.
_ABANDONED_AFTER_S = 3_600.0
_UNJUDGED: dict[str, Any] = {"best": None, "best_by_hand": False, "warnings": []}
_UNKNOWN_RECOGNISER = {
    "code": "unknown_recogniser",
    "message": "The face model does not say which recogniser its embedding is of. With another one's it is nobody's.",
    "groups": [],
}
_Arrived = tuple[str, Path, NewPicture]
"""Id, where the file lies meanwhile, and what it is."""


class CharacterStore:
    """For any number of threads, processes and machines on one database (which was migrated) and one folder."""

    def __init__(self, url: str, folder: Path) -> None:
        """url: of the database. folder: pictures lie in `characters/` beneath it. Raises StoreUnavailable for a URL that leads nowhere."""
        self._url, self._root = parsed(url), folder / FOLDER
        self._database = Database(url)

    def create(self, owner: str, name: str, pictures: Sequence[NewPicture], judgement: Judgement) -> Character:
        """A new character. judgement: of these pictures, in their order. Raises InvalidRequest for a name that is none or too many."""
        id = _new("character")
        row = CharacterRow(id=id, owner=owner, name=named(name), revision=0, created_at=datetime.now(UTC), **_UNJUDGED)
        with self._arriving(pictures) as arrived, self._writing(id) as session:
            session.add(row)
            session.flush()
            self._set(session, row, (), arrived, judgement, by_hand=False)
        return self.get(id, owner)

    def keep_face_model(self, owner: str, name: str, file: bytes, embedding: bytes, recogniser: str | None) -> Character:
        """A new character without pictures, of a face model: its file, and the embedding in it."""
        notes = [] if recogniser is not None else [_UNKNOWN_RECOGNISER]
        said = {**_UNJUDGED, "face_model": file, "embedding": embedding, "recogniser": recogniser, "warnings": notes}
        id = _new("character")
        row = CharacterRow(id=id, owner=owner, name=named(name), revision=0, created_at=datetime.now(UTC), **said)
        with self._writing(id) as session:
            session.add(row)
        return self.get(id, owner)

    def list(self, owner: str) -> tuple[CharacterSummary, ...]:
        """The newest first."""
        picture = CharacterPictureRow
        counted = select(picture.character_id, func.count().label("pictures"), func.count(picture.rank).label("kept"))
        counts = counted.group_by(picture.character_id).subquery()
        wanted = (
            select(CharacterRow.id, CharacterRow.name, CharacterRow.best, CharacterRow.created_at, CharacterRow.face_model.is_not(None),
                   func.coalesce(counts.c.pictures, 0), func.coalesce(counts.c.kept, 0))
            .outerjoin(counts, counts.c.character_id == CharacterRow.id)
            .where(CharacterRow.owner == owner)
            .order_by(CharacterRow.created_at.desc(), CharacterRow.id)
        )  # fmt: skip
        with self._database.reading() as session:
            return tuple(
                CharacterSummary(id=id, name=name, best=best, created_at=created, from_face_model=model, pictures=pictures, kept=kept)
                for id, name, best, created, model, pictures, kept in session.execute(wanted)
            )

    def get(self, id: str, owner: str) -> Character:
        """Raises CharacterNotFound."""
        with self._database.reading() as session:
            return character_of(session, _owned(session, id, owner), owner)

    def rename(self, id: str, owner: str, name: str) -> None:
        """Raises CharacterNotFound, InvalidRequest."""
        called = named(name)
        with self._writing(id) as session:
            _owned(session, id, owner).name = called

    def change(
        self,
        seen: Character,
        owner: str,
        judgement: Judgement,
        *,
        add: Sequence[NewPicture] = (),
        remove: Collection[str] = (),
        by_hand: bool = False,
    ) -> bool:
        """Other pictures, or another best one. judgement: of those of `seen` without `remove`, then of `add`. by_hand: whether its best was
        chosen by somebody. False, with nothing changed, where the character is no longer as it was seen: look at it again.

        Raises CharacterNotFound, and InvalidRequest where it would have too many pictures.
        """
        stay = tuple(picture.id for picture in seen.pictures if picture.id not in remove)
        with self._arriving(add, beside=len(stay)) as arrived, self._writing(seen.id) as session:
            row = _owned(session, seen.id, owner)
            if row.revision != seen.revision:
                return False
            session.execute(delete(CharacterPictureRow).where(CharacterPictureRow.id.in_(list(remove))))
            self._set(session, row, stay, arrived, judgement, by_hand=by_hand)
        if remove:
            for picture in seen.pictures:
                if picture.id in remove:
                    self._path(seen.id, picture).unlink(missing_ok=True)
            self._database.forget()
        return True

    def delete(self, id: str, owner: str) -> tuple[str, ...]:
        """Takes away everything that is kept of a character. Returns the sha256 of its pictures. Raises CharacterNotFound."""
        with self._writing(id) as session:
            row = _owned(session, id, owner)
            digests = tuple(session.scalars(select(CharacterPictureRow.sha256).where(CharacterPictureRow.character_id == id)))
            session.delete(row)
        self._remove(id)
        self._database.forget()
        return digests

    def picture(self, id: str, picture: str, owner: str) -> tuple[bytes, str]:
        """The file, and its format. Raises CharacterNotFound, which says whether it is the picture that is not there."""
        found = next((item for item in self.get(id, owner).pictures if item.id == picture), None)
        if found is None:
            raise no_picture(picture)
        return self._read(id, found, owner), found.facts.format

    def references(self, id: str, owner: str, limit: int = 20, pixels: int = REFERENCE_PIXELS) -> tuple[bytes, ...]:
        """The pictures to draw this person by, at most `limit`: the best first, then those of most use beside it. pixels: of all of them
        together; what would be too many is left out, but never the best.

        Raises CharacterNotFound, and InvalidRequest for a character that has none: of a face model, or with all of them set aside.
        """
        character = self.get(id, owner)
        if character.face_model is not None:
            raise InvalidRequest(
                f"The character {id} is a face model: an embedding without a picture, and this needs pictures.",
                "Use a character that was made of pictures.",
                {"character": id},
            )
        kept = sorted((item for item in character.pictures if item.verdict.rank is not None), key=lambda item: item.verdict.rank or 0)
        if not kept:
            raise InvalidRequest(f"The character {id} has no picture that can be used.", "Add pictures to it.", {"character": id})
        return tuple(self._read(id, item, owner) for item in _within(kept, pixels)[:limit])

    def attach_lora(self, id: str, lora: str, owner: str) -> None:
        """That a LoRA is of this character; it counts as the newest. Raises CharacterNotFound, LoraNotFound."""
        with self._writing(id) as session:
            _owned(session, id, owner)
            row = session.get(LoraRow, lora) if _LORA_ID.fullmatch(lora) else None
            if row is None or row.owner != owner:
                raise LoraNotFound(f"There is no LoRA {ascii(lora[:_ID_SHOWN])}.", details={"id": lora[:_ID_SHOWN]})
            session.merge(CharacterLoraRow(character_id=id, lora_id=lora, created_at=datetime.now(UTC)))

    def lora(self, id: str, owner: str) -> tuple[str, str | None] | None:
        """Id and trigger word of its newest LoRA. Raises CharacterNotFound."""
        with self._database.reading() as session:
            _owned(session, id, owner)
            return newest_lora(session, id, owner)

    def sweep(self) -> int:
        """Finishes deletions: removes folders and files that no row names, and empties SQLite's log. Returns how many files it removed.
        Safe beside others that add and delete."""
        removed = 0
        for path in self._root.glob(f"{_ARRIVING}/*"):
            with suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
                    path.unlink()
                    removed += 1
        for folder in self._root.glob("character_*"):
            with self._writing(folder.name) as session:
                rows = session.execute(select(CharacterPictureRow.id).where(CharacterPictureRow.character_id == folder.name))
                known = {id for (id,) in rows}
                for path in folder.glob("*"):
                    if path.stem not in known:
                        path.unlink(missing_ok=True)
                        removed += 1
                if not known:
                    with suppress(FileNotFoundError):
                        folder.rmdir()
        self._database.forget()
        return removed

    def close(self) -> None:
        self._database.close()

    def _set(
        self, session: Session, row: CharacterRow, stay: Sequence[str], arrived: Sequence[_Arrived], judgement: Judgement, *, by_hand: bool
    ) -> None:
        """Brings rows and files to what was judged."""
        folder = self._root / row.id
        after = max((session.get_one(CharacterPictureRow, id).number for id in stay), default=-1) + 1
        for number, (picture, path, new) in enumerate(arrived, after):
            with _writable(self._root):
                folder.mkdir(parents=True, exist_ok=True)
                os.replace(path, folder / path.name)
            session.add(picture_row(row.id, picture, number, new))
        session.flush()
        ids = [*stay, *(picture for picture, _, _ in arrived)]
        for id, verdict in zip(ids, judgement.verdicts, strict=True):
            shown = session.get_one(CharacterPictureRow, id)
            shown.kept, shown.reason = verdict.rank is not None, verdict.reason
            shown.rank, shown.cosine = verdict.rank, verdict.cosine
        row.revision += 1
        row.best, row.best_by_hand = (None, False) if judgement.best is None else (ids[judgement.best], by_hand)
        row.embedding, row.centroid = judgement.embedding, judgement.centroid
        row.spread_mean, row.spread_least = judgement.spread if judgement.spread is not None else (None, None)
        row.recogniser, row.judge = judgement.recogniser, judgement.judge
        row.warnings = [
            {"code": notice.code, "message": notice.message, "groups": [[ids[place] for place in group] for group in notice.groups]}
            for notice in judgement.notices
        ]

    @contextmanager
    def _arriving(self, pictures: Sequence[NewPicture], beside: int = 0) -> Iterator[Sequence[_Arrived]]:
        """The files, written to where they are gone at the end of the context unless they were moved."""
        if beside + len(pictures) > MOST_PICTURES:
            message = f"The character would have {beside + len(pictures)} pictures; at most {MOST_PICTURES} are kept."
            raise InvalidRequest(message, "Send fewer, or remove some first.", {"param": "pictures"})
        folder = self._root / _ARRIVING
        arrived: list[_Arrived] = []
        try:
            with _writable(self._root):
                folder.mkdir(parents=True, exist_ok=True)
                for new in pictures:
                    id = _new("picture")
                    path = folder / f"{id}.{new.facts.format}"
                    arrived.append((id, path, new))
                    with path.open("xb") as stream:
                        stream.write(new.content)
                        stream.flush()
                        os.fsync(stream.fileno())
            yield arrived
        finally:
            for _, path, _ in arrived:
                path.unlink(missing_ok=True)

    @contextmanager
    def _writing(self, id: str) -> Iterator[Session]:
        """A transaction in which nobody else changes this character, and in which SQLite overwrites what it deletes."""
        with self._database.writing(lock=id if _ID.fullmatch(id) else FOLDER) as session:
            if self._on_sqlite:
                session.connection().exec_driver_sql("PRAGMA secure_delete = ON")
            yield session

    @property
    def _on_sqlite(self) -> bool:
        return self._url.get_backend_name() == "sqlite"

    def _remove(self, id: str) -> None:
        with _writable(self._root), suppress(FileNotFoundError):  # who sweeps may be quicker
            shutil.rmtree(self._root / id)

    def _path(self, id: str, picture: CharacterPicture) -> Path:
        return self._root / id / f"{picture.id}.{picture.facts.format}"

    def _read(self, id: str, picture: CharacterPicture, owner: str) -> bytes:
        path = self._path(id, picture)
        try:
            return path.read_bytes()
        except FileNotFoundError as error:
            if picture.id in {item.id for item in self.get(id, owner).pictures}:
                raise StoreUnavailable(
                    f"The picture {path} is not there.", "Let the store's folder be the one that it was uploaded to."
                ) from error
            raise no_picture(picture.id) from error


def named(name: str) -> str:
    """The name as it is kept. Raises InvalidRequest where it is empty, too long or holds control characters."""
    text = name.strip()
    if not text:
        raise InvalidRequest("`name` is empty.", None, {"param": "name"})
    if len(text) > NAME_CHARACTERS:
        raise InvalidRequest(f"`name` has {len(text)} characters, at most {NAME_CHARACTERS} are kept.", None, {"param": "name"})
    # Cc: control, Cs: half of a character, which cannot be written.
    if any(unicodedata.category(character) in ("Cc", "Cs") for character in text):
        raise InvalidRequest("`name` holds control characters.", None, {"param": "name"})
    return text


def no_picture(id: str) -> CharacterNotFound:
    """The character is there, the picture is not."""
    shown = id[:_ID_SHOWN]
    return CharacterNotFound(f"The character has no picture {ascii(shown)}.", "Use the id of one of its pictures.", {"id": shown})


@contextmanager
def _writable(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(f"The folder {root} of the store cannot be written: {error.strerror}.") from error


def _new(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(12)}"


def _within(pictures: Sequence[CharacterPicture], pixels: int) -> list[CharacterPicture]:
    taken, left = [pictures[0]], pixels - pictures[0].facts.width * pictures[0].facts.height
    for picture in pictures[1:]:
        size = picture.facts.width * picture.facts.height
        if size <= left:
            taken.append(picture)
            left -= size
    return taken


def _owned(session: Session, id: str, owner: str) -> CharacterRow:
    # Nothing that cannot be an id reaches the database, which may not take every character.
    row = session.get(CharacterRow, id) if _ID.fullmatch(id) else None
    if row is None or row.owner != owner:
        raise CharacterNotFound(f"There is no character {ascii(id[:_ID_SHOWN])}.", details={"id": id[:_ID_SHOWN]})
    return row
