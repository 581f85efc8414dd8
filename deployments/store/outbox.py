"""Webhooks that are still to be sent, and what they are signed with. Sends nothing and knows no HTTP.

A row is made in the transaction in which its job ends, one for each (job_changes.end): it is sent at least once, under one id.
"""

from __future__ import annotations

import base64
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

from sqlalchemy import select, update

from deployments.store.engine import Database
from deployments.store.job_queue import now as time_of
from deployments.store.job_tables import DeliveryRow, WebhookSecretRow

# Standard Webhooks 1.0.0 (standard-webhooks/standard-webhooks, spec/standard-webhooks.md): 24 to 64 random bytes after this prefix.
_SECRET_PREFIX, _SECRET_BYTES = "whsec_", 32


@dataclass(frozen=True, kw_only=True)
class Delivery:
    """A webhook to be sent now. id: `msg_...`, the same whenever it is sent again. attempt: 1 for the first. payload: {"job": its id}; the
    body is what the job's owner would read at the moment of sending."""

    id: str
    job_id: str
    owner: str
    url: str
    payload: Mapping[str, Any]
    attempt: int


class Outbox:
    """For any number of senders at once."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def due(self, now: datetime | None = None, limit: int = 20, lease_s: float = 60.0) -> tuple[Delivery, ...]:
        """Claims those that are due, the longest due first: nobody else gets them for lease_s seconds. now: else the database's time."""
        waiting = select(DeliveryRow).order_by(DeliveryRow.due_at).limit(limit)
        with self._database.reading() as session:
            if session.scalar(waiting.where(DeliveryRow.due_at <= (now or time_of(session)))) is None:
                return ()
        with self._database.writing() as session:
            at = now or time_of(session)
            rows = session.scalars(waiting.where(DeliveryRow.due_at <= at).with_for_update(skip_locked=True)).all()
            for row in rows:
                row.due_at = at + timedelta(seconds=lease_s)
                row.attempt += 1
            return tuple(
                Delivery(id=row.id, job_id=row.job_id, owner=row.owner, url=row.url, payload=row.payload, attempt=row.attempt)
                for row in rows
            )

    def delivered(self, id: str) -> None:
        """It has arrived, and is not sent again."""
        with self._database.writing() as session:
            session.execute(update(DeliveryRow).where(DeliveryRow.id == id).values(due_at=None, delivered_at=time_of(session)))

    def failed(self, id: str, retry_at: datetime | None) -> None:
        """It has not arrived. retry_at: when to try again; None: it is given up."""
        with self._database.writing() as session:
            undelivered = (DeliveryRow.id == id, DeliveryRow.delivered_at.is_(None))
            session.execute(update(DeliveryRow).where(*undelivered).values(due_at=retry_at))

    def secret(self, owner: str) -> str:
        """What the owner's webhooks are signed with: `whsec_` and base64. Made when it is first asked for."""
        with self._database.reading() as session:
            if row := session.get(WebhookSecretRow, owner):
                return row.secret
        with self._database.writing(lock=f"{_SECRET_PREFIX}{owner}") as session:
            row = session.get(WebhookSecretRow, owner)
            if row is None:
                row = WebhookSecretRow(owner=owner, secret=_new_secret(), created_at=time_of(session))
                session.add(row)
            return row.secret

    def rotate(self, owner: str) -> str:
        """A new secret, which signs from now on; the one before is forgotten."""
        with self._database.writing(lock=f"{_SECRET_PREFIX}{owner}") as session:
            made = WebhookSecretRow(owner=owner, secret=_new_secret(), created_at=time_of(session))
            session.merge(made)
            return made.secret


def _new_secret() -> str:
    return _SECRET_PREFIX + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()
