"""The whole application behind its door, in this process: what the server's front is, with keys, a store of its own and small limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
from fastapi import FastAPI
from starlette.types import ASGIApp

from deployments.job_server import open_jobs
from deployments.store.jobs import JobStore
from deployments.store.keys import KeyStore
from deployments.store.migrate import migrate
from serve.callers import SCOPES
from serve.client import Client
from serve.door_settings import DoorSettings
from serve.front import front
from serve.ingress import HandleCalls
from serve.readiness import Readiness, in_one_process
from serve.settings import AppSettings

DOOR = DoorSettings(auth="on", requests_per_minute=1_000_000, refusals_per_minute=1_000_000)


@dataclass(frozen=True)
class Whole:
    """entry: what a server would serve. keys, jobs: of the same store. http: plain HTTP to it, with no key."""

    settings: AppSettings
    entry: ASGIApp
    keys: KeyStore
    jobs: JobStore
    http: httpx.Client

    @cached_property
    def app(self) -> FastAPI:
        """The routes, inside of everything that stands before them."""
        inner: Any = self.entry
        while not isinstance(inner, FastAPI):
            inner = inner._app
        return inner

    def key(self, owner: str, *scopes: str) -> dict[str, str]:
        """Headers with a new key. scopes: every one, where none is named."""
        return {"authorization": f"Bearer {self.keys.create(owner, owner, scopes or SCOPES)[1]}"}

    def files(self) -> dict[str, int]:
        """Every file of the store but the database's own, by its place, with its bytes."""
        folder = self.settings.store.files
        found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("likeness.db"))
        return {str(path.relative_to(folder)): path.stat().st_size for path in found}

    def owned(self, headers: Mapping[str, str]) -> dict[str, list[str]]:
        """The ids of what somebody has, by the address that lists it."""
        lists = ("/v1/jobs", "/v1/characters", "/v1/loras")
        answers = {path: self.http.get(path, headers=dict(headers)).raise_for_status().json() for path in lists}
        return {path: sorted(item["id"] for item in answer["data"]) for path, answer in answers.items()}


@contextmanager
def whole(handle: Any, settings: AppSettings) -> Iterator[Whole]:
    """handle: of Workflows. settings: those it was made with, but for what concerns the door and the size of bodies."""
    migrate(settings.store.database)
    keys, jobs = KeyStore(settings.store.database), open_jobs(settings.store, settings.jobs.keep_s)
    entry = front(HandleCalls(handle), settings, lambda: None, Readiness(in_one_process), lambda id: None)
    try:
        with Client("http://localhost", transport=httpx.ASGITransport(entry), timeout=120) as client:
            yield Whole(settings, entry, keys, jobs, client._http)
    finally:
        keys.close()
        jobs.close()
