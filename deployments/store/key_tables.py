"""The tables of API keys and of the audit log. They must say what the migration makes; a test compares the two."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, Index, Integer, String
from sqlalchemy.orm import Mapped, mapped_column

from deployments.store.tables import Base, Utc


class KeyRow(Base):
    """One API key. secret_sha256: hex, of the secret part; the secret itself is nowhere. Other fields: see `keys.KeyInfo`."""

    __tablename__ = "api_keys"
    __table_args__ = (Index(None, "owner", "created_at"),)

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    name: Mapped[str] = mapped_column(String(200))
    secret_sha256: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[Any]] = mapped_column(JSON)
    created_at: Mapped[datetime] = mapped_column(Utc)
    expires_at: Mapped[datetime | None] = mapped_column(Utc)
    revoked_at: Mapped[datetime | None] = mapped_column(Utc)
    last_used_at: Mapped[datetime | None] = mapped_column(Utc)
    requests_per_minute: Mapped[int | None]
    concurrent_requests: Mapped[int | None]
    queued_jobs: Mapped[int | None]


class AuditRow(Base):
    """One request that changed something, or was refused. id: counts up, in the order of writing. Other fields: see `audit.AuditEntry`."""

    __tablename__ = "audit"
    __table_args__ = (Index(None, "at"), Index(None, "owner", "at"))

    # SQLite counts up by itself only what is called INTEGER.
    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    at: Mapped[datetime] = mapped_column(Utc)
    owner: Mapped[str | None] = mapped_column(String(64))
    key: Mapped[str | None] = mapped_column(String(64))
    request: Mapped[str] = mapped_column(String(128))
    action: Mapped[str] = mapped_column(String(200))
    subject: Mapped[str | None] = mapped_column(String(64))
    status: Mapped[int]
