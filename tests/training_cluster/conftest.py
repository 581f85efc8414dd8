"""A cluster of several nodes on this machine: one Ray, whose GPUs are numbers, with the labels that placements ask for.

Its head comes with the first test; the nodes with GPUs only where a test asks for them.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest

from tests.store_places import free_port
from tests.training_jobs import PLACEMENTS
from training.ray_jobs import RayTrainings


class Nodes:
    """Those of the cluster beside its head."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster

    def add(self, gpu_class: str) -> Any:
        return self.cluster.add_node(num_cpus=2, num_gpus=1, labels={"gpu-class": gpu_class})

    def kill(self, node: Any) -> None:
        """SIGKILL to all of its processes."""
        self.cluster.remove_node(node, allow_graceful=False)


@pytest.fixture(scope="package")
def cluster() -> Iterator[Any]:
    """Connected to. The folder of its sockets has a short name: Linux has 107 characters for the path of one."""
    import ray
    from ray.cluster_utils import Cluster

    folder = Path(tempfile.mkdtemp(prefix="lr", dir="/tmp"))
    # Ports that another Ray of this machine has are not looked past here, and without its agent's the Jobs API takes no job.
    ports = {"dashboard_port": free_port(), "dashboard_agent_listen_port": free_port()}
    head = {"num_cpus": 4, "include_dashboard": True, "dashboard_host": "127.0.0.1", "temp_dir": str(folder), **ports}
    made: Any = Cluster(initialize_head=True, connect=True, head_node_args=head)
    yield made
    cast(Any, ray).shutdown()
    made.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="package")
def nodes(cluster: Any) -> Nodes:
    """With one node of an A6000 and one of an A100."""
    found = Nodes(cluster)
    found.add("a6000")
    found.add("a100")
    return found


@pytest.fixture
def trainings(cluster: Any) -> RayTrainings:
    return RayTrainings(placements=PLACEMENTS)


@pytest.fixture
def folder(tmp_path: Path) -> Callable[[str], Path]:
    """Of a job, below a storage that all nodes share."""
    return lambda job: tmp_path / job
