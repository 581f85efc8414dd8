"""Workflows without any model: what it refuses before it asks one, and the files that it leaves behind."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deployments.errors import UnsupportedCombination
from serve.settings import AppSettings
from serve.workflows import Workflows


class _Handle:
    """Of a deployment that is never asked."""

    def options(self, **_: Any) -> _Handle:
        return self


def _workflows(folder: Path, *methods: str) -> Workflows:
    handle = _Handle()
    return Workflows(AppSettings(output_folder=str(folder), methods=methods), *([handle] * 7))


@pytest.mark.parametrize(("methods", "there"), [(("pulid-mini",), "pulid-mini"), ((), "none")])
def test_a_method_that_is_not_deployed_is_refused_before_a_model_is_asked(tmp_path: Path, methods: tuple[str, ...], there: str) -> None:
    body = {"prompt": "x", "reference_image": "QUJD"}
    with pytest.raises(UnsupportedCombination, match=rf"xlabs-ip-adapter-mini is not deployed.*{there}"):
        asyncio.run(_workflows(tmp_path, *methods).generate("flux-ipadapter-faceid", body))


def test_equal_pictures_written_at_once_are_one_whole_file(tmp_path: Path) -> None:
    workflows, content = _workflows(tmp_path), bytes(range(256)) * 2000
    with ThreadPoolExecutor(16) as threads:
        paths = set(threads.map(lambda _: workflows._drawing._kept(content, "png"), range(400)))
    assert [Path(path) for path in paths] == list(tmp_path.iterdir())
    assert next(tmp_path.iterdir()).read_bytes() == content


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="space"):
        _workflows(tmp_path)._drawing._kept(b"picture", "png")
    assert not list(tmp_path.iterdir())
