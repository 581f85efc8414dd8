"""What speaks HTTP, whole: the routes with what they need of the store, and the door around them. The same behind Ray Serve and in a test.

    Watching -> Door -> routes -> Workflows' handle, JobDesk, CharacterDesk

Knows no Ray: whoever makes it gives the handle, what wakes the runners, and what looks at replicas.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp

from deployments.job_server import open_jobs
from deployments.store.audit import AuditLog
from deployments.store.characters import CharacterStore
from deployments.store.keys import KeyStore
from deployments.urls import UrlGuard
from serve.characters import CharacterDesk
from serve.door import Door, DoorPolicy
from serve.ingress import Calls, api
from serve.job_desk import JobDesk
from serve.limits import Room
from serve.picture_urls import fetched
from serve.presets import load_presets
from serve.readiness import Readiness
from serve.settings import AppSettings
from serve.training_desk import TrainingDesk
from serve.watching import Known, Watching

WEBHOOKS_REMEDY = "Give an address on the public internet"


def front(
    calls: Calls, settings: AppSettings, wake: Callable[[], object], readiness: Readiness, named: Callable[[str], object], echo: bool = True
) -> ASGIApp:
    """wake: tells a runner that there is something to do. named: called with every request's id in its own task. echo: whether answers
    carry that id; not behind Ray Serve's proxy, which adds the header. Raises StoreUnavailable."""
    jobs = desk_of(calls, settings, wake)  # brings the store up to date, for all that follow
    app = routes(calls, settings, jobs, readiness)
    return Watching(door(Known(app), settings, echo), app.routes, named)


def routes(calls: Calls, settings: AppSettings, jobs: JobDesk | None = None, readiness: Readiness | None = None) -> FastAPI:
    """Every route, with no door before it. jobs: None where nobody would do them. The store has been brought up to date."""
    characters = CharacterStore(settings.store.database, settings.store.files)
    characters.sweep()
    desk = CharacterDesk(characters, partial(calls.character, "curate"))
    training = None
    if jobs is not None and settings.training.enabled:
        training = TrainingDesk(settings, jobs, characters, partial(calls.lora, "find"), calls.check)
    return api(
        calls, settings.max_body_bytes, settings.max_lora_bytes, max_set_bytes=settings.max_set_bytes, readiness=readiness, jobs=jobs,
        characters=desk, training=training, room=Room(settings.denoiser.room * settings.workflows.most),
    )  # fmt: skip


def desk_of(calls: Calls, settings: AppSettings, wake: Callable[[], object]) -> JobDesk:
    urls = UrlGuard(settings.pictures_by_url, "pictures_by_url")
    return JobDesk(
        open_jobs(settings.store, settings.jobs.keep_s),
        settings.jobs,
        check=calls.check,
        wake=wake,
        guard=webhook_guard(settings),
        fetch=partial(fetched, guard=urls, max_bytes=settings.max_body_bytes),
        limits=settings.limits.value,
    )


def door(app: ASGIApp, settings: AppSettings, echo: bool = True) -> Door:
    """Around the application, as the settings say. The store has been brought up to date."""
    url = settings.store.database
    workflows = frozenset(preset.endpoint for preset in load_presets().values())
    policy = DoorPolicy(settings.door, settings.max_body_bytes, workflows, echo)
    keys = KeyStore(url) if settings.door.auth == "on" else None
    return Door(app, keys, policy, AuditLog(url, settings.door.audit_days))


def webhook_guard(settings: AppSettings) -> UrlGuard:
    return UrlGuard(settings.webhooks, "webhooks", instead=WEBHOOKS_REMEDY)
