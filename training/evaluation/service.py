"""Drawing and looking through a running service: the handle of Workflows, for evaluations that run beside it as jobs.

`evaluate` and `select` are plain functions that wait for each picture; they run in a thread, while the handle belongs to an event loop.
Cancelled, the drawing under way is stopped before anybody is told. Knows neither Ray (the handle is given) nor HTTP.
"""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from deployments.contracts import PictureFaces
from deployments.errors import Cancelled, QueueFull, ReplicaLost
from deployments.face_server import FaceSettings
from deployments.job_runner import told
from training.evaluation.adherence import measures
from training.evaluation.cases import with_pictures_as
from training.evaluation.likeness import Look
from training.evaluation.plan import Plan
from training.evaluation.run import Bench, Pictures, looking

_PATIENCE_S = 1.0, 3.0, 10.0, 30.0
"""What passes by itself (a full queue, a replica that died) is waited for so often, so long each time."""
_Result = TypeVar("_Result")


class Service:
    """A service as one owner sees it, for one run in a thread. Made within the event loop that its handle is used in."""

    def __init__(self, workflows: Any, owner: str, faces: FaceSettings) -> None:
        """workflows: the handle of serve.workflows.Workflows. faces: the models of its FaceServer."""
        self._workflows, self._owner, self._faces = workflows, owner, faces
        self._loop = asyncio.get_running_loop()
        self._left = threading.Event()
        self._under_way: set[asyncio.Task[Any]] = set()

    async def run(self, work: Callable[[], _Result]) -> _Result:
        """What `work` returns, in a thread, where it may use `draw` and `bench`. Cancelled, this returns when the thread has ended."""
        # Of its own: it is kept for hours, and the loop's own threads are for what takes moments.
        own = ThreadPoolExecutor(1, "evaluation")
        thread = self._loop.run_in_executor(own, work)
        try:
            return await asyncio.shield(thread)
        except asyncio.CancelledError:
            self._left.set()
            for task in self._under_way:
                task.cancel()
            await asyncio.wait({thread})
            thread.exception()  # that it was left is known
            raise
        finally:
            own.shutdown(wait=False)

    def draw(self, fields: Mapping[str, Any]) -> Pictures:
        """A `Draw`. Raises Cancelled where the run was left."""
        return self._waited(self._patiently(as_json(fields)))

    def bench(self, plan: Plan) -> Bench:
        """Faces by the service, where its models are the plan's; else by the plan's own, opened here. Raises as bench_of."""
        ours = (self._faces.faces, self._faces.judge) == (plan.faces.faces, plan.faces.judge)
        return Bench(self.look if ours else looking(plan.faces), measures(plan), plan.faces)

    @property
    def look(self) -> Look:
        return self._look

    def _look(self, pictures: Sequence[bytes]) -> Sequence[PictureFaces]:
        found: Sequence[PictureFaces] = self._waited(self._seen(tuple(pictures)))
        return found

    def _waited(self, doing: Coroutine[Any, Any, _Result]) -> _Result:
        """In the thread: what is done in the loop meanwhile."""
        if self._left.is_set():
            doing.close()
            raise Cancelled("Nobody waits for this any more.")
        return asyncio.run_coroutine_threadsafe(self._tracked(doing), self._loop).result()

    async def _tracked(self, doing: Coroutine[Any, Any, _Result]) -> _Result:
        task = asyncio.ensure_future(doing)
        self._under_way.add(task)
        try:
            if self._left.is_set():  # between the thread's look and now
                task.cancel()
            return await task
        except asyncio.CancelledError as error:
            raise Cancelled("Nobody waits for this any more.") from error
        finally:
            self._under_way.discard(task)

    async def _patiently(self, body: Mapping[str, Any]) -> Pictures:
        for pause in (*_PATIENCE_S, None):
            try:
                return await self._drawn(body)
            except Exception as error:  # noqa: BLE001 (Ray's wrapping, whatever it wraps)
                problem, _ = told(error)
                if pause is None or not isinstance(problem, QueueFull | ReplicaLost):
                    raise problem from error
            await asyncio.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    async def _drawn(self, body: Mapping[str, Any]) -> Pictures:
        answer = await asked(self._workflows.generate.remote(None, body, self._owner))
        files = [base64.b64decode(item.b64_json) for item in answer.data if item.b64_json is not None]
        return Pictures(files, answer.timings.get("total"), tuple(answer.models), answer.peak_bytes)

    async def _seen(self, pictures: tuple[bytes, ...]) -> Sequence[PictureFaces]:
        for need in (("judge", "attributes"), ("judge",)):
            try:
                found: Sequence[PictureFaces] = await asked(self._workflows.character.remote("analyze", pictures, need))
                return found
            except Exception as error:  # noqa: BLE001 (Ray's wrapping, whatever it wraps)
                problem, _ = told(error)
                # Face models without one for age and sex, which are then not known.
                if problem.code != "missing_weights" or need == ("judge",):
                    raise problem from error
        raise AssertionError("the last attempt returns or raises")


async def asked(response: Any) -> Any:
    """What a handle answers. Cancelled, the request is cancelled, too: nobody else would. Raises what it raises, wrapped by Ray or not."""
    try:
        return await response
    except asyncio.CancelledError:
        response.cancel()
        raise


def as_json(fields: Mapping[str, Any]) -> Any:
    """Fields of a request with their pictures as base64."""
    return with_pictures_as(fields, lambda picture: base64.b64encode(picture).decode())
