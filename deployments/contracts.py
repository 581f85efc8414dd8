"""The values that deployments hand to one another: frozen, never changed in flight, whole in themselves.

Pictures of people enter as encoded bytes and leave as uint8 arrays; what lies between is here. Importing this imports numpy and
nothing heavier. Knows no model, no HTTP and no Ray.

Shapes: H, W in pixels of the upright picture (EXIF turn applied), colour order RGB, origin at the top left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from torch import Tensor

RGB = NDArray[np.uint8]
"""[H, W, 3], 0..255."""
Floats = NDArray[np.float32]

Need = Literal["embedding", "judge", "attributes", "aligned"]
"""What an analysis is to find beside box, score and landmarks; each costs time, so nothing comes unasked."""

FaceIndex = int | Literal["largest"] | None
"""Which face of a picture is meant: its place in the order of `PictureFaces.faces`. None: there is to be only one."""


@dataclass(frozen=True, eq=False, kw_only=True)
class Face:
    """One face of one picture.

    box: [4] x0, y0, x1, y1 in pixels. score: of the detector, 0..1. landmarks: [5, 2] x, y in pixels, centre of the first pixel at 0:
    the eye at the picture's left, the other eye, nose, the corner of the mouth at the left, the other.
    embedding (need `embedding`): [512] of the conditioning recogniser, raw: its length means something to PuLID.
    judge_embedding (need `judge`): [512], unit length, of the recogniser that conditions nothing; every cosine shown is this one's.
    age (years), sex (need `attributes`). aligned, labels (need `aligned`): the FFHQ-512 crop, RGB [512, 512, 3], and its parsing
    map [512, 512] uint8 in CelebAMask's order of 19 classes.
    """

    box: Floats
    score: float
    landmarks: Floats
    embedding: Floats | None = None
    judge_embedding: Floats | None = None
    age: int | None = None
    sex: Literal["F", "M"] | None = None
    aligned: RGB | None = None
    labels: NDArray[np.uint8] | None = None


@dataclass(frozen=True, eq=False)
class PictureFaces:
    """Every face of a picture, by area of the box, largest first, then left to right. size: (W, H) pixels."""

    size: tuple[int, int]
    faces: tuple[Face, ...]


@dataclass(frozen=True, eq=False)
class PersonPictures:
    """The reference pictures of one person, as they came: encoded bytes. face_index: which face is meant in each of them."""

    pictures: tuple[bytes, ...]
    face_index: FaceIndex = None


@dataclass(frozen=True, eq=False)
class Person:
    """One person, found: the chosen face in each reference picture, and the pictures, for methods that see more than the face."""

    faces: tuple[Face, ...]
    pictures: tuple[RGB, ...]


@dataclass(frozen=True, eq=False)
class People:
    """Every person of a request, in its order. seconds: spent on each stage so far; it travels with the data, up to the answer."""

    persons: tuple[Person, ...]
    seconds: Mapping[str, float]


@dataclass(frozen=True)
class Mask:
    """Where in the picture somebody acts. values: height * width bytes, rows from the top, 0 (not here) to 255 (here).

    Any size of the picture's shape: who reads it brings it to the size that is needed.
    """

    width: int
    height: int
    values: bytes

    @property
    def shares(self) -> Floats:
        """[height, width] in 0..1."""
        return (np.frombuffer(self.values, np.uint8).reshape(self.height, self.width) / np.float32(255)).astype(np.float32)


@dataclass(frozen=True, kw_only=True)
class IdentityRequest:
    """How one person acts on a picture.

    method: a family of the catalogue's identity entries (`pulid`, `xlabs-ip-adapter-v2`); version: of its weights, where several fit.
    weight: strength, 0 is exactly the base. start, end: window in percents of the schedule, 0..1. mask: where; None is everywhere.
    blend: how several reference pictures become one person (deployments/identity/blending.py). options: what only this method knows
    (`weight_type` of XLabs).
    """

    method: str
    version: str | None = None
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0
    mask: Mask | None = None
    blend: str = "mean"
    options: Mapping[str, str | float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class IdentityTokens:
    """One person as a method's denoiser half reads them. tokens: [1, n, width] on the CPU; unconditional: nobody's, same shape.

    model: the catalogue's id of the weights that made them. left_out: places of the reference pictures that were not used, because
    they show somebody else than the others do.
    """

    model: str
    tokens: Tensor
    unconditional: Tensor
    left_out: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Identities:
    """Every identity of a request, in its order, and the seconds spent so far."""

    tokens: tuple[IdentityTokens, ...] = ()
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LoraRequest:
    """One LoRA in a picture. id: what its owner calls it by; sha256: of its file, by which every denoiser finds it."""

    id: str
    sha256: str
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ControlRequest:
    """How one control acts on a picture.

    model: the catalogue's id of a ControlNet; mode: one that it knows, by name (`pose`, `canny`). scale: strength, 0 is exactly
    without. start, end: window in percents of the schedule, 0..1.
    """

    model: str
    mode: str
    scale: float
    start: float = 0.0
    end: float = 1.0


@dataclass(frozen=True, eq=False, kw_only=True)
class ControlSource:
    """What a control is made of. Exactly one of picture and pose is given.

    mode: as in ControlRequest. picture: encoded bytes. prepared: the picture is the condition itself (a drawn skeleton, an edge map)
    and not to be analysed. pose: a name of the pose bank. edits: changes to the pose, in order (deployments/controls/pose_bank.py).
    figure: whose proportions a pose of the bank is drawn in (`human`, `character-world`).
    """

    mode: str
    picture: bytes | None = None
    prepared: bool = False
    pose: str | None = None
    edits: tuple[str, ...] = ()
    figure: str = "human"


@dataclass(frozen=True, eq=False)
class Guides:
    """The pictures that a drawing is led by, each in its size: one condition for each control of the spec, in its order; begin: the
    picture to begin from, where the spec's strength is below 1. seconds: spent so far."""

    controls: tuple[RGB, ...] = ()
    begin: RGB | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class PromptEmbeds:
    """Texts as a base model reads them, on the CPU; one row a text. FLUX: states [n, length, width] of T5, pooled [n, width] of CLIP.
    Qwen-Image: states of Qwen2.5-VL, zeros behind each text, and pooled [n, 0]."""

    states: Tensor
    pooled: Tensor

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each text: the places whose states are not all zeros, as no encoder's are. FLUX reads its padding, which has states."""
        return tuple(self.states.any(-1).sum(-1).tolist())


@dataclass(frozen=True, eq=False)
class Prompts:
    """The texts of a request, and the seconds spent so far."""

    embeds: PromptEmbeds
    seconds: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class GenerationSpec:
    """One picture, wholly determined: the same spec with the same inputs gives the same pixels on the same machine.

    base: the catalogue's id. width, height: pixels, multiples of 16. guidance_scale: distilled guidance. true_cfg_scale: 1 is off;
    true_cfg_start: percent of the schedule from which it acts. identities: one a person and method. loras: added up, by their scales.
    strength: share of the schedule that is drawn; below 1 the drawing begins from a picture (`Guides.begin`).
    """

    base: str
    prompt: str
    negative_prompt: str = ""
    width: int
    height: int
    steps: int
    guidance_scale: float
    true_cfg_scale: float = 1.0
    true_cfg_start: float = 0.0
    seed: int
    max_sequence_length: int
    identities: tuple[IdentityRequest, ...] = ()
    loras: tuple[LoraRequest, ...] = ()
    controls: tuple[ControlRequest, ...] = ()
    strength: float = 1.0

    @property
    def needs_negative(self) -> bool:
        """Whether a second pass is ever made. The reference's own tolerance: ToTheBeginning/PuLID, flux/sampling.py."""
        return abs(self.true_cfg_scale - 1) > 1e-2 and self.true_cfg_start < 1


@dataclass(frozen=True, eq=False)
class Progress:
    """A step that is done. step: 1..total. preview: a small RGB, if one was asked for."""

    step: int
    total: int
    preview: RGB | None = None


@dataclass(frozen=True, eq=False)
class PictureProgress:
    """How far a request with several pictures is: step of total of picture (0..pictures - 1). preview: a small JPEG, if one was asked
    for."""

    picture: int
    pictures: int
    step: int
    total: int
    preview: bytes | None = None


@dataclass(frozen=True, eq=False)
class WorkProgress:
    """How far a job is that is more than the drawing of its pictures. stage: what is being done now. step of steps: of the part that takes
    longest. facts: what else there is to tell of this moment, plain JSON (`loss`)."""

    stage: str
    step: int
    steps: int
    facts: Mapping[str, float | str | None] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Drawn:
    """The finished picture, and the seconds spent on each stage of drawing it. left_out: of each identity's references, see
    IdentityTokens. peak_bytes: see deployments/hardware.py; None where nobody has measured it."""

    picture: RGB
    seconds: Mapping[str, float]
    left_out: tuple[tuple[int, ...], ...] = ()
    peak_bytes: int | None = None
