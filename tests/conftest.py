"""What tests share: the databases that a store is tested on, and how tests are spread over several processes
(`pytest -n 2 --dist loadgroup`): by file, and by folder where a folder shares a server.

What a file opens is then opened once, and there is one Ray at a time: two would share neither its ports nor the cores.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from deployments.store import character_tables, job_tables, key_tables  # noqa: F401 (they register themselves)
from deployments.store.engine import open_engine, parsed
from deployments.store.migrate import migrate
from deployments.store.tables import Base
from serve.ray_ports import guard_ray_ports
from tests.store_places import postgres

_TESTS = Path(__file__).parent
# Ray reads it when it is imported, which the collecting of some tests does.
guard_ray_ports(folder=Path(tempfile.mkdtemp(prefix="likeness-ray-token-")))
_TOGETHER = {"chaos": "ray", "cluster": "ray", "graph": "graph", "hostile": "hostile", "training_cluster": "ray"}
"""Folder -> group. What starts Ray, and what opens the whole application in its own process."""


@pytest.hookimpl(tryfirst=True)  # xdist reads the groups in its own hook of this name, which would come first
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(_TESTS)
        item.add_marker(pytest.mark.xdist_group(_TOGETHER.get(place.parts[0], str(place))))


@pytest.fixture(scope="session")
def server() -> Iterator[str | None]:
    """The URL of a PostgreSQL of this process's own, or None where it is not installed."""
    with postgres() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a database that was migrated, with nothing in it."""
    if request.param == "sqlite":
        found = f"sqlite:///{tmp_path / 'likeness.db'}"
        migrate(found)
        return found
    given: str | None = request.getfixturevalue("server")
    if given is None:
        pytest.skip("PostgreSQL, or its driver psycopg, is not installed")
    migrate(given)
    engine = open_engine(parsed(given))
    with engine.begin() as connection:
        names = ", ".join(table.name for table in Base.metadata.sorted_tables)
        connection.execute(text(f"TRUNCATE {names} RESTART IDENTITY CASCADE"))
    engine.dispose()
    return given
