"""What Likeness answers about jobs: their state, their progress, their results by address. Built by the ingress, read by the client.

A webhook's body is `body_of(info)`, byte for byte what `GET /v1/jobs/{id}` answers then. Asks no store and holds no picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import LikenessError
from deployments.store.job_values import TERMINAL, Event, JobInfo, Status
from serve.answers import LicenceInfo, Score
from serve.problem import Problem, problem_of
from serve.training_answers import EvaluationFound, TrainedLora

Priority = Literal["low", "normal", "high"]
JOBS, JOB, ARTIFACT = "/v1/jobs", "/v1/jobs/{id}", "/v1/artifacts/{id}"
EVENTS, CANCEL = f"{JOB}/events", f"{JOB}/cancel"
SECRET, ROTATE = "/v1/webhooks/secret", "/v1/webhooks/secret/rotate"


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class JobProgress(_Answer):
    """How far a job is. Steps are counted over all of its pictures; of a training they are its own, and `pictures` is 0."""

    picture: int = Field(description="The picture that is being drawn, from 0.")
    pictures: int
    step: int
    total: int
    percent: float = Field(ge=0, le=100)
    stage: str | None = Field(default=None, description="What is being done, where it is more than drawing.")
    loss: float | None = Field(default=None, description="Of the last step of a training.")
    done: int | None = Field(default=None, description="Pictures of the stage that are done ...")
    of: int | None = Field(default=None, description="... of so many.")


class JobPicture(_Answer):
    """One picture of a job. Exactly one of url and path is set."""

    url: str | None = Field(default=None, description="Where the picture file is, until the job expires.")
    artifact: str | None = Field(default=None, description="Its id.")
    path: str | None = Field(default=None, description="Where the server wrote it (response_format: file).")
    seed: int
    width: int
    height: int
    format: Literal["png", "jpeg", "webp"]
    scores: list[Score] = Field(default_factory=list)


class JobResult(_Answer):
    """What `POST /v1/generate` answers, with each picture by its address."""

    created: int = Field(description="Unix time, seconds.")
    model: str
    data: list[JobPicture]
    timings: dict[str, float] = Field(default_factory=dict, description="Seconds by stage.")
    peak_bytes: int | None = None
    models: list[str] = Field(default_factory=list)
    licences: list[LicenceInfo] = Field(default_factory=list)
    request: dict[str, Any] = Field(default_factory=dict, description="Every value that changes pixels, as it was used.")
    warnings: list[str] = Field(default_factory=list)


_RESULTS: Mapping[str, type[TrainedLora] | type[EvaluationFound]] = {"training": TrainedLora, "evaluation": EvaluationFound}
"""Of kinds whose result is not that of a drawing."""


class JobLinks(_Answer):
    """Addresses about a job."""

    job: str
    events: str
    cancel: str


class JobItem(_Answer):
    """One job of yours. Times are seconds since 1970."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "id": "job_0123456789abcdef01234567",
                    "kind": "generate",
                    "workflow": "flux-pulid",
                    "status": "running",
                    "priority": "normal",
                    "created": 1767225600.25,
                    "started": 1767225601.5,
                    "attempt": 1,
                    "progress": {"picture": 0, "pictures": 1, "step": 7, "total": 20, "percent": 35.0},
                    "eta_s": 2.1,
                    "links": {
                        "job": "/v1/jobs/job_0123456789abcdef01234567",
                        "events": "/v1/jobs/job_0123456789abcdef01234567/events",
                        "cancel": "/v1/jobs/job_0123456789abcdef01234567/cancel",
                    },
                }
            ]
        }
    )

    id: str
    kind: str
    workflow: str | None = None
    status: Status
    priority: Priority = "normal"
    created: float
    started: float | None = Field(default=None, description="When its last attempt began.")
    finished: float | None = None
    expires: float | None = Field(default=None, description="When it and its pictures are forgotten.")
    queue_position: int | None = Field(default=None, description="0 is next; null unless it is queued.")
    waiting_for: str | None = Field(
        default=None,
        description="The pool that it waits in, where this server does no jobs of it: another server's runners do (for trainings in "
        "`train-<class>` one with this `training.placement`), or it waits until there is one.",
    )
    progress: JobProgress | None = Field(default=None, description="Null until the first step is done.")
    eta_s: float | None = Field(default=None, description="Seconds until it ends, as far as that is known.")
    timings: dict[str, float] = Field(default_factory=dict, description="Seconds by stage; `queued` and `total` among them.")
    attempt: int = Field(description="How often it was begun; a job whose process died is begun again.")
    error: Problem | None = Field(default=None, description="Why it failed, or why its last attempt did.")
    result: JobResult | TrainedLora | EvaluationFound | None = Field(default=None, description="By the job's kind.")
    links: JobLinks

    @property
    def ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.status in TERMINAL

    @classmethod
    def of(cls, info: JobInfo, eta_s: float | None = None, waiting_for: str | None = None) -> JobItem:
        return cls(
            id=info.id,
            kind=info.kind,
            workflow=info.workflow,
            status=info.status,
            priority=_priority(info.priority),
            created=_seconds(info.created_at),
            started=_seconds(info.started_at) if info.started_at is not None else None,
            finished=_seconds(info.finished_at) if info.finished_at is not None else None,
            expires=_seconds(info.expires_at) if info.expires_at is not None else None,
            queue_position=info.queue_position,
            waiting_for=waiting_for,
            progress=_progress(info),
            eta_s=None if eta_s is None or info.status in TERMINAL else round(eta_s, 1),
            timings={stage: round(value, 4) for stage, value in info.timings.items()},
            attempt=info.attempt,
            error=Problem.model_validate(info.error) if info.error is not None else None,
            result=_result(info.kind, info.result) if info.result is not None else None,
            links=JobLinks(job=JOB.format(id=info.id), events=EVENTS.format(id=info.id), cancel=CANCEL.format(id=info.id)),
        )


class JobsResponse(_Answer):
    """Your jobs, the newest first. next: give it as `before` for those that are older; null at the end."""

    data: list[JobItem]
    next: str | None = None


class JobCancelled(_Answer):
    """cancelled: whether it was this call that ended the job."""

    id: str
    cancelled: bool
    status: Status


class JobDeleted(_Answer):
    """It is gone, with its pictures. One that ran was cancelled."""

    id: str
    deleted: Literal[True] = True


class JobEvent(_Answer):
    """Something that happened to a job. seq: counts up within the job; `Last-Event-ID`."""

    seq: int
    kind: str
    at: float = Field(description="Seconds since 1970.")
    data: dict[str, Any] = Field(default_factory=dict)

    @property
    def ends(self) -> bool:
        """Whether it is the last one of its job."""
        return self.kind in TERMINAL

    @classmethod
    def of(cls, event: Event) -> JobEvent:
        return cls(seq=event.seq, kind=event.kind, at=_seconds(event.at), data=dict(event.data))


class WebhookSecret(_Answer):
    """With what your webhooks are signed (https://www.standardwebhooks.com)."""

    secret: str = Field(description="whsec_...: keep it to yourself.")


def body_of(info: JobInfo, eta_s: float | None = None) -> bytes:
    """A job as its address answers it."""
    return JobItem.of(info, eta_s).model_dump_json().encode()


def problem_json(error: LikenessError) -> dict[str, Any]:
    """An error as a job keeps it."""
    return problem_of(error).model_dump(mode="json")


def _progress(info: JobInfo) -> JobProgress | None:
    if not info.steps:
        return None
    percent = round(100 * min(info.step, info.steps) / info.steps, 1)
    told = {name: info.facts.get(name) for name in ("stage", "loss", "done", "of")}
    return JobProgress(picture=info.picture, pictures=info.pictures, step=info.step, total=info.steps, percent=percent, **told)


def _result(kind: str, result: Any) -> JobResult | TrainedLora | EvaluationFound:
    files = [{**item, "url": ARTIFACT.format(id=item["artifact"])} if item.get("artifact") else item for item in result["data"]]
    if kind in _RESULTS:
        return _RESULTS[kind].model_validate({**result, "data": files})
    known = JobPicture.model_fields.keys()
    return JobResult.model_validate({**result, "data": [{name: item[name] for name in item if name in known} for item in files]})


def _priority(number: int) -> Priority:
    return "low" if number < 0 else "high" if number > 0 else "normal"


def _seconds(at: datetime) -> float:
    """To the millisecond: more would differ between databases."""
    return round(at.timestamp(), 3)
