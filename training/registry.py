"""From a finished training to a LoRA that its owner draws with: the checkpoint is chosen, kept, and attached to a character.

Everything is the job's own until the job succeeds (deployments/store/provisional.py): `Registered.within` makes it the owner's, in the
transaction in which it does. Asked again, after whoever asked first had died, the same content is found and not kept twice.

Draws, looks and keeps through the handle of Workflows. Knows no queue, no Ray and no HTTP.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

from deployments.errors import CharacterNotFound, LikenessError, NoFaceDetected
from deployments.face_server import FaceSettings
from deployments.job_runner import told
from deployments.picture_metadata import without_metadata
from deployments.store.character_values import MOST_PICTURES, NewPicture
from deployments.store.jobs import Within
from deployments.store.loras import LoraInfo
from deployments.store.provisional import Provisional, maker_of
from training.dataset.dataset import read_dataset
from training.evaluation import grid
from training.evaluation.cases import Subject
from training.evaluation.plan import Plan, load_plan
from training.evaluation.selection import Checkpoint, Selection, select
from training.evaluation.service import Service, asked
from training.lora_header import scored
from training.orders import TrainingOrder
from training.tasks import TrainingResult

_LOG = logging.getLogger("likeness.jobs")
_PLAN = "selection"
_REFERENCES = 12
"""Pictures of the set whose mean the judge compares with: more of them change it by less than 0.003 (evaluation/likeness.py)."""
Told = Callable[[int, int], object]
"""How many pictures are drawn, of how many."""


@dataclass(frozen=True, eq=False)
class Choice:
    """The checkpoint that is taken. scores: what its file says of it. candidates: one mapping a checkpoint that was compared. grid: a
    picture of them, where there was a comparison. warnings: sentences for people."""

    step: int
    scores: Mapping[str, float] = field(default_factory=dict)
    candidates: Sequence[Mapping[str, Any]] = ()
    grid: bytes | None = None
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Registered:
    """lora: in the making until `within` was done. character: the id of the one that receives it."""

    lora: LoraInfo
    character: str | None
    within: Within
    warnings: tuple[str, ...] = ()


class Registry:
    """For any number of trainings at once, in one event loop."""

    def __init__(self, workflows: Any, store: Provisional, faces: FaceSettings, candidates: int = 4, plan: Plan | None = None) -> None:
        """workflows: the handle of serve.workflows.Workflows. faces: the models of its FaceServer. candidates: how many checkpoints are
        compared at most. plan: by what they draw; None is configs/evaluation/selection.yaml."""
        self._workflows, self._store, self._faces, self._candidates = workflows, store, faces, candidates
        self._plan = (load_plan(_PLAN) if plan is None else plan).but(faces=faces)

    async def chosen(self, job: str, order: TrainingOrder, folder: Path, dataset: Path, result: TrainingResult, report: Told) -> Choice:
        """The checkpoint that draws the person best; the last one where that is not asked for, or cannot be told.

        folder: of the training; dataset: the curated pictures. Raises what may pass by itself: QueueFull, ReplicaLost.
        """
        if not order.select:
            return _last(result)
        try:
            selection = await self._selection(job, order, folder, dataset, result, report)
        except LikenessError as error:
            if error.retryable:
                raise
            _LOG.warning("%s: its checkpoints could not be compared: %s", job, error)
            return _last(result, f"The checkpoints could not be compared, so the last one is taken. {error.message}")
        return await asyncio.to_thread(_choice, selection, result, folder)

    async def registered(
        self,
        job: str,
        owner: str,
        order: TrainingOrder,
        folder: Path,
        dataset: Path,
        result: TrainingResult,
        choice: Choice,
        pictures: Mapping[str, bytes],
    ) -> Registered:
        """The chosen checkpoint as a LoRA, and the character that receives it, both in the making. dataset: the curated pictures;
        pictures: those that came, of which a new character is made."""
        source = folder / result.checkpoints[choice.step]
        content = await asyncio.to_thread(lambda: scored(source.read_bytes(), choice.scores))
        lora = await self._kept(maker_of(job), content, order.name, order.trigger_word, f"Trained by {job}.")
        character = order.character
        warnings: tuple[str, ...] = ()
        if character is None and order.character_name is not None:
            character, warnings = await self._character_or_why(job, owner, order.character_name, dataset, pictures)
        elif character is not None and not await self._has(owner, character):
            warnings = (f"The character {character} was deleted while this was trained, so the LoRA stands alone.",)
            character = None
        within = self._store.handing_over(job, owner, lora.id, character)
        return Registered(lora, character, within, warnings)

    async def _has(self, owner: str, character: str) -> bool:
        try:
            await asyncio.to_thread(self._store.characters.get, character, owner)
        except CharacterNotFound:
            return False
        return True

    async def forgotten(self, job: str) -> None:
        """Whatever the job has in the making is removed."""
        await asyncio.to_thread(self._store.remove, job)

    async def _selection(
        self, job: str, order: TrainingOrder, folder: Path, dataset: Path, result: TrainingResult, report: Told
    ) -> Selection:
        maker, plan = maker_of(job), self._plan
        contents = {step: folder / result.checkpoints[step] for step in spread(sorted(result.checkpoints), self._candidates)}
        try:
            kept = [
                Checkpoint(f"step-{step}", (await self._kept(maker, await asyncio.to_thread(path.read_bytes), f"step {step}")).id)
                for step, path in contents.items()
            ]
            subject = await asyncio.to_thread(_subject, order, dataset)
            service = Service(self._workflows, maker, self._faces)
            loop = asyncio.get_running_loop()
            # The winner is drawn once more.
            told_of = _Counted(lambda done, of: loop.call_soon_threadsafe(report, done, of), (len(kept) + 1) * _pictures(plan))
            found = await service.run(
                lambda: select(plan, subject, kept, service.draw, folder / "selection", fresh_seeds(plan), service.bench(plan), told_of)
            )
        except Exception as error:  # Ray's wrapping, whatever it wraps
            await self.forgotten(job)
            if isinstance(error, LikenessError):
                raise
            raise told(error)[0] from error
        # Not where this was cancelled: whoever has the job by now draws with the same candidates.
        await self.forgotten(job)
        return found

    async def _kept(self, owner: str, content: bytes, name: str, trigger_word: str | None = None, description: str = "") -> LoraInfo:
        """The LoRA with this content, which may be there already."""
        digest = sha256(content).hexdigest()
        for known in await asked(self._workflows.lora.remote("list", owner)):
            if known.sha256 == digest:
                found: LoraInfo = known
                return found
        made: LoraInfo = await asked(self._workflows.lora.remote("add", content, name, owner, trigger_word, description))
        return made

    async def _character_or_why(
        self, job: str, owner: str, name: str, dataset: Path, pictures: Mapping[str, bytes]
    ) -> tuple[str | None, tuple[str, ...]]:
        """As _character; what is wrong with pictures costs the character, not the LoRA. Raises what may pass by itself."""
        try:
            return await self._character(job, owner, name, await asyncio.to_thread(_accepted, dataset, pictures))
        except Exception as error:
            problem, _ = told(error)
            if problem.retryable:
                raise
            return None, (f"No character {name!r} was made: {problem.message}",)

    async def _character(self, job: str, owner: str, name: str, pictures: Mapping[str, bytes]) -> tuple[str | None, tuple[str, ...]]:
        """The owner's newest of this name, else a new one in the making, of the first of the pictures. None, and why, where none
        of them can be used."""
        store = self._store.characters
        for whose in (owner, maker_of(job)):
            found = [character.id for character in await asyncio.to_thread(store.list, whose) if character.name == name]
            if found:
                return found[0], ()
        bare = await asyncio.to_thread(lambda: [without_metadata(content) for content in list(pictures.values())[:MOST_PICTURES]])
        curated = await asked(self._workflows.character.remote("curate", tuple(bare), (), None))
        if curated.judgement.best is None:
            return None, (f"No character {name!r} was made: {NoFaceDetected.advice}",)
        new = [NewPicture(content=content, facts=facts) for content, facts in zip(bare, curated.facts, strict=True)]
        made = await asyncio.to_thread(store.create, maker_of(job), name, new, curated.judgement)
        return made.id, ()


class _Counted:
    """One count over parts that come one after the other and are each told from their own beginning."""

    def __init__(self, report: Told, of: int) -> None:
        self._report, self._all = report, of
        self._before = self._done = self._of = 0

    def __call__(self, done: int, of: int) -> None:
        if done < self._done:
            self._before += self._of
        self._done, self._of = done, of
        self._report(self._before + done, self._all)


def spread(steps: Sequence[int], most: int) -> list[int]:
    """At most so many of them, at even distances, the last one always."""
    count = min(most, len(steps))
    return [steps[(place + 1) * len(steps) // count - 1] for place in range(count)]


def fresh_seeds(plan: Plan) -> list[int]:
    """As many as the plan's, and none of them."""
    return [max(plan.seeds) + 100 + number for number in range(len(plan.seeds))]


def _pictures(plan: Plan) -> int:
    return len(plan.prompts) * len(plan.seeds)


def _last(result: TrainingResult, *warnings: str) -> Choice:
    step = max(result.checkpoints)
    return Choice(step, _known(result, step), warnings=warnings)


def _known(result: TrainingResult, step: int) -> dict[str, float]:
    return {"held_out_loss": result.held_out[step]} if step in result.held_out else {}


def _choice(selection: Selection, result: TrainingResult, folder: Path) -> Choice:
    step = int(selection.winner.name.removeprefix("step-"))
    scores = {"identity": round(selection.fresh, 4), "identity_selected": round(selection.selected, 4)}
    candidates = []
    for name, mean in selection.means.items():
        number, gap = int(name.removeprefix("step-")), selection.gaps.get(name)
        worse = gap is not None and gap.clear
        candidates.append({"step": number, "identity": round(mean, 4), "told_apart": worse, **_known(result, number)})
    full, small = folder / "selection" / "grid.png", folder / "selection" / "grid_small.png"
    grid.write(selection.candidates, full, small)
    return Choice(step, _known(result, step) | scores, candidates, small.read_bytes())


def _subject(order: TrainingOrder, dataset: Path) -> Subject:
    """Those of the set that are most like the others come first."""
    pictures = sorted(read_dataset(dataset).pictures, key=lambda picture: -(picture.cosine or 0.0))[:_REFERENCES]
    contents = [(dataset / picture.file).read_bytes() for picture in pictures]
    return Subject(name=order.name, references=contents, trigger=order.trigger_word, noun=order.class_word)


def _accepted(dataset: Path, pictures: Mapping[str, bytes]) -> dict[str, bytes]:
    """Of the pictures that came those that were trained on, whole; of a curated dataset its own. Those that are most like the others come
    first. Raises InvalidRequest as read_dataset."""
    found = sorted(read_dataset(dataset).pictures, key=lambda picture: -(picture.cosine or 0.0))
    if pictures:
        return {picture.source: pictures[picture.source] for picture in found if picture.source in pictures}
    return {picture.file: (dataset / picture.file).read_bytes() for picture in found}
