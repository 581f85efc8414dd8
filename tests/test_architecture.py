"""The house rules that a program can check: who imports whom, how long things may be, how large, what must not be in the repository."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from training.mini.pack import sizes_mib

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
FILE_LINES, FUNCTION_LINES = 400, 80
REPOSITORY_MIB, PACK_MIB, LATECOMERS_MIB = 46, 30, 2
# A path that only one machine has. A shell's ~, $HOME or ${ROOT} before it is fine, and so is a web address.
_ONE_MACHINE = re.compile(r"(?<![\w.~$})-])/(?:work|root|home|opt|Users)/\w|\bfile:///\w")
_PROSE_AND_CODE = frozenset({".py", ".md", ".toml", ".yaml", ".lock"})


def _repository() -> list[Path]:
    """Every file that is tracked, or would be if it were added: what is new is held to the rules before it is committed."""
    listing = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


FILES = _repository()
PYTHON = [path for path in FILES if path.suffix == ".py"]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _mib(paths: list[Path]) -> float:
    return sum(path.stat().st_size for path in paths) / 2**20


def _lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BIN / "lint-imports", "--no-logo", "--no-cache"], cwd=folder, capture_output=True, text=True)


def _skeleton(folder: Path) -> Path:
    """An empty house with our rooms and our contracts."""
    for path in PYTHON:
        if path.parts[len(ROOT.parts)] in ("serve", "deployments", "training"):
            copy = folder / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text("")
    shutil.copy(ROOT / "pyproject.toml", folder)
    return folder


def test_the_import_rules_hold() -> None:
    run = _lint_imports(ROOT)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("deployments/errors.py", "import training.mini", "serve -> training -> deployments"),
        ("deployments/catalog.py", "import deployments.identity", "servers -> model folders"),
        ("deployments/errors.py", "import deployments.weights", "servers -> model folders"),
        ("deployments/identity/__init__.py", "from ray import serve", "models, values and their training"),
        ("deployments/weights.py", "import diffusers", "the catalogue, the weights and the errors"),
        ("training/mini/world/__init__.py", "import training.mini.generator", "the character world"),
    ],
)
def test_a_breach_of_the_import_rules_is_reported(tmp_path: Path, module: str, line: str, contract: str) -> None:
    house = _skeleton(tmp_path)
    (house / module).write_text(line)
    run = _lint_imports(house)
    report = " ".join(run.stdout.split())
    assert run.returncode == 1 and "1 broken" in report, run.stdout + run.stderr
    verdict = re.search(r"KEPT|BROKEN", report.partition(contract)[2])
    assert verdict is not None and verdict.group() == "BROKEN", run.stdout


def test_ray_serve_is_never_imported_as_our_package() -> None:
    source = "from ray import serve\n\nserve.start()\n"
    run = subprocess.run(
        [BIN / "ruff", "check", "--stdin-filename", "serve/app.py", "-"], cwd=ROOT, input=source, capture_output=True, text=True
    )
    assert run.returncode == 1 and "ICN003" in run.stdout


def test_the_catalogue_can_be_asked_without_any_model_library() -> None:
    heavy = {"torch", "numpy", "diffusers", "transformers", "huggingface_hub", "safetensors", "onnxruntime", "ray"}
    source = f"import deployments.errors, deployments.catalog as c, sys; c.load_catalog(); print(sorted({heavy!r} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


def test_the_application_brings_torch_into_no_process_that_only_reads_how_it_is_built() -> None:
    """Ray imports serve.app in every replica, in those too whose models run on onnxruntime alone."""
    source = "import serve.app, sys; print(sorted({'torch', 'diffusers', 'transformers', 'onnxruntime'} & set(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= FILE_LINES, f"{_name(path)} is longer than {FILE_LINES} lines: split it"
    functions = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    long = [node.name for node in functions if (node.end_lineno or 0) - node.lineno + 1 > FUNCTION_LINES]
    assert not long, f"{_name(path)}: {', '.join(long)} exceed {FUNCTION_LINES} lines: split them"


@pytest.mark.parametrize("path", PYTHON, ids=_name)
def test_torch_loads_weights_only(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    loads = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "torch.load"]
    assert [load for load in loads if "weights_only=True" not in load] == [], "a pickle may run code: pass weights_only=True"


def test_package_files_are_empty_and_tests_have_them_only_for_what_ends_with_a_folder() -> None:
    packages = [path for path in PYTHON if path.name == "__init__.py"]
    assert [_name(path) for path in packages if path.stat().st_size] == []
    folders = {path.parent for path in packages if path.is_relative_to(ROOT / "tests")}
    # pytest knows fixtures of the scope `package` only of folders that are one.
    assert folders == {path.parent for path in PYTHON if path.name == "conftest.py" and 'scope="package"' in path.read_text("utf-8")}


def test_the_repository_stays_small() -> None:
    assert _mib(FILES) <= REPOSITORY_MIB
    own, late = sizes_mib()
    assert own <= PACK_MIB and late <= LATECOMERS_MIB


def test_no_file_names_a_place_of_one_machine() -> None:
    places = [
        f"{_name(path)}:{number}: {line.strip()}"
        for path in FILES
        if path.suffix in _PROSE_AND_CODE
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if _ONE_MACHINE.search(line)
    ]
    assert places == []


@pytest.mark.parametrize("line", ["cp /" + "home/ada/net.onnx .", 'open("/' + 'root/x")', "index = file://" + "/srv/wheels"])
def test_a_place_of_one_machine_is_recognised(line: str) -> None:
    assert _ONE_MACHINE.search(line)
