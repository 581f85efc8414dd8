"""Whose value of a field counts, and the two checks that all parts of a request share. Knows no model and no person's method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from deployments.catalog import Entry
from deployments.denoisers.windows import active_steps
from deployments.errors import InvalidImage, InvalidRequest
from deployments.images import Limits, from_text
from serve.presets import BASE_DECIDES, Preset
from serve.schemas import GenerateRequest, PersonInput

# Where neither the catalogue nor a preset says anything.
_FALLBACK: Mapping[str, Any] = {"guidance_scale": 3.5, "true_cfg_scale": 1.0, "true_cfg_start": 0.0, "max_sequence_length": 512}


@dataclass(frozen=True)
class Values:
    """Whose default counts: the order of serve/presets.py, for one request on one base."""

    request: GenerateRequest
    preset: Preset | None
    base: Entry

    def of(self, name: str) -> Any:
        """A field of the picture. Raises InvalidRequest where nobody says anything."""
        for values in self._layers():
            if values.get(name) is not None:
                return values[name]
        if name in _FALLBACK:
            return _FALLBACK[name]
        raise InvalidRequest(f"`{name}` has no default on {self.base.id}.", f"Give `{name}`.", {"param": name})

    def of_person(self, name: str, person: PersonInput, entry: Entry, fallback: Any) -> Any:
        """A field of identity. What the preset says counts for its own method only."""
        own = self.preset is not None and entry.family in (self.preset.method, f"{self.preset.method}-v{person.version}")
        layers = [person.model_dump(exclude_unset=True), *(self._advice() if own else []), entry.defaults]
        return next((values[name] for values in layers if values.get(name) is not None), fallback)

    def _layers(self) -> list[Mapping[str, Any]]:
        style, bases, defaults = self._advice() or ({}, {}, {})
        said = {name: getattr(self.request, name) for name in self.request.model_fields_set}
        known = {name: value for name, value in self.base.defaults.items() if name in BASE_DECIDES}
        return [said, style, bases, known, defaults]

    def _advice(self) -> list[Mapping[str, Any]]:
        if self.preset is None:
            return []
        style = self.request.style if self.request.style is not None else self.preset.defaults.get("style")
        if style is not None and style not in self.preset.styles:
            there = f"There are: {', '.join(self.preset.styles)}." if self.preset.styles else "Leave `style` out."
            raise InvalidRequest(f"The workflow {self.preset.name} has no style {style!r}.", there, {"param": "style"})
        return [self.preset.styles.get(str(style), {}), self.preset.bases.get(self.base.id, {}), self.preset.defaults]


def refuse_empty(what: str, way_out: str, start: float, end: float, drawn: range, param: str) -> None:
    """Refuses a window in which no step lies wholly: what was asked for would be left out without a word. drawn: the steps that are made,
    the last ones of drawn.stop; with a picture to begin from, not all of them."""
    steps = drawn.stop
    window = active_steps(steps, start, end)
    if max(window.start, drawn.start) < window.stop:
        return
    message = f"{what} would act from {start:g} to {end:g} of the schedule, which holds none of the picture's {steps} steps whole."
    if window and drawn.start:
        message = f"{what} would act from {start:g} to {end:g} of the schedule; `strength` leaves only steps {drawn.start} to {steps - 1}."
    remedy = f"Step i of {steps} goes from i / {steps} to (i + 1) / {steps}: widen the window, or take more steps; {way_out}."
    raise InvalidRequest(message, remedy, {"param": param, "steps": steps})


def picture_bytes(text: str, where: str, limits: Limits) -> bytes:
    try:
        return from_text(text, limits)
    except InvalidImage as error:
        raise InvalidImage(f"`{where}`: {error.message}", error.remedy, {**error.details, "param": where}) from error
