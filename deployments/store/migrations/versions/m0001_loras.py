"""LoRAs and who they belong to.

Written out once and never changed: it does not follow deployments/store/tables.py.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "loras",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("trigger_word", sa.String(200), nullable=True),
        sa.Column("description", sa.Text, nullable=False),
        sa.Column("base", sa.String(100), nullable=False),
        sa.Column("family", sa.String(100), nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("format", sa.Text, nullable=False),
        sa.Column("keys", sa.Integer, nullable=False),
        sa.Column("rank_low", sa.Integer, nullable=False),
        sa.Column("rank_high", sa.Integer, nullable=False),
        sa.Column("error", sa.Double, nullable=False),
        sa.Column("metadata", sa.JSON, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_loras"),
    )
    op.create_index("ix_loras_owner_created_at", "loras", ["owner", "created_at"])
    op.create_index("ix_loras_sha256", "loras", ["sha256"])


def downgrade() -> None:
    op.drop_table("loras")
