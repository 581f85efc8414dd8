"""Between the rows of characters and the values that leave the store. Writes nothing and knows no file."""

from __future__ import annotations

from dataclasses import asdict, replace
from datetime import UTC, datetime

from sqlalchemy import select
from sqlalchemy.orm import Session

from deployments.store.character_tables import CharacterLoraRow, CharacterPictureRow, CharacterRow
from deployments.store.character_values import Character, CharacterNotice, CharacterPicture, NewPicture, PictureFacts, Verdict
from deployments.store.tables import LoraRow


def character_of(session: Session, row: CharacterRow, owner: str) -> Character:
    """With its pictures in the order in which they came. owner: whose LoRAs count."""
    wanted = select(CharacterPictureRow).where(CharacterPictureRow.character_id == row.id).order_by(CharacterPictureRow.number)
    warnings = [
        CharacterNotice(code=item["code"], message=item["message"], groups=tuple(map(tuple, item["groups"]))) for item in row.warnings
    ]
    spread = None if row.spread_mean is None or row.spread_least is None else (row.spread_mean, row.spread_least)
    return Character(
        id=row.id, name=row.name, revision=row.revision, pictures=tuple(map(picture_of, session.scalars(wanted))), best=row.best,
        best_by_hand=row.best_by_hand, embedding=row.embedding, centroid=row.centroid, spread=spread, warnings=tuple(warnings),
        recogniser=row.recogniser, judge=row.judge, face_model=row.face_model, lora=newest_lora(session, row.id, owner),
        created_at=row.created_at,
    )  # fmt: skip


def newest_lora(session: Session, id: str, owner: str) -> tuple[str, str | None] | None:
    """Id and trigger word of the LoRA that was attached last."""
    newest = (
        select(LoraRow.id, LoraRow.trigger_word)
        .join(CharacterLoraRow, CharacterLoraRow.lora_id == LoraRow.id)
        .where(CharacterLoraRow.character_id == id, LoraRow.owner == owner)
        .order_by(CharacterLoraRow.created_at.desc(), LoraRow.id)
        .limit(1)
    )
    found = session.execute(newest).first()
    return None if found is None else (found[0], found[1])


def picture_row(character: str, id: str, number: int, new: NewPicture) -> CharacterPictureRow:
    """Of a picture that is not judged yet. number: its place in the order in which they came."""
    plain = asdict(replace(new.facts, embedding=None, judge_embedding=None))
    return CharacterPictureRow(
        id=id, character_id=character, number=number, sha256=new.facts.sha256, file_bytes=len(new.content), facts=plain,
        embedding=new.facts.embedding, judge_embedding=new.facts.judge_embedding, kept=False, created_at=datetime.now(UTC),
    )  # fmt: skip


def picture_of(row: CharacterPictureRow) -> CharacterPicture:
    """The value, with everything that was measured and decided."""
    said = dict(row.facts)
    said["box"] = None if said["box"] is None else tuple(said["box"])
    said["landmarks"] = tuple((x, y) for x, y in said["landmarks"])
    facts = PictureFacts(**{**said, "embedding": row.embedding, "judge_embedding": row.judge_embedding})
    verdict = Verdict(reason=row.reason, rank=row.rank, cosine=row.cosine)  # type: ignore[arg-type]
    return CharacterPicture(id=row.id, facts=facts, verdict=verdict, bytes=row.file_bytes, created_at=row.created_at)
