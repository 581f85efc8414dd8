"""From a request to what is drawn: the GenerationSpec of each picture and the pictures that it needs, or a refusal.

Everything that can be known without a model is decided here, before any is touched: whether workflow, method and base fit, whose
defaults count (the order stands in serve/presets.py), sizes, windows, weights, licences. People are persons.py's, LoRAs and controls
additions.py's. Reads the catalogue and the environment's licence policy; opens no reference picture and knows no HTTP.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple, cast

from pydantic import ValidationError

from deployments.catalog import Catalog, Entry, license_policy, refuse_licence
from deployments.contracts import ControlSource, GenerationSpec, Mask, PersonPictures
from deployments.denoisers.windows import first_step
from deployments.errors import InvalidRequest, UnsupportedCombination
from deployments.images import DEFAULT_LIMITS, Limits
from serve.additions import NO_POSE, beginning_of, controls_of, loras_of
from serve.persons import identity_of, masks_of, people_of, pictures_of, who
from serve.presets import Preset, find, load_presets
from serve.problem import invalid
from serve.schemas import STEP_SCALE, GenerateRequest, PersonInput
from serve.values import Values, refuse_empty

_SIDES_PX, _MAX_PIXELS = (64, 2048), 2048 * 2048
_RANDOM_SEEDS = 2**32


class Wanted(NamedTuple):
    """A request, decided. specs: of the n pictures, which differ in their seeds alone. people: the references of each identity: identity k
    of every spec is person k, and one person brought in by two methods is the same object twice. sources: what each control is made of;
    begin: the encoded picture to begin from."""

    specs: list[GenerationSpec]
    people: list[PersonPictures]
    sources: tuple[ControlSource, ...] = ()
    begin: bytes | None = None


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
    *,
    loras: Mapping[str, str] | None = None,
    controls: Sequence[str] | None = None,
) -> Wanted:
    """What a request asks of the base model with the id `base`.

    loras: id -> sha256 of those that the caller may use. controls: ids of the deployed ControlNets; None: all that fit the base.
    Pure, except that a seed is drawn where none is given. Raises InvalidRequest, InvalidImage, UnknownModel, UnsupportedCombination or
    LicenseRefused, with the field under `details["param"]` where one is at fault.
    """
    presets = load_presets() if presets is None else presets
    request = body if isinstance(body, GenerateRequest) else parse(workflow, body, presets)
    preset = find(presets, request.workflow) if request.workflow is not None else None
    entry = catalog.entry(base)
    refuse_licence(entry, license_policy())
    if preset is not None and preset.family != entry.family:
        message = f"The workflow {preset.name} is for base models of the family {preset.family}; {base} is of {entry.family}."
        raise UnsupportedCombination(message, "Deploy a base model of that family, or choose another workflow.")
    values = Values(request, preset, entry)
    people = list(people_of(request, preset))
    width, height = _size(request, values, entry)
    steps = int(values.of("num_inference_steps"))
    begin, strength = beginning_of(request, steps, limits)
    drawn = range(first_step(steps, strength), steps)
    masks = masks_of(people, (width, height), limits)
    for present in _present(request, people, masks):
        catalog.refuse_combination(entry.family, present)
    identities = tuple(
        identity_of(person, where, values, catalog, entry, drawn, mask) for (where, person), mask in zip(people, masks, strict=True)
    )
    deployed = controls if controls is not None else [item.id for item in catalog.models.values() if item.role == "control"]
    led = controls_of(request, preset.pose if preset else None, catalog, entry, deployed, drawn, limits)
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
            loras=loras_of(request, loras or {}),
            controls=led.requests,
            strength=strength,
        )
        for k in range(request.n)
    ]
    if specs[0].needs_negative:
        refuse_empty("True CFG", "for none at all leave `true_cfg_scale` at 1", specs[0].true_cfg_start, 1.0, drawn, "true_cfg_start")
    return Wanted(specs, pictures_of(people, limits), led.sources, begin)


def recipe(wanted: Wanted, server: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every value that changes the pixels of the first picture, as JSON: what an answer returns and a picture file carries.

    server: what of its settings does (`reports.drawn_with`).

    Pictures stand in it as the sha256 of their bytes, so the recipe of a picture is the same wherever it was asked for.
    """
    spec, people, sources, begin = wanted.specs[0], wanted.people, wanted.sources, wanted.begin
    values = asdict(spec)
    values["identities"] = [
        {
            **{name: dict(value) if name == "options" else value for name, value in asdict(identity).items()},
            "mask": _digest(identity.mask.values) if identity.mask is not None else None,
            "pictures": [_digest(picture) for picture in person.pictures],
            "face_index": person.face_index,
        }
        for identity, person in zip(spec.identities, people, strict=True)
    ]
    values["controls"] = [
        {**asdict(control), **asdict(source), "picture": _digest(source.picture) if source.picture is not None else None}
        for control, source in zip(spec.controls, sources, strict=True)
    ]
    values["begin"] = _digest(begin) if begin is not None else None
    values["server"] = dict(server or {})
    return values


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _present(request: GenerateRequest, people: list[tuple[str, PersonInput]], masks: list[Mask | None]) -> Iterator[set[str]]:
    """What of the catalogue's combinations a request holds: all but people and masks at once, those by the method that has them."""
    said = {
        "loras": request.loras,
        "controls": request.controls or request.pose_image or request.pose not in (None, NO_POSE),
        "image": request.image,
        "true_cfg": (request.true_cfg_scale or 1) > 1,
    }
    yield {cast(str, person.method) for _, person in people} | {name for name, there in said.items() if there}
    for method in {cast(str, person.method) for _, person in people}:
        own = [(who(person), mask) for (_, person), mask in zip(people, masks, strict=True) if person.method == method]
        several, placed = len({person for person, _ in own}) > 1, any(mask is not None for _, mask in own)
        yield {method, *(["people"] if several else []), *(["masks"] if placed else [])}


def _size(request: GenerateRequest, values: Values, base: Entry) -> tuple[int, int]:
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
