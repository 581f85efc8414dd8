"""What `POST /v1/training/jobs` and `POST /v1/evaluations` take. Values only: what they name is looked for elsewhere."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from deployments.store.job_values import KEY_CHARACTERS, URL_CHARACTERS
from serve.schemas import MAX_SEED, Strict
from training.dataset.settings import Word
from training.evaluation.plan import Configuration, Prompt
from training.orders import DatasetName

MOST_PICTURES = 64
"""Of one training, and of each set of an evaluation."""
PICTURES = frozenset({"images", "image_urls", "reference_image", "held_out"})
"""Fields that hold pictures."""
_NAME_CHARACTERS = 200


def _several(value: object) -> object:
    """One alone is a list of one: a form cannot tell."""
    return [value] if isinstance(value, str | bytes) else value


def _picture(value: object) -> str | bytes:
    """Files of a form come as bytes, which pydantic would take for text."""
    if isinstance(value, str | bytes):
        return value
    raise ValueError("a picture is base64, a data URI, or a file of a form")


Picture = Annotated[str | bytes, PlainValidator(_picture, json_schema_input_type=str)]
Pictures = Annotated[list[Picture], BeforeValidator(_several), Field(min_length=1, max_length=MOST_PICTURES)]
Addresses = Annotated[list[str], BeforeValidator(_several), Field(min_length=1, max_length=MOST_PICTURES)]
Key = Annotated[str, Field(min_length=1, max_length=KEY_CHARACTERS, pattern=r"^[\x20-\x7e]+$")]
Webhook = Annotated[str, Field(max_length=URL_CHARACTERS)]
PlanName = Annotated[str, Field(pattern=r"^[\w-]{1,64}$")]


class TrainingRequest(Strict):
    """A LoRA of a person, to be trained. Of `image_urls`, `images` and `dataset` at most one; with none of them `character_id` alone trains
    on that character's own pictures."""

    trigger_word: Word = Field(description="What will call the person up in prompts: a short word that means nothing else (`ohwx`).")
    job_id: Key | None = Field(default=None, description="Your own id for it: the same request with it, sent again, is the same job.")
    image_urls: Addresses | None = Field(default=None, description="Addresses of pictures, where the server fetches such.")
    images: Pictures | None = Field(default=None, description="The pictures: in a form, files; else base64 or data URIs. Ten or more.")
    dataset: DatasetName | None = Field(default=None, description="A curated dataset that the operator keeps, by name.")
    character_id: str | None = Field(
        default=None,
        max_length=_NAME_CHARACTERS,
        description="Who receives the LoRA: a character of yours by id or name; of a name that you have not, one is made.",
    )
    reference_image: Picture | None = Field(
        default=None, description="A picture of the person alone; else who is in most pictures is meant."
    )
    class_word: Word = Field(default="person", description="What the person is: `woman`, `man`.")
    preset: str | None = Field(default=None, max_length=64, description="Of configs/training; by default the server's own.")
    settings: dict[str, Any] = Field(default_factory=dict, description="Fields of the preset in other words: `steps`, `rank`, ...")
    upscale: int | None = Field(default=None, ge=64, le=4096, description="Enlarge small pictures to this shorter side.")
    blur_others: bool = Field(default=False, description="Blur other people's heads; by default their loss weighs little instead.")
    select: bool = Field(default=True, description="Choose the checkpoint by what it draws; else the last is taken.")
    name: str | None = Field(default=None, max_length=_NAME_CHARACTERS, description="What the LoRA is called.")
    webhook_url: Webhook | None = Field(default=None, description="Where the job is posted to, signed, once it has ended.")

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        given = [name for name in ("image_urls", "images", "dataset") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; pictures come from one of them")
        if not given and self.character_id is None:
            raise ValueError("there are no pictures: give `images`, `image_urls`, `dataset`, or a `character_id` that has some")
        if self.reference_image is not None and given not in (["images"], ["image_urls"]):
            raise ValueError("`reference_image` tells who is meant in `images`, and there are none")
        return self


class EvaluationRequest(Strict):
    """How like a person the pictures are, in configurations x prompts x seeds. The person is a character, or `images`."""

    plan: PlanName | None = Field(default=None, description="Of configs/evaluation; by default the server's own.")
    configurations: list[str | Configuration] | None = Field(
        default=None, min_length=1, max_length=32, description="Of the plan, by name, or your own."
    )
    prompts: list[str | Prompt] | None = Field(default=None, min_length=1, max_length=100, description="Of the plan, by name, or your own.")
    seeds: list[Annotated[int, Field(ge=0, le=MAX_SEED)]] | None = Field(default=None, min_length=1, max_length=100)
    character_id: str | None = Field(default=None, max_length=64, description="A character of yours: its pictures, and its newest LoRA.")
    images: Pictures | None = Field(default=None, description="Pictures of the person, in place of a character; in a form, files.")
    held_out: Pictures | None = Field(default=None, description="Pictures that neither LoRA nor request has seen: the honest target.")
    lora: str | None = Field(default=None, max_length=64, description="The LoRA of the person, by id.")
    trigger_word: Word | None = Field(default=None, description="What calls the LoRA up; by default what is kept with it.")
    noun: Word = Field(default="person", description="What the person is in prompts without a LoRA.")
    sex: Literal["F", "M"] | None = Field(default=None, description="By default what the face models say.")
    name: str | None = Field(default=None, max_length=_NAME_CHARACTERS, description="What the person is called in the results.")
    job_id: Key | None = Field(default=None, description="Your own id for it: the same request with it, sent again, is the same job.")
    webhook_url: Webhook | None = None

    @model_validator(mode="after")
    def _one_person(self) -> Self:
        if (self.character_id is None) == (self.images is None):
            raise ValueError("whose pictures are they? Give either `character_id` or `images`")
        return self
