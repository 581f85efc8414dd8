"""Stages `siglip-vision`, `instantx` and `redux`: a SigLIP picture encoder, and the two methods that read it.

First all that looks at a picture learns to see people, as the other picture encoders do (vision.py): the encoder in its pooled output,
which InstantX reads, and in its patches, which Redux reads, and what either makes of it. Then each adapter learns by itself on the frozen
generator. The encoder stands still meanwhile: trained along, it saw the same in everybody after a thousand steps (pooled outputs of two
people at a cosine of 1.000, from -0.02 before).

InstantX is after the person, and learns that from PuLID, trained before: from the flow alone no face came of it in 2,300 steps (cosine
0.01). Redux is after the picture: it learns to say in words what a prompt left out, by the flow's loss.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import SiglipVisionModel

from deployments.identity.instantx_ip_adapter import InstantX, InstantXReader
from deployments.identity.redux import ReduxProjection
from training.mini.flux_folder import SIGLIP_DIM, flux_config, siglip_vision_config
from training.mini.generator import autoencoder, base
from training.mini.generator.bank import References, as_floats
from training.mini.generator.base import mixed_precision
from training.mini.generator.context import Context
from training.mini.generator.flow import velocity_loss
from training.mini.generator.forward import TrainableFlux
from training.mini.generator.identity_training import Verdict, from_data, train_adapter
from training.mini.generator.pulid import FaceAdapter
from training.mini.generator.sizes import INSTANTX, REDUX
from training.mini.generator.text import TEXT_TOKENS
from training.mini.generator.vision import Head, identities_of
from training.mini.optimise import Losses, Outcome, Recipe, optimise
from training.mini.storage import fake_quantise

_ROUNDED_FROM = 0.7
# As PuLID, InstantX reaches into every block (see Verdict); its lessons being free of noise, it gets the verdict late.
_COUNTS = Verdict(weight=1.0, alignment=1.0, begins=0.5, emphasis=8.0, pictures=128)
_PICTURES = 128
"""Of one step of Redux's."""
_UNSAID = 0.5
"""Share of Redux's pictures whose prompt is empty: what they show, the words alone have to say."""
_HEADS: int = flux_config()["num_attention_heads"]


class SiglipAdapters(nn.Module):
    """Both adapters with the encoder that they share."""

    def __init__(self) -> None:
        super().__init__()
        self.siglip = SiglipVisionModel(siglip_vision_config())
        self.instantx = InstantX(INSTANTX)
        self.redux = ReduxProjection(REDUX)
        for reader in self.instantx.ip_adapter:
            nn.init.zeros_(cast(InstantXReader, reader).to_v_ip.weight)  # the first step leaves the generator as it is

    def looking(self) -> nn.ModuleList:
        """The parts that see a picture before the generator has a say in it."""
        return nn.ModuleList([self.siglip, self.instantx.image_proj, self.redux])

    def gated(self, references: References, index: Tensor, drop: Tensor) -> dict[str, Any]:
        """InstantX's keys and values of every block; where drop is true, the values are zero: nobody adds nothing."""
        kept = (~drop)[:, None, None, None]
        tokens = self.instantx.image_proj.tokens(seen(self.siglip, references, index).pooler_output)
        return {"gated": [(keys, values * kept.to(values.dtype)) for keys, values in self.instantx.keys_values(tokens, _HEADS)]}

    def words(self, references: References, index: Tensor) -> dict[str, Any]:
        """Redux's words of the indexed references' pictures."""
        return {"words": self.redux.tokens(seen(self.siglip, references, index).last_hidden_state)}


def seen(encoder: nn.Module, references: References, index: Tensor) -> Any:
    """SigLIP's output for the indexed references: `last_hidden_state` [n, 64, d] and `pooler_output` [n, d]."""
    return encoder(2 * as_floats(references.whole[index]) - 1)


class Witness(nn.Module):
    """Asks each part who and what it sees; dropped after the training."""

    def __init__(self, people: int) -> None:
        super().__init__()
        widths = {"pooled": SIGLIP_DIM, "patches": SIGLIP_DIM, "tokens": INSTANTX.tokens * INSTANTX.token_dim, "words": REDUX.text_dim}
        self.heads = nn.ModuleDict({part: Head(width, people) for part, width in widths.items()})

    def forward(self, adapters: SiglipAdapters, output: Any, person: Tensor, identity: Tensor) -> Losses:
        """output: see `seen`. The whole loss, and each part's."""
        words = adapters.redux.tokens(output.last_hidden_state)
        told = {
            "pooled": output.pooler_output,
            "patches": output.last_hidden_state.mean(1),
            "tokens": adapters.instantx.image_proj.tokens(output.pooler_output).flatten(1),
            "words": words.mean(1),
        }
        parts = {part: head(F.layer_norm(told[part], told[part].shape[-1:]), person, identity) for part, head in self.heads.items()}
        loudness = (words.float().square().mean() - 1) ** 2  # as T5's states are
        return {"loss": sum(parts.values(), loudness), **{part: loss.detach() for part, loss in parts.items()}}


def train_vision(context: Context, recipe: Recipe) -> Outcome:
    """Saves `siglip-vision`: what has learnt to see (siglip.*, instantx.image_proj.*, redux.*), and the rest as it begins."""
    bank = context.reference_bank
    assert bank.references is not None
    references, adapters = bank.references, SiglipAdapters().to(context.device)
    witness = Witness(bank.people).to(context.device)
    n = 4 if recipe.smoke else 512

    def loss(progress: float) -> Losses:
        index = bank.draw(n)
        with mixed_precision(context.device):
            output = seen(adapters.siglip, references, index)
            return cast(Losses, witness(adapters, output, bank.person(index), identities_of(bank, index)))

    learning = nn.ModuleList([adapters.looking(), witness])
    outcome = optimise("siglip-vision", learning, recipe, context.workspace, loss, rounded=adapters.siglip)
    context.workspace.save("siglip-vision", adapters.state_dict(), halved=True)
    return outcome


def train_instantx(context: Context, recipe: Recipe) -> Outcome:
    """Saves `instantx`, which has the names of the published file; PuLID of the same workspace is its teacher."""
    adapters = _that_see(context)
    face = FaceAdapter().to(context.device).requires_grad_(False)
    face.load_state_dict(context.workspace.load("pulid", context.device))
    rounding = recipe.but(quantise_from=_ROUNDED_FROM)
    learner = adapters.instantx
    return train_adapter("instantx", learner, adapters.gated, context, rounding, rounded=learner, counts=_COUNTS, teacher=face.attach)


def train_redux(context: Context, recipe: Recipe) -> Outcome:
    """Saves `redux`, which has the names of the published file."""
    adapters, bank, device = _that_see(context), context.reference_bank, context.device
    assert bank.references is not None
    references = bank.references
    generator = base.load(context.workspace, device)
    flux = TrainableFlux(generator.transformer, autoencoder.LATENT_SIZE, TEXT_TOKENS, compiled=device.type == "cuda")
    n = 2 if recipe.smoke else _PICTURES
    once = torch.ones(n, device=device)

    def loss(progress: float) -> Losses:
        batch = base.draw_batch(bank, n, emphasis=1.0)
        captions, scales = bank.captions.pick(batch.index), base.guidance_scales(n, device)
        with mixed_precision(device):
            with torch.no_grad():
                target = from_data(flux, batch, generator.text(captions), scales, once)
                prompt = generator.text(captions.emptied(_UNSAID))
            words = adapters.words(references, batch.index)  # of the very picture: a variation of it is what Redux draws
            velocity = flux.velocity(batch.noisy, prompt, batch.times, scales, **words)
        return {"loss": velocity_loss(velocity, target, batch.weights)}

    outcome = optimise("redux", adapters.redux, recipe.but(quantise_from=_ROUNDED_FROM), context.workspace, loss, rounded=adapters.redux)
    context.workspace.save("redux", adapters.redux.state_dict(), halved=True)
    return outcome


def _that_see(context: Context) -> SiglipAdapters:
    """What `siglip-vision` left, with the encoder as the pack will hold it: the adapters learn to read that."""
    adapters = SiglipAdapters()
    adapters.load_state_dict(context.workspace.load("siglip-vision"))
    adapters.to(context.device)
    with torch.no_grad():
        for parameter in adapters.siglip.requires_grad_(False).parameters():
            if parameter.ndim == 2:
                parameter.copy_(fake_quantise(parameter))
    return adapters
