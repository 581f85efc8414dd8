"""The stages of the recipe, in order: what each makes, what it needs, its share of the time. The only list of them."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.mini.generator.context import Context
    from training.mini.optimise import Recipe

LONGEST_STAGE_MINUTES = 9.0
_FACES = "training.mini.faces."
_GENERATOR = "training.mini.generator."


@dataclass(frozen=True)
class Stage:
    """minutes: its share of a run of 45 minutes. train: "module:function" from (context, recipe) to facts for the card, imported
    when it runs. makes, needs: files in the workspace. parallel: may run under torchrun. learning_rate: the peak, of
    the generator's stages."""

    name: str
    minutes: float
    train: str
    makes: tuple[str, ...]
    needs: tuple[str, ...] = ()
    parallel: bool = False
    learning_rate: float = 1e-3

    def run(self, context: Context, recipe: Recipe) -> dict[str, Any]:
        module, function = self.train.split(":")
        train = getattr(import_module(module), function)
        facts: dict[str, Any] = (
            train(recipe.seconds, context.device, context.workspace.folder, smoke=recipe.smoke)  # they share no pictures
            if self.train.startswith(_FACES)
            else train(context, recipe)
        )
        return facts


STAGES = (
    Stage("recogniser", 3.0, _FACES + "recognisers:train_recogniser", ("recogniser.safetensors", "arcface.onnx")),
    Stage("judge", 3.0, _FACES + "recognisers:train_judge", ("judge.safetensors", "arcface_judge.onnx")),
    Stage("detector", 3.0, _FACES + "detector:train_detector", ("detector.safetensors", "scrfd.onnx")),
    Stage("parser", 0.8, _FACES + "parser:train_parser", ("parser.safetensors", "face_parser.onnx")),
    Stage("gender-age", 0.5, _FACES + "gender_age:train_gender_age", ("gender_age.safetensors", "genderage.onnx")),
    Stage("body-keypoints", 1.0, _FACES + "body_keypoints:train_body_keypoints", ("body_keypoints.safetensors", "body_keypoints.onnx")),
    Stage("attributes", 1.2, _FACES + "attributes:train_attributes", ("attributes.safetensors", "attributes.onnx")),
    Stage("autoencoder", 3.0, _GENERATOR + "autoencoder:train", ("autoencoder.safetensors",)),
    Stage("flux", 9.0, _GENERATOR + "base:train", ("flux.safetensors",), ("autoencoder.safetensors",), parallel=True),
    Stage(
        "flux-2", 6.0, _GENERATOR + "base:train", ("flux.safetensors",), ("autoencoder.safetensors", "flux.safetensors"),
        parallel=True, learning_rate=6e-4,
    ),
    Stage(
        "guidance", 2.0, _GENERATOR + "base:train_guidance", ("guidance.safetensors",), ("autoencoder.safetensors", "flux.safetensors"),
        parallel=True, learning_rate=3e-4,
    ),
    Stage("vision", 2.0, _GENERATOR + "vision:train", ("vision.safetensors",), ("autoencoder.safetensors", "recogniser.safetensors")),
    Stage(
        "pulid", 6.0, _GENERATOR + "pulid:train", ("pulid.safetensors",),
        ("autoencoder.safetensors", "recogniser.safetensors", "detector.safetensors", "guidance.safetensors", "vision.safetensors"),
        parallel=True,
    ),
    Stage(
        "ip-adapter", 6.0, _GENERATOR + "ip_adapter:train", ("ip-adapter.safetensors",),
        (
            "autoencoder.safetensors", "recogniser.safetensors", "detector.safetensors", "guidance.safetensors", "vision.safetensors",
            "pulid.safetensors",
        ),
        parallel=True,
    ),
    Stage(
        "siglip-vision", 1.5, _GENERATOR + "siglip:train_vision", ("siglip-vision.safetensors",),
        ("autoencoder.safetensors", "recogniser.safetensors"),
    ),
    Stage(
        "instantx", 6.5, _GENERATOR + "siglip:train_instantx", ("instantx.safetensors",),
        (
            "autoencoder.safetensors", "recogniser.safetensors", "detector.safetensors", "guidance.safetensors", "pulid.safetensors",
            "siglip-vision.safetensors",
        ),
        parallel=True, learning_rate=2e-3,
    ),
    Stage(
        "redux", 3.0, _GENERATOR + "siglip:train_redux", ("redux.safetensors",),
        ("autoencoder.safetensors", "recogniser.safetensors", "guidance.safetensors", "siglip-vision.safetensors"), parallel=True,
    ),
    Stage(
        "pose-control", 3.0, _GENERATOR + "pose_control:train", ("pose-control.safetensors",),
        ("autoencoder.safetensors", "guidance.safetensors"),
    ),
    Stage("lora", 0.4, _GENERATOR + "lora:train", ("lora.safetensors",), ("autoencoder.safetensors", "guidance.safetensors")),
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
