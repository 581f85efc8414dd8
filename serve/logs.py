"""One line of JSON for each thing that is logged, on stderr, in every process; all lines about one request carry its id.

The fields of a line: time, level, logger, message, request_id, owner, key_id, job_id, deployment, replica; whatever the line itself adds
(`extra=`: seconds by stage, a status); an exception's traceback. Secrets that got into a line are blotted out of it.
Knows neither Ray nor HTTP: where a process is, it is told by a function. Imports nothing but the standard library.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import wraps
from logging.handlers import WatchedFileHandler
from types import MappingProxyType
from typing import Any

LEVEL_VARIABLE = "LIKENESS_LOG_LEVEL"
FILE_VARIABLE = "LIKENESS_LOG_FILE"
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

Where = Callable[[], Mapping[str, str]]
"""What is true of this process, or of the request it works on now, without having been bound: deployment, replica, request_id."""

# By the rules of logging a logger's children follow it.
_OURS = ("likeness", "serve", "deployments", "training", "ray.serve")
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Of what Ray Serve puts on its own records; the rest is for its handlers, or ids of Ray's (a job of Ray's is none of ours).
_OF_RAY = frozenset({"request_id", "deployment", "replica"})
_LONGEST_MESSAGE, _LONGEST_TRACE, _LONGEST_ID = 4_000, 20_000, 128
# An API key (its id may be shown, what follows may not), a webhook secret, and any other credential of a header.
_SECRETS = (
    (re.compile(r"(lk_[0-9A-Za-z]+_)[0-9A-Za-z]+"), r"\1***"),
    (re.compile(r"(whsec_)[0-9A-Za-z+/=_-]+"), r"\1***"),
    (re.compile(r"((?:bearer|basic) )[^\s\"\\]+", re.IGNORECASE), r"\1***"),
)

_NOTHING: Mapping[str, object] = MappingProxyType({})
_bound: ContextVar[Mapping[str, object]] = ContextVar("likeness_log_fields", default=_NOTHING)


@contextmanager
def about(**fields: object) -> Iterator[None]:
    """Within it every line of this task, and of threads and tasks that it starts, has these fields: request_id, owner, key_id, job_id."""
    token = _bound.set({**_bound.get(), **{name: value for name, value in fields.items() if value not in (None, "")}})
    try:
        yield
    finally:
        _bound.reset(token)


def nowhere() -> Mapping[str, str]:
    return {}


class JsonLines(logging.Formatter):
    """A record as one line."""

    def __init__(self, where: Where = nowhere) -> None:
        super().__init__()
        self._where = where

    def format(self, record: logging.LogRecord) -> str:
        """Never raises: a value that JSON cannot hold is written as text."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": _cut(record.getMessage(), _LONGEST_MESSAGE),
            **self._about(),
            **_extra(record),
        }
        if record.exc_info and record.exc_info[0] is not None:
            # The end of a traceback says what happened.
            line["exception"] = self.formatException(record.exc_info)[-_LONGEST_TRACE:]
        return _blotted(json.dumps(line, default=str, ensure_ascii=False))

    def _about(self) -> Mapping[str, object]:
        try:
            there: Mapping[str, object] = self._where()
        except Exception:  # noqa: BLE001 (a line without its place is better than none)
            there = {}
        fields = {**there, **_bound.get()}
        if isinstance(request := fields.get("request_id"), str):
            fields["request_id"] = _cut(request, _LONGEST_ID)
        return fields


class _Lines(logging.StreamHandler[Any]):
    """Ours, so that it can be told from others'. On the true stderr: Ray Serve may have put a logger in its place, which would log its
    own lines for ever."""


class _FileLines(WatchedFileHandler):
    """The same into a file; it may be moved away while it is written (logrotate), and several processes may append to it."""


def configure_logging(level: str = "INFO", where: Where = nowhere, file: str | None = None) -> None:
    """From here on this process logs lines of JSON, ours from `level` on and other libraries' warnings. May be called again.

    file: appended to in place of stderr. Raises ValueError for an unknown level, OSError where the file cannot be opened.
    """
    if level not in LEVELS:
        raise ValueError(f"There is no log level {level!r}; use one of {', '.join(LEVELS)}.")
    handler: logging.Handler = _FileLines(file, encoding="utf-8") if file else _Lines(sys.__stderr__)
    handler.setFormatter(JsonLines(where))
    for name in (None, "ray.serve"):
        logger = logging.getLogger(name)
        for old in list(logger.handlers):
            if type(old) in (logging.StreamHandler, _Lines, _FileLines):
                logger.removeHandler(old)
                old.flush()
        if logger.parent is None or not logger.propagate:  # in Ray's processes the second passes nothing on to the root
            logger.addHandler(handler)
    for name in _OURS:
        logging.getLogger(name).setLevel(level)
    logging.captureWarnings(True)


def logged(server: type, where: Where) -> type:
    """The class of a deployment, whose replicas log as said by the environment (LIKENESS_LOG_LEVEL, LIKENESS_LOG_FILE) from before they
    are made. Where `where` raises, there is no replica (Ray Serve's local testing mode), and the process logs as it did."""

    @wraps(server, updated=())
    class Logged(server):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            configure_replica(where)
            super().__init__(*args, **kwargs)

    return Logged


def configure_replica(where: Where) -> None:
    """See `logged`."""
    try:
        where()
    except Exception:  # noqa: BLE001 (Ray's way to say that this is no replica)
        return
    configure_logging(os.environ.get(LEVEL_VARIABLE) or "INFO", where, os.environ.get(FILE_VARIABLE) or None)


def environment() -> dict[str, str]:
    """What the processes of a server must inherit to log alike."""
    return {name: value for name in (LEVEL_VARIABLE, FILE_VARIABLE) if (value := os.environ.get(name))}


def _extra(record: logging.LogRecord) -> dict[str, object]:
    if record.name.startswith("ray"):
        return {name: value for name, value in vars(record).items() if name in _OF_RAY}
    # Ray marks every record of its processes, by a name that begins so.
    return {name: value for name, value in vars(record).items() if name not in _STANDARD and not name.startswith("_")}


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}… ({len(text)} characters)"


def _blotted(line: str) -> str:
    for secret, shown in _SECRETS:
        line = secret.sub(shown, line)
    return line
