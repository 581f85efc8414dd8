"""What a process may use of the machine: its device, its share of a GPU's memory, its threads.

Ray's fractions of a GPU are bookkeeping; here they are kept. Knows no model.
"""

from __future__ import annotations

import os
import re
import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from deployments.errors import ProviderUnavailable

if TYPE_CHECKING:
    import torch

_PROCESS = Path("/proc/self")
Device = Literal["cpu", "cuda"]
Dtype = Literal["float32", "bfloat16", "float16"]
MemoryMode = Literal["full", "offload", "group", "sequential", "fp8", "fp8-offload", "fp8-sequential", "nf4", "nf4-offload"]
"""How a denoiser's weights lie; deployments/denoisers/memory.py explains and arranges them."""


class TorchSettings(BaseModel):
    """device: where the models of a process lie. gpu_fraction: the most of the GPU's memory that it may take (1: all).
    dtype: of weights and activations. torch_threads: of one operation on the CPU; Ray gives a small replica one otherwise.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Device = "cpu"
    gpu_fraction: float = Field(default=1.0, gt=0, le=1)
    dtype: Dtype = "float32"
    torch_threads: int = Field(default=1, ge=1)


def claim(settings: TorchSettings) -> torch.dtype:
    """Applies the settings to this process, before its first model is loaded; returns the type of weights.

    Raises ProviderUnavailable without the GPU asked for.
    """
    # Contending processes whose threads spin while they wait are three times slower; read when OpenMP starts.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    import torch

    torch.set_num_threads(settings.torch_threads)
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ProviderUnavailable("The settings ask for a GPU, and torch sees none in this process.")
    if settings.device == "cuda" and settings.gpu_fraction < 1:
        torch.cuda.set_per_process_memory_fraction(settings.gpu_fraction)
    dtype: torch.dtype = getattr(torch, settings.dtype)
    return dtype


def forget_peak(device: Device) -> None:
    """What `peak_bytes` tells counts from here on."""
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # where it may not be written the peak is that of the process's whole life
        (_PROCESS / "clear_refs").write_text("5")  # resets VmHWM: proc(5)


def peak_bytes(device: Device) -> int:
    """The most memory since `forget_peak`: of a GPU what torch had allocated in it, else what the process had in RAM."""
    if device == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError):
        if found := re.search(r"^VmHWM:\s*(\d+) kB$", (_PROCESS / "status").read_text(), re.MULTILINE):
            return int(found[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024
