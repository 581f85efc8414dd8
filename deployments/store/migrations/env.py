"""What alembic runs to migrate: on the connection, and in the transaction, that `deployments.store.migrate` gives it."""

from __future__ import annotations

from alembic import context

from deployments.store import character_tables, job_tables, key_tables  # noqa: F401 (they register themselves)
from deployments.store.tables import Base

# SQLite cannot alter most of a table: batch mode copies it instead.
context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata, render_as_batch=True)
context.run_migrations()
