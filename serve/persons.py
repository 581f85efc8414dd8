"""The people of a request: which method brings each in, how strongly, when and where, and the pictures of them. Or a refusal.

Decided from the catalogue, before any model is touched. Opens no reference picture (the bytes are passed on as they came), only masks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

from deployments.catalog import Catalog, Entry, license_policy, refuse_licence
from deployments.contracts import IdentityRequest, Mask, PersonPictures
from deployments.errors import InvalidRequest, UnknownModel, UnsupportedCombination
from deployments.images import Limits
from serve.presets import Preset
from serve.regions import boxed, named, painted, refuse_overlaps
from serve.schemas import GenerateRequest, PersonInput, Window
from serve.values import Values, picture_bytes, refuse_empty


def people_of(request: GenerateRequest, preset: Preset | None) -> Iterator[tuple[str, PersonInput]]:
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
        remedy = "Give `reference_image`, or the `character_id` of somebody who is kept."
        raise InvalidRequest("A picture of the person is needed.", remedy, {"param": "reference_image"})
    elif flat:
        raise InvalidRequest(f"`{min(flat)}` needs a person.", "Give `reference_image` and a `workflow`.", {"param": min(flat)})


def _with_method(person: PersonInput, default: str | None, where: str) -> PersonInput:
    if person.method is not None:
        return person
    if default is None:
        remedy = "Give `method` inside `identities`, or name a `workflow`, which has one."
        raise InvalidRequest(f"`{where}`: nothing says by which method this person comes into the picture.", remedy, {"param": where})
    return person.model_copy(update={"method": default})


def who(person: PersonInput) -> tuple[object, ...]:
    """Equal for one person's two methods: the same face of the same pictures."""
    return (tuple(person.images), person.face_index)


def masks_of(people: list[tuple[str, PersonInput]], size: tuple[int, int], limits: Limits) -> list[Mask | None]:
    """Where each identity acts, None for everywhere. Raises InvalidRequest where different people are given the same place."""
    found: list[Mask | None] = []
    for where, person in people:
        prefix = "" if where.startswith("reference") else f"{where}."
        if isinstance(person.region, str):
            found.append(named(person.region, size, f"{prefix}region"))
        elif person.region is not None:
            found.append(boxed(person.region, size, f"{prefix}region"))
        elif person.mask is not None:
            found.append(painted(picture_bytes(person.mask, f"{prefix}mask", limits), size, f"{prefix}mask", limits))
        else:
            found.append(None)
    # Two methods may bring in one person at one place.
    given = [(where, who(person), mask) for (where, person), mask in zip(people, found, strict=True) if mask is not None]
    refuse_overlaps(given)
    return found


def identity_of(
    person: PersonInput, where: str, values: Values, catalog: Catalog, base: Entry, drawn: range, mask: Mask | None
) -> IdentityRequest:
    prefix = "" if where.startswith("reference") else f"{where}."
    try:
        entry = entry_of(catalog, cast(str, person.method), base.id, person.version)
    except (UnknownModel, UnsupportedCombination) as error:
        details = {**error.details, "param": f"{prefix}{error.details.get('param', 'method')}"}
        raise type(error)(error.message, error.remedy, details) from error
    refuse_licence(entry, license_policy())
    start, end = _window(person, entry, values, drawn.stop, prefix)
    weight = _weight(person, entry, values, prefix)
    if weight:
        said = next((name for name in ("start", "start_step", "end") if getattr(person, name) is not None), "start")
        refuse_empty("Identity", "for no identity at all use weight 0", start, end, drawn, f"{prefix}{said}")
    version = entry.options.get("version")
    return IdentityRequest(
        method=entry.family,
        version=str(version) if version is not None else None,
        weight=weight,
        start=start,
        end=end,
        mask=mask,
        blend=str(values.of_person("blend", person, entry, "mean")),
        options=_options(person, entry, values, prefix),
    )


def _weight(person: PersonInput, entry: Entry, values: Values, prefix: str) -> float:
    weight = float(values.of_person("weight", person, entry, 1.0))
    low, high = cast(tuple[float, float], entry.options.get("weight_range", (0, 1)))
    if not low <= weight <= high:
        message = f"`{prefix}weight` is {weight:g}; {entry.family} takes {low:g} to {high:g}."
        raise InvalidRequest(message, f"Choose a weight from {low:g} to {high:g}.", {"param": f"{prefix}weight"})
    return weight


def _window(person: PersonInput, entry: Entry, values: Values, steps: int, prefix: str) -> tuple[float, float]:
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


def _options(person: PersonInput, entry: Entry, values: Values, prefix: str) -> dict[str, str | float]:
    """What only some methods know: `weight_type` and `downsampling`, where the catalogue lists their values."""
    found: dict[str, str | float] = {}
    if choices := _choices(person, entry, "weight_type", "weight_types", prefix):
        found["weight_type"] = _chosen(
            "weight_type", str(values.of_person("weight_type", person, entry, choices[0])), choices, entry, prefix
        )
    if bounds := _choices(person, entry, "downsampling", "downsampling_range", prefix):
        factors = list(range(cast(int, bounds[0]), cast(int, bounds[1]) + 1))
        found["downsampling"] = _chosen("downsampling", int(values.of_person("downsampling", person, entry, 1)), factors, entry, prefix)
    return found


def _choices(person: PersonInput, entry: Entry, field: str, option: str, prefix: str) -> list[Any]:
    """What the catalogue lists for a field; nothing for a method that does not have it. Raises InvalidRequest where it is given anyhow."""
    choices = cast(list[Any], entry.options.get(option, []))
    if not choices and getattr(person, field) is not None:
        raise InvalidRequest(f"`{prefix}{field}`: {entry.family} has none.", f"Leave `{field}` out.", {"param": f"{prefix}{field}"})
    return choices


_Choice = TypeVar("_Choice", str, int)


def _chosen(field: str, value: _Choice, choices: list[_Choice], entry: Entry, prefix: str) -> _Choice:
    if value not in choices:
        message = f"`{prefix}{field}` is {value!r}, which {entry.family} does not know."
        listed = ", ".join(str(choice) for choice in choices)
        raise InvalidRequest(message, f"Choose {listed}.", {"param": f"{prefix}{field}", "choices": choices})
    return value


def pictures_of(people: list[tuple[str, PersonInput]], limits: Limits) -> list[PersonPictures]:
    known: dict[tuple[object, ...], PersonPictures] = {}
    result = []
    for where, person in people:
        pictures = tuple(picture_bytes(text, _place(where, index), limits) for index, text in enumerate(person.images))
        key = (pictures, person.face_index)
        result.append(known.setdefault(key, PersonPictures(pictures, person.face_index)))
    return result


def _place(where: str, index: int) -> str:
    if where.startswith("identit"):
        return f"{where}.images[{index}]"
    return where if where == "reference_image" else f"{where}[{index}]"


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
