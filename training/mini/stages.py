"""The stages of the recipe, in order: what each makes, what it needs, its share of the time. The only list of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from training.mini.faces import attributes, body_keypoints, detector, gender_age, parser, recognisers
from training.mini.generator import autoencoder, base, ip_adapter, lora, pose_control, pulid, vision
from training.mini.generator.context import Context
from training.mini.optimise import Outcome, Recipe

LONGEST_STAGE_MINUTES = 9.0


@dataclass(frozen=True)
class Stage:
    """minutes: of a run of 45 minutes in all. makes: names of files in the workspace. parallel: may run under torchrun."""

    name: str
    minutes: float
    run: Callable[[Context, Recipe], dict[str, Any]]
    makes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    parallel: bool = False
    options: dict[str, float] = field(default_factory=dict)


def _generator(train: Callable[[Context, Recipe], Outcome]) -> Callable[[Context, Recipe], dict[str, Any]]:
    def run(context: Context, recipe: Recipe) -> dict[str, Any]:
        outcome = train(context, recipe)
        return {"steps": outcome.steps, "seconds": outcome.seconds, "devices": outcome.devices, **outcome.losses}

    return run


def _faces(train: Callable[..., dict[str, Any]]) -> Callable[[Context, Recipe], dict[str, Any]]:
    return lambda context, recipe: train(recipe.seconds, context.device, context.workspace.folder, smoke=recipe.smoke)


STAGES = (
    Stage("recogniser", 3.0, _faces(recognisers.train_recogniser), ("recogniser.safetensors", "arcface.onnx")),
    Stage("judge", 3.0, _faces(recognisers.train_judge), ("arcface_judge.onnx",)),
    Stage("detector", 3.0, _faces(detector.train_detector), ("scrfd.onnx",)),
    Stage("parser", 0.8, _faces(parser.train_parser), ("face_parser.onnx",)),
    Stage("gender-age", 0.5, _faces(gender_age.train_gender_age), ("genderage.onnx",)),
    Stage("body-keypoints", 1.0, _faces(body_keypoints.train_body_keypoints), ("body_keypoints.onnx",)),
    Stage("attributes", 1.2, _faces(attributes.train_attributes), ("attributes.onnx",)),
    Stage("autoencoder", 3.0, _generator(autoencoder.train), ("autoencoder.safetensors",)),
    Stage("flux", 9.0, _generator(base.train), ("flux.safetensors",), ("autoencoder.safetensors",), parallel=True),
    Stage("flux-2", 6.0, _generator(base.train), ("flux.safetensors",), ("flux.safetensors",), parallel=True, options={"learning_rate": 6e-4}),
    Stage("guidance", 2.0, _generator(base.train_guidance), ("guidance.safetensors",), ("flux.safetensors",), parallel=True, options={"learning_rate": 3e-4}),
    Stage("vision", 2.0, _generator(vision.train), ("vision.safetensors",), ("autoencoder.safetensors", "recogniser.safetensors")),
    Stage("pulid", 6.0, _generator(pulid.train), ("pulid.safetensors",), ("guidance.safetensors", "vision.safetensors"), parallel=True),
    Stage("ip-adapter", 3.0, _generator(ip_adapter.train), ("ip-adapter.safetensors",), ("guidance.safetensors", "vision.safetensors")),
    Stage("pose-control", 3.0, _generator(pose_control.train), ("pose-control.safetensors",), ("guidance.safetensors",)),
    Stage("lora", 0.4, _generator(lora.train), ("lora.safetensors",), ("guidance.safetensors",)),
)  # fmt: skip


def chosen(names: str | None) -> tuple[Stage, ...]:
    """Stages by comma-separated names, in the recipe's order; None: all. Raises ValueError naming an unknown one and the known."""
    if names is None:
        return STAGES
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    known = {stage.name for stage in STAGES}
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        raise ValueError(f"unknown stage {', '.join(unknown) or '(none given)'}; the stages are {', '.join(s.name for s in STAGES)}")
    return tuple(stage for stage in STAGES if stage.name in wanted)


def seconds_of(stage: Stage, stages: tuple[Stage, ...], minutes: float) -> float:
    """The stage's part of `minutes`, which the given stages share; never more than nine minutes."""
    share = stage.minutes / sum(s.minutes for s in stages)
    return 60 * min(minutes * share, LONGEST_STAGE_MINUTES)
