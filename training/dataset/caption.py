"""What is written beside each picture: its composition, the trigger word, and what a captioner sees, where there is one.

A captioner is any `module:object` that, called without arguments, gives a function from a picture to a phrase. Templates are data
(configs/training/captions.yaml); whether a word can be learned by a tokenizer is the trainer's to say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Final, Self, cast

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from deployments.contracts import RGB
from deployments.errors import InvalidRequest
from training.dataset.settings import CurationSettings, ImportString
from training.dataset.values import Box

CAPTIONS_PATH: Final = Path(__file__).resolve().parents[2] / "configs" / "training" / "captions.yaml"
Captioner = Callable[[RGB], str]
"""A crop, RGB [H, W, 3] -> a phrase that follows the subject ("wearing a red coat in a park"), or nothing."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Composition(_Strict):
    """from: the least share of the crop's height that the face's box has, 0..1."""

    name: str
    least: float = Field(alias="from", ge=0, le=1)
    text: Annotated[str, Field(pattern=r"\{subject\}")]


class Style(_Strict):
    """See configs/training/captions.yaml."""

    class_word: str
    compositions: tuple[Composition, ...] = Field(min_length=1)
    described: Annotated[str, Field(pattern=r"\{caption\}.*\{said\}")]
    captioner: ImportString | None = None
    faces: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _every_share_has_one(self) -> Self:
        shares = [composition.least for composition in self.compositions]
        if shares != sorted(shares, reverse=True) or shares[-1] != 0:
            raise ValueError("compositions go from the largest share to 0")
        return self

    def composition(self, face: Box, crop: tuple[int, int, int, int]) -> Composition:
        """By how much of the crop's height the face has; both boxes in the same pixels."""
        share = (face[3] - face[1]) / max(crop[3] - crop[1], 1)
        return next(composition for composition in self.compositions if share >= composition.least)


class _Styles(_Strict):
    styles: Mapping[str, Style] = Field(min_length=1)


def style_of(settings: CurationSettings, faces: str, path: Path = CAPTIONS_PATH) -> Style:
    """The style that the settings name, or the one that is meant for the face models with this id, else the file's first.

    Raises InvalidRequest for a style that there is not, or a file that is none.
    """
    try:
        styles = _Styles.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).styles
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise InvalidRequest(f"{path} is no file of caption styles: {error}", "Correct it.") from error
    if settings.captions is not None and settings.captions not in styles:
        raise InvalidRequest(f"There is no caption style {settings.captions!r}.", f"Choose one of {', '.join(styles)}.")
    own = next((name for name, style in styles.items() if faces in style.faces), next(iter(styles)))
    return styles[settings.captions or own]


def captioner_of(settings: CurationSettings, style: Style) -> Captioner | None:
    """The captioner of the settings, or else of the style, opened. Raises InvalidRequest where it cannot be imported."""
    named = settings.captioner or style.captioner
    if named is None:
        return None
    module, _, name = named.partition(":")
    try:
        make = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InvalidRequest(f"The captioner {named} cannot be imported: {error}.", "Name it as `module:object`.") from error
    return cast(Captioner, make())


def caption(style: Style, composition: Composition, settings: CurationSettings, said: str = "") -> str:
    """One line. said: of a captioner; its line breaks and spaces are made single spaces."""
    subject = f"{settings.trigger} {settings.class_word or style.class_word}"
    text = composition.text.replace("{subject}", subject)
    words = " ".join(said.split())
    return style.described.replace("{caption}", text).replace("{said}", words) if words else text
