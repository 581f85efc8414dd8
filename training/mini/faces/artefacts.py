"""What a finished face stage leaves behind: the weights as safetensors and, where ONNX's packages are installed, the ONNX file.

Training needs no ONNX: on a machine without it only the weights are written, and `python -m training.mini.faces.onnx_files FOLDER`
makes the files later from them. Knows no particular network.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from training.mini.faces.convolutions import on_device
from training.mini.workspace import Workspace

_EXPORTERS = ("onnx", "onnxscript", "onnxruntime")
_EXAMPLE_SEED = 7


@dataclass(frozen=True)
class OnnxForm:
    """The outside of an ONNX file. shape: of the example input that it is traced with; unit_range: the example is uniform in 0..1,
    otherwise normal; dynamic: input dimension -> its name; multiple: what the named heights and widths are divisible by."""

    file: str
    shape: tuple[int, int, int, int]
    outputs: tuple[str, ...]
    input_name: str = "input"
    dynamic: dict[int, str] = field(default_factory=lambda: {0: "batch"})
    multiple: int = 1
    unit_range: bool = False


def can_export() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in _EXPORTERS)


def keep(workspace: Workspace, name: str, network: nn.Module, form: OnnxForm) -> dict[str, Any]:
    """Saves `<name>.safetensors` and `<form.file>` in the workspace; returns facts: parameters, and what halving the weights changed."""
    network.eval()
    workspace.save(name, network.state_dict())
    facts: dict[str, Any] = {"parameters": sum(p.numel() for p in network.parameters())}
    if can_export() and workspace.writes:
        facts["fp16_difference"] = write_onnx(network, form, workspace.folder)
    elif workspace.writes:
        print(f"{name}: {', '.join(_EXPORTERS)} are not all installed; `python -m training.mini.faces.onnx_files` writes {form.file} later")
    return facts


def write_onnx(network: nn.Module, form: OnnxForm, folder: Path) -> float:
    """Writes folder/form.file; returns the largest difference of an output that storing the weights as fp16 made."""
    from training.mini.faces.export import export_onnx  # not before here: training machines need no onnx

    generator = torch.Generator().manual_seed(_EXAMPLE_SEED)
    draw = torch.rand if form.unit_range else torch.randn
    example = draw(form.shape, generator=generator)
    cpu = on_device(network, "cpu").float().eval()
    return export_onnx(cpu, example, folder / form.file, form.outputs, form.dynamic, input_name=form.input_name, multiple=form.multiple)


def restore(network: nn.Module, path: Path) -> nn.Module:
    """Loads `<name>.safetensors` strictly; fp32, eval mode. Raises FileNotFoundError, or RuntimeError naming the keys that don't fit."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: run the stage of training.mini.train that makes it")
    network.load_state_dict({key: value.float() if value.is_floating_point() else value for key, value in load_file(path).items()})
    return network.eval()
