"""Jobs, their attempts, events, artifacts and webhooks.

Written out once and never changed: it does not follow deployments/store/job_tables.py.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

_TABLES = ("jobs", "job_lanes", "job_attempts", "job_events", "artifacts", "outbox", "webhook_secrets")


def upgrade() -> None:
    _jobs()
    _history()
    _artifacts()
    _webhooks()


def downgrade() -> None:
    for table in reversed(_TABLES):
        op.drop_table(table)


def _time(name: str, nullable: bool = False) -> sa.Column[object]:
    return sa.Column(name, sa.DateTime(timezone=True), nullable=nullable)


def _text(name: str, characters: int, nullable: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.String(characters), nullable=nullable)


def _whole(*names: str) -> list[sa.Column[int]]:
    return [sa.Column(name, sa.Integer, nullable=False) for name in names]


def _of_job(table: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=f"fk_{table}_job_id_jobs", ondelete="CASCADE")


def _jobs() -> None:
    op.create_table(
        "jobs",
        _text("id", 64),
        _text("owner", 64),
        _text("kind", 64),
        _text("pool", 64),
        _text("workflow", 100, nullable=True),
        sa.Column("input", sa.JSON, nullable=False),
        *_whole("rank"),
        sa.Column("previews", sa.Boolean, nullable=False),
        sa.Column("webhook_url", sa.Text, nullable=True),
        _text("idempotency_key", 255, nullable=True),
        _text("digest", 64),
        *_whole("max_attempts"),
        _text("status", 16),
        sa.Column("turn", sa.BigInteger, nullable=False),
        _time("not_before", nullable=True),
        *_whole("leases", "attempt"),
        _text("runner", 200, nullable=True),
        _time("lease_until", nullable=True),
        *_whole("events", "step", "steps", "picture", "pictures"),
        sa.Column("seconds", sa.JSON, nullable=False),
        sa.Column("error", sa.JSON, nullable=True),
        sa.Column("result", sa.JSON, nullable=True),
        _time("created_at"),
        _time("started_at", nullable=True),
        _time("finished_at", nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_jobs"),
        sa.UniqueConstraint("owner", "idempotency_key", name="uq_jobs_owner_idempotency_key"),
    )
    op.create_index("ix_jobs_owner_created_at_id", "jobs", ["owner", "created_at", "id"])
    op.create_index("ix_jobs_status_pool_rank_turn_created_at_id", "jobs", ["status", "pool", "rank", "turn", "created_at", "id"])
    op.create_index("ix_jobs_owner_pool_status_rank_turn", "jobs", ["owner", "pool", "status", "rank", "turn"])
    op.create_index("ix_jobs_runner_status", "jobs", ["runner", "status"])
    op.create_index("ix_jobs_finished_at", "jobs", ["finished_at"])
    op.create_index("ix_jobs_pool_status_finished_at", "jobs", ["pool", "status", "finished_at"])
    op.create_table(
        "job_lanes",
        _text("pool", 64),
        *_whole("rank"),
        sa.Column("served", sa.BigInteger, nullable=False),
        sa.PrimaryKeyConstraint("pool", "rank", name="pk_job_lanes"),
    )


def _history() -> None:
    op.create_table(
        "job_attempts",
        _text("job_id", 64),
        *_whole("attempt"),
        _text("runner", 200),
        _time("started_at"),
        _time("ended_at", nullable=True),
        _text("outcome", 16, nullable=True),
        sa.Column("error", sa.JSON, nullable=True),
        _of_job("job_attempts"),
        sa.PrimaryKeyConstraint("job_id", "attempt", name="pk_job_attempts"),
    )
    op.create_table(
        "job_events",
        _text("job_id", 64),
        *_whole("seq"),
        _text("kind", 16),
        sa.Column("data", sa.JSON, nullable=False),
        _time("at"),
        _of_job("job_events"),
        sa.PrimaryKeyConstraint("job_id", "seq", name="pk_job_events"),
    )


def _artifacts() -> None:
    op.create_table(
        "artifacts",
        _text("id", 64),
        _text("job_id", 64),
        _text("owner", 64),
        sa.Column("given", sa.Boolean, nullable=False),
        _text("name", 200),
        _text("key", 200),
        _text("media_type", 100),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        _text("sha256", 64),
        _time("created_at"),
        _of_job("artifacts"),
        sa.PrimaryKeyConstraint("id", name="pk_artifacts"),
        sa.UniqueConstraint("key", name="uq_artifacts_key"),
    )
    op.create_index("ix_artifacts_job_id", "artifacts", ["job_id"])


def _webhooks() -> None:
    op.create_table(
        "outbox",
        _text("id", 64),
        _text("job_id", 64),
        _text("owner", 64),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("payload", sa.JSON, nullable=False),
        *_whole("attempt"),
        _time("due_at", nullable=True),
        _time("delivered_at", nullable=True),
        _of_job("outbox"),
        sa.PrimaryKeyConstraint("id", name="pk_outbox"),
        sa.UniqueConstraint("job_id", name="uq_outbox_job_id"),
    )
    op.create_index("ix_outbox_due_at", "outbox", ["due_at"])
    op.create_table(
        "webhook_secrets",
        _text("owner", 64),
        _text("secret", 100),
        _time("created_at"),
        sa.PrimaryKeyConstraint("owner", name="pk_webhook_secrets"),
    )
