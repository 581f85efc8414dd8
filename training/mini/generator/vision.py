"""Stage `vision`: the two picture encoders that adapters read, taught to see people before anything is conditioned on them.

EVA (PuLID's) sees the aligned face in grey on white; CLIP (XLabs') sees the whole picture. Both learn to tell the training
people apart (CosFace, Wang et al. 2018) and to name the numbers a person is made of. So do PuLID's identity tokens: left to the
flow's loss alone they stay nearly the same for everybody.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from deployments.identity.eva_clip import EvaVisionTransformer, initialise
from deployments.identity.pulid import IDFormer, eva_pixels, face_to_grey, identity_condition
from training.mini.flux_folder import clip_vision_config
from training.mini.generator.bank import Bank, References, as_floats
from training.mini.generator.base import mixed_precision
from training.mini.generator.context import Context
from training.mini.generator.sizes import EVA, PULID
from training.mini.optimise import Losses, Outcome, Recipe, optimise
from training.mini.world.identity import IDENTITY_DIM

# OpenAI CLIP's normalisation (openai/CLIP, clip/clip.py), as CLIPImageProcessor has it.
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_COSFACE_SCALE, _COSFACE_MARGIN = 24.0, 0.2


class Encoders(nn.Module):
    """Both picture encoders, and PuLID's, which reads EVA; the heads beside them are dropped after training."""

    def __init__(self) -> None:
        super().__init__()
        self.identity = IDFormer(PULID)
        self.eva = EvaVisionTransformer(EVA)
        initialise(self.eva)
        self.clip = CLIPVisionModelWithProjection(clip_vision_config())


def seen_faces(eva: nn.Module, references: References, index: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """EVA's embedding [n, d] and five hidden states of the indexed references."""
    grey = face_to_grey(as_floats(references.aligned[index]), references.labels[index].long())
    return eva(eva_pixels(grey, EVA.image_size))  # type: ignore[no-any-return]


def seen_pictures(clip: nn.Module, references: References, index: Tensor) -> Tensor:
    """CLIP's image embeddings [n, d] of the indexed references."""
    return clip(clip_pixels(as_floats(references.whole[index]))).image_embeds  # type: ignore[no-any-return]


def clip_pixels(rgb: Tensor) -> Tensor:
    """[n, 3, h, w] in 0..1 -> normalised as CLIPImageProcessor does."""
    mean, std = (torch.tensor(v, device=rgb.device).view(1, 3, 1, 1) for v in (_CLIP_MEAN, _CLIP_STD))
    return (rgb - mean) / std


class Head(nn.Module):
    """CosFace over the people, and a regression of the identity's numbers."""

    def __init__(self, width: int, people: int) -> None:
        super().__init__()
        self.people = nn.Parameter(torch.randn(people, width) * 0.02)
        self.numbers = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, IDENTITY_DIM))

    def forward(self, embedding: Tensor, person: Tensor, identity: Tensor) -> Tensor:
        cosine = F.normalize(embedding.float(), dim=-1) @ F.normalize(self.people, dim=-1).T
        logits = _COSFACE_SCALE * (cosine - _COSFACE_MARGIN * F.one_hot(person, len(self.people)))
        return F.cross_entropy(logits, person) + 4 * F.mse_loss(self.numbers(embedding).float(), identity)


def train(context: Context, recipe: Recipe) -> Outcome:
    """Saves `vision` (eva.*, clip.* and identity.*, PuLID's encoder)."""
    bank, device = context.reference_bank, context.device
    assert bank.references is not None
    references = bank.references
    encoders = Encoders().to(device)
    widths = (EVA.embed_dim, clip_vision_config().projection_dim, PULID.queries * PULID.output_dim)
    heads = nn.ModuleList(Head(width, bank.people) for width in widths).to(device)
    n = 4 if recipe.smoke else 512

    def loss(progress: float) -> Losses:
        index = bank.draw(n)
        person, identity = bank.person(index), identities_of(bank, index)
        with mixed_precision(device):
            embedding, states = seen_faces(encoders.eva, references, index)
            face = heads[0](embedding, person, identity)
            tokens = encoders.identity(identity_condition(references.embedding[index].float(), embedding.float()), states)
            told = heads[2](F.layer_norm(tokens.float(), tokens.shape[-1:]).flatten(1), person, identity)
            picture = heads[1](seen_pictures(encoders.clip, references, index), person, identity)
        return {"loss": face + picture + told, "eva": face.detach(), "clip": picture.detach(), "tokens": told.detach()}

    outcome = optimise("vision", nn.ModuleList([encoders, heads]), recipe, context.workspace, loss)
    context.workspace.save("vision", encoders.state_dict(), halved=True)
    return outcome


def identities_of(bank: Bank, index: Tensor) -> Tensor:
    return bank.identities[bank.person(index)]


def load(context: Context) -> Encoders:
    encoders = Encoders().to(context.device)
    encoders.load_state_dict(context.workspace.load("vision", context.device))
    return encoders
