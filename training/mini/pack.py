"""Pins the embedded pack: sha256 and size of every file of models/mini, written to configs/mini.yaml for the catalogue to merge.

`python -m training.mini.pack` after the pack has changed. Knows which files belong (the catalogue says) and nothing of what is in them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import yaml

from deployments.catalog import CATALOG_PATH, Catalog, Pin, Pins, load_catalog
from deployments.errors import InvalidCatalog, LikenessError, MissingWeights
from deployments.weights import WeightFile, refuse_pickle, refuse_suffix, sha256_of

PACK = "mini"
PACK_DIR = CATALOG_PATH.parents[1] / "models" / PACK
DOCUMENTS = frozenset({"CARD.md", "metrics.json", "people.jpg"})
LATECOMERS = ("instantx-ip-adapter", "siglip-vision")
"""Folders that joined the pack after its bar of size was set: counted apart from it."""
_HEADER = "# What every file of models/mini must be. Written by `python -m training.mini.pack`: do not edit.\n"


def write_catalog(pack_dir: Path = PACK_DIR, catalog_path: Path = CATALOG_PATH) -> Pins:
    """Writes `mini.yaml` beside the catalogue from the files of a pack, and returns what it wrote; the same bytes for the same pack.

    Raises MissingWeights if a file or folder that the catalogue declares is not in the pack, InvalidCatalog if the pack holds a file
    that no entry declares, UnsafeWeights for a pickle. On an error the file stays as it was.
    """
    present = {path.relative_to(pack_dir).as_posix() for path in pack_dir.rglob("*") if path.is_file()} - DOCUMENTS
    files, folders = _declared(load_catalog(catalog_path))
    absent = sorted(files - present) + sorted(folder for folder in folders if not any(name.startswith(folder) for name in present))
    if absent:
        raise MissingWeights(f"{pack_dir} lacks {', '.join(absent)}.", "Run the stages of `python -m training.mini.train` that make them.")
    strangers = sorted(name for name in present - files if not name.startswith(tuple(folders)))
    if strangers:
        raise InvalidCatalog(
            f"{pack_dir} holds what no entry declares: {', '.join(strangers)}.", f"Delete it, or declare it in {catalog_path}."
        )
    pins = Pins(repo=PACK, files={name: _pin(pack_dir / name) for name in sorted(present)})
    _replace(
        catalog_path.with_name(f"{PACK}.yaml"),
        _HEADER + yaml.safe_dump(pins.model_dump(), default_flow_style=None, sort_keys=False, width=200),
    )
    return pins


def sizes_mib(pack_dir: Path = PACK_DIR) -> tuple[float, float]:
    """MiB of the models that the bar of size is about, and of the latecomers; documents count for neither."""
    own = late = 0
    for path in pack_dir.rglob("*"):
        if path.is_file() and path.name not in DOCUMENTS:
            size = path.stat().st_size
            if path.relative_to(pack_dir).parts[0] in LATECOMERS:
                late += size
            else:
                own += size
    return round(own / 2**20, 2), round(late / 2**20, 2)


def _declared(catalog: Catalog) -> tuple[set[str], set[str]]:
    """The files and the folders (with a slash at the end) of the pack that the catalogue's entries name."""
    records = [weight for entry in catalog.models.values() for weight in entry.weights.values() if weight.repo == PACK]
    files = {record.file for record in records if isinstance(record, WeightFile)}
    folders = {f"{record.folder}/" for record in records if not isinstance(record, WeightFile)}
    return files, folders


def _pin(path: Path) -> Pin:
    refuse_suffix(path.name)
    refuse_pickle(path)
    return Pin(sha256=sha256_of(path), bytes=path.stat().st_size)


def _replace(path: Path, text: str) -> None:
    """Writes a file in one step: a reader sees the old text or the new one."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pin the files of the embedded pack in configs/mini.yaml.")
    parser.add_argument("pack", type=Path, nargs="?", default=PACK_DIR, help="the folder of the pack (default: models/mini)")
    try:
        pins = write_catalog(parser.parse_args().pack)
    except LikenessError as error:
        raise SystemExit(f"{error.code}: {error}") from error
    total_bytes = sum(pin.bytes for pin in pins.files.values())
    print(f"{len(pins.files)} files, {total_bytes / 2**20:.2f} MiB pinned.")


if __name__ == "__main__":
    main()
