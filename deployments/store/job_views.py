"""Rows of jobs as the values that leave the store. Reads what it is given, and positions in the queue; changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import select, tuple_
from sqlalchemy.orm import Session

from deployments.store.job_queue import positions
from deployments.store.job_tables import ArtifactRow, EventRow, JobRow
from deployments.store.job_values import ArtifactInfo, Event, JobInfo

_AS_THEY_ARE = (
    "id", "owner", "kind", "pool", "workflow", "status", "attempt", "max_attempts", "input", "created_at", "started_at",
    "finished_at", "step", "steps", "picture", "pictures", "error", "result", "previews", "webhook_url",
)  # fmt: skip


def infos(session: Session, rows: Sequence[JobRow], keep_s: float) -> tuple[JobInfo, ...]:
    """keep_s: how long a job is kept after its end."""
    places, told = positions(session, rows), _told(session, rows)
    return tuple(_info(row, places.get(row.id), told.get(row.id, {}), keep_s) for row in rows)


def event_of(row: EventRow) -> Event:
    return Event(row.seq, row.kind, row.data, row.at)


def artifact_of(row: ArtifactRow, job: JobRow, keep_s: float) -> ArtifactInfo:
    expires_at = job.finished_at + timedelta(seconds=keep_s) if job.finished_at is not None else None
    return ArtifactInfo(
        id=row.id, owner=row.owner, job_id=row.job_id, name=row.name, media_type=row.media_type, bytes=row.bytes,
        sha256=row.sha256, created_at=row.created_at, expires_at=expires_at,
    )  # fmt: skip


def _told(session: Session, rows: Sequence[JobRow]) -> dict[str, dict[str, Any]]:
    """What the last progress of those that run says beside their steps; of drawings, which say no more, it is not read."""
    last = [(row.id, row.events) for row in rows if row.status == "running" and row.steps and not row.pictures]
    if not last:
        return {}
    wanted = select(EventRow).where(tuple_(EventRow.job_id, EventRow.seq).in_(last), EventRow.kind == "progress")
    steps = ("picture", "pictures", "step", "steps")
    return {event.job_id: {name: event.data[name] for name in event.data if name not in steps} for event in session.scalars(wanted)}


def _info(row: JobRow, position: int | None, facts: dict[str, Any], keep_s: float) -> JobInfo:
    said: dict[str, Any] = {name: getattr(row, name) for name in _AS_THEY_ARE}
    timings = dict(row.seconds)
    if row.started_at is not None:
        timings["queued"] = (row.started_at - row.created_at).total_seconds()
    if row.finished_at is not None:
        timings["total"] = (row.finished_at - row.created_at).total_seconds()
    expires_at = row.finished_at + timedelta(seconds=keep_s) if row.finished_at is not None else None
    return JobInfo(**said, priority=-row.rank, queue_position=position, timings=timings, expires_at=expires_at, facts=facts)
