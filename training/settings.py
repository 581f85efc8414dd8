"""What a training of a LoRA is told: one frozen value, checked before anything is loaded. Presets lie in configs/training.

Imports no torch and knows neither pictures nor folders: what is trained on, and where results go, is said when the training starts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from deployments.catalog import Catalog, Entry
from deployments.errors import InvalidRequest, UnsupportedCombination

_FOLDER = Path(__file__).resolve().parents[1] / "configs" / "training"
RANKS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 256)
"""What readers of LoRAs meet in the wild; above 256 a file is larger than what it changes is worth."""

SigmaSampling = Literal["sigmoid", "flux_shift", "qwen_shift"]
Optimiser = Literal["adamw", "adamw8bit", "prodigy"]
Checkpointing = Literal["auto", "on", "off"]

_BLOCKS = r"(?:transformer_blocks|single_transformer_blocks)\.\d+\."
_ATTENTION = r"attn\.(?:to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_FLUX_MLP = r"ff(?:_context)?\.net\.(?:0\.proj|2)|proj_mlp|proj_out"
_QWEN_MLP = r"(?:img|txt)_mlp\.net\.(?:0\.proj|2)"
ATTENTION_ALONE = rf"{_BLOCKS}{_ATTENTION}"
"""The modules of FLUX's attention, which many published LoRAs leave it at."""
TARGETS: Mapping[str, str] = {"flux1": rf"{_BLOCKS}(?:{_ATTENTION}|{_FLUX_MLP})", "qwen-image": rf"{_BLOCKS}(?:{_ATTENTION}|{_QWEN_MLP})"}
"""Every linear module of the blocks but the modulations (kohya-ss/musubi-tuner, networks/lora_qwen_image.py leaves those out too), matched
whole against the names of a family's modules."""


class TrainingSettings(BaseModel):
    """base: a base model's id in the catalogue.
    rank, alpha: of the LoRA; its change is alpha / rank times B A. targets: regular expression of whole module names (None: the family's).
    optimiser, learning_rate, weight_decay: `prodigy` finds its own rate and wants 1.0 here. schedule, warm_up_steps: of the rate.
    clip_norm: of the whole gradient. steps: a ceiling; which checkpoint is best, an evaluation says.
    batch, grad_accum: pictures per process and forward, forwards per step.
    resolutions: a picture is trained on in each that it is large enough for; pixels of the side of a square of the same area.
    sigma_sampling: how noise levels are drawn. guidance: the embedding that FLUX.1-dev is trained under; models without one ignore it.
    ema: decay of the average of the weights, which is what is exported; 0 for none.
    mask_weight: the least that a masked place counts; never 0, or the model may paint there what it likes.
    face_share: of each picture's loss, the least that is to come from the subject's face, however small; 0 leaves all places equal.
    caption_dropout: share of pictures that are shown without their caption. prior_weight: of the pictures that preserve the class.
    held_out: pictures that are not trained on, whose loss is measured at every checkpoint.
    checkpoint_every, sample_every: steps (sample_every 0: no samples). keep_states: newest checkpoints that can be resumed from; the LoRA
    files of all of them stay.
    """

    # Neither is JSON, as which settings travel.
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    base: str
    rank: int = 32
    alpha: float = Field(default=32, gt=0)
    targets: str | None = None
    optimiser: Optimiser = "adamw"
    learning_rate: float = Field(default=1e-4, gt=0, le=1)
    weight_decay: float = Field(default=1e-4, ge=0, le=1)
    schedule: Literal["constant", "cosine"] = "constant"
    warm_up_steps: int = Field(default=0, ge=0)
    clip_norm: float = Field(default=1.0, gt=0)
    steps: int = Field(default=2500, ge=1, le=100_000)
    batch: int = Field(default=1, ge=1, le=64)
    grad_accum: int = Field(default=1, ge=1, le=64)
    resolutions: tuple[int, ...] = Field(default=(1024,), min_length=1)
    sigma_sampling: SigmaSampling = "sigmoid"
    guidance: float = Field(default=1.0, ge=0)
    ema: float = Field(default=0.99, ge=0, lt=1)
    mask_weight: float = Field(default=0.05, gt=0, le=1)
    face_share: float = Field(default=0.0, ge=0, lt=1)
    caption_dropout: float = Field(default=0.0, ge=0, le=0.5)
    prior_weight: float = Field(default=1.0, gt=0, le=10)
    held_out: int = Field(default=0, ge=0)
    checkpoint_every: int = Field(default=250, ge=1)
    sample_every: int = Field(default=0, ge=0)
    sample_prompts: tuple[str, ...] = ()
    keep_states: int = Field(default=2, ge=1)
    seed: int = Field(default=0, ge=0, lt=2**32)
    gradient_checkpointing: Checkpointing = "auto"
    compile_blocks: bool = False
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    saved_dtype: Literal["float32", "bfloat16", "float16"] = "bfloat16"

    @field_validator("rank")
    @classmethod
    def _rank_is_usual(cls, rank: int) -> int:
        if rank not in RANKS:
            raise ValueError(f"{rank} is no rank that LoRAs have; choose one of {', '.join(map(str, RANKS))}")
        return rank

    @field_validator("targets")
    @classmethod
    def _targets_compile(cls, targets: str | None) -> str | None:
        if targets is not None:
            try:
                re.compile(targets)
            except re.error as error:
                raise ValueError(f"{targets!r} is no regular expression: {error}") from error
        return targets

    @field_validator("resolutions")
    @classmethod
    def _resolutions_can_be(cls, resolutions: tuple[int, ...]) -> tuple[int, ...]:
        if any(not 64 <= side <= 2048 for side in resolutions) or len(set(resolutions)) != len(resolutions):
            raise ValueError(f"{list(resolutions)} must be different sides of 64 to 2048 pixels")
        return tuple(sorted(resolutions))

    @model_validator(mode="after")
    def _warm_up_ends(self) -> Self:
        if self.warm_up_steps > self.steps:
            raise ValueError(f"warm_up_steps is {self.warm_up_steps}, more than the {self.steps} steps")
        if self.sample_every and not self.sample_prompts:
            raise ValueError("sample_every is set, and sample_prompts says nothing to draw")
        return self

    def targets_of(self, family: str) -> str:
        """Raises UnsupportedCombination for a family that cannot be trained here."""
        if self.targets is not None:
            return self.targets
        if family not in TARGETS:
            raise UnsupportedCombination(f"LoRAs of {family} cannot be trained.", f"Use a base model of {' or '.join(sorted(TARGETS))}.")
        return TARGETS[family]


def base_entry(settings: TrainingSettings, catalog: Catalog) -> Entry:
    """The base model. Raises UnknownModel, which names close matches, and UnsupportedCombination for what is no trainable base model."""
    entry = catalog.entry(settings.base)
    if entry.role != "base" or entry.family not in TARGETS:
        bases = sorted(e.id for e in catalog.models.values() if e.role == "base" and e.family in TARGETS)
        message = f"{entry.id} is a {entry.family} of role {entry.role}; a LoRA cannot be trained on it."
        raise UnsupportedCombination(message, f"Use one of {', '.join(bases)}.")
    return entry


def checked(values: Mapping[str, object], source: str = "The training settings") -> TrainingSettings:
    """Raises InvalidRequest, which names every field that is wrong."""
    try:
        return TrainingSettings.model_validate(dict(values))
    except ValidationError as error:
        wrong = [f"{'.'.join(map(str, fault['loc'])) or 'settings'}: {fault['msg']}" for fault in error.errors()]
        raise InvalidRequest(f"{source} cannot be used: {'; '.join(wrong)}.", "Correct the fields that are named.") from error


def preset(name: str, **changes: object) -> TrainingSettings:
    """One of configs/training, with some fields replaced. Raises InvalidRequest, for an unknown preset naming those that exist."""
    known = presets()
    if name not in known:
        close = get_close_matches(name, known, n=1)
        offer = f"Did you mean {close[0]}?" if close else f"There are: {', '.join(sorted(known))}."
        raise InvalidRequest(f"There is no training preset {name!r}.", offer)
    return checked({**known[name], **changes}, f"The preset {name}")


def presets() -> dict[str, dict[str, object]]:
    """The fields that each preset sets, by its name. (Files in the folder that name no base are about something else.)"""
    files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(_FOLDER.glob("*.yaml"))}
    return {name: said for name, said in files.items() if isinstance(said, dict) and "base" in said}
