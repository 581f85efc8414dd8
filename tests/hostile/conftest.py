"""The whole application in this process, behind its door, for everybody who means it harm: started once for every test of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from deployments.store.settings import StoreSettings
from deployments.urls import UrlPolicy
from serve.local import local_handle
from serve.settings import load_settings
from tests.whole_application import DOOR, Whole, whole

LIMIT = 32 * 2**20


@pytest.fixture(scope="package")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    """Pictures by address are on, as an operator may have it: so the guard is what refuses."""
    folder = tmp_path_factory.mktemp("hostile-store")
    changed = {
        "store": StoreSettings(url=f"sqlite:///{folder / 'likeness.db'}", folder=folder),
        "door": DOOR,
        "pictures_by_url": UrlPolicy(fetch="public"),
        "max_body_bytes": LIMIT,
        "max_lora_bytes": LIMIT,
        "max_set_bytes": LIMIT,
    }
    settings = load_settings("local").model_copy(update=changed)
    with whole(local_handle(settings), settings) as found:
        yield found
