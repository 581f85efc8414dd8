"""The executor of evaluations: draws a plan through the service as the job's owner, measures it, and leaves figures, a grid and a plot.

What was drawn lies in a folder of the job that every node reaches: whoever leases the job after this one died draws only what is missing.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deployments.contracts import WorkProgress
from deployments.errors import InvalidRequest
from deployments.face_server import FaceSettings
from deployments.job_runner import Finished, Report
from deployments.store.characters import CharacterStore
from deployments.store.job_values import JobInfo, Lease
from deployments.store.jobs import JobStore
from deployments.weights import models_root
from training.evaluation.cases import MOST_REFERENCES, Subject
from training.evaluation.run import Evaluation, evaluate
from training.evaluation.service import Service, asked
from training.evaluation.summary import files, write
from training.orders import EvaluationOrder, given
from training.pathless import for_callers

FOLDER = "evaluations"
_MEDIA = {".png": "image/png", ".json": "application/json", ".csv": "text/csv", ".md": "text/markdown"}
# Somebody may just be beginning one, under a lease that is a moment old.
_ABANDONED_AFTER_S = 120.0


@dataclass(frozen=True, eq=False)
class EvaluationExecutor:
    """workflows: the handle of serve.workflows.Workflows. root: the folder of all evaluations. faces: the models of the service's
    FaceServer."""

    store: JobStore
    workflows: Any
    characters: CharacterStore
    root: Path
    faces: FaceSettings

    async def __call__(self, lease: Lease, report: Report) -> Finished:
        with for_callers(lease.job.id, (self.root.parent, models_root())):  # the store's folder is around ours
            return await self._evaluated(lease, report)

    async def _evaluated(self, lease: Lease, report: Report) -> Finished:
        job, began = lease.job, time.monotonic()
        order = EvaluationOrder.model_validate(job.input)
        pictures = await asyncio.to_thread(self.store.pictures, lease)
        subject = await self._subject(order, job, pictures)
        service, loop = Service(self.workflows, job.owner, self.faces), asyncio.get_running_loop()
        folder = self.root / job.id

        def told(done: int, of: int) -> None:
            loop.call_soon_threadsafe(report, WorkProgress("drawing", done, of))

        def work() -> tuple[dict[str, Any], Sequence[Path], Evaluation]:
            evaluation = evaluate(order.plan, [subject], service.draw, folder, service.bench(order.plan), told)
            return write(evaluation), files(folder), evaluation

        found, paths, evaluation = await service.run(work)
        contents = [(path.read_bytes(), _MEDIA[path.suffix]) for path in paths]
        places = [{"name": path.name, "media_type": _MEDIA[path.suffix]} for path in paths]
        # As plain JSON: keys of slices may be anything, and no number may be infinite.
        answer = {"summary": json.loads(json.dumps(found)), "pictures": len(evaluation.rows), "warnings": [], "data": places}
        return Finished(answer, contents, {"evaluation": time.monotonic() - began})

    async def sweep(self) -> None:
        """Removes what is left of evaluations that have ended. For any number of processes at once."""
        await asyncio.to_thread(self._swept)

    def _swept(self) -> None:
        old = time.time() - _ABANDONED_AFTER_S
        folders = {}
        for path in self.root.glob("job_*"):
            with suppress(FileNotFoundError):  # who sweeps beside this one may be quicker
                if path.stat().st_mtime < old:
                    folders[path.name] = path
        for id in sorted(folders.keys() - self.store.live(folders.keys())):
            shutil.rmtree(folders[id], ignore_errors=True)

    async def _subject(self, order: EvaluationOrder, job: JobInfo, pictures: Mapping[str, bytes]) -> Subject:
        """Raises CharacterNotFound, LoraNotFound, InvalidRequest."""
        references, lora, trigger = list(given(pictures, "images").values()), order.lora, order.trigger_word
        identity: dict[str, Any] = {}
        if order.character is not None:
            references = list(await asyncio.to_thread(self.characters.references, order.character, job.owner, MOST_REFERENCES))
            identity = {"character_id": order.character}
            own = await asyncio.to_thread(self.characters.lora, order.character, job.owner)
            if lora is None and own is not None:
                lora, trigger = own[0], trigger or own[1]
        if not references:
            raise InvalidRequest("There are no pictures of the person.", "Send `images`, or name a character.", {"param": "images"})
        known = (await asked(self.workflows.lora.remote("find", [lora], job.owner)))[0] if lora is not None else None
        return Subject(
            name=order.name,
            references=references,
            held_out=list(given(pictures, "held_out").values()),
            identity=identity,
            lora=lora,
            lora_sha256=known.sha256 if known is not None else None,
            trigger=trigger or (known.trigger_word if known is not None else None),
            noun=order.noun,
            sex=order.sex,
        )
