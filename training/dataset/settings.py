"""What a set of pictures is curated by: one frozen value, kept in the dataset that it made.

Where a number was measured or published is said at the number. Knows no model and no file.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from deployments.curation import BLURRED
from deployments.identity.blending import SAME_PERSON_FROM

SMALLEST_FACE_PX = 64.0
"""Of the face's shorter side in the source's pixels, as lora-dataset-studio has it (backend/infer/face_score_infer.py): not a share of the
picture, which turned down nearly every full-body shot there."""
FEW = 10
"""Of fewer pictures a LoRA learns the pictures rather than the person; trainers for hire ask for 10 to 30."""
ImportString = Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")]
"""`module:object`."""
Word = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[^\s\x00-\x1f](?:[^\x00-\x1f]*[^\s\x00-\x1f])?$")]


class CurationSettings(BaseModel):
    """How pictures are judged, cropped, masked and captioned.

    trigger: what the LoRA will be called up by. class_word: what the subject is (`man`, `woman`); None is the style's. captions: a style of
    configs/training/captions.yaml; None chooses by the face models. captioner: `module:object`, see caption.py; None is the style's.

    smallest_face_px: of the shorter side of a face's box, source pixels; None is what the face models' entry says, else 64.
    distant_share, distant_times: a face is too distant below this share of its crop's shorter side *and* below so many times the smallest:
    a share alone would turn down a whole figure in a large photograph. same_person: cosine of the conditioning recogniser to the subject's
    centroid. turned_person: the same for a head turned by more than `turned_degrees`, whose embedding says less: turned heads are kept on
    purpose. blurred: sharpness (deployments/identity/blending.py), at the face's own size. duplicate: correlation of two pictures' pixels
    about the face, see duplicates.py.

    aspect: least and most of width over height. mask_weight: of the loss on other people's heads: not 0, or anything may be painted there.
    blur_others: blurs those heads in the pixels; a blur is then what is learned. upscale_px: to which shorter side small pictures are
    enlarged; None leaves them, for a trainer that puts them into a smaller bucket. longest_px: larger ones are reduced to it, which
    holds whatever a bucket of 1024 x 1024 pixels at 2:1 (1448 x 724) can show.
    workers: threads that look at pictures.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    trigger: Word = "ohwx"
    class_word: Word | None = None
    captions: str | None = None
    captioner: ImportString | None = None

    smallest_face_px: float | None = Field(default=None, gt=0)
    distant_share: float = Field(default=0.05, ge=0, lt=1)
    distant_times: float = Field(default=2.0, ge=1)
    same_person: float = Field(default=SAME_PERSON_FROM, gt=-1, lt=1)
    turned_person: float = Field(default=SAME_PERSON_FROM / 2, gt=-1, lt=1)
    turned_degrees: float = Field(default=40.0, gt=0, le=90)
    surest_score: float = Field(default=0.5, ge=0, le=1)
    blurred: float = Field(default=BLURRED, ge=0)
    duplicate: float = Field(default=0.9, gt=0, le=1)

    aspect: tuple[float, float] = (0.5, 2.0)
    mask_weight: float = Field(default=0.1, ge=0.01, le=1)
    blur_others: bool = False
    upscale_px: int | None = Field(default=None, ge=64, le=4096)
    longest_px: int = Field(default=2048, ge=64, le=8192)
    workers: int = Field(default=2, ge=1, le=64)
