"""What is counted while Likeness works, for Prometheus: names, labels, and one cheap function for each thing that happens.

No function here raises or waits: a full disk costs a figure, never a picture. Every label has few values, all of them the program's own:
a route's template, a workflow, a stage, a code; never an id, an owner or a text. Knows no HTTP; serve/metrics_page.py shows the figures.

Where PROMETHEUS_MULTIPROC_DIR names a folder, every process of a node counts into files there, and any of them can show the sum
(prometheus_client's multiprocess mode; the variable is read when this is imported). There is no gauge here on purpose: what rises only
needs no clearing up after a process that died, and what can fall (a queue's depth) is read anew for every page.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from functools import wraps
from pathlib import Path
from threading import Lock
from typing import ParamSpec

from prometheus_client import Counter, Histogram

FOLDER_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
_LOG = logging.getLogger(__name__)
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0, 640.0)
_COSINES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# On the device for one picture alone; what goes before runs beside other drawings.
_ON_THE_DEVICE = ("denoise", "decode")

_Given = ParamSpec("_Given")

_requests = Counter("likeness_requests", "Requests answered, by route and status.", ["endpoint", "status"])
_request_seconds = Histogram(
    "likeness_request_seconds", "From a request's first byte to its answer's last.", ["endpoint"], buckets=_SECONDS
)
_errors = Counter("likeness_errors", "Answers that are problems, by code.", ["code"])
_stage_seconds = Histogram("likeness_stage_seconds", "Of a drawn request, by stage.", ["workflow", "stage"], buckets=_SECONDS)
_gpu_seconds = Counter("likeness_gpu_seconds", "Denoising and decoding, also what was stopped.", ["workflow", "base"])
_pictures = Counter("likeness_pictures", "Pictures drawn.", ["workflow", "base"])
_cosines = Histogram("likeness_identity_cosine", "Of drawn faces with their references, by the judge.", ["method"], buckets=_COSINES)
_no_face = Counter("likeness_identity_no_face", "Scores that could not be given: no face was found for the person.", ["method"])
_prompts = Counter("likeness_prompt_cache", "Texts, by where their embeddings came from.", ["source"])
_loras = Counter("likeness_lora_cache", "LoRAs asked for, by result; and those let go.", ["result"])
_swaps = Counter("likeness_lora_swaps", "Pictures drawn with other LoRAs than the one before, in one replica.", ["base"])
_cancels = Counter("likeness_cancels", "Work that was not wanted any more, by how far it had come.", ["where"])
_jobs = Counter("likeness_jobs", "Jobs that ended, by status.", ["kind", "workflow", "status"])
_job_seconds = Histogram(
    "likeness_job_seconds", "Of jobs, from submitting to their end.", ["kind", "status"], buckets=(*_SECONDS, 3600.0, 14400.0)
)


def _quiet(function: Callable[_Given, None]) -> Callable[_Given, None]:
    """The function, which then never raises. Told once: a full disk would fill the log as well."""
    told = False

    @wraps(function)
    def counted(*args: _Given.args, **kwargs: _Given.kwargs) -> None:
        nonlocal told
        try:
            function(*args, **kwargs)
        except Exception:  # noqa: BLE001 (a figure is worth no picture, whatever is wrong)
            if not told:
                told = True
                _LOG.warning("%s cannot be counted; this is not said again.", function.__name__, exc_info=True)

    return counted


@_quiet
def requested(endpoint: str, status: int, seconds: float) -> None:
    """A request was answered. endpoint: its route's template."""
    _requests.labels(endpoint, str(status)).inc()
    _request_seconds.labels(endpoint).observe(seconds)


@_quiet
def failed(code: str) -> None:
    """A request or a job ended in an error. code: of LikenessError."""
    _errors.labels(code).inc()


@_quiet
def drawn(
    workflow: str, base: str, seconds: Mapping[str, float], scores: Iterable[tuple[str, float | None]] = (), pictures: int = 1
) -> None:
    """A request was drawn. seconds: by stage, of all its pictures together. scores: method and judge's cosine, None without a face."""
    for stage, spent in seconds.items():
        if stage != "total":
            _stage_seconds.labels(workflow, stage).observe(spent)
    _gpu_seconds.labels(workflow, base).inc(sum(seconds.get(stage, 0.0) for stage in _ON_THE_DEVICE))
    _pictures.labels(workflow, base).inc(pictures)
    for method, cosine in scores:
        if cosine is None:
            _no_face.labels(method).inc()
        else:
            # A sum that can fall is no counter; and below zero no cosine says more than "somebody else".
            _cosines.labels(method).observe(max(0.0, cosine))


@_quiet
def stopped(workflow: str, base: str, seconds: float) -> None:
    """A drawing was cancelled or failed after it had held the device for so long."""
    _gpu_seconds.labels(workflow, base).inc(max(0.0, seconds))


@_quiet
def cancelled(where: str) -> None:
    """Work was cancelled. where: `waiting` (nothing was drawn yet), `drawing` (it stopped in mid-picture), `job` (as a whole)."""
    _cancels.labels(where).inc()


@_quiet
def swapped(base: str) -> None:
    """A picture is drawn with other LoRAs than the one before."""
    _swaps.labels(base).inc()


@_quiet
def job_ended(kind: str, workflow: str, status: str, seconds: float) -> None:
    """A job reached a terminal status, so long after it was submitted."""
    _jobs.labels(kind, workflow, status).inc()
    _job_seconds.labels(kind, status).observe(max(0.0, seconds))


class Rising:
    """Counts what a part of the program counts by itself: told totals now and then, it adds what has come since. Any thread may tell."""

    def __init__(self, counter: Counter) -> None:
        """counter: of one label."""
        self._counter, self._lock = counter, Lock()
        self._seen: dict[str, int] = {}

    def tell(self, totals: Mapping[str, int]) -> None:
        """totals: by the label's value, since the part of the program was made."""
        with self._lock:
            # A thread that was overtaken tells less than is known already.
            fresh = {name: total - seen for name, total in totals.items() if total > (seen := self._seen.get(name, 0))}
            self._seen.update({name: totals[name] for name in fresh})
        _add(self._counter, fresh)


@_quiet
def _add(counter: Counter, amounts: Mapping[str, int]) -> None:
    for name, amount in amounts.items():
        counter.labels(name).inc(amount)


def prompt_cache() -> Rising:
    """For one prompt cache: `memory`, `folder`, `encoder` (a miss)."""
    return Rising(_prompts)


def lora_cache() -> Rising:
    """For one LoRA cache: `hit`, `miss`, `evicted`."""
    return Rising(_loras)


def prepare(folder: Path) -> None:
    """Makes the folder of a node ready for the processes of a new server: there, and empty of what an earlier server counted.

    Raises OSError. No process of an earlier server may still be counting there.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for left in folder.glob("*.db"):
        left.unlink(missing_ok=True)


def environment() -> dict[str, str]:
    """What the processes of a server must inherit to count together."""
    named = os.environ.get(FOLDER_VARIABLE)
    return {FOLDER_VARIABLE: named} if named else {}


def folder() -> Path | None:
    """Where the processes of this node count, made if it is not there. None: this process counts for itself alone."""
    named = os.environ.get(FOLDER_VARIABLE)
    if not named:
        return None
    with suppress(OSError):  # without it nothing is counted, and the first figure says so
        Path(named).mkdir(mode=0o700, parents=True, exist_ok=True)
    return Path(named)


folder()
