"""HTTP: routes of a few lines each, one table from errors to answers, and the limits of a body. Knows no model and no handle's internals.

`api(calls)` is a plain FastAPI application over anything that answers `Calls`: the ingress deployment wraps it with a Ray Serve handle,
the command line and the tests with a handle of the local testing mode.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol, cast

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deployments import metrics
from deployments.errors import Cancelled, InvalidRequest, LikenessError, QueueFull, ReplicaLost, TooLarge, unwrapped
from serve.answers import AnalyzeResponse, CompareResponse, GenerateResponse, ModelsResponse, WorkflowsResponse
from serve.attachments import PICTURE_FIELDS
from serve.bodies import MULTIPART, counted, form_of, media_of, refuse_query
from serve.callers import caller_of
from serve.characters import CharacterDesk, add_character_routes
from serve.job_desk import JobDesk
from serve.jobs import add_job_routes, owner_by_caller
from serve.limits import Room
from serve.loras import LoraCalls, add_lora_routes
from serve.metrics_page import add_metrics_route
from serve.openapi import Application, body_schema
from serve.presets import Preset, load_presets
from serve.problem import MEDIA_TYPE, RETRY_AFTER_S, Problem, once, problem_of
from serve.readiness import Readiness, add_ready_route, in_one_process
from serve.schemas import AnalyzeRequest, CompareRequest, GenerateRequest
from serve.training import add_training_routes
from serve.training_bodies import MOST_PICTURES
from serve.training_desk import TrainingDesk
from serve.waiting import preference, preferred

_LOG = logging.getLogger("likeness")
_ERRORS: dict[int | str, dict[str, Any]] = {
    code: {"model": Problem, "content": {MEDIA_TYPE: {}}, "description": text}
    for code, text in ((422, "The request cannot be done; `code` says why, `remedy` what to do."), (429, "As many wait as may wait."))
}
_ADDRESS = {404: ("not_found", "There is no such address."), 405: ("method_not_allowed", "The address does not take this method.")}
# Fields of a form whose text is JSON; the others are read from text as they are, so that a prompt may be a number.
_STRUCTURED = frozenset(
    {"identity", "identities", "reference_images", "loras", "controls", "settings", "configurations", "prompts", "seeds"}
)
# A body has people, their pictures and a few fields: far fewer values, in far fewer levels. (Ray cannot send deep ones on.)
_MOST_LEVELS, _MOST_VALUES = 16, 10_000
# Of a form. A set may be two sets and one more: what is trained on or looked at, what is held out, and who is meant.
_FILES, _SET_FILES = 64, 2 * MOST_PICTURES + 1
# What Ray raises, by name, where the process that worked on a request is gone or going.
_DEATHS = frozenset({"RayActorError", "WorkerCrashedError", "NodeDiedError", "DeploymentUnavailableError", "OutOfMemoryError"})


class Calls(Protocol):
    """What the routes need; the methods of `serve.workflows.Workflows`."""

    async def generate(self, workflow: str | None, body: Mapping[str, Any], owner: str) -> GenerateResponse: ...
    async def check(self, workflow: str | None, body: Mapping[str, Any], owner: str) -> None: ...
    async def analyze(self, body: Mapping[str, Any]) -> AnalyzeResponse: ...
    async def compare(self, body: Mapping[str, Any]) -> CompareResponse: ...
    async def workflows(self) -> WorkflowsResponse: ...
    async def models(self) -> ModelsResponse: ...
    async def lora(self, method: str, *args: Any) -> Any: ...
    async def character(self, method: str, *args: Any) -> Any: ...


class HandleCalls:
    """Calls through the DeploymentHandle of Workflows."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def __getattr__(self, name: str) -> Any:
        async def call(*args: Any) -> Any:
            try:
                return await getattr(self._handle, name).remote(*args)
            except Exception as error:  # noqa: BLE001 (Ray's wrapping ends here, whatever it wraps)
                raise told(error) from error

        return call


class LoraHandle:
    """LoraCalls through the same handle: Workflows passes them on."""

    def __init__(self, calls: Calls) -> None:
        self._calls = calls

    def __getattr__(self, name: str) -> Any:
        return partial(self._calls.lora, name)


def api(
    calls: Calls,
    max_body_bytes: int,
    max_lora_bytes: int = 2**30,
    presets: Mapping[str, Preset] | None = None,
    owner_of: Callable[[Request], str] = owner_by_caller,
    readiness: Readiness | None = None,
    jobs: JobDesk | None = None,
    characters: CharacterDesk | None = None,
    training: TrainingDesk | None = None,
    room: Room | None = None,
    max_set_bytes: int = 512 * 2**20,
) -> FastAPI:
    """The application. max_body_bytes: of a request; max_lora_bytes: of a LoRA's file; max_set_bytes: of a form with the pictures of a
    training or an evaluation; more is refused while it is read. owner_of: whose things a request is about; raises where nobody's. jobs,
    characters, training: without them their routes are not there. room: how many may wait for their picture here, which is counted again
    behind `calls`: whom that would refuse is refused here, before any handle is called."""
    # No redirects: where to is taken from the header Host, which is whatever a caller says.
    app = Application(
        title="Likeness", description="Pictures of the same person, again and again.", version="1", redoc_url=None, redirect_slashes=False
    )
    for kind in (LikenessError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer)

    async def body(request: Request) -> dict[str, Any]:
        return await _body(request, max_body_bytes)

    async def with_set(request: Request) -> dict[str, Any]:
        return await _body(request, max_body_bytes, max_set_bytes)

    async def analyze(request: Request) -> Response:
        return _json(await calls.analyze(await body(request)))

    async def compare(request: Request) -> Response:
        return _json(await calls.compare(await body(request)))

    async def workflows() -> WorkflowsResponse:
        return await calls.workflows()

    async def models() -> ModelsResponse:
        return await calls.models()

    async def alive() -> dict[str, str]:
        return {"status": "alive"}

    def named(workflow: str | None) -> Any:
        async def generate(request: Request) -> Response:
            if room is not None and preference(request) is None:
                room.refuse_full()  # before its pictures are read
            fields = await body(request)
            if jobs is not None and (answer := await preferred(request, workflow, fields, jobs)) is not None:
                return answer
            with room.one() if room is not None else nullcontext():
                return _json(await calls.generate(workflow, fields, owner_of(request)))

        return generate

    _route(app, "/v1/generate", named(None), GenerateRequest, GenerateResponse, "Pictures by any workflow")
    for preset in (load_presets() if presets is None else presets).values():
        _route(app, preset.endpoint, named(preset.name), preset.request_type, GenerateResponse, preset.description)
    _route(app, "/v1/faces/analyze", analyze, AnalyzeRequest, AnalyzeResponse, "The faces of a picture")
    _route(app, "/v1/faces/compare", compare, CompareRequest, CompareResponse, "Whether two pictures show the same person")
    add_lora_routes(app, cast(LoraCalls, LoraHandle(calls)), max_lora_bytes, owner_of)
    app.get("/v1/workflows")(workflows)
    app.get("/v1/models")(models)
    app.get("/healthz")(alive)
    app.head("/healthz", include_in_schema=False)(alive)  # what some load balancers ask
    add_ready_route(app, readiness or Readiness(in_one_process))
    add_metrics_route(app, jobs.depth if jobs is not None else None)
    if jobs is not None:
        add_job_routes(app, jobs, body, owner_of)
    if characters is not None:
        add_character_routes(app, characters, max_body_bytes, owner_of)
    if training is not None:
        add_training_routes(app, training, with_set, owner_of)
    return app


def _route(app: FastAPI, path: str, function: Any, body: type[BaseModel], answer: type[BaseModel], text: str) -> None:
    """The body is read and checked by ourselves; what it is stands in the documentation all the same."""
    app.add_api_route(
        path, function, methods=["POST"], response_model=answer, responses=_ERRORS, openapi_extra={"requestBody": body_schema(body)},
        name=path.strip("/"), summary=text.split(":")[0][:80], description=text,
    )  # fmt: skip


async def _body(request: Request, limit: int, set_limit: int | None = None) -> dict[str, Any]:
    """JSON, or a form whose files are pictures: as base64, or as the bytes that they are where there may be a whole set of them. set_limit:
    of such a form. Raises InvalidRequest for anything else, TooLarge for more bytes."""
    refuse_query(request)
    if media_of(request) == MULTIPART:
        allowed = limit if set_limit is None else set_limit
        return await _form(counted(request, allowed, _too_large(allowed)), limit, set_limit is not None)
    body = _parsed(await counted(request, limit, _too_large(limit, set_limit)).body(), "The body")
    if not isinstance(body, dict):
        raise InvalidRequest("The body is not a JSON object.", 'Send fields and their values: {"prompt": "..."}.')
    return body


def _parsed(text: bytes | str, what: str) -> Any:
    """JSON in which no name is given twice, of no more levels and values than a request can have. Raises InvalidRequest."""
    tangled = InvalidRequest(f"{what} has more levels or more values than any request has.", "Send fields of a request, see /docs.")
    try:
        value = json.loads(text, object_pairs_hook=once)
    except RecursionError as error:
        raise tangled from error
    except ValueError as error:
        raise InvalidRequest(f"{what} is no JSON: {error}.", "Send JSON (content-type: application/json) or a form.") from error
    level, values = [value], 1
    for _ in range(_MOST_LEVELS):
        level = [child for item in level for child in _children(item)]
        values += len(level)
        if values > _MOST_VALUES:
            break
        if not level:
            return value
    raise tangled


def _children(item: object) -> list[Any]:
    if isinstance(item, dict):
        return list(item.values())
    return item if isinstance(item, list) else []


async def _form(request: Request, text_limit: int, of_set: bool) -> dict[str, Any]:
    """Fields of a form; those that repeat, and `reference_images`, become lists; people and lists are JSON. text_limit: of all of them that
    are no files."""
    length = request.headers.get("content-length", "")
    if not (length.isascii() and length.isdecimal()):
        raise InvalidRequest("The form does not say how long it is.", "Send the header content-length.")
    body: dict[str, Any] = {}
    # While it comes its files lie on the disk: in memory is what a form holds, once, and not what many are sending.
    async with form_of(request, _SET_FILES if of_set else _FILES, text_limit) as form:
        for name in form:
            values = [await _value(name, item, of_set) for item in form.getlist(name)]
            body[name] = values if len(values) > 1 or (name == "reference_images" and not isinstance(values[0], list)) else values[0]
    return body


async def _value(name: str, item: UploadFile | str, of_set: bool) -> Any:
    if isinstance(item, UploadFile):
        if name not in PICTURE_FIELDS:
            raise InvalidRequest(f"`{name[:60]}` came as a file, and is no picture.", "Send it as a plain field.")
        content = await item.read()
        return content if of_set else base64.b64encode(content).decode()
    if name in _STRUCTURED and item.lstrip().startswith(("{", "[")):
        return _parsed(item, f"`{name}`")
    return item


def _too_large(limit: int, set_limit: int | None = None) -> TooLarge:
    """set_limit: of a form, where that may be larger."""
    as_form = f"Send the pictures as files of a form (multipart/form-data), which may have {set_limit} bytes."
    remedy = "Send smaller pictures: JPEG, or fewer pixels." if set_limit is None else as_form
    return TooLarge(f"The body is larger than {limit} bytes.", remedy)


def _json(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


async def _answer(request: Request, error: BaseException) -> Response:
    """The one table from errors to answers."""
    headers = dict((error.headers or {}) if isinstance(error, HTTPException) else {})
    if isinstance(error, HTTPException):
        code, title = _ADDRESS.get(error.status_code, _ADDRESS[404])
        remedy = "The addresses and their methods are listed at /docs."
        problem = Problem(title=title, status=error.status_code, detail=str(error.detail), code=code, remedy=remedy)
    else:
        problem = problem_of(told(error)).model_copy(update={"request_id": caller_of(request).request or None})
    metrics.failed(problem.code)
    if problem.status in (429, 503):
        headers["retry-after"] = str(problem.details.get("retry_after_s", RETRY_AFTER_S))
    return Response(problem.model_dump_json(), status_code=problem.status, media_type=MEDIA_TYPE, headers=headers)


def told(error: BaseException) -> LikenessError:
    """What a caller is told: the error itself where it is ours, unwrapped as often as it crossed a deployment; Ray's own by name, so that
    this file needs no Ray; anything else is a fault of ours, which goes to the log and is told without its insides."""
    error = unwrapped(error)  # also where it is one of ours already
    if isinstance(error, LikenessError):
        return error
    if isinstance(error, RequestValidationError):
        return _misread(error)
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if "BackPressureError" in kinds:
        return QueueFull("As many requests wait as may wait.")
    if kinds & _DEATHS:
        return ReplicaLost(f"A process that worked on the request died ({type(error).__name__}).")
    if isinstance(error, asyncio.CancelledError | ClientDisconnect) or "RequestCancelledError" in kinds:
        return Cancelled("The request was cancelled.")
    _LOG.error("an unexpected error", exc_info=error)
    return LikenessError(f"An unexpected {type(error).__name__}.")


def _misread(error: RequestValidationError) -> InvalidRequest:
    """A parameter of the address that is not what its route says it is."""
    first = error.errors()[0]
    name = str(first["loc"][-1])
    return InvalidRequest(f"`{name}`: {first['msg']}.", None, {"param": name})
