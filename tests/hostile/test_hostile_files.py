"""Hostile files: each is refused by its name, or opened as the picture that it also is; in time, and in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from deployments.images import decode, encode
from tests.hostile.files import MARK, OPENED, REFUSED

_MOST_SECONDS, _MOST_MB = 2.0, 96
"""Of one file. Before parts and scans were counted, files of 32 MB took 26 s, and others 560 MB."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Every file opened, one after the other, in one process."""
    folder, builders = tmp_path_factory.mktemp("hostile"), {**REFUSED, **OPENED}
    paths = [folder / f"{number}.png" for number in range(len(builders))]
    for path, build in zip(paths, builders.values(), strict=True):
        path.write_bytes(build())
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.hostile.opening", *map(str, paths)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=root, timeout=240)
    lines = run.stdout.splitlines()
    assert run.returncode == 0 and len(lines) == len(builders), run.stderr[-2000:]
    return dict(zip(builders, map(json.loads, lines), strict=True))


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_as_a_picture(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    assert outcomes[name]["decode"] == "invalid_image", outcomes[name]


@pytest.mark.parametrize("name", OPENED)
def test_it_is_opened_as_the_picture_that_it_is(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    shape = outcomes[name]["decode"]
    assert shape in ([16, 16, 3], [8, 8, 3]), outcomes[name]


@pytest.mark.parametrize("name", [*REFUSED, *OPENED])
def test_it_costs_little(outcomes: dict[str, dict[str, Any]], name: str) -> None:
    assert outcomes[name]["seconds"] < _MOST_SECONDS and outcomes[name]["mb"] < _MOST_MB, outcomes[name]


@pytest.mark.parametrize("name", [name for name, build in OPENED.items() if MARK in build() or zipfile.is_zipfile(BytesIO(build()))])
def test_what_else_it_was_does_not_leave_the_server(name: str) -> None:
    picture = decode(OPENED[name]())
    for format in ("png", "jpeg", "webp"):
        sent = encode(picture, format)
        assert MARK not in sent and not zipfile.is_zipfile(BytesIO(sent))
