"""The tables of jobs as SQLAlchemy classes: jobs, their lanes, attempts, events and artifacts, and the webhooks that tell of their end.

They must say what the migrations make; a test compares the two. Rows stay inside the store.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, ForeignKey, Index, String, Text, UniqueConstraint
from sqlalchemy.orm import Mapped, mapped_column

from deployments.store.job_values import KEY_CHARACTERS, EventKind, Status
from deployments.store.tables import Base, Utc

_OF_JOB = "jobs.id"


class JobRow(Base):
    """One job; see `job_values.JobInfo`.

    rank: the priority with its sign turned, so that one index has the whole order of the queue. turn: place in its lane, see LaneRow.
    digest: sha256 of everything that was asked for, by which two bodies under one idempotency key are told apart. leases: how often it
    was leased; the number of the last one fences what is written. events: how many were told. runner, lease_until: whose it is while it
    runs, and how long without a sign of life.
    """

    __tablename__ = "jobs"
    __table_args__ = (
        UniqueConstraint("owner", "idempotency_key"),
        Index(None, "owner", "created_at", "id"),  # lists
        Index(None, "status", "pool", "rank", "turn", "created_at", "id"),  # the queue, in its order
        Index(None, "owner", "pool", "status", "rank", "turn"),  # quotas, an owner's last turn
        Index(None, "runner", "status"),  # heartbeats
        Index(None, "finished_at"),  # expiry
        Index(None, "pool", "status", "finished_at"),  # the pace of late
    )

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    owner: Mapped[str] = mapped_column(String(64))
    kind: Mapped[str] = mapped_column(String(64))
    pool: Mapped[str] = mapped_column(String(64))
    workflow: Mapped[str | None] = mapped_column(String(100))
    input: Mapped[dict[str, Any]] = mapped_column(JSON)
    rank: Mapped[int]
    previews: Mapped[bool]
    webhook_url: Mapped[str | None] = mapped_column(Text)
    idempotency_key: Mapped[str | None] = mapped_column(String(KEY_CHARACTERS))
    digest: Mapped[str] = mapped_column(String(64))
    max_attempts: Mapped[int]
    status: Mapped[Status] = mapped_column(String(16))
    turn: Mapped[int] = mapped_column(BigInteger)
    not_before: Mapped[datetime | None] = mapped_column(Utc)
    leases: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    runner: Mapped[str | None] = mapped_column(String(200))
    lease_until: Mapped[datetime | None] = mapped_column(Utc)
    events: Mapped[int] = mapped_column(default=0)
    step: Mapped[int] = mapped_column(default=0)
    steps: Mapped[int] = mapped_column(default=0)
    picture: Mapped[int] = mapped_column(default=0)
    pictures: Mapped[int] = mapped_column(default=0)
    seconds: Mapped[dict[str, float]] = mapped_column(JSON, default=dict)
    # A None in JSON would be kept as the text `null`: none_as_null makes it the database's NULL.
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    result: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    created_at: Mapped[datetime] = mapped_column(Utc)
    started_at: Mapped[datetime | None] = mapped_column(Utc)
    finished_at: Mapped[datetime | None] = mapped_column(Utc)


class LaneRow(Base):
    """The jobs of one pool and rank wait in one lane, in order of their turns. served: the turn that was leased last."""

    __tablename__ = "job_lanes"

    pool: Mapped[str] = mapped_column(String(64), primary_key=True)
    rank: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    served: Mapped[int] = mapped_column(BigInteger)


class AttemptRow(Base):
    """One lease of a job: who had it, and what came of it. outcome: a terminal status, `requeued`, `released` or `lost`; None so far."""

    __tablename__ = "job_attempts"

    job_id: Mapped[str] = mapped_column(ForeignKey(_OF_JOB, ondelete="CASCADE"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    runner: Mapped[str] = mapped_column(String(200))
    started_at: Mapped[datetime] = mapped_column(Utc)
    ended_at: Mapped[datetime | None] = mapped_column(Utc)
    outcome: Mapped[str | None] = mapped_column(String(16))
    error: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class EventRow(Base):
    """Something that happened to a job; see `job_values.Event`."""

    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(ForeignKey(_OF_JOB, ondelete="CASCADE"), primary_key=True)
    seq: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    kind: Mapped[EventKind] = mapped_column(String(16))
    data: Mapped[dict[str, Any]] = mapped_column(JSON)
    at: Mapped[datetime] = mapped_column(Utc)


class ArtifactRow(Base):
    """One file of a job. key: where ArtifactStore has it. given: whether it came with the job, or was made by it."""

    __tablename__ = "artifacts"
    __table_args__ = (Index(None, "job_id"), UniqueConstraint("key"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey(_OF_JOB, ondelete="CASCADE"))
    owner: Mapped[str] = mapped_column(String(64))
    given: Mapped[bool]
    name: Mapped[str] = mapped_column(String(200))
    key: Mapped[str] = mapped_column(String(200))
    media_type: Mapped[str] = mapped_column(String(100))
    bytes: Mapped[int] = mapped_column(BigInteger)
    sha256: Mapped[str] = mapped_column(String(64))
    created_at: Mapped[datetime] = mapped_column(Utc)


class DeliveryRow(Base):
    """The webhook of a job that ended. attempt: how often it was claimed. due_at: when it may be sent (again); None once that is over.
    delivered_at: None where it was given up."""

    __tablename__ = "outbox"
    __table_args__ = (UniqueConstraint("job_id"), Index(None, "due_at"))

    id: Mapped[str] = mapped_column(String(64), primary_key=True)
    job_id: Mapped[str] = mapped_column(ForeignKey(_OF_JOB, ondelete="CASCADE"))
    owner: Mapped[str] = mapped_column(String(64))
    url: Mapped[str] = mapped_column(Text)
    payload: Mapped[dict[str, Any]] = mapped_column(JSON)
    attempt: Mapped[int] = mapped_column(default=0)
    due_at: Mapped[datetime | None] = mapped_column(Utc)
    delivered_at: Mapped[datetime | None] = mapped_column(Utc)


class WebhookSecretRow(Base):
    """What an owner's webhooks are signed with. Kept as it is, since a signature cannot be made from a hash."""

    __tablename__ = "webhook_secrets"

    owner: Mapped[str] = mapped_column(String(64), primary_key=True)
    secret: Mapped[str] = mapped_column(String(100))
    created_at: Mapped[datetime] = mapped_column(Utc)
