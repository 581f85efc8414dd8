"""How tests are spread over several processes (`pytest -n 2 --dist loadgroup`): by file, and by folder where a folder shares a server.

What a file opens is then opened once, and there is one Ray at a time: two would share neither its ports nor the cores.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from serve.ray_ports import guard_ray_ports

_TESTS = Path(__file__).parent
# Ray reads it when it is imported, which the collecting of some tests does.
guard_ray_ports(folder=Path(tempfile.mkdtemp(prefix="likeness-ray-token-")))
_TOGETHER = {"chaos": "ray", "cluster": "ray", "graph": "graph", "hostile": "hostile"}
"""Folder -> group. What starts Ray, and what opens the whole application in its own process."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        place = item.path.relative_to(_TESTS)
        item.add_marker(pytest.mark.xdist_group(_TOGETHER.get(place.parts[0], str(place))))
