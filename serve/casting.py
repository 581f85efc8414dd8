"""People by name: a request whose `character_id`s became pictures, and where the workflow wants it, the character's own LoRA.

Asks one function for what is kept of a character; knows no database. What it added is said in words, for the answer.
"""

from __future__ import annotations

import base64
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from serve.presets import Preset
from serve.schemas import GenerateRequest, LoraInput, PersonInput


@dataclass(frozen=True, eq=False)
class Kept:
    """What is kept of a character. pictures: encoded, the best first. lora: id and trigger word of the newest LoRA, if there is one."""

    pictures: Sequence[bytes]
    lora: tuple[str, str | None] | None = None


Known = Callable[[str], Awaitable[Kept]]
"""The character with an id, of whoever asks. Raises CharacterNotFound."""


class Played(NamedTuple):
    """A request in which nobody is named by an id any more, and what was added to it beside pictures."""

    request: GenerateRequest
    notes: tuple[str, ...] = ()


async def played(request: GenerateRequest, presets: Mapping[str, Preset], known: Known) -> Played:
    """Raises as `known`."""
    people = request.identities or ([request.identity] if request.identity is not None else [])
    names = dict.fromkeys(name for name in (request.character_id, *(person.character_id for person in people)) if name is not None)
    if not names:
        return Played(request)
    kept = {name: await known(name) for name in names}
    preset = presets.get(request.workflow) if request.workflow is not None else None
    changes: dict[str, object] = {}
    if request.character_id is not None:
        changes = {"character_id": None, "reference_images": _texts(kept[request.character_id])}
    if request.identity is not None:
        changes["identity"] = _person(request.identity, kept)
    if request.identities is not None:
        changes["identities"] = [_person(person, kept) for person in request.identities]
    notes: list[str] = []
    if preset is not None and preset.character_lora:
        for name, character in kept.items():
            notes += _bring_lora(request, name, character, changes)
    return Played(request.model_copy(update=changes), tuple(notes))


def _person(person: PersonInput, kept: Mapping[str, Kept]) -> PersonInput:
    if person.character_id is None:
        return person
    return person.model_copy(update={"character_id": None, "images": _texts(kept[person.character_id])})


def _texts(character: Kept) -> list[str]:
    return [base64.b64encode(picture).decode() for picture in character.pictures]


def _bring_lora(request: GenerateRequest, name: str, character: Kept, changes: dict[str, object]) -> list[str]:
    """Adds the LoRA, unless the request names it with a scale of its own, and the word that calls it up, unless the prompt says it."""
    if character.lora is None:
        return []
    lora, word = character.lora
    notes = []
    if lora not in {item.id for item in request.loras}:
        changes["loras"] = [*request.loras, LoraInput(id=lora)]
        notes.append(f"The LoRA {lora} of the character {name} was added.")
    if word and word.casefold() not in request.prompt.casefold():
        changes["prompt"] = f"{word}, {request.prompt}"
        notes.append(f"The prompt was begun with {word!r}, which calls up the LoRA.")
    return notes
