"""What may be asked of Likeness: one request type for every workflow, and the few fields each workflow shows of it.

Unknown fields are refused, and so is a field that is given twice under two names. Says what is *well formed*; what fits a base model, a
method or a workflow is decided in serve/normalise.py, from the catalogue. Opens no picture and imports no model library.

Names are the field's habit; ALIASES holds the other spellings that are understood.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

OutputFormat = Literal["png", "jpeg", "webp"]
ResponseFormat = Literal["b64_json", "file"]
Percent = Annotated[float, Field(ge=0, le=1)]
Picture = Annotated[str, Field(min_length=1, description="A PNG, JPEG or WebP as `data:image/png;base64,...` or as bare base64.")]
Face = Annotated[int, Field(ge=0)] | Literal["largest"]
Region = Literal["left", "right", "top", "bottom", "left_third", "middle_third", "right_third", "centre"]
Box = tuple[Percent, Percent, Percent, Percent]
Blend = Literal["mean", "quality", "concat", "norm", "max_token"]

MAX_PICTURES = 8
MAX_REFERENCES = 20
MAX_PEOPLE = 8
MAX_LORAS = 8
MAX_CONTROLS = 4
# The largest whole number that every JSON reader keeps (IEEE 754 doubles), less room for the pictures after the first.
MAX_SEED = 2**53 - 1 - MAX_PICTURES
STEP_SCALE = 16
"""Widths and heights are multiples of this: 8 pixels a latent (VAE), 2 x 2 latents a token (FLUX)."""

_PERSON_ALIASES: Mapping[str, str] = {
    "start_at": "start",
    "start_percent": "start",
    "end_at": "end",
    "end_percent": "end",
    "id_weight": "weight",
}


class Strict(BaseModel):
    """A body in which every field is known, under its name or under one of ALIASES, and none is said twice."""

    ALIASES: ClassVar[Mapping[str, str]] = {}
    model_config = ConfigDict(extra="forbid", str_strip_whitespace=True)

    @model_validator(mode="before")
    @classmethod
    def _under_one_name(cls, body: Any) -> Any:
        if not isinstance(body, Mapping):
            return body
        spelt: dict[Any, Any] = {}
        for name in body:
            known = cls.ALIASES.get(name, name)
            if known in spelt:
                raise ValueError(f"`{spelt[known]}` and `{name}` are the same field; give one of them")
            spelt[known] = name
            field = cls.model_fields.get(known)
            if isinstance(body[name], bool) and field is not None and field.annotation is not bool:
                raise ValueError(f"`{name}` is {str(body[name]).lower()}, and no field for yes or no")
        return {known: body[name] for known, name in spelt.items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """The other spellings stand in the schema too, marked as such: a client that checks itself against it may use them."""
        schema: dict[str, Any] = handler(core_schema)
        body: dict[str, Any] = handler.resolve_ref_schema(schema)
        properties = body.get("properties", {})
        for alias, name in cls.ALIASES.items():
            if name in properties:
                properties[alias] = {
                    **properties[name],
                    "title": alias,
                    "description": f"Another spelling of `{name}`.",
                    "deprecated": True,
                }
        return schema


class Window(Strict):
    """When identity acts, and how strongly: shared by a person in a list and by the flat form with one person."""

    weight: float | None = Field(
        default=None, ge=0, description="How strongly identity acts; 0 is exactly the base model. PuLID: 0 to 3, XLabs: 0 to 1."
    )
    start: Percent | None = Field(
        default=None, description="Part of the schedule (0 to 1) from which identity acts. Later: freer pictures, weaker likeness."
    )
    end: Percent | None = Field(default=None, description="Part of the schedule (0 to 1) up to which identity acts.")
    start_step: int | None = Field(default=None, ge=0, description="`start` as a step number: start = start_step / steps.")
    face_index: Face | None = Field(
        default=None,
        description='Which face of the references is meant, by size from 0; "largest" says so explicitly. Needed where there are several.',
    )
    weight_type: str | None = Field(default=None, description="XLabs only: how the weight runs over the blocks of the model.")
    version: str | None = Field(default=None, description="Of the method's weights, where there are several (PuLID: 0.9.1, 0.9.0).")
    blend: Blend | None = Field(
        default=None,
        description="How several references become one: mean; quality (sharp, large, frontal ones count more); concat; norm; max_token.",
    )
    downsampling: int | None = Field(
        default=None,
        ge=1,
        le=5,
        description="Redux only: 1 copies the reference, 3 keeps its mood, 5 little; the prompt gains what it loses.",
    )

    @model_validator(mode="after")
    def _one_beginning(self) -> Window:
        if self.start is not None and self.start_step is not None:
            raise ValueError("`start` and `start_step` say the same thing; give one of them")
        if self.start is not None and self.end is not None and self.start >= self.end:
            raise ValueError(f"`start` {self.start} is not before `end` {self.end}; for no identity at all use weight 0")
        return self


CharacterId = Annotated[
    str, Field(min_length=1, max_length=100, description="A character of yours (`GET /v1/characters`), in place of pictures of them.")
]


class LoraInput(Strict):
    """A LoRA that was added before (`POST /v1/loras`)."""

    ALIASES: ClassVar[Mapping[str, str]] = {"weight": "scale", "strength": "scale", "lora_id": "id"}

    id: str = Field(min_length=1, max_length=100, description="Its id, as `GET /v1/loras` lists it.")
    scale: float = Field(default=1.0, ge=-4, le=4, description="How strongly it acts; 0 is exactly without it.")


class ControlInput(Strict):
    """One control: what of the picture is fixed beforehand, by which picture or pose, how strongly and when."""

    ALIASES: ClassVar[Mapping[str, str]] = {
        "mode": "type",
        "weight": "scale",
        "strength": "scale",
        "start_percent": "start",
        "end_percent": "end",
    }

    type: str = Field(
        description="What the control fixes: pose, canny, depth, tile, blur, gray, low_quality, soft_edge; as the model has it."
    )
    image: Picture | None = Field(default=None, description="The picture that it is taken from.")
    prepared: bool = Field(default=False, description="The picture is a skeleton, edges or a depth map already, and is taken as it is.")
    pose: str | None = Field(
        default=None, description="For type pose, in place of a picture: a pose by name, or `auto`, by the prompt's framing."
    )
    edits: list[dict[str, Any]] = Field(
        default_factory=list,
        max_length=16,
        description='Changes to the pose, in order, like {"arm": "left", "angle": 160} or {"head_room": 0.18}.',
    )
    scale: float | None = Field(default=None, ge=0, le=2, description="How strongly it acts; 0 is exactly without it.")
    start: Percent | None = Field(default=None, description="Part of the schedule (0 to 1) from which it acts.")
    end: Percent | None = Field(default=None, description="Part of the schedule (0 to 1) up to which it acts.")
    model: str | None = Field(default=None, description="Which ControlNet, where several are deployed that know the type.")

    @model_validator(mode="after")
    def _one_source(self) -> ControlInput:
        if (self.image is None) == (self.pose is None):
            raise ValueError("give either `image` or, for type pose, the name of a `pose`")
        if self.pose is not None and self.type != "pose":
            raise ValueError(f"a `pose` is for type pose, not for {self.type}; give an `image`")
        if self.prepared and self.pose is not None:
            raise ValueError("`prepared` is of an `image`; a pose by its name is drawn here")
        if self.edits and self.type != "pose":
            raise ValueError(f"`edits` are for type pose, not for {self.type}")
        return self


class PersonInput(Window):
    """One person: who it is (pictures), which method brings them in, how strongly, when and where."""

    ALIASES: ClassVar[Mapping[str, str]] = {**_PERSON_ALIASES, "strength": "weight", "reference_images": "images"}

    method: str | None = Field(
        default=None,
        description="A method of identity, as `GET /v1/workflows` lists them; the workflow's own where it has one.",
    )
    images: list[Picture] = Field(
        default_factory=list, max_length=MAX_REFERENCES, description="Pictures of this one person; see `blend` for more than one."
    )
    character_id: CharacterId | None = None
    region: Region | Box | None = Field(
        default=None,
        description="Where in the picture this person is: a name, or the corners [x0, y0, x1, y1] of a box, 0 to 1 from the top left.",
    )
    mask: Picture | None = Field(
        default=None, description="Where in the picture this person is, as a picture of its shape: white is here, black is not."
    )

    @model_validator(mode="after")
    def _somebody(self) -> PersonInput:
        if bool(self.images) == (self.character_id is not None):
            raise ValueError("give either `images` of the person or the `character_id` of one that is kept")
        return self

    @model_validator(mode="after")
    def _one_place(self) -> PersonInput:
        _refuse_several(self, "region", "mask")
        return self

    @model_validator(mode="before")
    @classmethod
    def _one_picture(cls, body: Any) -> Any:
        """`reference_image` (or `image`): the list of one."""
        if not isinstance(body, Mapping):
            return body
        single = [name for name in ("reference_image", "image") if name in body]
        if not single:
            return body
        if len(single) > 1 or {"images", "reference_images"} & set(body):
            raise ValueError(f"`{single[0]}` and another field both give the pictures; give `images` alone")
        return {"images": [body[single[0]]], **{name: value for name, value in body.items() if name != single[0]}}


class GenerateRequest(Window):
    """Pictures of somebody, somewhere. Every workflow is a choice of these fields with its own defaults."""

    ALIASES: ClassVar[Mapping[str, str]] = {
        **_PERSON_ALIASES,
        "denoise": "strength",
        "init_image": "image",
        "steps": "num_inference_steps",
        "true_cfg": "true_cfg_scale",
        "guidance": "guidance_scale",
        "num_images": "n",
    }
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"workflow": "flux-pulid", "prompt": "a portrait in a library", "reference_image": "data:image/png;base64,...", "seed": 7},
                {
                    "prompt": "a close-up portrait on a beach at sunset",
                    "identities": [{"method": "pulid", "images": ["data:image/png;base64,..."], "weight": 0.8, "start": 0.15}],
                    "n": 4,
                },
            ]
        }
    )

    workflow: str | None = Field(default=None, description="A workflow of `GET /v1/workflows`; without one, the fields say everything.")
    prompt: str = Field(
        min_length=1, max_length=10_000, description="What the picture shows. The face comes from the pictures, so describe the rest."
    )
    negative_prompt: str = Field(
        default="", max_length=10_000, description="What the picture should not show. Acts only where true_cfg_scale is above 1."
    )
    reference_image: Picture | None = Field(default=None, description="The picture of the person (a list of one `reference_images`).")
    reference_images: list[Picture] | None = Field(
        default=None,
        min_length=1,
        max_length=MAX_REFERENCES,
        description="Several pictures of the same person; `blend` says how they become one.",
    )
    character_id: CharacterId | None = None
    identity: PersonInput | None = Field(default=None, description="One person with all that belongs to them: `identities` with one item.")
    identities: list[PersonInput] | None = Field(
        default=None, min_length=1, max_length=MAX_PEOPLE, description="Several people, or several methods for one person."
    )
    style: str | None = Field(default=None, description="`photorealistic` or `stylized`: sets start_step where you do not.")
    width: int | None = Field(default=None, ge=STEP_SCALE, description="Pixels, a multiple of 16; together with `height`.")
    height: int | None = Field(default=None, ge=STEP_SCALE, description="Pixels, a multiple of 16; together with `width`.")
    size: str | None = Field(default=None, pattern=r"^\d{2,5}x\d{2,5}$", description="`WIDTHxHEIGHT` in one, like 1024x768.")
    aspect_ratio: str | None = Field(
        default=None, pattern=r"^\d{1,3}:\d{1,3}$", description="Like 3:4, with as many pixels as the base model is used to."
    )
    num_inference_steps: int | None = Field(
        default=None, ge=1, le=100, description="Steps of drawing. More are slower, and finer up to a point."
    )
    guidance_scale: float | None = Field(
        default=None, ge=0, le=30, description="How closely the prompt is followed (distilled guidance, costs nothing)."
    )
    true_cfg_scale: float | None = Field(
        default=None, ge=1, le=20, description="Above 1: a second pass with the negative prompt pushes away from it. Doubles the time."
    )
    true_cfg_start: Percent | None = Field(default=None, description="Part of the schedule (0 to 1) from which true CFG acts.")
    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="The same seed gives the same picture. Drawn at random where absent, and returned."
    )
    n: int = Field(default=1, ge=1, le=MAX_PICTURES, description="Number of pictures; picture k has the seed seed + k.")
    max_sequence_length: int | None = Field(default=None, ge=1, le=512, description="Tokens of the prompt that are read (T5).")
    image: Picture | None = Field(default=None, description="A picture to begin from; `strength` says how much of it is drawn anew.")
    strength: float | None = Field(
        default=None, gt=0, le=1, description="Share of `image` that is drawn anew, 0.6 by default; without a picture it is 1."
    )
    loras: list[LoraInput] = Field(default_factory=list, max_length=MAX_LORAS, description="LoRAs, added up by their scales.")
    controls: list[ControlInput] = Field(
        default_factory=list, max_length=MAX_CONTROLS, description="What is fixed beforehand: pose, edges, depth. Several act together."
    )
    pose: str | None = Field(
        default=None,
        description="A pose by name, `auto` for the one of the prompt's framing, or `none`; short for a control of type pose.",
    )
    pose_image: Picture | None = Field(
        default=None, description="A picture whose pose is taken over, or a drawn skeleton; short for a control of type pose."
    )
    output_format: OutputFormat = Field(default="png", description="Kind of picture file.")
    response_format: ResponseFormat = Field(
        default="b64_json", description="Whether pictures come in the answer, or as files of the server."
    )
    scores: bool = Field(default=True, description="Whether each picture's likeness to each reference is measured.")
    enable_safety_checker: bool | None = Field(
        default=None, description="Whether the content gate looks at pictures, where the server has one; by default it does for people."
    )

    @model_validator(mode="after")
    def _said_once(self) -> GenerateRequest:
        _refuse_several(self, "size", "aspect_ratio", "width")
        if (self.width is None) != (self.height is None):
            raise ValueError("`width` and `height` belong together; give both, or `size`, or `aspect_ratio`")
        _refuse_several(self, "reference_image", "reference_images", "character_id", "identity", "identities")
        return self

    @model_validator(mode="after")
    def _flat_belongs_to_pictures(self) -> GenerateRequest:
        flat = sorted(name for name in Window.model_fields if getattr(self, name) is not None)
        if flat and (self.identity is not None or self.identities is not None):
            raise ValueError(f"`{flat[0]}` belongs inside `identities`, to the person that it is meant for")
        return self

    @model_validator(mode="after")
    def _begins_somewhere(self) -> GenerateRequest:
        if self.image is None and self.strength not in (None, 1):
            raise ValueError("`strength` below 1 keeps part of a picture to begin from, and there is none; leave it out, or give `image`")
        return self

    @model_validator(mode="after")
    def _one_pose(self) -> GenerateRequest:
        _refuse_several(self, "pose", "pose_image")
        if (self.pose or self.pose_image) and any(control.type == "pose" for control in self.controls):
            raise ValueError("`pose` and a control of type pose say the same thing; give one of them")
        ids = [lora.id for lora in self.loras]
        if len(set(ids)) < len(ids):
            raise ValueError("`loras` names the same LoRA twice; give it once, with the sum of the scales")
        return self


class AnalyzeRequest(Strict):
    """The faces of one picture, in the order that `face_index` counts them."""

    ALIASES: ClassVar[Mapping[str, str]] = {"reference_image": "image"}
    model_config = ConfigDict(json_schema_extra={"examples": [{"image": "data:image/png;base64,..."}]})

    image: Picture
    attributes: bool = Field(default=True, description="Whether age and sex are estimated.")
    embeddings: bool = Field(default=False, description="Whether the 512 numbers of each face come too.")


class CompareRequest(Strict):
    """Whether two pictures show the same person."""

    ALIASES: ClassVar[Mapping[str, str]] = {"image_a": "first", "image_b": "second", "image1": "first", "image2": "second"}
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"first": "data:image/png;base64,...", "second": "data:image/png;base64,..."}]}
    )

    first: Picture
    second: Picture
    first_face_index: Face | None = Field(default=None, description="As `face_index`, for the first picture.")
    second_face_index: Face | None = Field(default=None, description="As `face_index`, for the second picture.")
    threshold: float = Field(default=0.3, ge=-1, le=1, description="Cosine from which two faces count as the same person.")


def _refuse_several(request: BaseModel, *names: str) -> None:
    given = [f"`{name}`" for name in names if getattr(request, name) is not None]
    if len(given) > 1:
        raise ValueError(f"{' and '.join(given)} say the same thing; give one of them")
