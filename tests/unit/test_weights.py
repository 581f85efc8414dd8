"""From a record to a verified path: what is there is found, what is missing, damaged or dangerous is refused by name."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save, save_file

from deployments.errors import CheckpointMismatch, DamagedWeights, MissingWeights, UnsafeWeights
from deployments.weights import (
    WeightFile,
    WeightFolder,
    check_state_dict,
    locate,
    locate_folder,
    models_root,
    read_safetensors,
    safetensors_header,
)


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LIKENESS_MODELS", str(tmp_path))
    return tmp_path


def put(root: Path, file: str, content: bytes) -> WeightFile:
    path = root / "toy" / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return WeightFile(repo="toy", file=file, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))


def test_a_sound_file_is_located(root: Path) -> None:
    weight = put(root, "a/net.safetensors", save({"x": torch.zeros(2)}))
    assert locate(weight) == root / "toy/a/net.safetensors"


def test_without_the_variable_the_repository_holds_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIKENESS_MODELS", raising=False)
    assert models_root() == Path(__file__).resolve().parents[2] / "models"


def test_a_missing_file_is_named_with_what_to_do(root: Path) -> None:
    with pytest.raises(MissingWeights, match=r"toy/net\.onnx.*LIKENESS_MODELS"):
        locate(WeightFile(repo="toy", file="net.onnx", sha256="0" * 64))


def test_another_size_is_damage(root: Path) -> None:
    weight = put(root, "net.onnx", b"\x08\x08 a graph")
    (root / "toy/net.onnx").write_bytes(b"\x08\x08 a gra")
    with pytest.raises(DamagedWeights, match=r"net\.onnx has 8 bytes; the catalogue pins 10"):
        locate(weight)


def test_one_changed_byte_is_damage_even_after_a_good_read(root: Path) -> None:
    weight = put(root, "net.onnx", b"\x08\x08 a graph")
    path = locate(weight)
    before = path.stat().st_mtime_ns
    path.write_bytes(b"\x08\x08 a gruph")
    os.utime(path, ns=(before + 1_000_000, before + 1_000_000))
    with pytest.raises(DamagedWeights, match=r"net\.onnx has the sha256"):
        locate(weight)


def test_a_local_file_without_a_pin_is_refused(root: Path) -> None:
    weight = put(root, "net.onnx", b"\x08\x08 a graph")
    with pytest.raises(MissingWeights, match=r"net\.onnx is there, but the catalogue pins no sha256"):
        locate(weight.model_copy(update={"sha256": None}))


@pytest.mark.parametrize("file", ["net.bin", "net.pt", "net.pth", "net.ckpt", "net.PKL", "net"])
def test_a_pickle_is_refused_by_its_suffix(root: Path, file: str) -> None:
    with pytest.raises(UnsafeWeights, match=file):
        locate(put(root, file, b"anything"))


@pytest.mark.parametrize("file", ["net.safetensors", "net.onnx", "config.json"])
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_renamed_pickle_is_refused_by_its_content(root: Path, file: str, protocol: int) -> None:
    weight = put(root, file, pickle.dumps({"x": [1.0]}, protocol=protocol))
    with pytest.raises(UnsafeWeights, match="holds a pickle"):
        locate(weight)


def test_a_renamed_torch_archive_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "lora.safetensors"
    torch.save({"x": torch.zeros(1)}, path)
    with pytest.raises(UnsafeWeights, match=r"lora\.safetensors holds a pickle"):
        read_safetensors(path)


def test_a_header_of_640_bytes_is_not_mistaken_for_a_pickle(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    bare = len(save({"x": torch.ones(1)}, {"note": ""})) - 12  # 8 bytes of length and 4 of data around the header
    save_file({"x": torch.ones(1)}, path, {"note": "n" * (640 - bare)})
    assert path.read_bytes()[:2] == b"\x80\x02"
    assert read_safetensors(path)["x"].item() == 1


def test_the_header_tells_shapes_and_metadata(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    save_file({"w": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.float16)}, path, {"config": "{}"})
    header = safetensors_header(path)
    assert header.shapes == {"w": (2, 3), "b": (2,)} and header.metadata == {"config": "{}"}


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_damage(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "net.safetensors"
    path.write_bytes(save({"w": torch.arange(6.0)})[:keep])
    with pytest.raises(DamagedWeights, match=r"net\.safetensors"):
        read_safetensors(path)


def test_tensors_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    stored = {"w": torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).half()}
    save_file(stored, path)
    found = read_safetensors(path)
    assert found["w"].dtype == torch.float16 and torch.equal(found["w"], stored["w"])


def folder_of(*files: WeightFile) -> WeightFolder:
    return WeightFolder(repo="toy", folder="flux1", files=files)


def test_a_folder_is_located_whole(root: Path) -> None:
    files = [put(root, "flux1/vae/config.json", b"{}"), put(root, "flux1/model_index.json", b"{ }")]
    assert locate_folder(folder_of(*files)) == root / "toy/flux1"


def test_a_folder_names_its_damaged_file(root: Path) -> None:
    files = [put(root, "flux1/model_index.json", b"{}"), put(root, "flux1/vae/config.json", b"{ }")]
    (root / "toy/flux1/vae/config.json").write_bytes(b"[ ]")
    with pytest.raises(DamagedWeights, match=r"flux1/vae/config\.json"):
        locate_folder(folder_of(*files))


def test_a_folder_with_a_stranger_in_it_is_refused(root: Path) -> None:
    files = [put(root, "flux1/model_index.json", b"{}")]
    put(root, "flux1/extra.onnx", b"\x08\x08")
    with pytest.raises(DamagedWeights, match=r"extra\.onnx"):
        locate_folder(folder_of(*files))


def test_a_folder_without_pins_is_missing(root: Path) -> None:
    with pytest.raises(MissingWeights, match="flux1 of toy"):
        locate_folder(folder_of())


@pytest.mark.parametrize("file", ["../secret.json", "/etc/passwd.txt", "a/../b.json", "a\\b.json", "./a.json", "a//b.json", ""])
def test_a_path_that_could_leave_its_folder_is_no_record(file: str) -> None:
    with pytest.raises(ValidationError, match="file"):
        WeightFile(repo="toy", file=file)


COMMIT = "0123456789abcdef0123456789abcdef01234567"
LOCATE = f"""
from deployments.weights import WeightFile, locate
print(locate(WeightFile(repo="owner/net", file="vae/config.json", revision="{COMMIT}")))
"""


def locate_in_cache(cache: Path) -> subprocess.CompletedProcess[str]:
    """In a process of its own: huggingface_hub reads its cache's place once, when it is imported."""
    environment = {**os.environ, "HF_HUB_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", LOCATE], capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2])


def test_a_hub_file_is_found_in_the_cache_without_a_network(tmp_path: Path) -> None:
    path = tmp_path / "models--owner--net" / "snapshots" / COMMIT / "vae" / "config.json"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    run = locate_in_cache(tmp_path)
    assert run.stdout.strip() == str(path), run.stderr


def test_a_hub_file_that_is_not_cached_is_named_with_the_command(tmp_path: Path) -> None:
    run = locate_in_cache(tmp_path)
    assert run.returncode == 1
    assert f"MissingWeights: The weights file vae/config.json of owner/net (revision {COMMIT})" in run.stderr
    assert f"hf download owner/net vae/config.json --revision {COMMIT}" in run.stderr


def test_a_fitting_state_passes() -> None:
    net = torch.nn.Linear(3, 2)
    check_state_dict({"weight": (2, 3), "bias": torch.Size([2])}, net.state_dict(), "net.safetensors")
    with pytest.raises(CheckpointMismatch, match="bias"):
        check_state_dict({"weight": (2, 3)}, net.state_dict(), "net.safetensors")


def test_every_misfit_is_named() -> None:
    expected = {"weight": (2, 4), "bias": (2,), "gate": (1,)}
    found = {**torch.nn.Linear(3, 2).state_dict(), "extra": torch.zeros(1)}
    with pytest.raises(CheckpointMismatch) as caught:
        check_state_dict(expected, found, "net.safetensors")
    said = str(caught.value)
    assert (
        "net.safetensors does not fit the model: 1 missing: gate; 1 left over: extra; 1 wrong shape: weight [2, 3] instead of [2, 4]."
        in said
    )
    assert caught.value.details["missing"] == ["gate"] and caught.value.details["left_over"] == ["extra"]


def test_many_misfits_are_counted() -> None:
    with pytest.raises(CheckpointMismatch, match=r"312 missing: k000, k001, k002, k003, k004 and 307 more\.") as caught:
        check_state_dict({f"k{i:03d}": (1,) for i in range(312)}, {}, "pulid")
    missing = caught.value.details["missing"]
    assert isinstance(missing, list) and len(missing) == 312
