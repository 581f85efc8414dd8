"""Whom an evaluation is about, and each single picture that it asks for, with the request that draws it. Asks nobody."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from deployments.errors import InvalidRequest
from training.evaluation.plan import WHO, Configuration, Part, Plan, Prompt

MOST_REFERENCES = 20
"""As many as a request takes (serve/schemas.py)."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Subject:
    """One person.

    references: encoded pictures that the model was shown or trained on, one face each, the best first. held_out: pictures of the same
    person that it never saw. identity: the fields by which a request names the person; the references themselves unless given. lora: an
    id; lora_sha256: of its file, for the report. trigger: what calls it up. noun: what the person is in prompts without a LoRA.
    sex: otherwise what the face models take most of the references for.
    """

    name: str
    references: Sequence[bytes]
    held_out: Sequence[bytes] = ()
    identity: Mapping[str, Any] = field(default_factory=dict)
    lora: str | None = None
    lora_sha256: str | None = None
    trigger: str | None = None
    noun: str = "person"
    sex: Literal["F", "M"] | None = None

    @property
    def slug(self) -> str:
        """The name as part of a path."""
        return re.sub(r"[^A-Za-z0-9_-]+", "-", self.name) or "-"

    def has(self, part: Part) -> bool:
        return bool(self.references) if part == "references" else self.lora is not None


class Key(NamedTuple):
    """One picture of an evaluation."""

    subject: str
    configuration: str
    prompt: str
    seed: int


@dataclass(frozen=True, eq=False)
class Case:
    """One picture to be drawn. fields: of the request."""

    subject: Subject
    configuration: Configuration
    prompt: Prompt
    seed: int
    fields: Mapping[str, Any]

    @property
    def key(self) -> Key:
        return Key(self.subject.name, self.configuration.name, self.prompt.name, self.seed)

    @property
    def asked(self) -> str:
        """16 hex digits that change with anything that is asked for: a picture of another request is not taken for this one's."""
        text = json.dumps(with_pictures_as(self.fields, _sha256), sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def cases(plan: Plan, subjects: Sequence[Subject]) -> list[Case]:
    """Every picture, prompt by prompt and seed by seed, so that what an unfinished run has can be compared. Configurations that need what
    a subject lacks are left out (`lacking`). Raises InvalidRequest for subjects of one name, and where nothing is left to draw."""
    slugs = {subject.slug for subject in subjects}
    if len(slugs) < len(subjects) or not subjects:
        raise InvalidRequest("An evaluation needs subjects, each with its own name.", "Name them apart.")
    found = [case for subject in subjects for case in _of(plan, subject)]
    if not found:
        raise InvalidRequest("Every configuration needs what the subjects lack.", "Give reference pictures, or a LoRA.")
    return found


def lacking(plan: Plan, subjects: Sequence[Subject]) -> dict[str, str]:
    """Configuration -> why it is not drawn, for those that some subject lacks something for."""
    found: dict[str, str] = {}
    for configuration in plan.configurations:
        said = [f"{who.name} has no {part}" for who in subjects for part in configuration.uses if not _usable(who, configuration, part)]
        if said:
            found[configuration.name] = "; ".join(said)
    return found


def text_of(prompt: Prompt, configuration: Configuration, subject: Subject) -> str:
    """The prompt as it is asked for. Where a LoRA acts, its word stands for the person, or before everything where the text has no place
    for it."""
    called = subject.trigger if "lora" in configuration.uses else None
    if WHO in prompt.text:
        return prompt.text.replace(WHO, called or subject.noun)
    return f"{called}, {prompt.text}" if called else prompt.text


def plain_text(prompt: Prompt, subject: Subject) -> str:
    """The prompt without any word that calls up a LoRA: what a picture is compared with."""
    return prompt.text.replace(WHO, subject.noun)


def _of(plan: Plan, subject: Subject) -> Iterator[Case]:
    drawn = [item for item in plan.configurations if all(_usable(subject, item, part) for part in item.uses)]
    for prompt in plan.prompts:
        for seed in plan.seeds:
            for configuration in drawn:
                yield Case(subject, configuration, prompt, seed, _fields(plan, subject, configuration, prompt, seed))


def _usable(subject: Subject, configuration: Configuration, part: Part) -> bool:
    return subject.has(part) or (part == "lora" and configuration.lora is not None)


def _fields(plan: Plan, subject: Subject, configuration: Configuration, prompt: Prompt, seed: int) -> dict[str, Any]:
    own: dict[str, Any] = {}
    if "references" in configuration.uses:
        own |= subject.identity or {"reference_images": list(subject.references[:MOST_REFERENCES])}
    if "lora" in configuration.uses:
        own["loras"] = [{"id": configuration.lora or subject.lora, "scale": configuration.lora_scale}]
    chosen = {**plan.fields, **configuration.fields, **configuration.by_framing.get(prompt.framing, {})}
    return {**chosen, **own, "prompt": text_of(prompt, configuration, subject), "seed": seed}


def with_pictures_as(value: Any, spelt: Callable[[bytes], str]) -> Any:
    """Fields of a request, in which every picture is spelt so."""
    if isinstance(value, bytes):
        return spelt(value)
    if isinstance(value, Mapping):
        return {name: with_pictures_as(item, spelt) for name, item in value.items()}
    return [with_pictures_as(item, spelt) for item in value] if isinstance(value, list | tuple) else value


def _sha256(picture: bytes) -> str:
    return hashlib.sha256(picture).hexdigest()
