"""From what the deployments answered to what a caller reads: scores, warnings, faces, the list of workflows. Asks nobody anything."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from deployments.catalog import Catalog, Entry
from deployments.contracts import Drawn, Face, GenerationSpec
from serve.answers import CombinationInfo, FaceInfo, Score, Verdict, WorkflowInfo, WorkflowsResponse
from serve.presets import Preset
from serve.schemas import GenerateRequest
from serve.settings import AppSettings

if TYPE_CHECKING:
    from deployments.faces.comparison import Likeness

SAME_PERSON_FROM = 0.3
"""Cosine from which two faces count as one person's, unless a request says otherwise."""


def workflows_of(catalog: Catalog, presets: Mapping[str, Preset], settings: AppSettings) -> WorkflowsResponse:
    """What a server with these settings draws, and what goes together on its base model."""
    base = catalog.entry(settings.base)
    nets = [catalog.entry(name) for name in settings.controlnets]
    rules = [rule for rule in catalog.combinations if rule.base_family == base.family]
    return WorkflowsResponse(
        workflows=[_workflow(preset, base) for preset in presets.values()],
        methods={base.id: [catalog.entry(name).family for name in settings.methods]},
        controls=sorted({mode for net in nets for mode in cast(Mapping[str, Any], net.options["modes"])}),
        combinations=[CombinationInfo.model_validate(rule.model_dump(exclude={"base_family"})) for rule in rules],
    )


def _workflow(preset: Preset, base: Entry) -> WorkflowInfo:
    return WorkflowInfo(
        name=preset.name,
        description=preset.description,
        advice=preset.advice,
        endpoint=preset.endpoint,
        family=preset.family,
        method=preset.method,
        bases=[base.id] if base.family == preset.family else [],
        defaults={**preset.defaults, **base.defaults, **preset.bases.get(base.id, {})},
        request_schema=preset.request_type.model_json_schema(),
    )


def drawn_with(settings: AppSettings) -> dict[str, Any]:
    """What of a server's settings changes pixels."""
    chosen = settings.denoiser.torch
    storage = next((name for name in ("fp8", "nf4") if chosen.memory.startswith(name)), "as published")
    return {"dtype": chosen.dtype, "weights": storage, "cache_threshold": chosen.cache_threshold}


def warnings_of(
    request: GenerateRequest, presets: Mapping[str, Preset], spec: GenerationSpec, unread: Sequence[str], settings: AppSettings
) -> Iterator[str]:
    """What was done otherwise than the caller may think."""
    own = drawn_with(settings)
    if own["weights"] != "as published":
        yield f"This server draws with {own['weights']} weights, which changes pixels a little (docs/memory_modes.md)."
    if own["cache_threshold"]:
        yield f"This server draws with a cache (threshold {own['cache_threshold']:g}), which changes pixels (docs/first_block_cache.md)."
    for name, rest in zip(("prompt", "negative_prompt"), unread, strict=False):
        if rest:
            yield f"The end of `{name}` was not read: {rest!r}."
    if spec.negative_prompt and not spec.needs_negative:
        yield "`negative_prompt` has no effect while `true_cfg_scale` is 1."
    expected = presets[request.workflow].expects if request.workflow is not None else {}
    for name, why in expected.items():
        if not getattr(request, name):
            yield f"`{name}` was not given: {why}"


def left_out(drawn: Drawn) -> Iterator[str]:
    for person, places in enumerate(drawn.left_out):
        for place in places:
            yield f"Reference {place} of person {person} shows somebody else than the other pictures do; it was left out."


def face_info(index: int, face: Face) -> FaceInfo:
    x0, y0, x1, y1 = (float(edge) for edge in face.box)
    return FaceInfo(
        index=index,
        box=(x0, y0, x1, y1),
        score=face.score,
        landmarks=[(float(x), float(y)) for x, y in face.landmarks],
        age=face.age,
        sex=face.sex,
        embedding=face.judge_embedding.tolist() if face.judge_embedding is not None else None,
    )


def scores_of(person: int, likeness: Likeness) -> list[Score]:
    return [
        Score(person=person, reference=reference, cosine=cosine, verdict=_verdict(cosine))
        for reference, cosine in enumerate(likeness.cosines)
    ]


def _verdict(cosine: float | None) -> Verdict:
    if cosine is None:
        return "no_face"
    return "same" if cosine >= SAME_PERSON_FROM else "different"
