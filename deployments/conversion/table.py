"""What is converted from what: configs/conversions.yaml, typed, and the one way to carry a conversion out.

A source is a published pickle: found in the Hugging Face cache or given by path, verified, read with weights_only=True by the converter of
its kind. The target is written whole or not at all, and pinned (sha256, size) in the file that the catalogue merges. Fetches nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Literal, Protocol, cast

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from deployments.catalog import CATALOG_PATH, Licence, Pins
from deployments.errors import DamagedWeights, InvalidCatalog, MissingWeights, UnknownModel
from deployments.weights import WeightFile, models_root, sha256_of

CONVERSIONS_PATH = CATALOG_PATH.parent / "conversions.yaml"
PINS_PATH = CATALOG_PATH.parent / "converted.yaml"
_PINS_HEAD = "# What every file made by `likeness models convert` must be. Written by that command: do not edit.\n"
# Imported when used: each of them imports torch.
_CONVERTERS: Mapping[str, str] = {
    "eva-clip": "deployments.conversion.eva_clip",
    "bisenet": "deployments.conversion.bisenet",
    "instantx-ip-adapter": "deployments.conversion.instantx",
}


class Converter(Protocol):
    """Reads a published pickle and writes what this project opens. Raises UnsafeWeights, DamagedWeights or CheckpointMismatch."""

    def __call__(self, source: Path, target: Path) -> None: ...


class Conversion(BaseModel):
    """One file. source: as it is published; target: in a local repo, under the models root."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["eva-clip", "bisenet", "instantx-ip-adapter"]
    source: WeightFile
    target: WeightFile
    licence: Licence

    @property
    def target_path(self) -> Path:
        return models_root() / self.target.repo / self.target.file

    @property
    def converter(self) -> Converter:
        return cast(Converter, import_module(_CONVERTERS[self.kind]).convert)


def load_conversions(path: Path = CONVERSIONS_PATH) -> dict[str, Conversion]:
    """Every conversion by its name. Raises InvalidCatalog, which names the file and the field."""
    try:
        return TypeAdapter(dict[str, Conversion]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InvalidCatalog(f"{path} is not a valid table of conversions: {error}") from error


def conversion_named(conversions: Mapping[str, Conversion], name: str) -> Conversion:
    if name not in conversions:
        raise UnknownModel(f"There is no conversion {name!r}.", f"There are: {', '.join(sorted(conversions))}.")
    return conversions[name]


def making(conversions: Mapping[str, Conversion], file: WeightFile) -> tuple[str, Conversion] | None:
    """The conversion that makes this file of a local repo, with its name."""
    wanted = (file.repo, file.file)
    return next(((name, found) for name, found in conversions.items() if (found.target.repo, found.target.file) == wanted), None)


def convert(name: str, conversion: Conversion, source: Path | None = None, pins: Path = PINS_PATH) -> Path:
    """Makes the target from the source (found in the cache, if none is given), pins it and returns its path.

    Raises MissingWeights, DamagedWeights (another file than the one that is published), and as the converter does.
    """
    found = source if source is not None else _cached(name, conversion.source)
    verify_source(conversion.source, found)
    target = conversion.target_path
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.part{target.suffix}")
    try:
        conversion.converter(found, beside)
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
    _pin(pins, conversion.target, target)
    return target


def verify_source(record: WeightFile, path: Path) -> None:
    """Raises DamagedWeights unless the file has the size and sha256 that are published, where they are."""
    if not path.is_file():
        raise MissingWeights(f"There is no file {path}.", "Give the published file.")
    size = path.stat().st_size
    if record.bytes is not None and size != record.bytes:
        raise DamagedWeights(f"{path} has {size} bytes; {record.file} of {record.repo} has {record.bytes}.")
    if record.sha256 is not None and sha256_of(path) != record.sha256:
        raise DamagedWeights(f"{path} has the sha256 {sha256_of(path)}; {record.file} of {record.repo} has {record.sha256}.")


def _cached(name: str, record: WeightFile) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(record.repo, record.file, revision=record.revision)
    if not isinstance(found, str):
        raise MissingWeights(
            f"{record.file} of {record.repo} is not in the Hugging Face cache.", f"Run `likeness models pull {name}`, or give its path."
        )
    return Path(found)


def _pin(pins: Path, record: WeightFile, path: Path) -> None:
    """Writes down what the file is from now on; the other pins stay."""
    known = Pins.model_validate(yaml.safe_load(pins.read_text(encoding="utf-8"))) if pins.is_file() else Pins(repo=record.repo)
    files = {file: pin.model_dump() for file, pin in known.files.items()}
    files[record.file] = {"sha256": sha256_of(path), "bytes": path.stat().st_size}
    content = yaml.safe_dump({"repo": known.repo, "files": files}, sort_keys=True)
    beside = pins.with_name(f".{pins.name}.part")
    beside.write_text(_PINS_HEAD + content, encoding="utf-8")
    beside.replace(pins)
