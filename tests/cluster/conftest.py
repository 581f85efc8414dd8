"""A real Ray with the whole application on two CPU cores: started once for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployments.store.settings import StoreSettings
from serve.cluster import serving
from serve.settings import AppSettings, load_settings
from tests.store_places import free_port


@pytest.fixture(scope="package")
def settings(tmp_path_factory: pytest.TempPathFactory) -> AppSettings:
    """Those of one machine, with a queue so short that a test can fill it, and a store of the tests' own."""
    folder = tmp_path_factory.mktemp("store")
    store = StoreSettings(url=f"sqlite:///{folder}/store.db", folder=folder)
    local = load_settings("local")
    pool = local.denoiser.pool.model_copy(update={"max_queued_requests": 60})
    return local.model_copy(update={"denoiser": local.denoiser.model_copy(update={"pool": pool}), "store": store})


@pytest.fixture(scope="package")
def url(settings: AppSettings) -> Iterator[str]:
    with serving(settings, port=free_port()) as address:
        yield address
