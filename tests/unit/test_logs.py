"""Lines of JSON: their fields, whose they are, and that no secret stands in them."""

from __future__ import annotations

import asyncio
import json
import logging
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextvars import copy_context
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request, Response

from serve.callers import Caller
from serve.logs import JsonLines, about, configure_logging
from serve.watching import Known, Watching

ROOT = Path(__file__).parents[2]


class Kept(logging.Handler):
    """Lines as they would be written."""

    def __init__(self, **where: str) -> None:
        super().__init__()
        self.setFormatter(JsonLines(lambda: where))
        self.lines: list[dict[str, Any]] = []
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(self.format(record))
        self.lines.append(json.loads(self.texts[-1]))


@pytest.fixture
def kept() -> Iterator[Kept]:
    handler, logger = Kept(deployment="FaceServer", replica="r7"), logging.getLogger("likeness")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


LOG = logging.getLogger("likeness.test")


def test_a_line_says_when_what_and_where(kept: Kept) -> None:
    LOG.info("drawn %d", 2, extra={"seconds": {"denoise": 1.5}, "odd": Path("/x"), "_of_a_library": 7})
    (line,) = kept.lines
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "INFO", "logger": "likeness.test", "message": "drawn 2", "deployment": "FaceServer", "replica": "r7",
        "seconds": {"denoise": 1.5}, "odd": "/x",
    }  # fmt: skip


def test_one_record_is_one_line_whatever_stands_in_it(kept: Kept) -> None:
    LOG.info('two\nlines, "quotes" and \x00', extra={"request": "a\nb"})
    assert "\n" not in kept.texts[0] and kept.lines[0]["message"].startswith("two\nlines")


def test_a_traceback_is_a_field(kept: Kept) -> None:
    try:
        raise ValueError("the reason")
    except ValueError:
        LOG.exception("it failed")
    assert kept.lines[0]["exception"].endswith("ValueError: the reason") and "\n" not in kept.texts[0]


def test_long_texts_are_cut(kept: Kept) -> None:
    LOG.info("x" * 50_000)
    assert len(kept.texts[0]) < 5_000 and "(50000 characters)" in kept.lines[0]["message"]


@pytest.mark.parametrize(
    "secret",
    [
        "lk_0123456789ab_k3yQ9secretsecretsecretsecretsecretse",
        "whsec_c2VjcmV0c2VjcmV0+/=",
        "Bearer abc.def-ghi",
        "authorization: basic Zm9v",
    ],
)
def test_secrets_are_blotted_out_wherever_they_stand(kept: Kept, secret: str) -> None:
    try:
        raise ValueError(secret)
    except ValueError:
        LOG.exception("came with %s", secret, extra={"headers": {"authorization": secret}})
    hidden = secret.rpartition("_")[2].rpartition(" ")[2]
    assert hidden not in kept.texts[0] and "***" in kept.lines[0]["message"]


def test_the_id_of_a_key_may_be_seen(kept: Kept) -> None:
    LOG.info("lk_0123456789ab_%s", "s" * 43)
    assert kept.lines[0]["message"] == "lk_0123456789ab_***"


def test_what_is_bound_stands_on_every_line_of_the_task_and_of_its_threads(kept: Kept) -> None:
    async def work(id: str) -> None:
        with about(request_id=id, owner="o" + id, key_id=None):
            LOG.info("first")
            await asyncio.sleep(0.01)
            await asyncio.to_thread(LOG.info, "in a thread")
            await asyncio.get_running_loop().run_in_executor(None, copy_context().run, LOG.info, "in an executor")
            with about(job_id="j" + id):
                LOG.info("inner")
        LOG.info("after")

    async def main() -> None:
        await asyncio.gather(*(work(str(k)) for k in range(20)))

    asyncio.run(main())
    for k in range(20):
        mine = [line["message"] for line in kept.lines if line.get("request_id") == str(k) and line["owner"] == f"o{k}"]
        assert mine == ["first", "in a thread", "in an executor", "inner"]
    assert sum("request_id" not in line for line in kept.lines) == 20
    assert all("key_id" not in line for line in kept.lines)
    assert {line["job_id"] for line in kept.lines if line["message"] == "inner"} == {f"j{k}" for k in range(20)}


def test_where_that_fails_costs_its_fields_alone() -> None:
    def broken() -> dict[str, str]:
        raise RuntimeError("no replica here")

    line = json.loads(JsonLines(broken).format(logging.makeLogRecord({"name": "x", "msg": "said"})))
    assert line["message"] == "said" and "replica" not in line


def test_of_rays_own_fields_only_those_that_mean_ours_are_kept() -> None:
    record = logging.makeLogRecord(
        {"name": "ray.serve", "msg": "CALL", "job_id": "01000000", "request_id": "r1", "route": "/", "worker_id": "w"}
    )
    line = json.loads(JsonLines().format(record))
    assert line["request_id"] == "r1" and not {"job_id", "worker_id", "route"} & set(line)


def program(text: str, *options: str) -> subprocess.CompletedProcess[str]:
    head = "import logging, sys, warnings\nfrom serve.logs import *\n"
    return subprocess.run([sys.executable, *options, "-c", head + text], capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)


def test_a_configured_process_says_each_thing_once_in_json_on_stderr() -> None:
    run = program(
        """
logging.basicConfig()
serve = logging.getLogger("ray.serve")
serve.propagate = False
serve.addHandler(logging.StreamHandler())
for _ in range(2): configure_logging("INFO", lambda: {"replica": "r1"})
logging.getLogger("likeness.x").info("ours")
logging.getLogger("deployments.y").info("ours too")
serve.info("ray's")
logging.getLogger("urllib3").info("nobody asked")
logging.getLogger("urllib3").warning("theirs")
warnings.warn("a warning")
"""
    )
    lines = [json.loads(line) for line in run.stderr.splitlines()]
    assert [line["message"] for line in lines[:4]] == ["ours", "ours too", "ray's", "theirs"]
    assert len(lines) == 5 and "a warning" in lines[4]["message"]
    assert run.stdout == "" and all(line["replica"] == "r1" for line in lines)


def test_a_stderr_that_is_a_logger_makes_no_circle() -> None:
    """Ray Serve puts one there where it is told not to log to stderr."""
    run = program(
        """
class Stream:
    def write(self, text): logging.getLogger("ray.serve").info(text)
    def flush(self): pass
sys.stderr = Stream()
configure_logging()
logging.getLogger("ray.serve").info("once")
"""
    )
    assert [json.loads(line)["message"] for line in run.stderr.splitlines()] == ["once"]


def test_several_processes_append_whole_lines_to_one_file(tmp_path: Path) -> None:
    target = tmp_path / "likeness.jsonl"
    text = f"configure_logging('INFO', file={str(target)!r})\nfor k in range(300): logging.getLogger('likeness').info('%d ' + 'x' * 900, k)"
    workers = [threading.Thread(target=program, args=(text,)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert len(lines) == 900


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="LOUD.*DEBUG, INFO"):
        configure_logging("LOUD")


def served(*, named: list[str] | None = None) -> Watching:
    """With a door that knows two callers, and copies what it is given as the true one does."""
    app = FastAPI()

    @app.get("/v1/things/{id}")
    async def thing(id: str, request: Request) -> str:
        LOG.info("at work")
        if id == "broken":
            raise RuntimeError("broken")
        return id

    @app.get("/healthz")
    async def alive() -> str:
        return "alive"

    inside = Known(app)

    async def door(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["path"].endswith("closed"):
            await Response(status_code=401)(scope, receive, send)
            return
        id = dict(scope["headers"])[b"x-request-id"].decode()
        state = {**scope["state"], "caller": Caller(owner="anna", key="0123456789ab", request=id)}
        await inside({**scope, "state": state}, receive, send)

    return Watching(door, app.router.routes, named.append if named is not None else None)


def ask(app: Any, path: str, id: str = "") -> None:
    async def asked() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://likeness.local") as client:
            await client.get(path, headers=[(b"x-request-id", id.encode())] if id else None)

    asyncio.run(asked())


def test_a_request_has_its_id_on_every_line_and_one_line_of_its_own(kept: Kept) -> None:
    named: list[str] = []
    ask(served(named=named), "/v1/things/secret-id?token=t0p", "my-id.1")
    work, access = kept.lines
    assert named == ["my-id.1"] and work["owner"] == "anna" and work["key_id"] == "0123456789ab"
    assert work["request_id"] == access["request_id"] == "my-id.1"
    expected = {"method": "GET", "endpoint": "/v1/things/{id}", "status": 200, "owner": "anna", "key_id": "0123456789ab", "level": "INFO"}
    assert expected.items() <= access.items() and access["seconds"] >= 0
    assert "secret-id" not in kept.texts[1] and "t0p" not in kept.texts[1]


@pytest.mark.parametrize("given", ["", "x" * 129, "two words", 'quo"te', "né"])
def test_an_id_that_is_nothing_for_a_log_is_replaced(kept: Kept, given: str) -> None:
    ask(served(), "/v1/things/1", given)
    ids = {line["request_id"] for line in kept.lines}
    assert len(ids) == 1 and next(iter(ids)).startswith("req_")


def test_whoever_is_not_let_in_is_a_line_without_an_owner(kept: Kept) -> None:
    ask(served(), "/v1/things/closed", "r1")
    (line,) = kept.lines
    assert line["status"] == 401 and line["endpoint"] == "/v1/things/{id}" and line["request_id"] == "r1" and "owner" not in line


def test_a_fault_of_ours_is_an_error_line(kept: Kept) -> None:
    ask(served(), "/v1/things/broken")
    assert kept.lines[-1]["level"] == "ERROR" and kept.lines[-1]["status"] == 500


def test_what_machines_ask_every_second_is_not_logged(kept: Kept) -> None:
    ask(served(), "/healthz")
    assert kept.lines == []
