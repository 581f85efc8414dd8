"""What stands in a request beside its people: LoRAs, controls, a picture to begin from. From the request to contracts, or a refusal.

Which ControlNet serves a control, what its strength and window are where nobody says so, and which pose `auto` means is decided here,
before any model is touched. Opens no picture; knows no HTTP.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from deployments.catalog import Catalog, Entry, license_policy, refuse_licence
from deployments.contracts import ControlRequest, ControlSource, LoraRequest
from deployments.controls.framing import framing_of
from deployments.controls.pose_bank import AUTO, PoseBank, edit_of, load_pose_bank
from deployments.denoisers.windows import first_step
from deployments.errors import InvalidRequest, UnsupportedCombination
from deployments.images import Limits
from serve.presets import PoseAdvice
from serve.schemas import ControlInput, GenerateRequest
from serve.values import picture_bytes, refuse_empty

NO_POSE = "none"
"""The `pose` that asks for none, where a workflow would choose one."""
USUAL_STRENGTH = 0.6
"""Of a picture to begin from (as in diffusers' FluxImg2ImgPipeline)."""
_FORM = "pose"
_UNMADE = ("depth", "soft_edge")
"""What only a further network makes of a picture, which the catalogue does not have yet (deployments/controls/conditions.py)."""


@dataclass(frozen=True, eq=False)
class Controls:
    """The controls of a request, and what each is made of, in the same order."""

    requests: tuple[ControlRequest, ...] = ()
    sources: tuple[ControlSource, ...] = ()


def loras_of(request: GenerateRequest, known: Mapping[str, str]) -> tuple[LoraRequest, ...]:
    """known: id -> sha256, of those that the caller may use. Raises InvalidRequest for any other."""
    unknown = [lora.id for lora in request.loras if lora.id not in known]
    if unknown:
        raise InvalidRequest(f"There is no LoRA {unknown[0]!r}.", "`GET /v1/loras` lists those that there are.", {"param": "loras"})
    return tuple(LoraRequest(id=lora.id, sha256=known[lora.id], scale=lora.scale) for lora in request.loras)


def controls_of(
    request: GenerateRequest,
    advice: PoseAdvice | None,
    catalog: Catalog,
    base: Entry,
    deployed: Sequence[str],
    drawn: range,
    limits: Limits,
) -> Controls:
    """deployed: ids of the ControlNets. Raises InvalidRequest, InvalidImage, UnsupportedCombination or LicenseRefused, with the field."""
    pairs = []
    for where, given in _given(request, advice, _types(catalog, base, deployed)):
        entry = _entry(given, where, catalog, base, deployed)
        pairs.append((_request(given, where, entry, drawn), _source(given, where, entry, request.prompt, limits)))
    return Controls(tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs))


def beginning_of(request: GenerateRequest, steps: int, limits: Limits) -> tuple[bytes | None, float]:
    """(the encoded picture to begin from, the share of the schedule that is drawn). Without a picture all of it."""
    if request.image is None:
        return None, 1.0
    strength = USUAL_STRENGTH if request.strength is None else request.strength
    if strength < 1 and not first_step(steps, strength):
        message = f"`strength` {strength:g} of {steps} steps draws all of them, which leaves nothing of `image`."
        raise InvalidRequest(message, "Choose less strength, or take more steps.", {"param": "strength", "steps": steps})
    # At 1 nothing of the picture is left: it is not asked for.
    return (None if strength == 1 else picture_bytes(request.image, "image", limits)), strength


def _given(request: GenerateRequest, advice: PoseAdvice | None, types: Collection[str]) -> list[tuple[str, ControlInput]]:
    """(path of the field, control) of every control, the short forms and what the workflow adds among them, where `types` has poses."""
    said = [(f"controls[{index}]", control) for index, control in enumerate(request.controls)]
    own = {} if advice is None else {"scale": advice.scale, "start": advice.start, "end": advice.end}
    if request.pose_image is not None:
        return [*said, ("pose_image", ControlInput.model_validate({"type": _FORM, "image": request.pose_image, **own}))]
    pose = request.pose
    if (
        pose is None
        and advice is not None
        and _FORM in types
        and framing_of(request.prompt) in advice.framings
        and all(c.type != _FORM for _, c in said)
    ):
        pose = AUTO
    if pose is None or pose == NO_POSE:
        return said
    return [*said, ("pose", ControlInput.model_validate({"type": _FORM, "pose": pose, **own}))]


def _entry(control: ControlInput, where: str, catalog: Catalog, base: Entry, deployed: Sequence[str]) -> Entry:
    """The deployed ControlNet that is named, or the first that knows the type."""
    param = {"param": where if where.startswith("pose") else f"{where}.type"}
    there = [entry for name in deployed if base.id in (entry := catalog.entry(name)).fits]
    if control.model is not None:
        there = [entry for entry in there if control.model in (entry.id, entry.family)]
        param = {"param": f"{where}.model"}
    for entry in there:
        if control.type in _modes(entry):
            refuse_licence(entry, license_policy())
            return entry
    known = sorted({mode for entry in there for mode in _modes(entry)})
    named = f" by {control.model}" if control.model else ""
    if not known:
        raise UnsupportedCombination(f"No control is deployed{named} with {base.id}.", "Leave controls and poses out.", param)
    raise UnsupportedCombination(
        f"No control of type {control.type!r} is deployed{named} with {base.id}.", f"There are: {', '.join(known)}.", param
    )


def _types(catalog: Catalog, base: Entry, deployed: Sequence[str]) -> set[str]:
    """What the deployed ControlNets of the base know."""
    return {mode for name in deployed if base.id in (entry := catalog.entry(name)).fits for mode in _modes(entry)}


def _modes(entry: Entry) -> Mapping[str, Any]:
    return cast(Mapping[str, Any], entry.options.get("modes", {}))


def _request(control: ControlInput, where: str, entry: Entry, drawn: range) -> ControlRequest:
    """What the request says, then the workflow, then the model's card."""
    card = cast(Mapping[str, Mapping[str, float]], entry.options.get("per_mode", {})).get(control.type, {})

    def value(name: str, otherwise: float) -> float:
        said = getattr(control, name)
        return float(said if said is not None else card.get(name, otherwise))

    made = ControlRequest(model=entry.id, mode=control.type, scale=value("scale", 1), start=value("start", 0), end=value("end", 1))
    if made.scale:
        refuse_empty(f"`{where}`", "for no control at all use scale 0", made.start, made.end, drawn, where)
    return made


def _source(control: ControlInput, where: str, entry: Entry, prompt: str, limits: Limits) -> ControlSource:
    edits = tuple(json.dumps(edit, sort_keys=True) for edit in control.edits)
    for edit in edits:
        edit_of(edit)
    if control.type in _UNMADE and not control.prepared:
        remedy = "Send a finished one, with `prepared: true`."
        raise InvalidRequest(f"No model is deployed that makes {control.type} of a picture.", remedy, {"param": f"{where}.prepared"})
    figure = str(entry.options.get("figure", "human"))
    if control.image is not None:
        place = where if where.startswith(_FORM) else f"{where}.image"
        picture = picture_bytes(control.image, place, limits)
        return ControlSource(mode=control.type, picture=picture, prepared=control.prepared, edits=edits, figure=figure)
    try:
        pose = _bank().choose(framing_of(prompt), control.pose)
    except InvalidRequest as error:
        raise InvalidRequest(error.message, error.remedy, {**error.details, "param": where}) from error
    return ControlSource(mode=control.type, pose=pose, edits=edits, figure=figure)


@cache
def _bank() -> PoseBank:
    return load_pose_bank()
