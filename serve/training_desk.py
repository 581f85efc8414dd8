"""TrainingDesk: from a request for a training or an evaluation to a job, over a JobDesk; or a refusal, of whatever can be told at once.

Opens no model. What only a model can tell (who is in the pictures, whether memory suffices) makes a job that fails, with its reason.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Mapping
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deployments.catalog import license_policy, load_catalog, refuse_licence
from deployments.errors import CharacterNotFound, InvalidImage, InvalidRequest, JobNotFound, UnsupportedCombination
from deployments.store.character_values import Character
from deployments.store.characters import CharacterStore, named
from deployments.store.job_values import NewJob
from deployments.store.loras import labelled
from serve.job_answers import JobItem
from serve.job_desk import Filled, JobDesk, parted
from serve.limits import Sets
from serve.problem import invalid
from serve.settings import AppSettings
from serve.training_bodies import MOST_PICTURES, PICTURES, EvaluationRequest, TrainingRequest
from training.dataset.settings import CurationSettings
from training.evaluation.cases import Subject, cases
from training.evaluation.plan import Configuration, Plan, Prompt, load_plan
from training.evaluation.service import as_json
from training.orders import EVALUATE, EVALUATION, TRAINING, EvaluationOrder, TrainingOrder, dataset_folder, given, refuse_other_word
from training.placement import load_placements, placement_of, pool_of
from training.settings import TrainingSettings, base_entry, preset, presets

MOST_DRAWINGS = 2_000
"""Pictures of one evaluation."""
_ID = re.compile(r"character_[0-9a-f]{24}")
MOST_CHECKPOINTS = 200
"""Of one training: each is a file of the LoRA's size until it has ended."""
_MOST_RESOLUTIONS = 4
# For whoever writes presets: a pattern can be made to take for ever, and code to be anything; nobody sees a job's samples; states are large
_OPERATORS = frozenset({"targets", "compile_blocks", "keep_states", "sample_every", "sample_prompts"})
# What an evaluation says itself of every picture that it asks for, one at a time.
_SAID_BY_THE_PLAN = frozenset({"prompt", "seed", "n", "num_images", "response_format"})
_Body = TypeVar("_Body", bound=BaseModel)
_Part = TypeVar("_Part", Configuration, Prompt)


class TrainingDesk:
    """What the routes need. Raises LikenessError."""

    def __init__(
        self,
        settings: AppSettings,
        jobs: JobDesk,
        characters: CharacterStore,
        find_loras: Callable[[list[str], str], Awaitable[Any]],
        check: Callable[[str | None, Mapping[str, Any], str], Awaitable[object]],
    ) -> None:
        """find_loras: (ids, owner), raises LoraNotFound; check: refuses a drawing. Both as Workflows has them."""
        self._settings, self._training, self.jobs = settings, settings.training, jobs
        self._characters, self._find_loras, self._check = characters, find_loras, check
        self._limits = settings.limits.value
        self.sets = Sets(settings.training.sets, settings.training.owner_sets)

    async def train(self, body: Mapping[str, Any], owner: str, key: str | None, quota: int | None) -> tuple[JobItem, bool]:
        """The job, and whether it was made now. key: of the header."""
        wanted = _parsed(TrainingRequest, body)
        new = NewJob(
            kind=TRAINING,
            pool=pool_of(self._training.placement),
            workflow=None,
            webhook_url=wanted.webhook_url,
            idempotency_key=_one_key(key, wanted.job_id),
            max_attempts=self._training.attempts,
        )
        allowed = _lesser(self._training.quota, quota)
        return await self.jobs.place(new, _said(wanted), partial(self._training_of, wanted, owner), owner, allowed)

    async def evaluate(self, body: Mapping[str, Any], owner: str, key: str | None, quota: int | None) -> tuple[JobItem, bool]:
        """As train."""
        wanted = _parsed(EvaluationRequest, body)
        new = NewJob(
            kind=EVALUATION, pool=EVALUATE, webhook_url=wanted.webhook_url, idempotency_key=_one_key(key, wanted.job_id),
            max_attempts=self._training.attempts,
        )  # fmt: skip
        allowed = _lesser(self._training.evaluation_quota, quota)
        return await self.jobs.place(new, _said(wanted), partial(self._evaluation_of, wanted, owner), owner, allowed)

    async def get(self, id: str, owner: str, kind: str) -> JobItem:
        """Raises JobNotFound, also for a job of another kind."""
        item = await self.jobs.get(id, owner)
        if item.kind != kind:
            raise JobNotFound(f"The job {id} is no {kind}.", f"It is at {item.links.job}.", {"id": id})
        return item

    async def _training_of(self, wanted: TrainingRequest, owner: str) -> Filled:
        settings = await asyncio.to_thread(self._settings_of, wanted)
        labelled(wanted.name or wanted.trigger_word, wanted.trigger_word)
        own = wanted.image_urls is None and wanted.images is None and wanted.dataset is None
        receiver = await asyncio.to_thread(self._receiver, wanted.character_id, owner, own)
        if wanted.dataset is not None:
            folder = await asyncio.to_thread(dataset_folder, self._training.datasets, wanted.dataset)
            await asyncio.to_thread(refuse_other_word, folder, wanted.trigger_word)
        sent = {name: getattr(wanted, name) for name in ("images", "image_urls", "reference_image")}
        input, pictures = await self._parted({name: value for name, value in sent.items() if value is not None})
        input["images"] = input.pop("image_urls", input.get("images", []))
        receiving = receiver.id if isinstance(receiver, Character) else None
        order = TrainingOrder(
            trigger_word=wanted.trigger_word,
            class_word=wanted.class_word,
            settings=settings,
            placement=self._training.placement,
            dataset=wanted.dataset,
            pictures_of=receiving if own else None,
            curate=CurationSettings(upscale_px=wanted.upscale, blur_others=wanted.blur_others),
            character=receiving,
            character_name=receiver if isinstance(receiver, str) else None,
            name=wanted.name or wanted.trigger_word,
            select=wanted.select,
            **input,
        )
        return order.model_dump(mode="json"), pictures

    async def _evaluation_of(self, wanted: EvaluationRequest, owner: str) -> Filled:
        plan = await asyncio.to_thread(self._plan_of, wanted)
        name = "person"
        if wanted.character_id is not None:
            name = (await asyncio.to_thread(self._pictured, wanted.character_id, owner)).name
        if wanted.lora is not None:
            await self._find_loras([wanted.lora], owner)
        sent = {"images": wanted.images, "held_out": wanted.held_out}
        input, pictures = await self._parted({field: value for field, value in sent.items() if value is not None})
        order = EvaluationOrder(
            plan=plan,
            name=wanted.name or name,
            character=wanted.character_id,
            lora=wanted.lora,
            trigger_word=wanted.trigger_word,
            noun=wanted.noun,
            sex=wanted.sex,
            **input,
        )
        await self._refuse_what_cannot_be_drawn(order, pictures, owner)
        return order.model_dump(mode="json"), pictures

    async def _parted(self, sent: Mapping[str, Any]) -> Filled:
        """Pictures that were sent and those that were fetched, all with a header that can be read."""
        try:
            whole = await self.jobs.fetched(sent, most=MOST_PICTURES, max_bytes=self._settings.max_set_bytes, as_bytes=True)
            return await asyncio.to_thread(parted, whole, self._limits)
        except InvalidImage as error:
            raise InvalidImage(error.message, error.remedy, {"param": "images", **error.details}) from error

    def _settings_of(self, wanted: TrainingRequest) -> TrainingSettings:
        """Raises InvalidRequest, UnknownModel, UnsupportedCombination, LicenseRefused."""
        theirs = sorted(_OPERATORS & wanted.settings.keys())
        if theirs:
            raise InvalidRequest(f"`settings.{theirs[0]}` is for presets only.", "Leave it out.", {"param": f"settings.{theirs[0]}"})
        named = wanted.preset or self._training.preset or self._usual_preset()
        chosen = preset(named, **_warmed_up(named, wanted.settings))
        entry = base_entry(chosen, load_catalog())
        refuse_licence(entry, license_policy())
        if chosen.base != self._settings.base:
            here = ", ".join(sorted(name for name, said in presets().items() if said["base"] == self._settings.base)) or "none"
            message = f"A LoRA for {chosen.base} cannot be used here: this server draws with {self._settings.base}."
            raise UnsupportedCombination(message, f"Its presets are: {here}.", {"param": "preset"})
        placement_of(self._training.placement, load_placements())
        _refuse_too_much(chosen, self._training.shown)
        return chosen

    def _usual_preset(self) -> str:
        """Of those for the base that is deployed the one that is named after where trainings run, else the first."""
        ours = sorted(name for name, said in presets().items() if said["base"] == self._settings.base)
        if not ours:
            raise UnsupportedCombination(f"There is no training preset for {self._settings.base}.", "Name one with `preset`.")
        return next((name for name in ours if self._training.placement in name.split("-")), ours[0])

    def _receiver(self, asked: str | None, owner: str, own: bool) -> Character | str | None:
        """A character of the owner's, or the name of one to be made. own: it is to be trained on its own pictures. Raises
        CharacterNotFound, InvalidRequest."""
        if asked is None:
            return None
        if _ID.fullmatch(asked):
            return self._pictured(asked, owner) if own else self._characters.get(asked, owner)
        name = named(asked)
        found = next((known.id for known in self._characters.list(owner) if known.name == name), None)
        if found is not None:
            return self._pictured(found, owner) if own else self._characters.get(found, owner)
        if own:
            message = f"There is no character {ascii(name[:60])}, and no pictures came to make one of."
            raise CharacterNotFound(message, "Send pictures, or use the id or name of one.", {"param": "character_id"})
        return name

    def _pictured(self, id: str, owner: str) -> Character:
        """Raises CharacterNotFound, and InvalidRequest for one without pictures that can be used."""
        character = self._characters.get(id, owner)
        if not any(picture.verdict.rank is not None for picture in character.pictures):
            raise InvalidRequest(f"The character {id} has no picture that can be used.", "Add pictures to it.", {"param": "character_id"})
        return character

    def _plan_of(self, wanted: EvaluationRequest) -> Plan:
        usual = self._training.plan or ("mini" if self._settings.base == "flux1-mini" else "character")
        plan = load_plan(wanted.plan or usual)
        changes: dict[str, Any] = {}
        if wanted.configurations is not None:
            _refuse_what_the_plan_says(item for item in wanted.configurations if isinstance(item, Configuration))
            changes["configurations"] = _chosen("configurations", wanted.configurations, plan.configurations)
        if wanted.prompts is not None:
            changes["prompts"] = _chosen("prompts", wanted.prompts, plan.prompts)
        if wanted.seeds is not None:
            changes["seeds"] = tuple(wanted.seeds)
        try:
            found = plan.but(**changes)
        except ValidationError as error:
            raise invalid(error) from error
        drawings = len(found.configurations) * len(found.prompts) * len(found.seeds)
        if drawings > MOST_DRAWINGS:
            raise InvalidRequest(f"The evaluation would draw {drawings} pictures; at most {MOST_DRAWINGS} are.", "Ask for fewer seeds.")
        return found

    async def _refuse_what_cannot_be_drawn(self, order: EvaluationOrder, pictures: Mapping[str, bytes], owner: str) -> None:
        """One picture of each configuration is looked at, as its drawing would be."""
        images = list(given(pictures, "images").values())[:1]
        lora = order.lora
        if order.character is not None:
            images = [b""]  # the request names the character
            own = await asyncio.to_thread(self._characters.lora, order.character, owner)
            lora = lora or (own[0] if own is not None else None)
        identity = {"character_id": order.character} if order.character is not None else {}
        subject = Subject(name=order.name, references=images, identity=identity, lora=lora, trigger=order.trigger_word, noun=order.noun)
        firsts = order.plan.but(prompts=order.plan.prompts[:1], seeds=order.plan.seeds[:1])
        for case in cases(firsts, [subject]):
            await self._check(None, as_json(case.fields), owner)


def _refuse_too_much(settings: TrainingSettings, most_shown: int) -> None:
    """What is not wrong, but would keep a GPU for weeks or fill the disk. Raises InvalidRequest."""
    shown = settings.steps * settings.batch * settings.grad_accum
    checkpoints = settings.steps // settings.checkpoint_every
    refused = (
        ("steps", shown, most_shown, "pictures would be shown", "steps x batch x grad_accum is too much."),
        ("checkpoint_every", checkpoints, MOST_CHECKPOINTS, "checkpoints would be written", "Let more steps lie between two of them."),
        ("resolutions", len(settings.resolutions), _MOST_RESOLUTIONS, "resolutions are named", "Name fewer."),
    )
    for field, count, most, what, remedy in refused:
        if count > most:
            raise InvalidRequest(f"`settings.{field}`: {count} {what}; at most {most} may be.", remedy, {"param": f"settings.{field}"})


def _warmed_up(name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Of a training of fewer steps than the preset warms up for, all of them: whoever shortens it need not know."""
    steps, usual = settings.get("steps"), presets().get(name, {}).get("warm_up_steps")
    if isinstance(steps, int) and isinstance(usual, int) and 0 < steps < usual:
        return {"warm_up_steps": steps, **settings}
    return dict(settings)


def _refuse_what_the_plan_says(configurations: Iterable[Configuration]) -> None:
    """Or it would be ignored, or nothing come back. Raises InvalidRequest."""
    for item in configurations:
        said = _SAID_BY_THE_PLAN.intersection({*item.fields}.union(*item.by_framing.values()))
        if said:
            message = f"`configurations`: {item.name} sets {min(said)}, which the plan does."
            raise InvalidRequest(message, "Leave it out.", {"param": "configurations"})


def _chosen(field: str, wanted: list[str | _Part], known: tuple[_Part, ...]) -> tuple[_Part, ...]:
    """Names of the plan's own, and others. Raises InvalidRequest for a name that the plan has not."""
    named = {item.name: item for item in known}
    for item in wanted:
        if isinstance(item, str) and item not in named:
            raise InvalidRequest(f"`{field}`: the plan has no {ascii(item[:60])}.", f"It has {', '.join(named)}.", {"param": field})
    return tuple(named[item] if isinstance(item, str) else item for item in wanted)


def _one_key(header: str | None, said: str | None) -> str | None:
    """Raises InvalidRequest for two different ones."""
    if header is not None and said is not None and header != said:
        raise InvalidRequest("`job_id` and the header Idempotency-Key are different.", "Send one of them.", {"param": "job_id"})
    return said if said is not None else header


def _said(wanted: BaseModel) -> dict[str, Any]:
    """The request as it was meant, by which two of them are the same: a form spells numbers and lists in other ways than JSON, a default
    or null may be said or not, and the key may stand here or in the header."""
    pictures = {name: getattr(wanted, name) for name in sorted(PICTURES & wanted.model_fields_set)}
    said = wanted.model_dump(exclude={"job_id", *pictures}, exclude_defaults=True)
    return said | {name: value for name, value in pictures.items() if value is not None}


def _lesser(ours: int, keys: int | None) -> int:
    """Of the two quotas: what the settings say, and what the key does."""
    return ours if keys is None else min(ours, keys)


def _parsed(kind: type[_Body], body: Mapping[str, Any]) -> _Body:
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise invalid(error) from error
