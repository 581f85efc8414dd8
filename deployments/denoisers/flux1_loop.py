"""The denoise loop of FLUX: one forward a step, two where true CFG acts, each identity within its own window.

Everything of a request comes as one value, and nothing of it is left on the transformer. Unlike stock FluxPipeline the loop knows
windows, a negative pass that has nobody's identity instead of none, and true CFG that begins late (ToTheBeginning/PuLID at 1aa2fc7,
flux/sampling.py: denoise). Knows no texts, no pixels, no method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from deployments.denoisers.windows import active

if TYPE_CHECKING:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    from deployments.identity.base import Condition


@dataclass(frozen=True, eq=False)
class Text:
    """One text, in the transformer's type. states: [1, length, width], pooled: [1, width]."""

    states: Tensor
    pooled: Tensor


@dataclass(frozen=True, eq=False)
class Influence:
    """One identity in one request. key: its item of `joint_attention_kwargs`; own, nobody: what it says in the two passes.

    start, end: percents of the schedule.
    """

    key: str
    own: Condition
    nobody: Condition
    start: float
    end: float


@dataclass(frozen=True, eq=False)
class Call:
    """One request, on the transformer's device.

    latents: [1, tokens, channels] fp32, the noise. positions: [tokens, 3]. guidance: of the distilled kind. negative: None where true
    CFG is off. true_cfg_start: percent of the schedule. generator: for samplers that draw more noise on their way.
    """

    latents: Tensor
    positions: Tensor
    prompt: Text
    guidance: float
    generator: torch.Generator | None = None
    negative: Text | None = None
    true_cfg_scale: float = 1.0
    true_cfg_start: float = 0.0
    influences: Sequence[Influence] = ()


def denoise(
    transformer: FluxTransformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    call: Call,
    *,
    before_forward: Callable[[], None],
    after_step: Callable[[int], None],
) -> Tensor:
    """The latents without noise, [1, tokens, channels] fp32.

    scheduler: at its beginning (see `sampler`). before_forward: may raise, and no forward starts. after_step: gets 1..N; on a GPU
    the step may still be running.
    """
    latents, steps = call.latents, len(scheduler.timesteps)
    for step, time in enumerate(scheduler.timesteps):
        present = [influence for influence in call.influences if active(step, steps, influence.start, influence.end)]
        before_forward()
        velocity = _velocity(transformer, call, call.prompt, latents, time, [(item.key, item.own) for item in present])
        if call.negative is not None and active(step, steps, call.true_cfg_start, 1.0):
            before_forward()
            away = _velocity(transformer, call, call.negative, latents, time, [(item.key, item.nobody) for item in present])
            velocity = away + call.true_cfg_scale * (velocity - away)
        (latents,) = scheduler.step(velocity, time, latents, generator=call.generator, return_dict=False)
        after_step(step + 1)
    return latents


def _velocity(
    transformer: FluxTransformer2DModel, call: Call, text: Text, latents: Tensor, time: Tensor, conditions: Sequence[tuple[str, Condition]]
) -> Tensor:
    """One forward, in the transformer's type. -> [1, tokens, channels] fp32: the sampler would carry on in the type it is given."""
    model = cast(Any, transformer)  # diffusers declares no attribute
    guidance = latents.new_full((1,), call.guidance) if model.config.guidance_embeds else None
    (velocity,) = model(
        hidden_states=latents.to(text.states.dtype),
        timestep=time.expand(1) / 1000,
        guidance=guidance,
        pooled_projections=text.pooled,
        encoder_hidden_states=text.states,
        txt_ids=call.positions.new_zeros(text.states.shape[1], 3),
        img_ids=call.positions,
        joint_attention_kwargs=_together(conditions),
        return_dict=False,
    )
    return cast(Tensor, velocity.float())


def _together(conditions: Sequence[tuple[str, Condition]]) -> dict[str, Condition]:
    """A dictionary of this forward's own: people of one method add up, methods stand side by side."""
    items: dict[str, Condition] = {}
    for key, condition in conditions:
        items[key] = items.get(key, ()) + condition
    return items
