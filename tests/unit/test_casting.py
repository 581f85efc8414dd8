"""People by name: what a request becomes when its characters are looked up."""

from __future__ import annotations

import asyncio
import base64

import pytest

from deployments.errors import CharacterNotFound
from serve.casting import Kept, Played, played
from serve.presets import load_presets
from serve.schemas import GenerateRequest

ADA = Kept(pictures=(b"ada one", b"ada two"), lora=("lora_ada", "adaperson"))
BEN = Kept(pictures=(b"ben",))


def cast(**fields: object) -> Played:
    async def known(name: str) -> Kept:
        if name not in (people := {"ada": ADA, "ben": BEN}):
            raise CharacterNotFound(f"You have no character {name}.")
        return people[name]

    return asyncio.run(played(GenerateRequest.model_validate({"prompt": "a portrait"} | fields), load_presets(), known))


def texts(kept: Kept) -> list[str]:
    return [base64.b64encode(picture).decode() for picture in kept.pictures]


def test_a_character_is_their_pictures_alone_and_among_others() -> None:
    alone = cast(workflow="flux-pulid", character_id="ada").request
    assert alone.reference_images == texts(ADA) and alone.character_id is None
    both = cast(identities=[{"method": "pulid", "character_id": "ben"}, {"method": "pulid", "images": ["QUJD"], "weight": 0.5}]).request
    assert both.identities is not None
    assert [person.images for person in both.identities] == [texts(BEN), ["QUJD"]] and both.identities[1].weight == 0.5


def test_nobody_is_looked_up_where_nobody_is_named() -> None:
    request, notes = cast(prompt="a hill")
    assert request == GenerateRequest(prompt="a hill") and notes == ()


def test_who_is_not_kept_is_refused() -> None:
    with pytest.raises(CharacterNotFound, match="no character zoe"):
        cast(workflow="flux-pulid", character_id="zoe")


def test_only_the_workflow_of_avatars_brings_the_characters_lora_and_says_so() -> None:
    assert cast(workflow="flux-pulid", character_id="ada").request.loras == []
    request, notes = cast(workflow="flux-avatar", character_id="ada")
    assert [lora.id for lora in request.loras] == ["lora_ada"] and request.prompt == "adaperson, a portrait"
    assert "lora_ada" in notes[0] and "'adaperson'" in notes[1]
    assert cast(workflow="flux-avatar", character_id="ben") == (cast(workflow="flux-avatar", character_id="ben").request, ())


def test_what_the_request_says_itself_is_not_said_twice() -> None:
    said = {"loras": [{"id": "lora_ada", "scale": 0.3}], "prompt": "Adaperson on a beach"}
    request, notes = cast(workflow="flux-avatar", character_id="ada", **said)
    assert [(lora.id, lora.scale) for lora in request.loras] == [("lora_ada", 0.3)] and request.prompt == "Adaperson on a beach"
    assert notes == ()
