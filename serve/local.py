"""The whole application in this process: no cluster, no port. What the command line does without `--server`, and what tests use.

The same graph, bound by the same builder, in Ray Serve's local testing mode; the same routes, over an ASGI transport.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from deployments.store.migrate import migrate
from serve.client import Client
from serve.front import routes
from serve.ingress import HandleCalls
from serve.settings import QUIET, AppSettings, load_settings


def local_handle(settings: AppSettings) -> Any:
    """The handle of Workflows, everything behind it in this process. Models are loaded when this returns."""
    for name, value in {**QUIET, "OMP_WAIT_POLICY": "passive"}.items():
        os.environ.setdefault(name, value)
    # insightface 2.1 aligns faces with a method that scikit-image 0.26 renamed.
    warnings.filterwarnings("ignore", "`estimate` is deprecated", FutureWarning)
    import ray.serve

    from serve.app import build_workflows

    # What fails is raised here, and told by whoever asked; Serve would print its traceback as well.
    logging.getLogger("ray.serve").setLevel(logging.CRITICAL)
    return ray.serve.run(build_workflows(settings), _local_testing_mode=True)


@contextmanager
def local_client(settings: AppSettings | None = None) -> Iterator[Client]:
    """A client of the application in this process. settings: those of configs/serve/local.yaml unless given."""
    chosen = settings if settings is not None else load_settings("local")
    calls = HandleCalls(local_handle(chosen))
    migrate(chosen.store.database)
    app = routes(calls, chosen)
    with Client("http://likeness.local", transport=httpx.ASGITransport(app)) as client:
        yield client
