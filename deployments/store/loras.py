"""LoRAs of owners: a row for each, and one file for each content, however many rows name it.

Every method takes the owner: another owner's LoRA does not exist. A row never lacks its file: a file is there before its first row, and
goes after its last one, under a lock on its sha256. Reads no LoRA and checks none: what is in a file is told by whoever opened it.
"""

from __future__ import annotations

import re
import secrets
import unicodedata
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path

from sqlalchemy import delete, exists, select

from deployments.errors import InvalidRequest, LoraNotFound, MissingWeights
from deployments.store.content import Arrival, ContentFolder
from deployments.store.engine import Database
from deployments.store.tables import LoraRow

FOLDER, SUFFIX = "loras", ".safetensors"
NAME_CHARACTERS, TRIGGER_CHARACTERS, DESCRIPTION_CHARACTERS = 200, 200, 4000
_ID = re.compile(r"lora_[0-9a-f]{24}")
_ID_SHOWN = 60
# Of what a trainer wrote into the file (kohya: every tag of every picture) so much is kept beside the row.
_METADATA_VALUE_CHARACTERS, _METADATA_CHARACTERS = 4_000, 32_000


@dataclass(frozen=True, kw_only=True)
class LoraLabels:
    """What the owner says of a LoRA; see `labelled`. trigger_word: what calls it up in a prompt, where anything does."""

    name: str
    trigger_word: str | None = None
    description: str = ""


@dataclass(frozen=True, kw_only=True)
class LoraFile:
    """What was found in the file.

    base, family: id and family of the base model that it was checked against. format: whose spelling its keys have. keys: how many there
    are. rank_low, rank_high: the smallest and largest rank of a change. error: largest relative error of a change that had to be brought
    to a low rank (LoKr, LoHa), 0 for others. metadata: what its trainer wrote into it, as far as `bounded` keeps it.
    """

    base: str
    family: str
    format: str
    keys: int
    rank_low: int
    rank_high: int
    error: float
    metadata: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class LoraInfo(LoraLabels, LoraFile):
    """A LoRA that is kept. id: random, its owner's name for it. sha256, bytes: of its file. created_at: with its zone, UTC."""

    id: str
    sha256: str
    bytes: int
    created_at: datetime


class LoraStore:
    """For any number of threads, processes and machines on one database (which was migrated) and one folder."""

    def __init__(self, url: str, folder: Path) -> None:
        """url: of the database. folder: files lie in `loras/` beneath it. Raises StoreUnavailable for a URL that leads nowhere."""
        self._database, self._files = Database(url), ContentFolder(folder / FOLDER, SUFFIX)

    def arriving(self, content: bytes) -> AbstractContextManager[Arrival]:
        """The content as a file to be looked at, within a context: gone afterwards unless it was kept."""
        return self._files.arriving(content)

    def keep(self, arrival: Arrival, owner: str, labels: LoraLabels, file: LoraFile) -> LoraInfo:
        """A new row for a file that arrived, under a new id, whoever has the same content already."""
        said = asdict(labels) | asdict(file)
        metadata = said.pop("metadata")
        row = LoraRow(
            id=f"lora_{secrets.token_hex(12)}", owner=owner, sha256=arrival.sha256, bytes=arrival.bytes,
            file_metadata=bounded(metadata), created_at=datetime.now(UTC), **said,
        )  # fmt: skip
        info = _info(row)
        with self._database.writing(lock=arrival.sha256) as session:
            self._files.keep(arrival)
            session.add(row)
        return info

    def list(self, owner: str) -> tuple[LoraInfo, ...]:
        """The newest first."""
        wanted = select(LoraRow).where(LoraRow.owner == owner).order_by(LoraRow.created_at.desc(), LoraRow.id)
        with self._database.reading() as session:
            return tuple(_info(row) for row in session.scalars(wanted))

    def get(self, id: str, owner: str) -> LoraInfo:
        """Raises LoraNotFound."""
        return self.find([id], owner)[0]

    def find(self, ids: Sequence[str], owner: str) -> tuple[LoraInfo, ...]:
        """Those with these ids, in this order. Raises LoraNotFound, which names the first that the owner has not."""
        # Nothing that cannot be an id reaches the database, which may not take every character.
        possible = [id for id in ids if _ID.fullmatch(id)]
        with self._database.reading() as session:
            rows = session.scalars(select(LoraRow).where(LoraRow.owner == owner, LoraRow.id.in_(possible)))
            found = {row.id: _info(row) for row in rows}
        for id in ids:
            if id not in found:
                raise _not_found(id)
        return tuple(found[id] for id in ids)

    def delete(self, id: str, owner: str) -> str:
        """Takes the row away, and the file with it unless another row names it. Returns its sha256. Raises LoraNotFound."""
        if not _ID.fullmatch(id):
            raise _not_found(id)
        with self._database.writing() as session:
            gone: str | None = session.scalar(delete(LoraRow).where(LoraRow.owner == owner, LoraRow.id == id).returning(LoraRow.sha256))
        if gone is None:
            raise _not_found(id)
        self._remove_if_unnamed(gone)
        return gone

    def path(self, sha256: str) -> Path:
        """The file of a LoRA that was found. Raises LoraNotFound where its last row was deleted since, MissingWeights where it was not."""
        path = self._files.path(sha256)
        if path.is_file():
            return path
        if self._named(sha256):
            raise MissingWeights(f"The LoRA file {path} is not there.", "Let the store's folder be the one that it was uploaded to.")
        raise LoraNotFound("A LoRA of this request was deleted while the request waited.")

    def sweep(self) -> int:
        """Removes what dying processes left: files that no row names. Returns how many. Safe beside others that add and delete."""
        self._files.clear_abandoned()
        with self._database.reading() as session:
            named = set(session.scalars(select(LoraRow.sha256).distinct()))
        return sum(self._remove_if_unnamed(sha256) for sha256 in self._files.kept() if sha256 not in named)

    def close(self) -> None:
        self._database.close()

    def _remove_if_unnamed(self, sha256: str) -> bool:
        # In a transaction after the one that deleted the row: between a removed file and a commit that fails, a row would lack its file.
        with self._database.writing(lock=sha256) as session:
            if session.scalar(select(exists().where(LoraRow.sha256 == sha256))):
                return False
            self._files.remove(sha256)
            return True

    def _named(self, sha256: str) -> bool:
        with self._database.reading() as session:
            return bool(session.scalar(select(exists().where(LoraRow.sha256 == sha256))))


def labelled(name: str, trigger_word: str | None = None, description: str = "") -> LoraLabels:
    """What the owner says, checked. Raises InvalidRequest, which names the field: too long, empty, or with control characters."""
    limits = {"name": NAME_CHARACTERS, "trigger_word": TRIGGER_CHARACTERS, "description": DESCRIPTION_CHARACTERS}
    said = {"name": name.strip(), "trigger_word": (trigger_word or "").strip(), "description": description.strip()}
    for field, text in said.items():
        allowed = "\n\t" if field == "description" else ""
        if len(text) > limits[field]:
            raise _wrong(field, f"has {len(text)} characters, at most {limits[field]} are kept")
        # Cc: control, Cs: half of a character, which cannot be written.
        if any(unicodedata.category(character) in ("Cc", "Cs") and character not in allowed for character in text):
            raise _wrong(field, "holds control characters")
    if not said["name"]:
        raise _wrong("name", "is empty")
    return LoraLabels(name=said["name"], trigger_word=said["trigger_word"] or None, description=said["description"])


def bounded(metadata: Mapping[str, str]) -> dict[str, str]:
    """As much of a file's metadata as is kept: in their order, without those that are long, until there is enough."""
    kept: dict[str, str] = {}
    room = _METADATA_CHARACTERS
    for key, value in metadata.items():
        size = len(key) + len(value)
        if size <= min(room, _METADATA_VALUE_CHARACTERS):
            kept[key] = value
            room -= size
    return kept


def _info(row: LoraRow) -> LoraInfo:
    own = {field.name: getattr(row, field.name) for field in fields(LoraInfo) if field.name != "metadata"}
    return LoraInfo(metadata=row.file_metadata, **own)


def _not_found(id: str) -> LoraNotFound:
    return LoraNotFound(f"There is no LoRA {ascii(id[:_ID_SHOWN])}.", details={"id": id[:_ID_SHOWN]})


def _wrong(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"`{field}` {what}.", None, {"param": field})
