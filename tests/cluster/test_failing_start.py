"""A server that cannot start: it says why and is gone. (Before test_serve.py by its name: one Ray at a time.)"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deployments.catalog import CATALOG_PATH
from tests.store_places import free_port

PACK = CATALOG_PATH.parents[1] / "models" / "mini"


@pytest.mark.slow
def test_the_server_names_the_model_that_it_could_not_open(tmp_path: Path) -> None:
    shutil.copytree(PACK, tmp_path / "mini")
    parser = tmp_path / "mini" / "parser" / "face_parser.onnx"
    parser.unlink()
    command: list[str | Path] = [Path(sys.executable).parent / "likeness", "serve", "--port", str(free_port())]
    run = subprocess.run(command, env={**os.environ, "LIKENESS_MODELS": str(tmp_path)}, capture_output=True, text=True, timeout=180)
    assert run.returncode == 1
    assert "deployment_failed" in run.stderr and f"FaceServer did not start: MissingWeights: The weights file {parser}" in run.stderr
    assert "Traceback" not in run.stderr
