"""Whether the files of a model are those of its implementation: names and shapes against the module on the meta device.

No tensor is loaded: safetensors headers are read, modules are built without memory. ONNX files are checked as graphs. Fetches nothing and
runs nothing; a file that is pinned is verified against its sha256 on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

from deployments.catalog import Entry
from deployments.errors import CheckpointMismatch, DamagedWeights, MissingWeights, WeightsError
from deployments.weights import WeightFolder, check_state_dict, locate, locate_folder, safetensors_header

# Components of a pipeline that hold no tensors.
_WITHOUT_TENSORS = ("Tokenizer", "TokenizerFast", "Scheduler", "Processor", "Extractor")
_INDEX = "model_index.json"


@dataclass(frozen=True)
class Checked:
    """One part of a model. tensors: how many have the right name and shape (0 for a graph); error: what is wrong, if anything is."""

    part: str
    path: Path | None
    tensors: int = 0
    error: WeightsError | None = None


def check_entry(entry: Entry) -> list[Checked]:
    """Every part of a catalogue entry. What is wrong is reported part by part, not raised."""
    found: list[Checked] = []
    for part, weight in entry.weights.items():
        try:
            path = locate_folder(weight) if isinstance(weight, WeightFolder) else locate(weight)
        except WeightsError as error:
            found.append(Checked(part, None, error=error))
            continue
        found.extend(_check_folder(part, path, weight) if isinstance(weight, WeightFolder) else [_check_file(entry, part, path)])
    return found


def check_pipeline(folder: Path) -> list[Checked]:
    """Every component of a diffusers pipeline folder, wherever it lies. Raises MissingWeights where the folder is none."""
    try:
        index: dict[str, Any] = json.loads((folder / _INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MissingWeights(f"{folder} is no pipeline folder: its {_INDEX} cannot be read.", "Give a folder that has one.") from error
    parts = {
        name: value for name, value in index.items() if isinstance(value, list) and value[0] and not value[1].endswith(_WITHOUT_TENSORS)
    }
    return [_guarded(name, folder / name, partial(_component, library=library, name=kind)) for name, (library, kind) in parts.items()]


def check_onnx(path: Path) -> int:
    """Raises DamagedWeights unless the file is a sound ONNX graph with at least one input and one output."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
        onnx.checker.check_model(str(path))
    except Exception as error:  # noqa: BLE001 - protobuf and the checker raise their own families, which share no base
        raise DamagedWeights(
            f"{path} is no sound ONNX file: {str(error).splitlines()[0] if str(error) else type(error).__name__}."
        ) from error
    if not graph.input or not graph.output:
        raise DamagedWeights(f"{path} has no input or no output.")
    return 0


def check_tensors(path: Path, module: Callable[[Mapping[str, str], Mapping[str, tuple[int, ...]]], Mapping[str, Any]]) -> int:
    """Compares a safetensors file with the state dict that `module` makes of its metadata and shapes; returns the number of tensors."""
    header = safetensors_header(path)
    expected = module(header.metadata, header.shapes)
    shapes = {name: _Shape(shape) for name, shape in header.shapes.items()}
    check_state_dict({name: tensor.shape for name, tensor in expected.items()}, shapes, str(path))
    return len(expected)


@dataclass(frozen=True)
class _Shape:
    shape: tuple[int, ...]


def _check_folder(part: str, path: Path, weight: WeightFolder) -> list[Checked]:
    if (path / _INDEX).is_file():
        return check_pipeline(path)
    if (path / "config.json").is_file():
        return [_guarded(part, path, _configured)]
    graphs = [path / Path(file.file).name for file in weight.files if file.file.endswith(".onnx")]
    tensors = [path / Path(file.file).name for file in weight.files if file.file.endswith(".safetensors")]
    return [
        *(_guarded(f"{part}/{graph.stem}", graph, check_onnx) for graph in graphs),
        *(_guarded(f"{part}/{file.stem}", file, lambda path: len(safetensors_header(path).shapes)) for file in tensors),
    ]


def _check_file(entry: Entry, part: str, path: Path) -> Checked:
    if path.suffix == ".onnx":
        return _guarded(part, path, check_onnx)
    # A version of a method is a family of its own, `pulid-v0.9.0`.
    module = next((make for (family, of), make in _MODULES.items() if of == part and entry.family.startswith(family)), None)
    if module is None:
        return _guarded(part, path, lambda path: len(safetensors_header(path).shapes))
    return _guarded(part, path, lambda path: check_tensors(path, module))


def _guarded(part: str, path: Path, check: Callable[[Path], int]) -> Checked:
    try:
        return Checked(part, path, check(path))
    except WeightsError as error:
        return Checked(part, path, error=error)


def _pulid(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    import torch

    from deployments.identity.pulid import PuLID, config_of

    with torch.device("meta"):
        return PuLID(config_of(metadata)).state_dict()


def _eva(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    import torch

    from deployments.identity.eva_clip import VISUAL_PREFIX, EvaVisionTransformer, config_of

    with torch.device("meta"):
        model = EvaVisionTransformer(config_of(metadata))
    return {f"{VISUAL_PREFIX}{name}": tensor for name, tensor in model.state_dict().items()}


def _xlabs(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    import torch

    from deployments.identity.xlabs_ip_adapter import XLabs, config_of

    with torch.device("meta"):
        return XLabs(config_of(shapes, "The file")).state_dict()


def _instantx(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    import torch

    from deployments.identity.instantx_ip_adapter import InstantX, config_of

    with torch.device("meta"):
        return InstantX(config_of(shapes, "The file")).state_dict()


def _redux(metadata: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> Mapping[str, Any]:
    import torch

    from deployments.identity.redux import ReduxProjection, config_of

    with torch.device("meta"):
        return ReduxProjection(config_of(shapes, "The file")).state_dict()


# (how the family begins, part) -> what its tensors are to be. Other safetensors files are checked for being whole.
_MODULES: Mapping[tuple[str, str], Callable[[Mapping[str, str], Mapping[str, tuple[int, ...]]], Mapping[str, Any]]] = {
    ("pulid", "adapter"): _pulid,
    ("pulid", "image_encoder"): _eva,
    ("xlabs-ip-adapter-v2", "adapter"): _xlabs,
    ("instantx-ip-adapter", "adapter"): _instantx,
    ("redux", "adapter"): _redux,
}
# Published whole, as a class of transformers; what an adapter looks through is the vision tower.
_TOWERS = {"CLIPModel": "CLIPVisionModelWithProjection", "SiglipModel": "SiglipVisionModel"}
# How the names of the rest begin, which the tower leaves over.
_SPARE = ("text_model.", "logit_scale", "logit_bias", "text_projection")


def _configured(folder: Path) -> int:
    """A model folder by itself: its config.json names the class (diffusers: `_class_name`, transformers: `architectures`)."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if "_class_name" in config:
        return _component(folder, "diffusers", config["_class_name"])
    named = (config.get("architectures") or ["?"])[0]
    return _component(folder, "transformers", _TOWERS.get(named, named))


def _component(folder: Path, library: str, name: str) -> int:
    if not any(folder.glob("*.safetensors")):
        raise MissingWeights(f"{folder} holds no safetensors.", "Fetch the folder again: `likeness models pull`.")
    return _of_diffusers(folder, name) if library == "diffusers" else _of_transformers(folder, name)


def _of_diffusers(folder: Path, name: str) -> int:
    import diffusers
    import torch

    kind = getattr(diffusers, name)
    with torch.device("meta"):
        model = kind.from_config(kind.load_config(folder))
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    shapes: dict[str, _Shape] = {}
    for shard in sorted(folder.glob("*.safetensors")):
        shapes.update({key: _Shape(shape) for key, shape in safetensors_header(shard).shapes.items()})
    check_state_dict(expected, shapes, str(folder))
    return len(expected)


def _of_transformers(folder: Path, name: str) -> int:
    """By the library's own reading: only it knows under which old names its checkpoints may lie. On `meta` it opens headers only."""
    import transformers
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading, and nothing is loaded
    for shard in sorted(folder.glob("*.safetensors")):
        safetensors_header(shard)
    kind = getattr(transformers, name)
    try:
        model, report = kind.from_pretrained(folder, device_map="meta", output_loading_info=True, local_files_only=True)
    except (OSError, RuntimeError) as error:
        raise CheckpointMismatch(f"{folder} does not fit a {name}: {error}") from error
    spare = _SPARE if name in _TOWERS.values() else ()
    misfits = {
        "missing": sorted(report["missing_keys"]),
        "left_over": sorted(key for key in report["unexpected_keys"] if not (spare and key.startswith(spare))),
        "wrong_shape": sorted(str(item[0] if isinstance(item, tuple) else item) for item in report["mismatched_keys"]),
    }
    if any(misfits.values()):
        said = "; ".join(f"{len(names)} {kind_.replace('_', ' ')}: {', '.join(names[:5])}" for kind_, names in misfits.items() if names)
        raise CheckpointMismatch(f"{folder} does not fit a {name}: {said}.", details=cast(Mapping[str, object], misfits))
    return len(model.state_dict())
