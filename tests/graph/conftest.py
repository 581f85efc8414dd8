"""The whole application in this process, on the embedded models: started once for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deployments.store.settings import StoreSettings
from serve.client import Client
from serve.ingress import HandleCalls, api
from serve.local import local_handle
from serve.settings import AppSettings, load_settings


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> AppSettings:
    """Those of a laptop, with a store of the tests' own."""
    folder = tmp_path_factory.mktemp("store")
    return load_settings("local").model_copy(update={"store": StoreSettings(url=f"sqlite:///{folder}/store.db", folder=folder)})


@pytest.fixture(scope="session")
def handle(settings: AppSettings) -> Any:
    """Of Workflows."""
    return local_handle(settings)


@pytest.fixture(scope="session")
def http(handle: Any, settings: AppSettings) -> Iterator[httpx.Client]:
    """Plain HTTP, for what the SDK would not send."""
    with Client("http://likeness.local", transport=httpx.ASGITransport(api(HandleCalls(handle), settings.max_body_bytes))) as client:
        yield client._http


@pytest.fixture(scope="session")
def client(http: httpx.Client, handle: Any, settings: AppSettings) -> Iterator[Client]:
    with Client("http://likeness.local", transport=httpx.ASGITransport(api(HandleCalls(handle), settings.max_body_bytes))) as client:
        yield client
