"""A server on this machine: starts Ray, runs the application behind Serve's HTTP proxy, and takes both down again.

For a cluster, give configs/serve/*.yaml to `serve deploy` instead; this is for one machine and for tests.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from serve.settings import AppSettings

_APP = "likeness"


@contextmanager
def serving(settings: AppSettings, host: str = "127.0.0.1", port: int = 8000) -> Iterator[str]:
    """The address of a running server, which answers when this is entered. Ray is joined where it runs (RAY_ADDRESS), else started.

    Token authentication between Ray's own processes is off: everything listens on this machine alone.
    """
    # Read when Ray is imported; Ray's default differs between local and other clusters, so it is always said.
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray
    import ray.serve

    from serve.app import build

    ours = not ray.is_initialized()
    if ours:
        ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        ray.serve.start(proxy_location="HeadOnly", http_options={"host": host, "port": port})
        ray.serve.run(build(settings), name=_APP, route_prefix="/")
        yield f"http://{host}:{port}"
        cast(Any, ray.serve).shutdown()
    finally:
        if ours:
            ray.shutdown()
