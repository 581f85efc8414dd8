"""What becomes of a job: every change of its state, with the attempt, the event and the webhook that belong to it. Commits nothing.

Each function takes a row that is locked in the session's transaction and in the state that the change begins from; `held` finds it so
for whoever has a lease. That is a compare-and-set: of two who want to change a job, the second finds it changed.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from deployments.errors import ReplicaLost
from deployments.store.job_tables import AttemptRow, DeliveryRow, EventRow, JobRow
from deployments.store.job_values import EventKind, Lease

# Before the second attempt a job waits 1 s, then four times as long each time.
_BACK_OFF_S, _BACK_OFF_FACTOR, _BACK_OFF_MOST_S = 1.0, 4.0, 60.0


def held(session: Session, lease: Lease) -> JobRow | None:
    """The job of a lease, locked; None once it ended, or was taken away."""
    fence = (JobRow.status == "running", JobRow.leases == lease.attempt, JobRow.runner == lease.runner)
    return session.scalar(select(JobRow).where(JobRow.id == lease.job.id, *fence).with_for_update())


def tell(session: Session, row: JobRow, kind: EventKind, data: Mapping[str, Any], at: datetime) -> None:
    """Adds an event. Numbers of one job are given out under its lock, hence whoever has read up to one misses none before it."""
    row.events += 1
    session.add(EventRow(job_id=row.id, seq=row.events, kind=kind, data=dict(data), at=at))


def start(session: Session, row: JobRow, runner: str, for_s: float, at: datetime) -> None:
    """queued -> running."""
    row.status, row.runner, row.lease_until = "running", runner, at + timedelta(seconds=for_s)
    row.started_at, row.not_before = at, None
    row.leases += 1
    row.attempt += 1
    session.add(AttemptRow(job_id=row.id, attempt=row.leases, runner=runner, started_at=at))
    tell(session, row, "started", {"attempt": row.attempt}, at)


def advance(session: Session, row: JobRow, steps: Mapping[str, int], facts: Mapping[str, Any], preview: str | None, at: datetime) -> None:
    """running -> running. steps: picture, pictures, step, steps. facts: what else is told. preview: a JPEG in base64, which replaces the
    one before."""
    row.picture, row.pictures, row.step, row.steps = (steps[name] for name in ("picture", "pictures", "step", "steps"))
    tell(session, row, "progress", {**facts, **steps}, at)
    if preview is not None:
        _forget_previews(session, row)
        tell(session, row, "preview", {"picture": row.picture, "step": row.step, "jpeg": preview}, at)


def release(session: Session, row: JobRow, at: datetime) -> None:
    """running -> queued, as if the attempt had not been."""
    row.attempt -= 1
    _requeue(session, row, "released", None, None, at)


def retry(session: Session, row: JobRow, problem: Mapping[str, Any], at: datetime) -> None:
    """running -> queued, after the back-off. For a job that has attempts left."""
    wait = min(_BACK_OFF_MOST_S, _BACK_OFF_S * _BACK_OFF_FACTOR ** (row.attempt - 1))
    _requeue(session, row, "requeued", problem, at + timedelta(seconds=wait), at)


def lose(session: Session, row: JobRow, at: datetime) -> None:
    """running -> queued at once where attempts are left, else failed: its runner gave no sign of life."""
    problem = lost_problem(row.attempt)
    if row.attempt < row.max_attempts:
        _requeue(session, row, "lost", problem, None, at)
    else:
        end(session, row, "failed", at, error=problem)


def end(
    session: Session,
    row: JobRow,
    status: Literal["succeeded", "failed", "canceled", "moderated"],
    at: datetime,
    *,
    error: Mapping[str, Any] | None = None,
    told: Mapping[str, Any] | None = None,
) -> None:
    """queued or running -> status, for good. told: data of the event beside the error."""
    if row.status == "running":
        _close(session, row, status, error, at)
    row.status, row.finished_at, row.error = status, at, dict(error) if error is not None else None
    row.runner = row.lease_until = row.not_before = None
    _forget_previews(session, row)
    tell(session, row, status, {**(told or {}), **({"error": dict(error)} if error is not None else {})}, at)
    if row.webhook_url is not None:
        delivery = {"job_id": row.id, "owner": row.owner, "url": row.webhook_url, "payload": {"job": row.id}, "due_at": at}
        session.add(DeliveryRow(id=f"msg_{secrets.token_hex(12)}", **delivery))


def lost_problem(attempt: int) -> dict[str, Any]:
    """ReplicaLost as a problem (RFC 9457), in the fields of every problem that a runner writes."""
    error = ReplicaLost(f"The runner of attempt {attempt} gave no sign of life.")
    title = " ".join((ReplicaLost.__doc__ or "").split())
    found = {"type": f"urn:likeness:problem:{error.code}", "title": title, "status": error.status, "detail": error.message}
    return found | {"code": error.code, "param": None, "remedy": error.remedy, "details": error.details}


def _requeue(
    session: Session, row: JobRow, outcome: str, problem: Mapping[str, Any] | None, not_before: datetime | None, at: datetime
) -> None:
    _close(session, row, outcome, problem, at)
    row.status, row.runner, row.lease_until, row.started_at, row.not_before = "queued", None, None, None, not_before
    row.step = row.picture = 0
    _forget_previews(session, row)
    data = {"attempt": row.attempt, "error": problem, "not_before": not_before.isoformat() if not_before is not None else None}
    tell(session, row, "requeued", data, at)


def _close(session: Session, row: JobRow, outcome: str, error: Mapping[str, Any] | None, at: datetime) -> None:
    attempt = session.get_one(AttemptRow, (row.id, row.leases))
    attempt.ended_at, attempt.outcome, attempt.error = at, outcome, dict(error) if error is not None else None


def _forget_previews(session: Session, row: JobRow) -> None:
    if row.previews:
        session.execute(delete(EventRow).where(EventRow.job_id == row.id, EventRow.kind == "preview"))
