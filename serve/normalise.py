"""From a request to what is drawn: (GenerationSpec of each picture, PersonPictures of each identity), or a refusal.

Everything that can be known without a model is decided here, before any is touched: whether workflow, method and base fit, whose
defaults count (the order stands in serve/presets.py), sizes, windows, weights, licences. Reads the catalogue and the environment's
licence policy; opens no picture (the bytes of references are passed on as they came) and knows no HTTP.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, cast

from pydantic import ValidationError

from deployments.catalog import Catalog, Entry, license_policy, refuse_licence
from deployments.contracts import GenerationSpec, IdentityRequest, PersonPictures
from deployments.denoisers.windows import active_steps
from deployments.errors import InvalidImage, InvalidRequest, UnknownModel, UnsupportedCombination
from deployments.images import DEFAULT_LIMITS, Limits, from_text
from serve.presets import BASE_DECIDES, Preset, find, load_presets
from serve.problem import invalid
from serve.schemas import STEP_SCALE, GenerateRequest, PersonInput, Window

# Where neither the catalogue nor a preset says anything.
_FALLBACK: Mapping[str, Any] = {"guidance_scale": 3.5, "true_cfg_scale": 1.0, "true_cfg_start": 0.0, "max_sequence_length": 512}
_SIDES_PX, _MAX_PIXELS = (64, 2048), 2048 * 2048
_RANDOM_SEEDS = 2**32


def parse(workflow: str | None, body: Mapping[str, Any], presets: Mapping[str, Preset] | None = None) -> GenerateRequest:
    """The request that a body is: of a workflow's own endpoint, or with None of `POST /v1/generate`. Raises InvalidRequest."""
    presets = load_presets() if presets is None else presets
    try:
        if workflow is None:
            request = GenerateRequest.model_validate(body)
            if request.workflow is not None:
                find(presets, request.workflow)
            return request
        own = find(presets, workflow).request_type.model_validate(body)
        return GenerateRequest.model_validate({**own.model_dump(exclude_unset=True), "workflow": workflow})
    except ValidationError as error:
        raise invalid(error) from error


def normalise(
    workflow: str | None,
    body: Mapping[str, Any] | GenerateRequest,
    catalog: Catalog,
    base: str,
    presets: Mapping[str, Preset] | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> tuple[list[GenerationSpec], list[PersonPictures]]:
    """The n pictures of a request on the base model with the id `base`, and the reference pictures of each identity in them.

    Identity k of every spec is person k of the list; one person brought in by two methods is the same object twice. Pure, except that a
    seed is drawn where none is given. Raises InvalidRequest, InvalidImage, UnknownModel, UnsupportedCombination or LicenseRefused, with
    the field under `details["param"]` where one is at fault.
    """
    presets = load_presets() if presets is None else presets
    request = body if isinstance(body, GenerateRequest) else parse(workflow, body, presets)
    preset = find(presets, request.workflow) if request.workflow is not None else None
    entry = catalog.entry(base)
    refuse_licence(entry, license_policy())
    if preset is not None and preset.family != entry.family:
        message = f"The workflow {preset.name} is for base models of the family {preset.family}; {base} is of {entry.family}."
        raise UnsupportedCombination(message, "Deploy a base model of that family, or choose another workflow.")
    values = _Values(request, preset, entry)
    people = list(_people(request, preset))
    width, height = _size(request, values, entry)
    steps = int(values.of("num_inference_steps"))
    identities = tuple(_identity(person, where, values, catalog, entry, steps) for where, person in people)
    seed = request.seed if request.seed is not None else secrets.randbelow(_RANDOM_SEEDS)
    specs = [
        GenerationSpec(
            base=base,
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            width=width,
            height=height,
            steps=steps,
            guidance_scale=float(values.of("guidance_scale")),
            true_cfg_scale=float(values.of("true_cfg_scale")),
            true_cfg_start=float(values.of("true_cfg_start")),
            seed=seed + k,
            max_sequence_length=int(values.of("max_sequence_length")),
            identities=identities,
        )
        for k in range(request.n)
    ]
    if specs[0].needs_negative:
        _refuse_empty("True CFG", "for none at all leave `true_cfg_scale` at 1", specs[0].true_cfg_start, 1.0, steps, "true_cfg_start")
    return specs, _pictures(people, limits)


def recipe(spec: GenerationSpec, people: list[PersonPictures]) -> dict[str, Any]:
    """Every value that changes the pixels of one picture, as JSON: what an answer returns and a picture file carries.

    Reference pictures stand in it as the sha256 of their bytes, so the recipe of a picture is the same wherever it was asked for.
    """
    values = asdict(spec)
    values["identities"] = [
        {
            **{name: dict(value) if name == "options" else value for name, value in asdict(identity).items()},
            "pictures": [hashlib.sha256(picture).hexdigest() for picture in person.pictures],
            "face_index": person.face_index,
        }
        for identity, person in zip(spec.identities, people, strict=True)
    ]
    return values


def entry_of(catalog: Catalog, method: str, base: str, version: str | None = None) -> Entry:
    """The weights that do `method` on `base`, in that version where one is named. Raises as `Catalog.fitting`, also for other versions.

    A version other than the default one is an entry of its own, whose family is `<method>-v<version>`: then `Catalog.fitting` finds it by
    the family, and an identity's `method` is all that a server needs.
    """
    default = catalog.fitting(method, base)
    if version is None or version == default.options.get("version"):
        return default
    others = [entry for entry in catalog.models.values() if entry.family == f"{default.family}-v{version}" and base in entry.fits]
    if not others:
        known = default.options.get("version")
        there = f"The version on {base} is {known}." if known else f"{default.id} has no versions."
        raise UnsupportedCombination(
            f"There is no version {version} of {method} for {base}.", f"{there} Leave `version` out.", {"param": "version"}
        )
    return others[0]


@dataclass(frozen=True)
class _Values:
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


def _people(request: GenerateRequest, preset: Preset | None) -> Iterator[tuple[str, PersonInput]]:
    """(path of the field, person with its method) of each person; the flat fields are one person."""
    if request.style is not None and preset is None:
        raise InvalidRequest("`style` is a workflow's, and the request names none.", "Name a `workflow`.", {"param": "style"})
    default = preset.method if preset else None
    if request.identities is not None or request.identity is not None:
        people = request.identities or [cast(PersonInput, request.identity)]
        for index, person in enumerate(people):
            where = "identity" if request.identities is None else f"identities[{index}]"
            yield where, _with_method(person, default, where)
        return
    flat = {name: getattr(request, name) for name in Window.model_fields if name in request.model_fields_set}
    images = request.reference_images or ([request.reference_image] if request.reference_image else None)
    if images is not None:
        where = "reference_images" if request.reference_images else "reference_image"
        yield where, _with_method(PersonInput.model_validate({"images": images, **flat}), default, where)
    elif default is not None:
        raise InvalidRequest("A picture of the person is needed.", "Give `reference_image`.", {"param": "reference_image"})
    elif flat:
        raise InvalidRequest(f"`{min(flat)}` needs a person.", "Give `reference_image` and a `workflow`.", {"param": min(flat)})


def _with_method(person: PersonInput, default: str | None, where: str) -> PersonInput:
    if person.method is not None:
        return person
    if default is None:
        remedy = "Give `method` inside `identities`, or name a `workflow`, which has one."
        raise InvalidRequest(f"`{where}`: nothing says by which method this person comes into the picture.", remedy, {"param": where})
    return person.model_copy(update={"method": default})


def _identity(person: PersonInput, where: str, values: _Values, catalog: Catalog, base: Entry, steps: int) -> IdentityRequest:
    prefix = "" if where.startswith("reference") else f"{where}."
    try:
        entry = entry_of(catalog, cast(str, person.method), base.id, person.version)
    except (UnknownModel, UnsupportedCombination) as error:
        details = {**error.details, "param": f"{prefix}{error.details.get('param', 'method')}"}
        raise type(error)(error.message, error.remedy, details) from error
    refuse_licence(entry, license_policy())
    start, end = _window(person, entry, values, steps, prefix)
    weight = _weight(person, entry, values, prefix)
    if weight:
        said = next((name for name in ("start", "start_step", "end") if getattr(person, name) is not None), "start")
        _refuse_empty("Identity", "for no identity at all use weight 0", start, end, steps, f"{prefix}{said}")
    version = entry.options.get("version")
    return IdentityRequest(
        method=entry.family,
        version=str(version) if version is not None else None,
        weight=weight,
        start=start,
        end=end,
        options=_options(person, entry, values, prefix),
    )


def _weight(person: PersonInput, entry: Entry, values: _Values, prefix: str) -> float:
    weight = float(values.of_person("weight", person, entry, 1.0))
    low, high = cast(tuple[float, float], entry.options.get("weight_range", (0, 1)))
    if not low <= weight <= high:
        message = f"`{prefix}weight` is {weight:g}; {entry.family} takes {low:g} to {high:g}."
        raise InvalidRequest(message, f"Choose a weight from {low:g} to {high:g}.", {"param": f"{prefix}weight"})
    return weight


def _window(person: PersonInput, entry: Entry, values: _Values, steps: int, prefix: str) -> tuple[float, float]:
    """Percents of the schedule. Whoever says `start` or `start_step` first, in the order of values, decides the beginning."""
    start, step = person.start, person.start_step
    if step is not None and step >= steps:
        message = f"`{prefix}start_step` is {step}, and the picture is drawn in {steps} steps (0 to {steps - 1})."
        raise InvalidRequest(message, "Choose an earlier step; for no identity at all use weight 0.", {"param": f"{prefix}start_step"})
    if start is None and step is None:
        start = values.of_person("start", person, entry, None)
        # Advice for twenty steps and more must not leave a picture of five without identity.
        step = min(int(values.of_person("start_step", person, entry, 0)), steps // 2)
    if start is None:
        start = cast(int, step) / steps
    end = float(values.of_person("end", person, entry, 1.0))
    if start >= end:
        message = f"Identity would begin at {start:g} of the schedule and end at {end:g}."
        raise InvalidRequest(message, "Let it begin earlier; for no identity at all use weight 0.", {"param": f"{prefix}end"})
    return float(start), end


def _refuse_empty(what: str, way_out: str, start: float, end: float, steps: int, param: str) -> None:
    """Refuses a window in which no step lies wholly: what was asked for would be left out without a word."""
    if active_steps(steps, start, end):
        return
    message = f"{what} would act from {start:g} to {end:g} of the schedule, which holds none of the picture's {steps} steps whole."
    remedy = f"Step i of {steps} goes from i / {steps} to (i + 1) / {steps}: widen the window, or take more steps; {way_out}."
    raise InvalidRequest(message, remedy, {"param": param, "steps": steps})


def _options(person: PersonInput, entry: Entry, values: _Values, prefix: str) -> dict[str, str | float]:
    """What only this method knows: `weight_type`, where the catalogue lists some."""
    kinds = cast(list[str], entry.options.get("weight_types", []))
    if not kinds:
        if person.weight_type is not None:
            raise InvalidRequest(
                f"`{prefix}weight_type`: {entry.family} has none.", "Leave `weight_type` out.", {"param": f"{prefix}weight_type"}
            )
        return {}
    chosen = str(values.of_person("weight_type", person, entry, kinds[0]))
    if chosen not in kinds:
        message = f"`{prefix}weight_type` is {chosen!r}, which {entry.family} does not know."
        raise InvalidRequest(message, f"Choose {', '.join(kinds)}.", {"param": f"{prefix}weight_type", "choices": kinds})
    return {"weight_type": chosen}


def _size(request: GenerateRequest, values: _Values, base: Entry) -> tuple[int, int]:
    """(width, height) in pixels, as the request says it in one of its three ways, or by default; within the base's limits."""
    param = next((name for name in ("size", "aspect_ratio") if getattr(request, name) is not None), "width")
    default = int(values.of("width")), int(values.of("height"))
    if request.size is not None:
        width, height = (int(side) for side in request.size.split("x"))
    elif request.aspect_ratio is not None:
        width, height = _of_ratio(request.aspect_ratio, default[0] * default[1])
    else:
        width, height = default
    for name, side in (("width", width), ("height", height)):
        if side % STEP_SCALE:
            nearest = max(STEP_SCALE, (side + STEP_SCALE // 2) // STEP_SCALE * STEP_SCALE)  # of whole numbers: a side may be of any length
            message = f"The {name} is {side}, which is not a multiple of {STEP_SCALE}."
            raise InvalidRequest(message, f"The nearest that is: {nearest}.", {"param": name if param == "width" else param})
    low, high = cast(tuple[int, int], base.options.get("sides", _SIDES_PX))
    pixels = cast(int, base.options.get("max_pixels", _MAX_PIXELS))
    if not (low <= min(width, height) and max(width, height) <= high and width * height <= pixels):
        message = f"{width}x{height} is outside of what {base.id} draws."
        remedy = f"Choose sides from {low} to {high} and at most {pixels} pixels in all; by default it draws {default[0]}x{default[1]}."
        raise InvalidRequest(message, remedy, {"param": param})
    return width, height


def _of_ratio(ratio: str, pixels: int) -> tuple[int, int]:
    """The size of that shape with about as many pixels, in multiples of 16."""
    across, down = (int(part) for part in ratio.split(":"))
    if not across or not down:
        raise InvalidRequest(f"`aspect_ratio` is {ratio}.", "Both numbers are at least 1, like 3:4.", {"param": "aspect_ratio"})
    exact = math.sqrt(pixels * across / down), math.sqrt(pixels * down / across)
    width, height = (max(STEP_SCALE, round(side / STEP_SCALE) * STEP_SCALE) for side in exact)
    return width, height


def _pictures(people: list[tuple[str, PersonInput]], limits: Limits) -> list[PersonPictures]:
    known: dict[tuple[object, ...], PersonPictures] = {}
    result = []
    for where, person in people:
        pictures = tuple(_picture(text, _place(where, index), limits) for index, text in enumerate(person.images))
        key = (pictures, person.face_index)
        result.append(known.setdefault(key, PersonPictures(pictures, person.face_index)))
    return result


def _place(where: str, index: int) -> str:
    if where.startswith("identit"):
        return f"{where}.images[{index}]"
    return where if where == "reference_image" else f"{where}[{index}]"


def _picture(text: str, where: str, limits: Limits) -> bytes:
    try:
        return from_text(text, limits)
    except InvalidImage as error:
        raise InvalidImage(f"`{where}`: {error.message}", error.remedy, {**error.details, "param": where}) from error
