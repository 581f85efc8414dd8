"""GET /metrics: what every process of this node has counted (deployments/metrics.py), and how long the queues are at this moment.

Knows the text formats by prometheus_client alone. Who may read the page is the door's to say.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from prometheus_client import REGISTRY
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from deployments import metrics

_LOG = logging.getLogger("likeness.metrics")
# A page without the queues in time is worth more than one with them too late: Prometheus waits ten seconds by default.
_PATIENCE_S = 2.0
_OURS = ("likeness_", "python_", "process_")

Depth = Mapping[str, tuple[int, float]]
"""pool -> how many wait, and for how many seconds the oldest."""


class _Queues(Collector):
    """What is the case now."""

    def __init__(self, depth: Depth) -> None:
        self._depth = depth

    def collect(self) -> Iterable[Metric]:
        waiting = GaugeMetricFamily("likeness_queue_depth", "Jobs that wait, by pool.", labels=["pool"])
        oldest = GaugeMetricFamily("likeness_queue_oldest_seconds", "For how long the oldest of them has waited.", labels=["pool"])
        for pool, (count, seconds) in sorted(self._depth.items()):
            waiting.add_metric([pool], count)
            oldest.add_metric([pool], seconds)
        yield waiting
        yield oldest


class _Together(Collector):
    """Several collectors as one, of Likeness' own figures and those of the process that shows them.

    Ray's processes inherit the folder, and those of them that use prometheus_client count into it as well.
    """

    def __init__(self, *parts: Collector) -> None:
        self._parts = parts

    def collect(self) -> Iterable[Metric]:
        for part in self._parts:
            yield from (metric for metric in part.collect() if metric.name.startswith(_OURS))


def page(accept: str = "", depth: Depth | None = None) -> tuple[bytes, str]:
    """The page and its media type. accept: the request's header; OpenMetrics for whoever asks for it, the text format 0.0.4 else."""
    folder = metrics.folder()
    if folder is not None and folder.is_dir():
        untyped: Any = MultiProcessCollector
        counted: Collector = untyped(None, str(folder))
    else:
        counted = REGISTRY
    encode, media_type = choose_encoder(accept)
    return encode(_Together(counted, _Queues(depth or {}))), media_type


def add_metrics_route(app: FastAPI, depth: Callable[[], Depth] | None = None) -> None:
    """depth: asked in a thread for every page; where it fails or takes too long the page comes without queues."""

    async def queues() -> Depth:
        if depth is None:
            return {}
        try:
            return await asyncio.wait_for(asyncio.to_thread(depth), _PATIENCE_S)
        except Exception as error:  # noqa: BLE001 (whatever the store raises: the other figures are there all the same)
            _LOG.warning("the queues cannot be read: %s", error)
            return {}

    async def show(request: Request) -> Response:
        body, media_type = await asyncio.to_thread(page, request.headers.get("accept", ""), await queues())
        return Response(body, headers={"content-type": media_type, "cache-control": "no-store"})

    app.add_api_route("/metrics", show, methods=["GET"], response_class=Response, include_in_schema=False)
