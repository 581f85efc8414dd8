"""What is asked of the store of jobs, checked: a job that is submitted, ids and filters. And when two requests are the same one."""

from __future__ import annotations

import hashlib
import json
import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from deployments.errors import ArtifactNotFound, IdempotencyConflict, InvalidRequest, JobNotFound
from deployments.store.job_tables import JobRow
from deployments.store.job_values import KEY_CHARACTERS, PRIORITIES, URL_CHARACTERS, NewJob

_JOB, _ARTIFACT = re.compile(r"job_[0-9a-f]{24}"), re.compile(r"art_[0-9a-f]{24}")
_NAME_CHARACTERS, _WORKFLOW_CHARACTERS, _PICTURE_CHARACTERS = 64, 100, 200
_SHOWN = 60


def check(owner: str, new: NewJob) -> None:
    """Raises InvalidRequest, which names the field, for what the columns do not hold: too long, with control characters, no JSON."""
    _fits("owner", owner, _NAME_CHARACTERS)
    _fits("kind", new.kind, _NAME_CHARACTERS)
    _fits("pool", new.pool, _NAME_CHARACTERS)
    _fits("workflow", new.workflow, _WORKFLOW_CHARACTERS)
    _fits("webhook_url", new.webhook_url, URL_CHARACTERS)
    _fits("idempotency_key", new.idempotency_key, KEY_CHARACTERS)
    for name in new.pictures:
        _fits("pictures", name, _PICTURE_CHARACTERS)
    if new.priority not in PRIORITIES.values():
        raise _wrong("priority", f"is {new.priority}; it is one of {', '.join(map(str, PRIORITIES.values()))}")
    if new.max_attempts < 1:
        raise _wrong("max_attempts", f"is {new.max_attempts}; a job is tried once at least")


def digest_of(new: NewJob) -> str:
    """sha256 of everything that is asked for, however it was spelt: equal for equal requests. Raises InvalidRequest for no JSON."""
    pictures = {name: hashlib.sha256(content).hexdigest() for name, content in new.pictures.items()}
    what = [new.input, pictures] if new.asked is None else [new.asked]
    said = [new.kind, new.workflow, *what, new.priority, new.webhook_url, new.previews]
    try:
        text = written(said)
    except (TypeError, ValueError) as error:
        raise _wrong("input", f"is no JSON: {error}") from error
    return hashlib.sha256(text.encode()).hexdigest()


def written(value: object) -> str:
    """Canonical JSON: names sorted, ASCII. Raises ValueError for NaN and infinities, which PostgreSQL does not keep, TypeError for what is
    no JSON at all."""
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def known(session: Session, owner: str, key: str | None, digest: str) -> JobRow | None:
    """The job that was submitted with this idempotency key before. Raises IdempotencyConflict where it asked for something else."""
    if key is None:
        return None
    row = session.scalar(select(JobRow).where(JobRow.owner == owner, JobRow.idempotency_key == key))
    if row is not None and row.digest != digest:
        raise IdempotencyConflict(f"The idempotency key {ascii(key[:_SHOWN])} belongs to {row.id}, which asked for something else.")
    return row


def owned(session: Session, id: str, owner: str, *, locked: bool = False) -> JobRow:
    """Raises JobNotFound."""
    wanted = select(JobRow).where(JobRow.id == job_id(id), JobRow.owner == owner)
    row = session.scalar(wanted.with_for_update() if locked else wanted)
    if row is None:
        raise no_job(id)
    return row


def job_id(id: str) -> str:
    """The id, where it can be one: nothing else reaches the database, which may not take every character. Raises JobNotFound."""
    if not _JOB.fullmatch(id):
        raise no_job(id)
    return id


def artifact_id(id: str) -> str:
    """As `job_id`. Raises ArtifactNotFound."""
    if not _ARTIFACT.fullmatch(id):
        raise no_artifact(id)
    return id


def no_job(id: str) -> JobNotFound:
    return JobNotFound(f"There is no job {ascii(id[:_SHOWN])}.", details={"id": id[:_SHOWN]})


def no_artifact(id: str) -> ArtifactNotFound:
    return ArtifactNotFound(f"There is no artifact {ascii(id[:_SHOWN])}.", details={"id": id[:_SHOWN]})


def possible(text: str) -> bool:
    """Whether the text can stand in a column at all. Cc: control characters, which PostgreSQL's NUL is one of; Cs: halves of characters."""
    return not any(unicodedata.category(character) in ("Cc", "Cs") for character in text)


def plain(value: object) -> Any:
    """Mappings of any kind as dicts, which json knows."""
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _fits(field: str, text: str | None, limit: int) -> None:
    if text is None:
        return
    if not text:
        raise _wrong(field, "is empty")
    if len(text) > limit:
        raise _wrong(field, f"has {len(text)} characters, at most {limit} are kept")
    if not possible(text):
        raise _wrong(field, "holds control characters")


def _wrong(field: str, what: str) -> InvalidRequest:
    return InvalidRequest(f"`{field}` {what}.", None, {"param": field})


def check_answer(answer: Mapping[str, Any], pictures: int, timings: Mapping[str, float]) -> None:
    """Raises ValueError where there are more or fewer places than pictures, and as `written`."""
    written([answer, timings])
    places = answer.get("data", [])
    if pictures and len(places) != pictures:
        raise ValueError(f"The answer has places for {len(places)} pictures, and {pictures} were drawn.")


def with_artifacts(answer: Mapping[str, Any], ids: Sequence[str]) -> dict[str, Any]:
    """The answer, each of its places naming the artifact that holds its picture."""
    result: dict[str, Any] = plain(answer)
    if ids:
        result["data"] = [item | {"artifact": id} for item, id in zip(result["data"], ids, strict=True)]
    return result
