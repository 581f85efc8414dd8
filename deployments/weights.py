"""Weights as records, (repo, file, revision, sha256, bytes), and the way from a record to a verified local path.

Works offline: a repo without a slash ("mini") is a folder under the models root, a repo with one is looked up in the Hugging Face
cache. Knows no model and no network, and imports no torch until tensors are asked for. Pickles are refused by suffix and by content.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Protocol

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from deployments.errors import CheckpointMismatch, DamagedWeights, MissingWeights, UnsafeWeights

if TYPE_CHECKING:
    from torch import Tensor

MODELS_ROOT_VARIABLE = "LIKENESS_MODELS"
CONVERTED = "converted"
"""The local repo of files that `likeness models convert` makes of published pickles."""
_HARMLESS_SUFFIXES = frozenset({".safetensors", ".onnx", ".json", ".txt", ".model"})
# What torch.save writes: a zip archive since torch 1.6, before it a bare pickle, whose protocols 2 to 5 open with these two bytes.
_PICKLE_OPENINGS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_SAFETENSORS_PREFIX_BYTES = 8
# The limit of the safetensors library itself (MAX_HEADER_SIZE): a longer header is no header.
_SAFETENSORS_HEADER_LIMIT_BYTES = 100_000_000
_NAMES_SHOWN = 5


def _inside(path: str) -> str:
    """Refuses a path that could leave the folder it is joined to, or that is spelt in more than one way."""
    pure = PurePosixPath(path)
    if pure.is_absolute() or ".." in pure.parts or "\\" in path or str(pure) != path:
        raise ValueError(f"{path!r} is not a plain relative path; write it like 'folder/file.safetensors'")
    return path


RelativePath = Annotated[str, Field(min_length=1), AfterValidator(_inside)]


class _Record(BaseModel):
    """Where weights come from. revision: the commit of a hub repo; a local repo has none."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    repo: str = Field(pattern=r"^[\w.-]+(/[\w.-]+)?$")
    revision: str | None = Field(default=None, pattern=r"^[0-9a-f]{40}$")

    @property
    def local(self) -> bool:
        return "/" not in self.repo


class WeightFile(_Record):
    """One file. sha256 (hex) and size in bytes are checked wherever they are pinned; a file of a local repo must be pinned."""

    file: RelativePath
    sha256: str | None = Field(default=None, pattern=r"^[0-9a-f]{64}$")
    bytes: int | None = Field(default=None, ge=0)


class WeightFolder(_Record):
    """A folder that some library opens as a whole, with the record of each file in it (paths from the top of the repo)."""

    folder: RelativePath
    files: tuple[WeightFile, ...] = ()


class Shaped(Protocol):
    """A tensor, an array, or anything else that has a shape."""

    @property
    def shape(self) -> Sequence[int]: ...


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a safetensors file says of itself. shapes: tensor name -> shape; metadata: free text, empty where absent."""

    shapes: Mapping[str, tuple[int, ...]]
    metadata: Mapping[str, str]


def models_root() -> Path:
    """The folder that holds the local repos: $LIKENESS_MODELS, else `models/` of this repository."""
    chosen = os.environ.get(MODELS_ROOT_VARIABLE)
    return Path(chosen) if chosen else Path(__file__).resolve().parents[1] / "models"


def locate(weight: WeightFile) -> Path:
    """The local path of a file, after its kind, size and sha256 were checked.

    Raises MissingWeights, DamagedWeights or UnsafeWeights, each of which names the file.
    """
    refuse_suffix(weight.file)
    path = _local_path(weight) if weight.local else _cached_path(weight)
    refuse_pickle(path)
    _verify(weight, path)
    return path


def locate_folder(folder: WeightFolder) -> Path:
    """The local path of a folder, after each of its files was located and checked. Raises as `locate` does.

    A local folder must hold nothing else: insightface opens whatever ONNX file lies there. A hub snapshot may (its repo is larger).
    """
    if not folder.files:
        raise MissingWeights(f"The catalogue pins no file in the folder {folder.folder} of {folder.repo}.", _how_to_get(folder))
    paths = [locate(file) for file in folder.files]
    depth = len(PurePosixPath(folder.files[0].file).relative_to(folder.folder).parts)
    path = paths[0].parents[depth - 1]
    strangers = sorted({str(file) for file in path.rglob("*") if file.is_file()} - {str(file) for file in paths})
    if folder.local and strangers:
        raise DamagedWeights(f"{path} holds files that the catalogue does not know: {_first(strangers)}.", "Move them elsewhere.")
    return path


def _local_path(weight: WeightFile) -> Path:
    path = models_root() / weight.repo / weight.file
    if not path.is_file():
        raise MissingWeights(f"The weights file {path} ({weight.repo}: {weight.file}) is not there.", _how_to_get(weight))
    return path


def _cached_path(weight: WeightFile) -> Path:
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(weight.repo, weight.file, revision=weight.revision)
    if not isinstance(found, str):
        message = (
            f"The weights file {weight.file} of {weight.repo} (revision {weight.revision or 'main'}) is not in the Hugging Face cache."
        )
        raise MissingWeights(message, _how_to_get(weight))
    return Path(found)


def _how_to_get(record: _Record) -> str:
    if record.repo == CONVERTED:
        return "It is made on this machine, once: `likeness models pull`, then `likeness models convert`."
    if record.local:
        return (
            f"Restore it from the repository (`git checkout -- models/{record.repo}`), train it anew (`make {record.repo}`), "
            f"or let {MODELS_ROOT_VARIABLE} name the folder that holds {record.repo}/."
        )
    what = f" {record.file}" if isinstance(record, WeightFile) else ""
    revision = f" --revision {record.revision}" if record.revision else ""
    return f"Fetch it where there is a network: `hf download {record.repo}{what}{revision}`."


def refuse_suffix(file: str) -> None:
    """Raises UnsafeWeights unless the name ends like a format that holds data only."""
    suffix = PurePosixPath(file).suffix.lower()
    if suffix not in _HARMLESS_SUFFIXES:
        raise UnsafeWeights(f"{file} is a {suffix or 'suffixless'} file; only {', '.join(sorted(_HARMLESS_SUFFIXES))} are opened.")


def refuse_pickle(path: Path) -> None:
    """Raises UnsafeWeights if the file opens like a pickle or a torch archive, whatever it is called."""
    with path.open("rb") as stream:
        start = stream.read(_SAFETENSORS_PREFIX_BYTES + 1)
    # A true safetensors file may open with b"\x80\x02": that is the length of a header of 640 bytes. Its ninth byte tells.
    if start.startswith(_PICKLE_OPENINGS) and start[_SAFETENSORS_PREFIX_BYTES:] != b"{":
        raise UnsafeWeights(f"{path} holds a pickle, although it is called a {path.suffix} file.")


def _verify(weight: WeightFile, path: Path) -> None:
    size = path.stat().st_size
    if weight.bytes is not None and size != weight.bytes:
        raise DamagedWeights(f"{path} has {size} bytes; the catalogue pins {weight.bytes}.", _how_to_get(weight))
    if weight.sha256 is None:
        if weight.local:
            raise MissingWeights(f"{path} is there, but the catalogue pins no sha256 of it.", "Pin it: `python -m training.mini.pack`.")
        return
    digest = sha256_of(path)
    if digest != weight.sha256:
        raise DamagedWeights(f"{path} has the sha256 {digest}; the catalogue pins {weight.sha256}.", _how_to_get(weight))


def sha256_of(path: Path) -> str:
    """The sha256 of a file, in hex. Remembered until the file's time or size changes."""
    stat = path.stat()
    return _sha256(path, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=4096)
def _sha256(path: Path, mtime_ns: int, size: int) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def safetensors_header(path: Path) -> SafetensorsHeader:
    """Reads names, shapes and metadata without a single tensor (hence without torch).

    Raises UnsafeWeights for a pickle in disguise, DamagedWeights for anything else that is not a whole safetensors file.
    """
    refuse_suffix(path.name)
    refuse_pickle(path)
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(_SAFETENSORS_PREFIX_BYTES), "little")
        text = stream.read(length) if length <= _SAFETENSORS_HEADER_LIMIT_BYTES else b""
    try:
        header = json.loads(text)
        metadata = header.pop("__metadata__", {})
        shapes = {name: tuple(entry["shape"]) for name, entry in header.items()}
        ends = [entry["data_offsets"][1] for entry in header.values()]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise DamagedWeights(f"{path} has no readable safetensors header.") from error
    expected = _SAFETENSORS_PREFIX_BYTES + length + max(ends, default=0)
    if path.stat().st_size != expected:
        raise DamagedWeights(f"{path} has {path.stat().st_size} bytes where its header promises {expected}.")
    return SafetensorsHeader(shapes, metadata)


def read_safetensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """All tensors of a file by name, in the types they are stored in. Raises as `safetensors_header` does."""
    safetensors_header(path)
    from safetensors.torch import load_file

    return load_file(path, device=device)


def check_state_dict(expected: Mapping[str, Sequence[int]], found: Mapping[str, Shaped], source: str) -> None:
    """Raises CheckpointMismatch unless `found` has exactly the names and shapes of `expected`.

    expected: name -> shape. source: what the error calls the checkpoint. The text shows the first few of each kind with their count;
    `details` holds all of them under `missing`, `left_over` and `wrong_shape`.
    """
    missing = sorted(expected.keys() - found.keys())
    left_over = sorted(found.keys() - expected.keys())
    wrong = [
        f"{name} {list(found[name].shape)} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    parts = {"missing": missing, "left_over": left_over, "wrong_shape": wrong}
    if any(parts.values()):
        said = "; ".join(f"{len(names)} {kind.replace('_', ' ')}: {_first(names)}" for kind, names in parts.items() if names)
        raise CheckpointMismatch(f"{source} does not fit the model: {said}.", details=parts)


def _first(names: Sequence[str]) -> str:
    rest = len(names) - _NAMES_SHOWN
    return ", ".join(names[:_NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")
