"""The denoise loop of FLUX: one forward a step, two where true CFG acts, each identity within its own window.

Everything of a request comes as one value, and nothing of it is left on the transformer. Unlike stock FluxPipeline the loop knows
windows, a negative pass that has nobody's identity instead of none, true CFG that begins late (ToTheBeginning/PuLID at 1aa2fc7,
flux/sampling.py: denoise), and a ControlNet beside adapters and caches. Knows no texts, no pixels, no method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import Tensor

from deployments.denoisers.first_block_cache import cached
from deployments.denoisers.flux1_controlnet import together
from deployments.denoisers.windows import active

TEXT_KEY = "text_tokens"
"""The key of an influence whose condition is read by the loop itself: tokens [1, n, width] that follow the prompt's states."""

Residuals = tuple[Sequence[Tensor], Sequence[Tensor]]
"""What controls add to the picture's tokens after each double block and each single block: a tensor a block, or nothing at all."""

Estimated = Callable[[int, Tensor], None]
"""Gets the number of a step and the picture that its velocity points at, [1, tokens, channels] fp32: what would come of it if the path
were straight from here."""

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
class Forward:
    """What goes into one forward. latents: [1, tokens, channels] in the transformer's type; time: [1], 1 is noise; guidance: [1]."""

    latents: Tensor
    time: Tensor
    guidance: Tensor
    text: Text
    positions: Tensor

    @property
    def text_positions(self) -> Tensor:
        return self.positions.new_zeros(self.text.states.shape[1], 3)


class Control(Protocol):
    """One control in one request (deployments/denoisers/flux1_controlnet.py). start, end: percents of the schedule."""

    @property
    def start(self) -> float: ...
    @property
    def end(self) -> float: ...

    def residuals(self, forward: Forward) -> Residuals:
        """What it adds in the forward that is about to run, times its scale."""
        ...


@dataclass(frozen=True, eq=False)
class Call:
    """One request, on the transformer's device.

    latents: [1, tokens, channels] fp32, the noise; or, where first_step is above 0, a picture with as much noise as that step begins
    with. positions: [tokens, 3]. guidance: of the distilled kind. negative: None where true CFG is off. true_cfg_start: percent of the
    schedule. generator: for samplers that draw more noise on their way.
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
    controls: Sequence[Control] = ()
    first_step: int = 0


def denoise(
    transformer: FluxTransformer2DModel,
    scheduler: FlowMatchEulerDiscreteScheduler,
    call: Call,
    *,
    before_forward: Callable[[], None],
    after_step: Callable[[int], None],
    estimated: Estimated | None = None,
) -> Tensor:
    """The latents without noise, [1, tokens, channels] fp32.

    scheduler: at the call's first step (see `sampler`). before_forward: may raise, and no forward starts; a control's counts as one.
    after_step: gets 1.. for the steps that are made; on a GPU the step may still be running. estimated: called before it, see Estimated.
    """
    latents, steps = call.latents, len(scheduler.timesteps)
    for step, time in enumerate(scheduler.timesteps[call.first_step :], call.first_step):
        present = [influence for influence in call.influences if active(step, steps, influence.start, influence.end)]
        before_forward()
        forward = _forward(transformer, call, call.prompt, latents, time)
        controlled = _controlled(call, forward, step, steps, before_forward)
        with cached(transformer, "own"):
            velocity = _velocity(transformer, forward, [(item.key, item.own) for item in present], controlled)
        if call.negative is not None and active(step, steps, call.true_cfg_start, 1.0):
            before_forward()
            negative = _forward(transformer, call, call.negative, latents, time)
            # As in stock pipelines the negative pass is held to the same pose: the control is not computed for it once more.
            with cached(transformer, "nobody"):
                away = _velocity(transformer, negative, [(item.key, item.nobody) for item in present], controlled)
            velocity = away + call.true_cfg_scale * (velocity - away)
        if estimated is not None:
            # On the straight path that the model was trained on: x_t = (1 - sigma) x_0 + sigma noise, and v = noise - x_0.
            estimated(step + 1 - call.first_step, latents - scheduler.sigmas[step] * velocity)
        (latents,) = scheduler.step(velocity, time, latents, generator=call.generator, return_dict=False)
        after_step(step + 1 - call.first_step)
    return latents


def _forward(transformer: FluxTransformer2DModel, call: Call, text: Text, latents: Tensor, time: Tensor) -> Forward:
    """In the transformer's type. guidance: [1] also for a base that was not distilled and reads none."""
    return Forward(latents.to(text.states.dtype), time.expand(1) / 1000, latents.new_full((1,), call.guidance), text, call.positions)


def _controlled(call: Call, forward: Forward, step: int, steps: int, before_forward: Callable[[], None]) -> Residuals:
    """The sum over all controls whose window holds the step; nothing is computed for the others."""
    fields = []
    for control in call.controls:
        if active(step, steps, control.start, control.end):
            fields.append(control.residuals(forward))
            before_forward()
    return together(fields)


def _velocity(
    transformer: FluxTransformer2DModel, forward: Forward, conditions: Sequence[tuple[str, Condition]], controlled: Residuals
) -> Tensor:
    """One forward. -> [1, tokens, channels] fp32: the sampler would carry on in the type it is given."""
    model = cast(Any, transformer)  # diffusers declares no attribute
    items = _together(conditions)
    states = torch.cat([forward.text.states, *items.pop(TEXT_KEY, ())], dim=1)
    double, single = controlled
    (velocity,) = model(
        hidden_states=forward.latents,
        timestep=forward.time,
        guidance=forward.guidance if model.config.guidance_embeds else None,
        pooled_projections=forward.text.pooled,
        encoder_hidden_states=states,
        txt_ids=forward.positions.new_zeros(states.shape[1], 3),
        img_ids=forward.positions,
        joint_attention_kwargs=items,
        controlnet_block_samples=double or None,
        controlnet_single_block_samples=single or None,
        return_dict=False,
    )
    return cast(Tensor, velocity.float())


def _together(conditions: Sequence[tuple[str, Condition]]) -> dict[str, Condition]:
    """A dictionary of this forward's own: people of one method add up, methods stand side by side."""
    items: dict[str, Condition] = {}
    for key, condition in conditions:
        items[key] = items.get(key, ()) + condition
    return items
