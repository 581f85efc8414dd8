"""Pinning a pack: what is written is what the catalogue then demands of every file."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from deployments.catalog import CATALOG_PATH, Catalog, load_catalog
from deployments.errors import DamagedWeights, InvalidCatalog, MissingWeights, UnsafeWeights
from deployments.weights import WeightFile, WeightFolder, locate, locate_folder
from training.mini.pack import DOCUMENTS, LATECOMERS, PACK, PACK_DIR, sizes_mib, write_catalog


def of_the_pack(catalog: Catalog) -> list[WeightFile | WeightFolder]:
    records = [weight for entry in catalog.models.values() for weight in entry.weights.values()]
    return [record for record in records if record.repo == PACK]


@pytest.fixture
def pack(tmp_path: Path) -> Path:
    """A pack with the layout that the shipped catalogue declares, beside a copy of that catalogue with nothing pinned."""
    for record in of_the_pack(load_catalog()):
        path = tmp_path / "mini" / (record.file if isinstance(record, WeightFile) else f"{record.folder}/deep/config.json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"the content of {path.name}")
    (tmp_path / "mini" / "CARD.md").write_text("# Measured")
    shutil.copy(CATALOG_PATH, tmp_path / "catalog.yaml")
    shutil.copy(CATALOG_PATH.with_name("converted.yaml"), tmp_path)
    (tmp_path / "mini.yaml").write_text("repo: mini\n")
    return tmp_path / "mini"


def test_every_file_is_pinned_and_then_verified(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    catalog_path = pack.with_name("catalog.yaml")
    pins = write_catalog(pack, catalog_path)
    assert "CARD.md" not in pins.files
    monkeypatch.setenv("LIKENESS_MODELS", str(pack.parent))
    for record in of_the_pack(load_catalog(catalog_path)):
        assert (locate(record) if isinstance(record, WeightFile) else locate_folder(record)).exists()
    (pack / "judge" / "arcface_judge.onnx").write_text("something else")
    judge = load_catalog(catalog_path).entry("face-judge-mini").weights["model"]
    assert isinstance(judge, WeightFile)
    with pytest.raises(DamagedWeights, match=r"arcface_judge\.onnx"):
        locate(judge)


def test_the_shipped_pack_is_exactly_what_is_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LIKENESS_MODELS", raising=False)
    records = of_the_pack(load_catalog())
    pinned = [file for record in records for file in ([record] if isinstance(record, WeightFile) else record.files) if file.sha256]
    present = {path.relative_to(PACK_DIR).as_posix() for path in PACK_DIR.rglob("*") if path.is_file()} - DOCUMENTS
    assert {file.file for file in pinned} == present, "run `python -m training.mini.pack`"
    for file in pinned:
        assert locate(file).stat().st_size == file.bytes


def test_the_shipped_pack_is_small_with_the_latecomers_counted_apart(tmp_path: Path) -> None:
    own, late = sizes_mib()
    assert 29 < own <= 30 and 0.7 < late < 0.9
    assert all((PACK_DIR / folder).is_dir() for folder in LATECOMERS)
    (tmp_path / LATECOMERS[0]).mkdir()
    for name, mib in (("CARD.md", 1), ("model.safetensors", 2), (f"{LATECOMERS[0]}/model.safetensors", 3)):
        (tmp_path / name).write_bytes(bytes(mib * 2**20))
    assert sizes_mib(tmp_path) == (2, 3)


def test_the_same_pack_gives_the_same_bytes(pack: Path) -> None:
    pins = pack.with_name("mini.yaml")
    write_catalog(pack, pack.with_name("catalog.yaml"))
    first = pins.read_bytes()
    write_catalog(pack, pack.with_name("catalog.yaml"))
    assert pins.read_bytes() == first and b"do not edit" in first


def test_a_missing_file_and_a_missing_folder_are_named_and_nothing_is_written(pack: Path) -> None:
    (pack / "parser" / "face_parser.onnx").unlink()
    shutil.rmtree(pack / "loras")
    with pytest.raises(MissingWeights, match=r"parser/face_parser\.onnx, loras/"):
        write_catalog(pack, pack.with_name("catalog.yaml"))
    assert pack.with_name("mini.yaml").read_text() == "repo: mini\n"


def test_a_file_that_no_entry_declares_is_named(pack: Path) -> None:
    (pack / "judge" / "old.onnx").write_text("left behind")
    with pytest.raises(InvalidCatalog, match=r"judge/old\.onnx"):
        write_catalog(pack, pack.with_name("catalog.yaml"))


def test_a_pickle_in_a_folder_is_refused(pack: Path) -> None:
    (pack / "flux1" / "vae.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(UnsafeWeights, match=r"vae\.bin"):
        write_catalog(pack, pack.with_name("catalog.yaml"))
