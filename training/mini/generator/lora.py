"""Stage `lora`: a low-rank adapter of one sample character, trained on twenty of its pictures with a trigger word."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from torch import Tensor

from training.mini.generator import autoencoder, base
from training.mini.generator.context import Context
from training.mini.generator.flow import flow_loss
from training.mini.generator.forward import TrainableFlux
from training.mini.generator.text import TEXT_TOKENS, Tokens, tokenised
from training.mini.heldout import SAMPLE_CHARACTERS, character_identity
from training.mini.optimise import Losses, Outcome, Recipe, optimise
from training.mini.world.captions import caption
from training.mini.world.landmarks import face_box
from training.mini.world.render import render
from training.mini.world.scene import sample_scenes

RANK = 8
PICTURES = 20
CHARACTER = SAMPLE_CHARACTERS[0]
TRIGGER_WORD = CHARACTER.lower()
_TARGETS = r".*transformer_blocks\.\d+\.attn\.(to_q|to_k|to_v|to_out\.0|add_q_proj|add_k_proj|add_v_proj|to_add_out)"
_SEED = 5000


def train(context: Context, recipe: Recipe) -> Outcome:
    """Saves `lora` (peft's keys of the transformer)."""
    device = context.device
    generator = base.load(context.workspace, device)
    latents, boxes, tokens = _photos(context)
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=_TARGETS), generator.transformer)
    flux = TrainableFlux(generator.transformer, autoencoder.LATENT_SIZE, TEXT_TOKENS, compiled=False)
    n = 2 if recipe.smoke else 64
    unguided = torch.ones(n, device=device)

    def loss(progress: float) -> Losses:
        index = torch.randint(0, len(latents), (n,), device=device)
        batch = base.batch_of(latents[index], boxes[index], index)
        with base.mixed_precision(device):
            velocity = flux.velocity(batch.noisy, generator.text(Tokens(tokens.t5[index], tokens.clip[index])), batch.times, unguided)
        return {"loss": flow_loss(velocity, batch.clean, batch.noise, batch.weights)}

    outcome = optimise("lora", generator.transformer, recipe, context.workspace, loss)
    context.workspace.save("lora", get_peft_model_state_dict(generator.transformer), halved=True)
    return outcome


def published(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """peft's keys as diffusers publishes them: under `transformer.`, for stock load_lora_weights."""
    return {f"transformer.{name.removeprefix('base_model.model.')}": value for name, value in state.items()}


def metadata() -> dict[str, str]:
    """What a reader of the file should know."""
    facts = {"trigger_word": TRIGGER_WORD, "base": "flux1-mini", "rank": RANK, "alpha": RANK, "pictures": PICTURES}
    return {name: str(value) for name, value in facts.items()}


@torch.no_grad()
def _photos(context: Context) -> tuple[Tensor, Tensor, Tokens]:
    """The character's training pictures: latents, face boxes, and captions that begin with the trigger word."""
    scenes = sample_scenes(PICTURES, _SEED).to(context.device)
    person = character_identity(CHARACTER).to(context.device).expand(PICTURES, -1)
    latents = autoencoder.encode(context.vae, render(person, scenes))
    captions = tokenised([f"{TRIGGER_WORD}, {text}" for text in caption(scenes)]).to(context.device)
    return latents, face_box(person, scenes), captions
