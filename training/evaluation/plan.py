"""What an evaluation draws: configurations x prompts x seeds, as a file of configs/evaluation/ says it. Draws and measures nothing.

A configuration is a few fields of a request; what stands for the person (pictures, a LoRA, the word that calls it up) is a subject's, so
that one plan serves every person. Fields are not checked here: the service that draws knows which there are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from deployments.errors import InvalidRequest
from deployments.face_server import FaceSettings

PLANS: Final = Path(__file__).resolve().parents[2] / "configs" / "evaluation"
SAME_PERSON_FROM: Final = 0.3
"""The judge's cosine from which two faces count as one person's; serving's verdict (deployments/identity/blending.py) is as strict."""
WHO: Final = "{who}"
"""In a prompt's text: the word that calls the LoRA up where one acts, else what the subject is (`person`, `man`)."""

Name = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_.-]{0,63}$", description="Also part of file names.")]
Framing = Literal["close_up", "portrait", "full"]
Part = Literal["lora", "references"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Configuration(_Strict):
    """One column of the comparison.

    uses: what of a subject it needs. fields: of the request; by_framing: further ones for prompts of a framing, which win. lora_scale: of
    the subject's LoRA; lora: the id of another in its place (selection.py compares checkpoints so).
    """

    name: Name
    label: str = Field(min_length=1, max_length=60)
    uses: tuple[Part, ...] = ()
    fields: Mapping[str, JsonValue] = {}
    by_framing: Mapping[Framing, Mapping[str, JsonValue]] = {}
    lora_scale: float = 1.0
    lora: str | None = None


class Prompt(_Strict):
    """expects: what a picture of it should be found to show, output of the classifier -> its label (adherence.py)."""

    name: Name
    framing: Framing
    text: str = Field(min_length=1)
    expects: Mapping[str, str] = {}


class Plan(_Strict):
    """faces: ids of the face models; the judge among them must condition none of the pictures. seeds: the same for every configuration,
    so that pictures can be compared in pairs. labels: the catalogue's id of a classifier with labels, clip: a folder with a CLIP; what is
    configured measures how prompts are followed."""

    description: str = ""
    faces: FaceSettings
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(min_length=1)
    threshold: float = Field(default=SAME_PERSON_FROM, ge=-1, le=1)
    labels: str | None = None
    clip: Path | None = None
    fields: Mapping[str, JsonValue] = {}
    configurations: tuple[Configuration, ...] = Field(min_length=1)
    prompts: tuple[Prompt, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _each_once(self) -> Self:
        lists: dict[str, list[Any]] = {
            "configurations": [item.name for item in self.configurations],
            "prompts": [item.name for item in self.prompts],
            "seeds": list(self.seeds),
        }
        for what, items in lists.items():
            twice = sorted({str(item) for item in items if items.count(item) > 1})
            if twice:
                raise ValueError(f"`{what}` has {', '.join(twice)} more than once; give each its own")
        return self

    def but(self, **changes: Any) -> Plan:
        """The same plan with some fields replaced, checked anew."""
        return Plan.model_validate({**{name: getattr(self, name) for name in type(self).model_fields}, **changes})

    def only(self, names: tuple[str, ...]) -> Plan:
        """The plan with these configurations alone, in its own order. Raises InvalidRequest for one that it has not."""
        known = [item.name for item in self.configurations]
        unknown = [name for name in names if name not in known]
        if unknown:
            raise InvalidRequest(f"The plan has no configuration {', '.join(unknown)}.", f"It has {', '.join(known)}.")
        return self.but(configurations=tuple(item for item in self.configurations if item.name in names))


def load_plan(name: str) -> Plan:
    """name: of a file in configs/evaluation/ without its ending, or the path of another. Raises InvalidRequest, naming the fields that are
    wrong."""
    named = re.fullmatch(r"[\w-]+", name) is not None
    path = PLANS / f"{name}.yaml" if named else Path(name)
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        there = ", ".join(sorted(file.stem for file in PLANS.glob("*.yaml")))
        raise InvalidRequest(f"There is no plan {path}: {error.strerror}.", f"Give a file's path, or one of {there}.") from error
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{path} is no YAML: {' '.join(str(error).split())}.", "Correct the file.") from error
    except ValidationError as error:
        wrong = "; ".join(f"{'.'.join(map(str, item['loc'])) or 'the plan'}: {item['msg']}" for item in error.errors())
        raise InvalidRequest(f"{path} is no plan of an evaluation: {wrong}.", "Correct these fields.") from error
