"""Pictures rendered ahead, as the generator's stages eat them: latents, caption tokens, and what adapters look at.

A bank holds `people` x `per_person` pictures; picture k of person i has index k * people + i. Of every person the first picture
is a close-up and the second a portrait, so that each has good references; the others are framed at random.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.mini.faces.crops import DETECTION_ERROR, unsure
from training.mini.generator.text import Tokens, tokenised
from training.mini.world.canvas import Grid
from training.mini.world.captions import caption, varied_captions
from training.mini.world.identity import sample_identities
from training.mini.world.landmarks import arcface_grid, face_box, ffhq_grid, landmarks
from training.mini.world.render import paint
from training.mini.world.scene import CLOSE_UP, PORTRAIT, Scene, sample_scenes
from training.mini.world.skeleton import keypoints

REFERENCE_SIZE_PX = 112
_CHUNK = 1024


@dataclass(frozen=True, eq=False)
class References:
    """What the identity adapters look at in each picture of the bank (N pictures).

    aligned: uint8 [N, 3, 112, 112] RGB, the FFHQ-aligned face; labels: uint8 [N, 112, 112], its parsing map; embedding: fp16
    [N, 512], raw (un-normalised) recogniser vectors; whole: uint8 [N, 3, 112, 112] RGB, the picture as the CLIP encoder sees it.
    """

    aligned: Tensor
    labels: Tensor
    embedding: Tensor
    whole: Tensor


@dataclass(frozen=True, eq=False)
class Bank:
    """identities: [people, 40]; latents: fp16 [N, 16, h, w], normalised; captions: tokens [N, variants, length]; boxes
    [N, 4], landmarks [N, 5, 2], joints [N, 18, 2] in picture coordinates, visible: bool [N, 18]."""

    identities: Tensor
    per_person: int
    latents: Tensor
    captions: Tokens
    boxes: Tensor
    landmarks: Tensor
    joints: Tensor
    visible: Tensor
    references: References | None

    def __len__(self) -> int:
        return self.latents.shape[0]

    @property
    def people(self) -> int:
        return self.identities.shape[0]

    def draw(self, n: int) -> Tensor:
        """[n] indices at random."""
        return torch.randint(0, len(self), (n,), device=self.latents.device)

    def another(self, index: Tensor) -> Tensor:
        """For each picture, the index of a reference: the close-up or the portrait of the same person, never the picture itself."""
        k, person = index // self.people, index % self.people
        choice = torch.randint(0, 2, index.shape, device=index.device)
        choice = torch.where(choice == k, 1 - choice, choice)
        return choice * self.people + person

    def person(self, index: Tensor) -> Tensor:
        return index % self.people


@dataclass(frozen=True)
class BankPlan:
    """people, per_person: the size; seed: of identities and scenes (held-out people use other seeds); framings: fixes the framing
    of all pictures from the third on (None: at random); references: whether the adapters' inputs are kept."""

    people: int
    per_person: int
    seed: int
    framing: int | None = None
    references: bool = False


def fill_bank(
    plan: BankPlan, encode: Callable[[Tensor], Tensor], recognise: Callable[[Tensor], Tensor] | None, device: torch.device
) -> Bank:
    """Renders and encodes. encode: pictures [n, 3, 192, 192] in -1..1 -> normalised latents; recognise: face crops [n, 3, 112, 112]
    in -1..1 -> raw embeddings [n, 512]."""
    identities = sample_identities(plan.people, plan.seed)
    rounds = [_scenes(plan, k) for k in range(plan.per_person)]
    with ThreadPoolExecutor(1) as writer:  # captions are pure Python; they are written while the GPU renders
        captions = writer.submit(lambda: _captions(rounds, plan.seed))
        parts: list[dict[str, Tensor]] = []
        for scene in rounds:
            for start in range(0, plan.people, _CHUNK):
                index = torch.arange(start, min(start + _CHUNK, plan.people))
                person, place = identities[index].to(device), scene.take(index).to(device)
                parts.append(_pictures(person, place, encode, recognise if plan.references else None))
        tokens = captions.result()
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    references = References(whole["aligned"], whole["labels"], whole["embedding"], whole["whole"]) if plan.references else None
    return Bank(
        identities.to(device), plan.per_person, whole["latents"], tokens.to(device), whole["boxes"], whole["landmarks"],
        whole["joints"], whole["visible"], references,
    )  # fmt: skip


def _scenes(plan: BankPlan, k: int) -> Scene:
    framing = (CLOSE_UP, PORTRAIT)[k] if k < 2 else plan.framing
    seed = plan.seed * 1000 + k
    return sample_scenes(plan.people, seed) if framing is None else sample_scenes(plan.people, seed, framing=framing)


def _captions(rounds: list[Scene], seed: int) -> Tokens:
    """Two captions a picture: the canonical one and a varied one."""
    rng = torch.Generator().manual_seed(seed)
    return Tokens.stack(
        [tokenised([c for s in rounds for c in caption(s)]), tokenised([c for s in rounds for c in varied_captions(s, rng)])]
    )


@torch.no_grad()
def _pictures(
    identity: Tensor, scene: Scene, encode: Callable[[Tensor], Tensor], recognise: Callable[[Tensor], Tensor] | None
) -> dict[str, Tensor]:
    canvas = paint(identity, scene, Grid.whole(len(scene), 192, identity.device))
    picture = canvas.rgb.clamp(0, 1) * 2 - 1
    points = landmarks(identity, scene)
    joints, visible = keypoints(identity, scene)
    found = {
        "latents": encode(picture).half(),
        "boxes": face_box(identity, scene),
        "landmarks": points,
        "joints": joints,
        "visible": visible,
    }
    if recognise is not None:
        found |= _reference(picture, canvas.labels, points, recognise)
    return found


def _reference(picture: Tensor, labels: Tensor, points: Tensor, recognise: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Crops are sampled from the 192-px picture by uncertain points, as they will be in use, not rendered afresh in their own size."""
    points = unsure(points, DETECTION_ERROR)
    aligned_grid = ffhq_grid(points, REFERENCE_SIZE_PX)
    return {
        "aligned": _bytes(crop(picture, aligned_grid)),
        "labels": crop(labels[:, None].float(), aligned_grid, "nearest")[:, 0].to(torch.uint8),
        "embedding": recognise(crop(picture, arcface_grid(points, REFERENCE_SIZE_PX))).half(),
        "whole": _bytes(F.interpolate(picture, size=(REFERENCE_SIZE_PX, REFERENCE_SIZE_PX), mode="bicubic", antialias=True)),
    }


def crop(picture: Tensor, grid: Grid, mode: str = "bilinear") -> Tensor:
    """Samples picture [n, c, H, W] at a grid of picture coordinates; differentiable."""
    return F.grid_sample(picture.float(), torch.stack([grid.x, grid.y], -1), mode=mode, padding_mode="border", align_corners=False)


def _bytes(picture: Tensor) -> Tensor:
    return ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def as_floats(picture: Tensor) -> Tensor:
    """uint8 0..255 -> float 0..1."""
    return picture.float() / 255
