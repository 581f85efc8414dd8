"""The tables of the store as SQLAlchemy classes. They must say what the migrations make; a test compares the two.

Rows stay inside the store: what leaves it are frozen values.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, Double, Index, MetaData, String, Text, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

NAMES = {
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
    "pk": "pk_%(table_name)s",
}
"""Names of constraints, so that a later migration can name what it drops (SQLite gives none by itself)."""


class Base(DeclarativeBase):
    metadata = MetaData(naming_convention=NAMES)


class Utc(TypeDecorator[datetime]):
    """A time with its zone. SQLite forgets the zone: it is UTC before it goes in and after it comes out."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class LoraRow(Base):
    """One LoRA of one owner. sha256: of its file, which rows of other owners may name too. Other fields: see `loras.LoraInfo`."""

    __tablename__ = "loras"
    __table_args__ = (Index(None, "owner", "created_at"), Index(None, "sha256"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(200))
    trigger_word: Mapped[str | None] = mapped_column(String(200))
    description: Mapped[str] = mapped_column(Text)
    base: Mapped[str] = mapped_column(String(100))
    family: Mapped[str] = mapped_column(String(100))
    sha256: Mapped[str] = mapped_column(String(64))
    bytes: Mapped[int] = mapped_column(BigInteger)
    format: Mapped[str] = mapped_column(Text)
    keys: Mapped[int]
    rank_low: Mapped[int]
    rank_high: Mapped[int]
    error: Mapped[float] = mapped_column(Double)
    # `metadata` is SQLAlchemy's own name on a class.
    file_metadata: Mapped[dict[str, Any]] = mapped_column("metadata", JSON)
    created_at: Mapped[datetime] = mapped_column(Utc)
