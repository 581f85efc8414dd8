"""Stage `pose-control`: a union FluxControlNetModel whose pose mode obeys an OpenPose skeleton. The generator stays frozen."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FluxControlNetModel
from torch import Tensor

from training.mini.flux_folder import controlnet_from
from training.mini.generator import autoencoder, base
from training.mini.generator.bank import Bank
from training.mini.generator.context import Context
from training.mini.generator.flow import flow_loss, pack, position_ids
from training.mini.generator.forward import TrainableFlux
from training.mini.generator.text import TEXT_TOKENS
from training.mini.optimise import Losses, Outcome, Recipe, optimise
from training.mini.world.skeleton import draw_skeleton

POSE_MODE = 4
"""Union-Pro's number for pose (model card of Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro)."""
_EMPTY_CAPTIONS = 0.3
"""Often no caption at all: where the words don't say where the arms are, the skeleton must."""


def train(context: Context, recipe: Recipe) -> Outcome:
    """Saves `pose-control`."""
    workspace, device, vae, bank = context.workspace, context.device, context.vae, context.body_bank
    generator = base.load(workspace, device)
    controlnet = controlnet_from(generator.transformer).to(device).train()
    flux = TrainableFlux(generator.transformer, autoencoder.LATENT_SIZE, TEXT_TOKENS, compiled=device.type == "cuda")
    n = 2 if recipe.smoke else 192
    guidance = torch.ones(n, device=device)

    def loss(progress: float) -> Losses:
        batch = base.draw_batch(bank, n)
        tokens = bank.captions.pick(batch.index).emptied(_EMPTY_CAPTIONS)
        skeleton = _skeleton_tokens(vae, bank, batch.index)
        with base.mixed_precision(device):
            with torch.no_grad():
                prompt = generator.text(tokens)
            residuals = _residuals(controlnet, batch, prompt.states, prompt.pooled, guidance, skeleton)
            velocity = flux.velocity(batch.noisy, prompt, batch.times, guidance, control=residuals)
        return {"loss": flow_loss(velocity, batch.clean, batch.noise)}

    outcome = optimise("pose-control", controlnet, recipe, workspace, loss, rounded=controlnet)
    workspace.save("pose-control", controlnet.state_dict(), halved=True)
    return outcome


@torch.no_grad()
def _skeleton_tokens(vae: AutoencoderKL, bank: Bank, index: Tensor) -> Tensor:
    """The skeleton pictures as the ControlNet is given them: encoded and packed like the latents."""
    return pack(autoencoder.encode(vae, draw_skeleton(bank.joints[index], bank.visible[index])))


def _residuals(
    controlnet: FluxControlNetModel, batch: base.Batch, states: Tensor, pooled: Tensor, guidance: Tensor, skeleton: Tensor
) -> list[Tensor]:
    """The ControlNet's residuals for the double blocks, through its own stock forward."""
    ids = position_ids(autoencoder.LATENT_SIZE, autoencoder.LATENT_SIZE, states.shape[1], states.device)
    mode = torch.full((len(skeleton), 1), POSE_MODE, device=states.device, dtype=torch.long)
    samples, _ = cast(Any, controlnet)(
        hidden_states=batch.noisy,
        controlnet_cond=skeleton,
        controlnet_mode=mode,
        encoder_hidden_states=states,
        pooled_projections=pooled,
        timestep=batch.times,
        guidance=guidance,
        txt_ids=ids[: states.shape[1]],
        img_ids=ids[states.shape[1] :],
        return_dict=False,
    )
    return cast(list[Tensor], list(samples))
