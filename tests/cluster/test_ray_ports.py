"""A Ray that `serving` has started: its ports are on the loopback address, and every service behind them asks for the token."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

grpc: Any = pytest.importorskip("grpc", reason="comes with ray[serve]")

# One method of each service by which Ray can be made to run something, or to say what it runs.
METHODS = (
    "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "/ray.rpc.NodeManagerService/GetNodeStats",
    "/ray.rpc.ObjectManagerService/Pull",
    "/ray.rpc.CoreWorkerService/PushTask",
    "/ray.serve.ASGIService/HandleRequest",
)


@pytest.fixture(scope="module")
def ports(url: str) -> set[tuple[str, str, int]]:
    """Process, address and port of everything that Ray listens on, beside the HTTP port."""
    import ray

    session, http = ray.get_runtime_context().get_session_name(), int(url.rpartition(":")[2])
    return {found for process in psutil.process_iter() for found in _listening(process, session) if found[2] != http}


def _listening(process: psutil.Process, session: str) -> Iterator[tuple[str, str, int]]:
    try:
        if process.name().startswith("ray::") or session in " ".join(process.cmdline()):
            for connection in process.net_connections(kind="inet"):
                if connection.status == psutil.CONN_LISTEN:
                    yield process.name(), connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port
    except psutil.Error:  # it has ended, or is another user's
        return


def _asked(port: int, method: str, metadata: list[tuple[str, str]]) -> Any:
    """The code with which a service answers an empty message."""
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        try:
            channel.unary_unary(method)(b"", timeout=10, metadata=metadata)
        except grpc.RpcError as error:
            return error.code()
    return grpc.StatusCode.OK


def test_nothing_listens_beyond_this_machine_but_serves_own_port_of_a_replica(ports: set[tuple[str, str, int]]) -> None:
    assert {"gcs_server", "raylet"} <= {name for name, _, _ in ports}
    outside = {name for name, address, _ in ports if not address.startswith("127.")}
    assert all(name.startswith("ray::ServeReplica:") for name in outside), outside


def test_no_service_answers_without_the_token(ports: set[tuple[str, str, int]]) -> None:
    code, token = grpc.StatusCode, Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    answered = set()
    for name, _, port in ports:
        for method in METHODS:
            without = _asked(port, method, [])
            if without in (code.UNIMPLEMENTED, code.UNAVAILABLE):  # another service's port, or one of HTTP
                continue
            assert without is code.UNAUTHENTICATED, (name, method, without)
            # PushTask is not asked with the token: a worker may take the empty task for one.
            if "PushTask" not in method:
                assert _asked(port, method, [("authorization", f"Bearer {token}")]) is not code.UNAUTHENTICATED, (name, method)
            answered.add(method)
    assert answered == set(METHODS)
