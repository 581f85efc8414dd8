"""What a job is to those outside the store: the values that go in and come out, and the names of its states and events.

    queued ──lease──> running ──succeed──> succeeded
       ^                 │ ├─────fail────> failed, moderated
       └─fail, release,──┘ └────cancel───> canceled          (a queued job may be cancelled too)
         reap

The last four are terminal: nothing changes such a job any more, except that it is deleted. Knows no database.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Literal

Status = Literal["queued", "running", "succeeded", "failed", "canceled", "moderated"]
TERMINAL: frozenset[Status] = frozenset(("succeeded", "failed", "canceled", "moderated"))
EventKind = Literal["queued", "started", "progress", "preview", "requeued", "succeeded", "failed", "canceled", "moderated"]
PRIORITIES = {"low": -1, "normal": 0, "high": 1}

KEY_CHARACTERS, URL_CHARACTERS = 255, 2000
"""How long an idempotency key and a webhook's address may be."""


@dataclass(frozen=True, kw_only=True)
class NewJob:
    """A job as it is submitted.

    kind: who executes it (`generate`). pool: whose slots it needs. input: plain JSON, with names in place of pictures; pictures: their
    bytes by these names. priority: -1, 0 or 1; higher goes first. idempotency_key: of all jobs of an owner with the same key there is
    one. asked: the input as it was sent, by which two requests with one key are the same; None: by input and pictures. previews:
    whether small pictures are wanted on the way. max_attempts: how often it is begun before it fails for good.
    """

    kind: str
    pool: str
    workflow: str | None = None
    input: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    priority: int = 0
    webhook_url: str | None = None
    idempotency_key: str | None = None
    asked: Mapping[str, Any] | None = None
    previews: bool = False
    max_attempts: int = 3


@dataclass(frozen=True, kw_only=True)
class JobInfo:
    """A job as it stands.

    attempt: how often it was begun, without those that were released; 0 before the first. started_at: of the last attempt, None while
    queued. queue_position: how many go before it in its pool, as things are; None unless queued. step of steps, over all pictures;
    picture of pictures. timings: seconds of each stage, and `queued` (until its last start) and `total` (until its end), once known.
    facts: what the last progress of a job that runs told beside its steps, where it draws no pictures (`pictures` is 0 then).
    error: a problem (RFC 9457) as JSON, of a job that failed or was moderated. result: the answer, whose pictures name an `artifact`.
    expires_at: when it will be forgotten; None unless terminal.
    """

    id: str
    owner: str
    kind: str
    pool: str
    workflow: str | None
    status: Status
    priority: int
    attempt: int
    max_attempts: int
    input: Mapping[str, Any]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    queue_position: int | None
    step: int
    steps: int
    picture: int
    pictures: int
    timings: Mapping[str, float]
    error: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    previews: bool
    webhook_url: str | None
    expires_at: datetime | None
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def terminal(self) -> bool:
        return self.status in TERMINAL


@dataclass(frozen=True)
class Lease:
    """The right to work on a job, until then. attempt: number of this lease of the job; no two have the same, and everything that is
    written under it is refused once there is a later one (`job.attempt` does not count those that were released; this does)."""

    job: JobInfo
    attempt: int
    runner: str
    until: datetime


@dataclass(frozen=True)
class Event:
    """Something that happened to a job. seq: 1, 2, ... within the job; numbers of previews that were replaced are missing.

    data, by kind: started {attempt}; progress {picture, pictures, step, steps, and what else the work tells: stage, loss}; preview
    {picture, step, jpeg: base64}; requeued {attempt, error: problem | null, not_before: ISO time | null}; succeeded {artifacts: ids};
    failed and moderated {error: problem}; others {}.
    """

    seq: int
    kind: EventKind
    data: Mapping[str, Any]
    at: datetime


@dataclass(frozen=True, kw_only=True)
class ArtifactInfo:
    """A file of a job. name: of a picture of the input, what `NewJob.pictures` called it; of the result, its place (`0`, `1`, ...)."""

    id: str
    owner: str
    job_id: str
    name: str
    media_type: str
    bytes: int
    sha256: str
    created_at: datetime
    expires_at: datetime | None
