"""Jobs of owners: submitted once, executed by whoever leases them, never lost, their results kept exactly once.

The database is the truth; runners hold nothing that they could not lose. Every method of an owner takes the owner: another owner's job
does not exist. A row never lacks its files: they are there before it and go after it. Executes no job, and knows no kind of them.
"""

from __future__ import annotations

import base64
import secrets
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

from sqlalchemy import delete, select, tuple_, update
from sqlalchemy.orm import Session

from deployments.errors import LikenessError, StoreUnavailable
from deployments.store import job_changes, job_queue, job_requests
from deployments.store.artifacts import ArtifactStore
from deployments.store.engine import Database
from deployments.store.job_files import PLAIN, JobFiles
from deployments.store.job_tables import ArtifactRow, AttemptRow, EventRow, JobRow
from deployments.store.job_values import TERMINAL, ArtifactInfo, Event, JobInfo, Lease, NewJob, Status
from deployments.store.job_views import artifact_of, event_of, infos
from deployments.store.outbox import Outbox

__all__ = ["KEEP_S", "ArtifactInfo", "Event", "JobInfo", "JobStore", "Lease", "NewJob", "Status"]

KEEP_S = 7 * 86_400.0
"""How long a job is kept after its end, unless the operator says otherwise."""
# Rows that one transaction changes, so that no other waits long.
_AT_ONCE = 100
# Listing a store of objects costs money, and what it would find is at least a day old.
_SWEPT_EVERY_S = 3600.0

Within = Callable[[Session], object]
"""Changes rows of the same database; what it raises undoes the whole transaction."""


class JobStore:
    """For any number of threads, processes and machines on one database (which was migrated) and one store of artifacts.

    Every method raises StoreUnavailable where one of the two cannot be used; what was under way is then done wholly or not at all.
    """

    def __init__(self, url: str, artifacts: ArtifactStore, keep_s: float = KEEP_S) -> None:
        """url: of the database. keep_s: how long a job is kept after its end. Raises StoreUnavailable for a URL that leads nowhere."""
        self._database, self._files, self._keep_s = Database(url), JobFiles(artifacts), keep_s
        self._swept: float | None = None
        self.outbox = Outbox(self._database)

    def close(self) -> None:
        self._database.close()

    # --- For owners ---

    def submit(self, owner: str, new: NewJob, quota: int | None = None, room: int | None = None) -> tuple[JobInfo, bool]:
        """The job, and whether it was made by this call: where its idempotency key is known, it is the one that was made then.

        quota: how many of the owner's may wait or run in the pool; room: how many of all owners may wait in it. Raises QuotaExceeded and
        QueueFull beyond that, IdempotencyConflict where the key belongs to another request, InvalidRequest for what cannot be kept.
        """
        job_requests.check(owner, new)
        digest = job_requests.digest_of(new)
        # Asked before a file is written, so that a full queue costs no disk; and again under the lock, where the answer counts.
        if new.pictures:
            with self._database.reading() as session:
                if row := self._let_in(session, owner, new, digest, quota, room):
                    return self._info(session, row), False
        id = f"job_{secrets.token_hex(12)}"
        files = self._files.write(id, ((name, content, PLAIN) for name, content in new.pictures.items()))
        try:
            with self._database.writing(lock=job_queue.LOCK) as session:
                made = self._let_in(session, owner, new, digest, quota, room)
                row = made or self._add(session, id, owner, new, digest)
                if made is None:
                    session.add_all(file.row(id, owner, True, row.created_at) for file in files)
                    session.flush()
                info = self._info(session, row)
        except LikenessError as error:
            # A commit that was not answered may have been done: then the files have rows.
            if not isinstance(error, StoreUnavailable):
                self._files.discard(files)
            raise
        if made is not None:
            self._files.discard(files)
        return info, made is None

    def known(self, owner: str, new: NewJob, quota: int | None = None, room: int | None = None) -> JobInfo | None:
        """The job that the same request with the same idempotency key made before; None where it would make one now. Raises as submit,
        which asks again: this is for whoever is about to do work for a job that may be refused."""
        with self._database.reading() as session:
            row = self._let_in(session, owner, new, job_requests.digest_of(new), quota, room)
            return self._info(session, row) if row is not None else None

    def get(self, id: str, owner: str) -> JobInfo:
        """Raises JobNotFound."""
        with self._database.reading() as session:
            return self._info(session, job_requests.owned(session, id, owner))

    def list(
        self,
        owner: str,
        *,
        status: Status | None = None,
        kind: str | None = None,
        workflow: str | None = None,
        limit: int = 50,
        before: str | None = None,
    ) -> tuple[JobInfo, ...]:
        """The newest first. before: an id of the owner's; only older ones. Raises JobNotFound where that is none."""
        given = {"status": status, "kind": kind, "workflow": workflow}
        wanted = {field: value for field, value in given.items() if value is not None}
        if not all(job_requests.possible(value) for value in wanted.values()):
            return ()
        rows = select(JobRow).where(JobRow.owner == owner, *(getattr(JobRow, field) == value for field, value in wanted.items()))
        with self._database.reading() as session:
            if before is not None:
                last = job_requests.owned(session, before, owner)
                rows = rows.where(tuple_(JobRow.created_at, JobRow.id) < tuple_(last.created_at, last.id))
            found = session.scalars(rows.order_by(JobRow.created_at.desc(), JobRow.id.desc()).limit(limit)).all()
            return infos(session, found, self._keep_s)

    def cancel(self, id: str, owner: str) -> tuple[JobInfo, bool]:
        """The job, and whether this call cancelled it: it did unless the job had ended. Whoever works on it finds its lease gone. Raises
        JobNotFound."""
        with self._database.writing() as session:
            row = job_requests.owned(session, id, owner, locked=True)
            ours = row.status not in TERMINAL
            if ours:
                job_changes.end(session, row, "canceled", job_queue.now(session))
                session.flush()
            return self._info(session, row), ours

    def delete(self, id: str, owner: str) -> None:
        """Takes the job away with everything of it, also from SQLite's log (its previews are pictures); whoever works on it finds its lease
        gone, and no webhook tells of it any more. Raises JobNotFound."""
        with self._database.writing() as session:
            row = job_requests.owned(session, id, owner, locked=True)
            keys = _delete(session, [row.id])
        self._files.remove(keys)
        self._database.forget()

    def events(self, id: str, owner: str, after: int = 0, limit: int = 100) -> tuple[Event, ...]:
        """The first `limit` with numbers above `after`, in order. Raises JobNotFound."""
        with self._database.reading() as session:
            row = job_requests.owned(session, id, owner)
            wanted = select(EventRow).where(EventRow.job_id == row.id, EventRow.seq > after).order_by(EventRow.seq).limit(limit)
            return tuple(event_of(event) for event in session.scalars(wanted))

    def artifact(self, id: str, owner: str) -> tuple[ArtifactInfo, bytes]:
        """Raises ArtifactNotFound."""
        wanted = select(ArtifactRow, JobRow).join(JobRow, JobRow.id == ArtifactRow.job_id)
        with self._database.reading() as session:
            mine = wanted.where(ArtifactRow.id == job_requests.artifact_id(id), ArtifactRow.owner == owner)
            found = session.execute(mine).one_or_none()
            if found is None:
                raise job_requests.no_artifact(id)
            info, key = artifact_of(found[0], found[1], self._keep_s), found[0].key
        content = self._files.read(key)
        if content is None:  # deleted between the two
            raise job_requests.no_artifact(id)
        return info, content

    # --- For runners ---

    def lease(
        self, runner: str, pools: Sequence[str], for_s: float, pool_limits: Mapping[str, int] | None = None, *, told: bool = False
    ) -> Lease | None:
        """The job that goes next, of the first of the pools that has one; None where none may begin.

        runner: a name that no other runner has, nor had before it. for_s: seconds until others may take the job up, without a heartbeat.
        pool_limits: how many jobs of a pool may run at once, over all runners. told: whether there is said to be one.
        """
        limits = pool_limits or {}
        # Asked without the lock else: runners ask often, and mostly in vain.
        for pool in pools if told else self._due(pools):
            # As if it had not been begun, after a power cut: no runner lives then either.
            with self._database.writing(lock=job_queue.LOCK, lasting=False) as session:
                at = job_queue.now(session)
                row = job_queue.take(session, pool, limits.get(pool), at)
                if row is not None:
                    job_changes.start(session, row, runner, for_s, at)
                    session.flush()
                    return Lease(self._info(session, row), row.leases, runner, at + timedelta(seconds=for_s))
        return None

    def held(self, runner: str) -> set[str]:
        """Ids of the jobs that the runner has; of those that it knows of, the others were cancelled, deleted or taken away."""
        with self._database.reading() as session:
            return set(session.scalars(select(JobRow.id).where(JobRow.runner == runner, JobRow.status == "running")))

    def heartbeat(self, runner: str, for_s: float, known: Collection[str] | None = None) -> set[str]:
        """Extends leases of the runner to for_s seconds from now. Returns the ids of those that it still has.

        known: the ids of the jobs that it works on, else all. A lease whose answer was lost together with the database's connection is
        one that the runner does not know of: it must run out, for others to take the job up.
        """
        mine = update(JobRow).where(JobRow.runner == runner, JobRow.status == "running")
        if known is not None:
            mine = mine.where(JobRow.id.in_(known))
        with self._database.writing(lasting=False) as session:
            until = job_queue.now(session) + timedelta(seconds=for_s)
            return set(session.scalars(mine.values(lease_until=until).returning(JobRow.id)))

    def progress(
        self,
        lease: Lease,
        *,
        picture: int = 0,
        pictures: int = 0,
        step: int,
        steps: int,
        preview: bytes | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> bool:
        """Notes how far the job is, and tells it. preview: a small JPEG, kept until the next one where the job wants them. facts: what else
        its event says, plain JSON. False where the job is not the lease's any more."""
        steps_now = {"picture": picture, "pictures": pictures, "step": step, "steps": steps}
        with self._database.writing(lasting=False) as session:
            row = job_changes.held(session, lease)
            if row is not None:
                shown = base64.b64encode(preview).decode() if preview is not None and row.previews else None
                job_changes.advance(session, row, steps_now, facts or {}, shown, job_queue.now(session))
            return row is not None

    def succeed(
        self,
        lease: Lease,
        answer: Mapping[str, Any],
        pictures: Sequence[tuple[bytes, str]],
        timings: Mapping[str, float],
        within: Within | None = None,
    ) -> JobInfo | None:
        """Ends the job with its answer. pictures: bytes and media type of each; each mapping in `answer["data"]`, one for each of them,
        gets `artifact`, its id. timings: seconds by stage. within: what else is done in the same transaction.

        None where the job is not the lease's any more: then nothing is kept. Asked again after it succeeded (the first answer was lost
        together with the database's connection), the job as it is. Raises ValueError for an answer that is no JSON, or without a place
        for each picture.
        """
        job_requests.check_answer(answer, len(pictures), timings)
        # Before anything is written: a database that is away, asked again and again, must not cost a file each time.
        with self._database.reading() as session:
            row = session.get(JobRow, lease.job.id)
            if row is None or row.status != "running" or row.leases != lease.attempt:
                return self._ended_by(session, lease)
        files = self._files.write(lease.job.id, ((str(place), content, kind) for place, (content, kind) in enumerate(pictures)))
        with self._database.writing() as session:
            row = job_changes.held(session, lease)
            if row is not None:
                at = job_queue.now(session)
                session.add_all(file.row(row.id, row.owner, False, at) for file in files)
                row.result, row.seconds = job_requests.with_artifacts(answer, [file.id for file in files]), dict(timings)
                row.step = row.steps
                if within is not None:
                    within(session)
                job_changes.end(session, row, "succeeded", at, told={"artifacts": [file.id for file in files]})
                session.flush()
                return self._info(session, row)
            info = self._ended_by(session, lease)
        self._files.discard(files)
        return info

    def fail(self, lease: Lease, problem: Mapping[str, Any], *, retryable: bool, moderated: bool = False) -> JobInfo | None:
        """Ends the attempt: the job waits for another one where it is retryable and has attempts left, else it has ended. problem: JSON
        (RFC 9457). None where the job is not the lease's any more."""
        with self._database.writing() as session:
            row = job_changes.held(session, lease)
            if row is None:
                return None
            at = job_queue.now(session)
            if retryable and not moderated and row.attempt < row.max_attempts:
                job_changes.retry(session, row, problem, at)
            else:
                job_changes.end(session, row, "moderated" if moderated else "failed", at, error=problem)
            session.flush()
            return self._info(session, row)

    def release(self, lease: Lease) -> bool:
        """Puts the job back to where it waited, without counting the attempt. False where the job is not the lease's any more."""
        with self._database.writing(lasting=False) as session:
            row = job_changes.held(session, lease)
            if row is not None:
                job_changes.release(session, row, job_queue.now(session))
            return row is not None

    def pictures(self, job: Lease | JobInfo) -> Mapping[str, bytes]:
        """The pictures that came with the job, by their names. Raises JobNotFound where the job was deleted meanwhile."""
        info = job.job if isinstance(job, Lease) else job
        with self._database.reading() as session:
            given = select(ArtifactRow.name, ArtifactRow.key).where(ArtifactRow.job_id == info.id, ArtifactRow.given)
            keys = dict(session.execute(given).all())
        contents = {name: self._files.read(key) for name, key in keys.items()}
        if None in contents.values():
            self.get(info.id, info.owner)
            remedy = "Let the store of artifacts be the one that it was submitted to."
            raise StoreUnavailable(f"Pictures of the job {info.id} are not there.", remedy)
        return {name: content for name, content in contents.items() if content is not None}

    # --- Housekeeping, by any number of processes at once ---

    def live(self, ids: Collection[str]) -> set[str]:
        """Of these ids those of jobs that wait or run, whoever's they are; the others have ended, or are gone."""
        with self._database.reading() as session:
            return set(session.scalars(select(JobRow.id).where(JobRow.id.in_(list(ids)), JobRow.status.not_in(TERMINAL))))

    def reap(self) -> tuple[JobInfo, ...]:
        """Takes up what runners left that gave no sign of life: each waits again, or has failed with `replica_lost`. As they are then."""
        left = select(JobRow).where(JobRow.status == "running").limit(_AT_ONCE)
        with self._database.reading() as session:
            if session.scalar(left.where(JobRow.lease_until < job_queue.now(session))) is None:
                return ()
        with self._database.writing() as session:
            at = job_queue.now(session)
            rows = session.scalars(left.where(JobRow.lease_until < at).with_for_update(skip_locked=True)).all()
            for row in rows:
                job_changes.lose(session, row, at)
            session.flush()
            return infos(session, rows, self._keep_s)

    def expire(self, keep_s: float | None = None) -> int:
        """Deletes jobs that ended longer than keep_s (else the store's own) ago, with everything of them. Returns how many. Of those that
        ended since, what came with them. Now and then also sweeps up files that dying processes left."""
        gone = 0
        while some := self._expire_some(self._keep_s if keep_s is None else keep_s):
            gone += some
        if gone:
            self._database.forget()
        while self._files.forget_given(self._database):
            pass
        if self._swept is None or time.monotonic() - self._swept > _SWEPT_EVERY_S:
            self._files.sweep(self._database)
            self._swept = time.monotonic()
        return gone

    def depth(self) -> Mapping[str, tuple[int, float]]:
        """Of each pool in which jobs wait: how many, and for how many seconds the oldest has."""
        with self._database.reading() as session:
            return job_queue.depth(session)

    def pace(self, pool: str) -> float | None:
        """Median seconds that the pool's latest jobs which succeeded ran for; None before the first."""
        with self._database.reading() as session:
            return job_queue.pace(session, pool)

    def _info(self, session: Session, row: JobRow) -> JobInfo:
        return infos(session, [row], self._keep_s)[0]

    def _due(self, pools: Sequence[str]) -> tuple[str, ...]:
        with self._database.reading() as session:
            return job_queue.pools_due(session, pools)

    def _let_in(self, session: Session, owner: str, new: NewJob, digest: str, quota: int | None, room: int | None) -> JobRow | None:
        """The job that the request made before; None where it makes one now, and may."""
        row = job_requests.known(session, owner, new.idempotency_key, digest)
        if row is None:
            job_queue.admit(session, owner, new.pool, quota, room)
        return row

    def _add(self, session: Session, id: str, owner: str, new: NewJob, digest: str) -> JobRow:
        at = job_queue.now(session)
        row = JobRow(
            id=id, owner=owner, kind=new.kind, pool=new.pool, workflow=new.workflow, input=job_requests.plain(new.input),
            rank=-new.priority, previews=new.previews, webhook_url=new.webhook_url, idempotency_key=new.idempotency_key,
            digest=digest, max_attempts=new.max_attempts, status="queued", created_at=at, events=1,
            turn=job_queue.next_turn(session, owner, new.pool, -new.priority),
        )  # fmt: skip
        session.add(row)
        session.flush()  # before what refers to it
        session.add(EventRow(job_id=id, seq=row.events, kind="queued", data={}, at=at))
        return row

    def _ended_by(self, session: Session, lease: Lease) -> JobInfo | None:
        """The job, if it was this lease under which it succeeded."""
        attempt = session.get(AttemptRow, (lease.job.id, lease.attempt))
        if attempt is None or attempt.outcome != "succeeded" or attempt.runner != lease.runner:
            return None
        return self._info(session, session.get_one(JobRow, lease.job.id))

    def _expire_some(self, keep_s: float = KEEP_S) -> int:
        with self._database.reading() as session:
            before = job_queue.now(session) - timedelta(seconds=keep_s)
            ended = select(JobRow.id).where(JobRow.finished_at < before).limit(_AT_ONCE)
            if session.scalar(ended) is None:
                return 0
        with self._database.writing() as session:
            ids = session.scalars(ended.with_for_update(skip_locked=True)).all()
            keys = _delete(session, ids)
        self._files.remove(keys)
        return len(ids)


def _delete(session: Session, ids: Sequence[str]) -> Sequence[str]:
    """Takes the rows away, and all that refers to them. Returns the keys of their files."""
    keys = session.scalars(select(ArtifactRow.key).where(ArtifactRow.job_id.in_(ids))).all()
    session.execute(delete(JobRow).where(JobRow.id.in_(ids)))
    return keys
