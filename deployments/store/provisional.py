"""What a job makes for its owner before it has succeeded: LoRAs and characters that belong to the job meanwhile, so that nobody sees them.

    in the making, owner `making:<job>`  ──the job succeeds──>  the owner's, in the transaction that ends it
                                         ──it does not──────>  removed, by whoever did the job or by a sweep

Hence a job that fails, is cancelled or dies at any line leaves nothing behind that somebody could come upon.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from sqlalchemy import select, update
from sqlalchemy.orm import Session

from deployments.errors import CharacterNotFound, LoraNotFound, StoreUnavailable
from deployments.store.character_tables import CharacterLoraRow, CharacterRow
from deployments.store.characters import CharacterStore
from deployments.store.engine import Database
from deployments.store.jobs import Within
from deployments.store.loras import LoraStore
from deployments.store.tables import LoraRow

# A colon stands in no owner that a key can have (deployments/store/keys.py).
_PREFIX = "making:"
_JOB = re.compile(r"job_[0-9a-f]{24}")


def maker_of(job: str) -> str:
    """The owner of what a job has in the making."""
    return f"{_PREFIX}{job}"


class Provisional:
    """For any number of processes on one database (which was migrated) and one folder."""

    def __init__(self, url: str, folder: Path) -> None:
        """As LoraStore and CharacterStore. Raises StoreUnavailable for a URL that leads nowhere."""
        self._database, self._loras, self.characters = Database(url), LoraStore(url, folder), CharacterStore(url, folder)

    def jobs(self) -> set[str]:
        """Ids of the jobs that have something in the making."""
        with self._database.reading() as session:
            owners: set[str] = set()
            for column in (LoraRow.owner, CharacterRow.owner):
                owners |= set(session.scalars(select(column).where(column.startswith(_PREFIX)).distinct()))
        return {job for owner in owners if _JOB.fullmatch(job := owner.removeprefix(_PREFIX))}

    def remove(self, job: str, but: Sequence[str] = ()) -> None:
        """Everything that the job has in the making, whoever else removes it at the same time. but: ids of LoRAs that stay."""
        maker = maker_of(job)
        for lora in self._loras.list(maker):
            if lora.id not in but:
                with suppress(LoraNotFound):
                    self._loras.delete(lora.id, maker)
        for character in self.characters.list(maker):
            with suppress(CharacterNotFound):
                self.characters.delete(character.id, maker)

    def handing_over(self, job: str, owner: str, lora: str, character: str | None = None) -> Within:
        """What makes them the owner's, in the transaction in which the job succeeds. character: of the owner's, or in the making; the LoRA
        is attached to it unless it was deleted meanwhile."""
        return partial(_hand_over, job=job, owner=owner, lora=lora, character=character)

    def close(self) -> None:
        for store in (self._database, self._loras, self.characters):
            store.close()


def _hand_over(session: Session, *, job: str, owner: str, lora: str, character: str | None) -> None:
    """Raises StoreUnavailable where the LoRA is gone: the job then does not succeed."""
    maker, now = maker_of(job), datetime.now(UTC)
    mine = update(LoraRow).where(LoraRow.id == lora, LoraRow.owner == maker)
    if session.scalar(mine.values(owner=owner, created_at=now).returning(LoraRow.id)) is None:
        raise StoreUnavailable(f"The LoRA {lora} that the job {job} made is not there any more.")
    if character is None:
        return
    session.execute(update(CharacterRow).where(CharacterRow.id == character, CharacterRow.owner == maker).values(owner=owner))
    # Locked: deleted between the two, it would take the job's success along.
    mine_too = select(CharacterRow.id).where(CharacterRow.id == character, CharacterRow.owner == owner).with_for_update()
    if session.scalar(mine_too) is not None:
        session.add(CharacterLoraRow(character_id=character, lora_id=lora, created_at=now))
