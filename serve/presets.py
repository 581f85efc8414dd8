"""Workflows as presets: a file of configs/workflows/ names a family, a method, the fields it shows and what they are by default.

A new workflow is a new file; no code knows a workflow by its name. Makes the request type of each (with its own defaults and help), which
validates, documents (OpenAPI) and becomes the subcommand. Knows no base model's limits and no pictures.

Which value counts, highest first: the request; the style it chose; what the preset says of *this* base (`bases`); what the base says of
itself in the catalogue; what the preset says of any base (`defaults`). So mini keeps its own size, steps and guidance while FLUX.1-dev
gets the authors' advice. Values of identity (weight, window) belong to the method: there the preset's `defaults` stand before the
catalogue entry's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, create_model, model_validator
from pydantic.fields import FieldInfo

from deployments.controls.framing import Framing
from deployments.errors import InvalidCatalog, InvalidRequest
from serve.schemas import GenerateRequest, Strict, Window

WORKFLOWS_PATH = Path(__file__).resolve().parents[1] / "configs" / "workflows"
BASE_DECIDES = frozenset({"width", "height", "num_inference_steps", "guidance_scale", "max_sequence_length"})
"""Fields whose good values are the base model's: its `defaults` in the catalogue stand before a preset's own."""
_PICTURES = ("reference_image", "reference_images", "character_id")
# Fields that stand for several people or several workflows: a named workflow is about one person.
_NEVER_SHOWN = frozenset({"workflow", "identity", "identities"})
_ALWAYS_SHOWN = tuple(
    name for name in GenerateRequest.model_fields if name not in {*_NEVER_SHOWN, *_PICTURES, *Window.model_fields, "style"}
)


class _Body(Strict):
    ALIASES = GenerateRequest.ALIASES


class PoseAdvice(BaseModel):
    """The pose of a workflow. framings: of the prompt, at which a pose of the bank is taken where the request says none ("choose per
    frame, not globally"). scale, start, end: of any pose control that the request does not spell out itself."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    framings: tuple[Framing, ...] = ()
    scale: float | None = None
    start: float | None = None
    end: float | None = None


class Preset(BaseModel):
    """One workflow. The file's name is its `name`.

    description: what it does, in a sentence or two. advice: which field to change when, a paragraph a symptom (`--help`, OpenAPI).
    family: of base models. method: of identity, None for a workflow without people. fields: which fields of identity it shows.
    defaults, bases, styles: values of request fields, see the module's order. help: what a field means here, for `--help` and OpenAPI.
    pose: what it does about poses. expects: fields without which it is not what it is made for: their absence is a warning of the answer.
    character_lora: whether a `character_id` also brings that character's newest LoRA, and its trigger word into the prompt.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    description: str = Field(min_length=1)
    advice: str = ""
    family: str
    method: str | None = None
    fields: tuple[str, ...] = ()
    defaults: Mapping[str, JsonValue] = {}
    bases: Mapping[str, Mapping[str, JsonValue]] = {}
    styles: Mapping[str, Mapping[str, JsonValue]] = {}
    help: Mapping[str, str] = {}
    pose: PoseAdvice | None = None
    expects: Mapping[str, str] = {}
    character_lora: bool = False

    @model_validator(mode="after")
    def _speaks_of_fields(self) -> Self:
        offered = {*self.fields, *_ALWAYS_SHOWN}
        spoken = {*self.defaults, *self.help, *self.expects, *(name for values in self.bases.values() for name in values)}
        for name in [*self.fields, *sorted(spoken)]:
            if name not in GenerateRequest.model_fields or name not in offered:
                raise ValueError(f"{name!r} is no field that this workflow shows")
        for values in (self.defaults, *self.bases.values(), *self.styles.values()):
            GenerateRequest.model_validate({"prompt": "a check of the values", **values})
        if self.styles and self.defaults.get("style") not in {None, *self.styles}:
            raise ValueError(f"the default style {self.defaults['style']!r} is none of {', '.join(self.styles)}")
        return self

    @property
    def endpoint(self) -> str:
        return f"/{self.name}"

    @cached_property
    def request_type(self) -> type[BaseModel]:
        """The body of this workflow's endpoint: the fields it shows, with its own help; unknown ones are refused.

        Checks of fields against each other are GenerateRequest's: `serve.normalise.parse` passes every body through it as well.
        """
        shown = [*(_PICTURES if self.method else ()), *self.fields, *_ALWAYS_SHOWN]
        first = ("prompt", *_PICTURES)
        order = [*first, *(name for name in GenerateRequest.model_fields if name not in first)]
        fields: dict[str, Any] = {name: self._field(name) for name in order if name in shown}
        name = "".join(part.capitalize() for part in self.name.split("-")) + "Request"
        return create_model(name, __base__=_Body, __doc__=f"{self.description}\n\n{self.advice}".strip(), __module__=__name__, **fields)

    def _field(self, name: str) -> tuple[Any, FieldInfo]:
        known = GenerateRequest.model_fields[name]
        changes: dict[str, Any] = {}
        if name in self.help:
            changes["description"] = self.help[name]
        if name in self.defaults and not known.is_required() and name not in BASE_DECIDES:
            changes["default"] = self.defaults[name]
        annotation: Any = Literal[tuple(self.styles)] | None if name == "style" and self.styles else known.annotation
        return annotation, FieldInfo.merge_field_infos(known, annotation=annotation, **changes)


def load_presets(folder: Path = WORKFLOWS_PATH) -> dict[str, Preset]:
    """Every workflow of a folder, by name. Raises InvalidCatalog, which names the file and the field."""
    return {path.stem: _read(path) for path in sorted(folder.glob("*.yaml"))}


def find(presets: Mapping[str, Preset], name: str) -> Preset:
    """The workflow of that name. Raises InvalidRequest, which names close matches."""
    if name not in presets:
        raise InvalidRequest(f"There is no workflow {name!r}.", _offer(name, presets), {"param": "workflow", "workflows": sorted(presets)})
    return presets[name]


def _offer(name: str, known: Iterable[str]) -> str:
    close = get_close_matches(name, known, n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(sorted(known))}."


def _read(path: Path) -> Preset:
    try:
        return Preset.model_validate({"name": path.stem, **yaml.safe_load(path.read_text(encoding="utf-8"))})
    except (OSError, TypeError, yaml.YAMLError, ValidationError) as error:
        raise InvalidCatalog(f"{path} is not a valid workflow file: {error}") from error
