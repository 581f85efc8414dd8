"""A server on this machine: starts Ray, runs the application behind Serve's HTTP proxy, and takes both down again.

For a cluster, give configs/serve/*.yaml to `serve deploy` instead; this is for one machine and for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from tempfile import TemporaryDirectory
from typing import Any, cast

from deployments import metrics
from deployments.catalog import load_catalog
from deployments.errors import DeploymentFailed
from serve.door_settings import refuse_open_door
from serve.ray_ports import guard_ray_ports
from serve.settings import AppSettings

_APP = "likeness"
_OURS = "deployments.errors."


@contextmanager
def serving(settings: AppSettings, host: str = "127.0.0.1", port: int = 8000) -> Iterator[str]:
    """The address of a running server, which answers when this is entered. Ray is joined where it runs (RAY_ADDRESS), else started.

    Ray's own ports ask for a token, and those of a Ray that is started here listen on this machine alone (serve/ray_ports.py).
    Raises InvalidCatalog where everybody who reaches `host` would come in, UnknownModel and UnsupportedCombination for a base that nothing
    draws with, DeploymentFailed, which says what a deployment died of.
    """
    refuse_open_door(settings.door, host)
    load_catalog().servable(settings.base)  # before Ray, which takes its time
    guard_ray_ports()
    # Ray's workers run at niceness 15 unless told otherwise: whatever else the machine does would come first.
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # How often Serve's controller looks around: at its own 0.1 s it takes a fifth of a core while nothing happens.
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "0.5")
    with ExitStack() as until_stopped:
        if metrics.FOLDER_VARIABLE not in os.environ:
            folder = until_stopped.enter_context(TemporaryDirectory(prefix="likeness-metrics-", ignore_cleanup_errors=True))
            os.environ[metrics.FOLDER_VARIABLE] = folder
            until_stopped.callback(os.environ.pop, metrics.FOLDER_VARIABLE)
        yield from _serving(settings, host, port)


def _serving(settings: AppSettings, host: str, port: int) -> Iterator[str]:
    import ray
    import ray.serve

    from serve.app import build

    ours = not ray.is_initialized()
    if ours:
        # Trainings are Ray Jobs, whose API is part of the dashboard: a dozen processes that nothing else here needs.
        dashboard = settings.training.enabled
        ray.init(include_dashboard=dashboard, dashboard_host="127.0.0.1", log_to_driver=False, configure_logging=False)
    try:
        ray.serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        try:
            ray.serve.run(build(settings), name=_APP, route_prefix="/")
        except RuntimeError as error:  # names the deployments that failed, and no reason
            raise _failure(ray.serve.status().applications[_APP]) from error
        yield f"http://{host}:{port}"
    finally:
        cast(Any, ray.serve).shutdown()
        if ours:
            ray.shutdown()


def _failure(app: Any) -> DeploymentFailed:
    """app: Serve's ApplicationStatusOverview. A deployment's message ends with the traceback of its replica, hence with the reason."""
    said = {name: deployment.message for name, deployment in app.deployments.items() if deployment.status.name == "DEPLOY_FAILED"}
    reasons = [f"{name} did not start: {_last_line(message)}" for name, message in said.items()]
    return DeploymentFailed(" ".join(reasons) or f"The application did not start: {app.message}", details={"deployments": sorted(said)})


def _last_line(message: str) -> str:
    return message.strip().rpartition("\n")[2].removeprefix(_OURS)
