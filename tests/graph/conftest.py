"""The whole application in this process, on the embedded models: started once for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from deployments.store.settings import StoreSettings
from serve.client import Client
from serve.local import local_handle
from serve.settings import AppSettings, load_settings
from tests.whole_application import Whole, whole


@pytest.fixture(scope="package")
def settings(tmp_path_factory: pytest.TempPathFactory) -> AppSettings:
    """Those of a laptop, with a store of the tests' own."""
    folder = tmp_path_factory.mktemp("store")
    return load_settings("local").model_copy(update={"store": StoreSettings(url=f"sqlite:///{folder}/store.db", folder=folder)})


@pytest.fixture(scope="package")
def handle(settings: AppSettings) -> Any:
    """Of Workflows."""
    return local_handle(settings)


@pytest.fixture(scope="package")
def served(handle: Any, settings: AppSettings) -> Iterator[Whole]:
    """What a server would serve, door and all."""
    with whole(handle, settings) as found:
        yield found


@pytest.fixture(scope="package")
def http(served: Whole) -> httpx.Client:
    """Plain HTTP, for what the SDK would not send."""
    return served.http


@pytest.fixture(scope="package")
def client(served: Whole) -> Iterator[Client]:
    with Client("http://localhost", transport=httpx.ASGITransport(served.entry)) as client:
        yield client
