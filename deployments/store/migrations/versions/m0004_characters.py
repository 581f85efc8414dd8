"""Characters and their pictures.

Written out once and never changed: it does not follow deployments/store/character_tables.py.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "characters",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("owner", sa.String(64), nullable=False),
        sa.Column("name", sa.String(200), nullable=False),
        sa.Column("revision", sa.Integer, nullable=False),
        sa.Column("best", sa.String(64), nullable=True),
        sa.Column("best_by_hand", sa.Boolean, nullable=False),
        sa.Column("embedding", sa.LargeBinary, nullable=True),
        sa.Column("centroid", sa.LargeBinary, nullable=True),
        sa.Column("recogniser", sa.String(100), nullable=True),
        sa.Column("judge", sa.String(100), nullable=True),
        sa.Column("spread_mean", sa.Double, nullable=True),
        sa.Column("spread_least", sa.Double, nullable=True),
        sa.Column("warnings", sa.JSON, nullable=False),
        sa.Column("face_model", sa.LargeBinary, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_characters"),
    )
    op.create_index("ix_characters_owner_created_at", "characters", ["owner", "created_at"])
    op.create_table(
        "character_pictures",
        sa.Column("id", sa.String(64), nullable=False),
        sa.Column("character_id", sa.String(64), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("sha256", sa.String(64), nullable=False),
        sa.Column("bytes", sa.BigInteger, nullable=False),
        sa.Column("facts", sa.JSON, nullable=False),
        sa.Column("embedding", sa.LargeBinary, nullable=True),
        sa.Column("judge_embedding", sa.LargeBinary, nullable=True),
        sa.Column("kept", sa.Boolean, nullable=False),
        sa.Column("reason", sa.String(40), nullable=True),
        sa.Column("rank", sa.Integer, nullable=True),
        sa.Column("cosine", sa.Double, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_character_pictures"),
        sa.ForeignKeyConstraint(["character_id"], ["characters.id"], "fk_character_pictures_character_id_characters", ondelete="CASCADE"),
        sa.UniqueConstraint("character_id", "number", name="uq_character_pictures_character_id_number"),
    )
    op.create_table(
        "character_loras",
        sa.Column("character_id", sa.String(64), nullable=False),
        sa.Column("lora_id", sa.String(64), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("character_id", "lora_id", name="pk_character_loras"),
        sa.ForeignKeyConstraint(["character_id"], ["characters.id"], "fk_character_loras_character_id_characters", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["lora_id"], ["loras.id"], "fk_character_loras_lora_id_loras", ondelete="CASCADE"),
    )
    op.create_index("ix_character_loras_lora_id", "character_loras", ["lora_id"])


def downgrade() -> None:
    for table in ("character_loras", "character_pictures", "characters"):
        op.drop_table(table)
