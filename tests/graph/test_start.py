"""Starting on a machine where something is missing: the file is named, the way out is told, and that is all."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from deployments.catalog import CATALOG_PATH

PACK = CATALOG_PATH.parents[1] / "models" / "mini"


def _generate(models: Path) -> subprocess.CompletedProcess[str]:
    command: list[str | Path] = [Path(sys.executable).parent / "likeness", "generate", "--prompt", "x", "--out", models / "out"]
    environment = {**os.environ, "LIKENESS_MODELS": str(models)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)


def test_a_model_that_is_missing_or_damaged_is_named_without_a_traceback(tmp_path: Path) -> None:
    for part in ("insightface", "judge", "parser"):
        shutil.copytree(PACK / part, tmp_path / "mini" / part)
    parser = tmp_path / "mini" / "parser" / "face_parser.onnx"
    content = bytearray(parser.read_bytes())
    content[len(content) // 2] ^= 1
    parser.write_bytes(content)
    damaged = _generate(tmp_path)
    parser.unlink()
    missing = _generate(tmp_path)
    for run, code in ((damaged, "damaged_weights"), (missing, "missing_weights")):
        assert run.returncode == 1 and code in run.stderr and str(parser) in run.stderr
        assert "Traceback" not in run.stderr + run.stdout
