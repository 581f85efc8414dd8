"""Where a training of each class runs and what it reserves there: configs/training/placement.yaml, typed. Imports no Ray and no torch."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from deployments.errors import InvalidCatalog, InvalidRequest
from deployments.hardware import Device

TABLE = Path(__file__).resolve().parents[1] / "configs" / "training" / "placement.yaml"
POOL = "train-"


class Placement(BaseModel):
    """device: what is computed on. labels: of the nodes that workers go to. workers: processes that share each step.

    cpus, gpus: reserved for each worker; gpus is one where the device is cuda, unless it is said. threads: of one operation on the CPU.
    strategy: of the placement group. backend: of torch.distributed; by default nccl for GPUs.
    nice: niceness of every process of the training, so that what serves on the same machine comes first.
    driver_cpus, driver_labels: of the process that curates and then waits. With neither it runs on the head node.
    max_failures: deaths of workers within one submission after which the training is given up, to be submitted again.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    device: Device
    labels: Mapping[str, str] = {}
    workers: int = Field(default=1, ge=1, le=64)
    cpus: float = Field(default=1.0, gt=0)
    gpus: float | None = Field(default=None, ge=0)
    threads: int = Field(default=1, ge=1)
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    backend: Literal["gloo", "nccl"] | None = None
    nice: int = Field(default=0, ge=0, le=19)
    driver_cpus: float = Field(default=1.0, ge=0)
    driver_labels: Mapping[str, str] = {}
    max_failures: int = Field(default=3, ge=0)

    @model_validator(mode="after")
    def _computes_on_what_it_has(self) -> Self:
        if self.device == "cuda" and not self.gpus_of_a_worker:
            raise ValueError("device is cuda, and no GPU is reserved")
        if self.device == "cpu" and self.backend == "nccl":
            raise ValueError("nccl joins GPUs, and the device is cpu")
        return self

    @property
    def gpus_of_a_worker(self) -> float:
        return self.gpus if self.gpus is not None else float(self.device == "cuda")

    @property
    def joined_by(self) -> Literal["gloo", "nccl"]:
        return self.backend or ("nccl" if self.device == "cuda" else "gloo")

    @property
    def resources(self) -> dict[str, float]:
        """Of one worker, as Ray counts them."""
        return {"CPU": self.cpus, **({"GPU": self.gpus_of_a_worker} if self.gpus_of_a_worker else {})}


def load_placements(path: Path = TABLE) -> dict[str, Placement]:
    """By class. Raises InvalidCatalog, which names what is wrong."""
    try:
        return TypeAdapter(dict[str, Placement]).validate_python(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InvalidCatalog(f"{path} is no table of placements: {error}") from error


def placement_of(name: str, table: Mapping[str, Placement]) -> Placement:
    """Raises InvalidRequest, which names the classes that there are."""
    if name not in table:
        close = get_close_matches(name, table, n=1)
        offer = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(sorted(table))}."
        raise InvalidRequest(f"There is no placement {name!r} for trainings.", offer)
    return table[name]


def pool_of(name: str) -> str:
    """The pool of the job store in which trainings of a class wait."""
    return f"{POOL}{name}"
