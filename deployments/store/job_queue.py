"""Who goes next: turns, limits and positions of the jobs that wait. Statements on a session; commits nothing.

Of the jobs that wait in a pool the highest priority goes first, and within a priority (a lane) whoever has the lowest turn. Turns are
those of start-time fair queueing (Goyal, Vin, Cheng, "Start-time Fair Queueing", SIGCOMM 1996) with jobs of equal length: an owner's
next job stands one behind their last one that waits, and not before what is served now. Hence two owners alternate, however many jobs
either has sent and whoever was first; and who sent nothing for a while gains nothing by it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import UTC, datetime

from sqlalchemy import Select, func, or_, select
from sqlalchemy.orm import Session

from deployments.errors import QueueFull, QuotaExceeded
from deployments.store.job_tables import JobRow, LaneRow

LOCK = "likeness: the queue of jobs"
"""Held (Database.writing) by whoever submits or leases: counting and then acting on the count is one step. Both take milliseconds."""

_PACE_OF = 20
_ORDER = (JobRow.rank, JobRow.turn, JobRow.created_at, JobRow.id)


def now(session: Session) -> datetime:
    """The time by the database's clock where several machines share one, so that theirs need not agree; else by this one's."""
    if session.get_bind().dialect.name == "sqlite":
        return datetime.now(UTC)
    # Not now(), which is when the transaction began: it may have waited for others since.
    found: datetime = session.execute(select(func.clock_timestamp())).scalar_one()
    return found.astimezone(UTC)


def admit(session: Session, owner: str, pool: str, quota: int | None, room: int | None) -> None:
    """Raises QueueFull where `room` jobs wait in the pool, QuotaExceeded where `quota` of this owner's wait or run in it."""
    counted = select(func.count()).select_from(JobRow).where(JobRow.pool == pool)
    if quota is not None:
        mine = session.scalar(counted.where(JobRow.owner == owner, JobRow.status.in_(("queued", "running")))) or 0
        if mine >= quota:
            details = {"pool": pool, "quota": quota}
            raise QuotaExceeded(f"{mine} of your jobs wait or run in the pool {pool}, and {quota} may.", details=details)
    if room is not None:
        waiting = session.scalar(counted.where(JobRow.status == "queued")) or 0
        if waiting >= room:
            raise QueueFull(f"{waiting} jobs wait in the pool {pool}, and {room} may.", details={"pool": pool, "room": room})


def next_turn(session: Session, owner: str, pool: str, rank: int) -> int:
    """The turn of an owner's new job. Under LOCK."""
    waiting = (JobRow.owner == owner, JobRow.pool == pool, JobRow.rank == rank, JobRow.status == "queued")
    last = session.scalar(select(func.max(JobRow.turn)).where(*waiting)) or 0
    lane = session.get(LaneRow, (pool, rank))
    return max(last, lane.served if lane is not None else 0) + 1


def take(session: Session, pool: str, limit: int | None, at: datetime) -> JobRow | None:
    """The job of the pool that goes next, locked, its turn noted as served; None where none may. Under LOCK."""
    if limit is not None:
        running = select(func.count()).select_from(JobRow).where(JobRow.pool == pool, JobRow.status == "running")
        if (session.scalar(running) or 0) >= limit:
            return None
    # Whoever has a job locked is about to cancel or delete it.
    row = session.scalar(due(at).where(JobRow.pool == pool).order_by(*_ORDER).limit(1).with_for_update(skip_locked=True))
    if row is not None:
        _serve(session, row)
    return row


def pools_due(session: Session, pools: Sequence[str]) -> tuple[str, ...]:
    """Those of the pools in which a job waits whose time has come, in their order."""
    # Each by itself: a question about all of them at once reads the whole queue.
    any_due = due(now(session)).with_only_columns(JobRow.id).limit(1)
    return tuple(pool for pool in pools if session.scalar(any_due.where(JobRow.pool == pool)) is not None)


def positions(session: Session, rows: Sequence[JobRow]) -> dict[str, int]:
    """By id: how many go before each of those rows that wait, in its pool, as things are."""
    waiting = [row for row in rows if row.status == "queued"]
    if not waiting:
        return {}
    place = func.row_number().over(partition_by=JobRow.pool, order_by=_ORDER) - 1
    pools = {row.pool for row in waiting}
    ranked = select(JobRow.id, place.label("place")).where(JobRow.status == "queued", JobRow.pool.in_(pools)).subquery()
    wanted = select(ranked.c.id, ranked.c.place).where(ranked.c.id.in_([row.id for row in waiting]))
    return dict(session.execute(wanted).all())


def due(at: datetime) -> Select[JobRow]:
    """Jobs that wait, and need not wait for a later time (after a failed attempt)."""
    return select(JobRow).where(JobRow.status == "queued", or_(JobRow.not_before.is_(None), JobRow.not_before <= at))


def _serve(session: Session, row: JobRow) -> None:
    lane = session.get(LaneRow, (row.pool, row.rank))
    if lane is None:
        session.add(LaneRow(pool=row.pool, rank=row.rank, served=row.turn))
    else:
        # A job that was tried before comes again with the turn that it had.
        lane.served = max(lane.served, row.turn)


def depth(session: Session) -> dict[str, tuple[int, float]]:
    """Of each pool in which jobs wait: how many, and for how many seconds the oldest has."""
    oldest = func.min(JobRow.created_at).label("oldest")
    waiting = select(JobRow.pool, func.count(), oldest).where(JobRow.status == "queued").group_by(JobRow.pool)
    at = now(session)
    return {pool: (count, max(0.0, (at - since).total_seconds())) for pool, count, since in session.execute(waiting)}


def pace(session: Session, pool: str) -> float | None:
    """Median seconds that the pool's latest jobs which succeeded ran for; None before the first."""
    latest = select(JobRow.started_at, JobRow.finished_at).where(JobRow.pool == pool, JobRow.status == "succeeded")
    rows = session.execute(latest.order_by(JobRow.finished_at.desc()).limit(_PACE_OF)).all()
    seconds = [(end - start).total_seconds() for start, end in rows if start is not None and end is not None]
    return statistics.median(seconds) if seconds else None
