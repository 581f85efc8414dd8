"""The tables of characters as SQLAlchemy classes; they must say what migration 0004 makes. Rows stay inside the store.

Embeddings are bytes here: 512 float32, little-endian. The store computes nothing with them.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Double, ForeignKey, Index, LargeBinary, String, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from deployments.store.tables import Base, Utc


class CharacterRow(Base):
    """One character of one owner. revision: goes up with every change, so that nobody overwrites what they have not seen. best: of its
    pictures, by hand or not. face_model: the imported file of a character that has no pictures."""

    __tablename__ = "characters"
    __table_args__ = (Index(None, "owner", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(200))
    revision: Mapped[int]
    best: Mapped[str | None] = mapped_column(String(64))
    best_by_hand: Mapped[bool]
    embedding: Mapped[bytes | None] = mapped_column(LargeBinary)
    centroid: Mapped[bytes | None] = mapped_column(LargeBinary)
    recogniser: Mapped[str | None] = mapped_column(String(100))
    judge: Mapped[str | None] = mapped_column(String(100))
    spread_mean: Mapped[float | None] = mapped_column(Double)
    spread_least: Mapped[float | None] = mapped_column(Double)
    warnings: Mapped[list[Any]] = mapped_column(JSON)
    face_model: Mapped[bytes | None] = mapped_column(LargeBinary)
    created_at: Mapped[datetime] = mapped_column(Utc)


class CharacterPictureRow(Base):
    """One picture of a character, kept or set aside. number: its place in the order in which they came. facts: everything that was measured
    but the embeddings; see `characters.PictureFacts`. Its file has the id's name."""

    __tablename__ = "character_pictures"
    __table_args__ = (UniqueConstraint("character_id", "number"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    character_id: Mapped[str] = mapped_column(String(64), ForeignKey("characters.id", ondelete="CASCADE"))
    number: Mapped[int]
    sha256: Mapped[str] = mapped_column(String(64))
    # Named otherwise on the class, in whose body `bytes` is a type.
    file_bytes: Mapped[int] = mapped_column("bytes", BigInteger)
    facts: Mapped[dict[str, Any]] = mapped_column(JSON)
    embedding: Mapped[bytes | None] = mapped_column(LargeBinary)
    judge_embedding: Mapped[bytes | None] = mapped_column(LargeBinary)
    kept: Mapped[bool]
    reason: Mapped[str | None] = mapped_column(String(40))
    rank: Mapped[int | None]
    cosine: Mapped[float | None] = mapped_column(Double)
    created_at: Mapped[datetime] = mapped_column(Utc)


class CharacterLoraRow(Base):
    """That a LoRA is of a character. Goes with either of them."""

    __tablename__ = "character_loras"
    __table_args__ = (Index(None, "lora_id"),)

    character_id: Mapped[str] = mapped_column(String(64), ForeignKey("characters.id", ondelete="CASCADE"), primary_key=True)
    lora_id: Mapped[str] = mapped_column(String(64), ForeignKey("loras.id", ondelete="CASCADE"), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(Utc)
