"""`Prefer: wait=N` (RFC 7240): a durable job whose answer is awaited for so long. Whoever goes away finds it where `Location` said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from fastapi import Request, Response

from deployments.errors import InvalidRequest
from deployments.store.job_values import KEY_CHARACTERS
from serve.access import quota_of, require
from serve.callers import caller_of
from serve.job_answers import JobItem
from serve.job_desk import JobDesk, JobRequest

LONGEST_S = 600
_WAIT = re.compile(r"wait\s*=\s*\"?([^\s\";,]*)\"?", re.IGNORECASE)
_KEY = re.compile(rf"[\x20-\x7e]{{1,{KEY_CHARACTERS}}}")


async def preferred(request: Request, workflow: str | None, body: Mapping[str, Any], desk: JobDesk) -> Response | None:
    """The answer to a workflow's own body where the header asks for a job; None where it does not. Raises as JobDesk.submit."""
    wait = preference(request)
    if wait is None:
        if "idempotency-key" in request.headers:
            raise InvalidRequest("An Idempotency-Key belongs to a job.", "Send `Prefer: wait=N` with it, or use POST /v1/jobs.")
        return None
    caller = caller_of(request)
    require(caller, "jobs")
    wanted = JobRequest(workflow=workflow, input=dict(body))
    item, _ = await desk.submit(wanted, caller.owner, idempotency_key(request), quota_of(request))
    return await awaited(desk, item, caller.owner, wait)


async def awaited(desk: JobDesk, item: JobItem, owner: str, wait: int) -> Response:
    """200 with the job if it ends in time, else 202 and where it is."""
    found = await desk.ended(item.id, owner, wait)
    return job_answer(found, 200 if found.ended else 202, {"preference-applied": f"wait={wait}"} if found.ended else {})


def job_answer(item: JobItem, status: int, headers: Mapping[str, str] | None = None) -> Response:
    said = {**(headers or {}), **({"location": item.links.job} if status == 202 else {})}
    return Response(item.model_dump_json(), status, said, media_type="application/json")


def preference(request: Request) -> int | None:
    """How many seconds the caller would wait; None where they do not say. Other preferences are passed over, as the RFC has it."""
    for header in request.headers.getlist("prefer"):
        for part in header.split(","):
            if (found := _WAIT.fullmatch(part.partition(";")[0].strip())) is None:
                continue
            if found[1].isascii() and found[1].isdecimal() and len(found[1]) <= 4 and 1 <= int(found[1]) <= LONGEST_S:
                return int(found[1])
            raise InvalidRequest(f"The header Prefer says wait={ascii(found[1][:20])}.", f"Give a number of seconds from 1 to {LONGEST_S}.")
    return None


def idempotency_key(request: Request) -> str | None:
    """Raises InvalidRequest for a key that is too long or not printable, and for two of them."""
    given = request.headers.getlist("idempotency-key")
    if len(given) > 1:
        raise InvalidRequest("The header Idempotency-Key is given twice.", "Send it once.")
    key = given[0] if given else None
    if key is not None and not _KEY.fullmatch(key):
        raise InvalidRequest(
            "The header Idempotency-Key is empty, too long or not printable.", f"Send 1 to {KEY_CHARACTERS} printable ASCII characters."
        )
    return key
