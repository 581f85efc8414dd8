"""Union ControlNets of FLUX.1: what they add to the transformer's blocks in one step, as stock diffusers would have it.

The net is stock FluxControlNetModel, opened strictly. Two families are known: Union-Pro, in which a number for the mode becomes a token
before the text, and Union-Pro-2.0, which has no such token and reads the mode off the picture. Knows no pixels, no step and no window: the
denoise loop asks when a control acts, and hands the same residuals to the pass of the negative prompt, as stock does.

What stock's FluxControlNetPipeline does and this does not: run the net at scale 0 outside of its window; drop in silence the conditions
beyond the first where one net gets several and a single window (FluxMultiControlNetModel zips its lists), and a second net's residuals for
the single blocks where the first net has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor

from deployments.denoisers.folders import open_part
from deployments.errors import CheckpointMismatch, InvalidCatalog, InvalidRequest

if TYPE_CHECKING:
    from deployments.denoisers.flux1_loop import Forward, Residuals

# What must be equal for a residual to mean anything to the transformer, and for both to read the same latents and texts.
_SHARED = ("in_channels", "num_attention_heads", "attention_head_dim", "joint_attention_dim", "pooled_projection_dim", "axes_dims_rope")


class UnionControl:
    """One union ControlNet beside one transformer. Holds nothing of a request; one thread at a time, as the transformer."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        folder: Path,
        modes: Mapping[str, int | None],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """transformer: which the residuals are for; only its configuration is read. folder: config.json and safetensors of the net.

        modes: by the catalogue, the name of each mode and its number; None throughout for a net without mode tokens. device: where the
        weights are put; who has them elsewhere between requests moves `net`.
        Raises CheckpointMismatch for weights that do not fit the net, or a net that does not fit the transformer, and InvalidCatalog for
        numbers that the net does not have.
        """
        net: Any = open_part(FluxControlNetModel, folder.parent, folder.name, dtype)
        base: Any = transformer
        _refuse_misfit(net.config, base.config, folder)
        _refuse_modes(modes, net.config.num_mode, folder)
        self._double = _places(base.config.num_layers, net.config.num_layers)
        self._single = _places(base.config.num_single_layers, net.config.num_single_layers)
        _drop_what_is_never_read(net, self._double, self._single)
        self._net: Any = net.to(device)
        self._dtype, self._modes = dtype, dict(modes)

    @property
    def net(self) -> FluxControlNetModel:
        """For those who move or measure it; never while a picture is drawn."""
        return self._net

    def prepare(self, latents: Tensor, mode: str, scale: float, start: float, end: float) -> Control:
        """One control of one request.

        latents: [1, tokens, channels] where the net will run, the condition picture through the VAE (the mode of its posterior, or the
        same request would draw two pictures), shifted, scaled and packed as the picture's own. mode: a name out of `modes`. scale: factor
        of the residuals. start, end: percents of the schedule; kept for the caller.
        Raises InvalidRequest for a mode that the net does not know.
        """
        if mode not in self._modes:
            raise InvalidRequest(f"This ControlNet has no mode {mode!r}.", f"Use one of: {', '.join(self._modes)}.")
        number = self._modes[mode]
        token = None if number is None else torch.tensor([[number]], device=latents.device)
        return Control(self, latents.to(self._dtype), token, scale, start, end)

    def residuals(self, control: Control, forward: Forward) -> Residuals:
        """See Control.residuals."""
        config = self._net.config
        double, single = self._net(
            hidden_states=forward.latents,
            controlnet_cond=control.latents,
            controlnet_mode=control.mode,
            conditioning_scale=control.scale,
            encoder_hidden_states=forward.text.states,
            pooled_projections=forward.text.pooled,
            timestep=forward.time,
            # A net has its own say in this: stock, too, goes by the net's configuration and not by the transformer's.
            guidance=forward.guidance if config.guidance_embeds else None,
            txt_ids=forward.text_positions,
            img_ids=forward.positions,
            return_dict=False,
        )
        return _spread(double, self._double), _spread(single, self._single)


@dataclass(frozen=True, eq=False)
class Control:
    """One control in one request. latents: [1, tokens, channels]. mode: [1, 1] the token's number, or None. start, end: percents of the
    schedule, by which the loop decides whether to ask at all. A control of scale 0 is not to be made: it is exactly none."""

    net: UnionControl
    latents: Tensor
    mode: Tensor | None
    scale: float
    start: float
    end: float

    def residuals(self, forward: Forward) -> Residuals:
        """What it adds in the forward of the prompt's pass, times its scale, in the transformer's type: after each double block and each
        single block a tensor [1, tokens, width], neighbours often the same one; nothing at all for a kind that the net says nothing of.

        Of the forward it reads the prompt's own text: identities, LoRAs, Redux and other controls do not enter.
        """
        return self.net.residuals(self, forward)


def together(fields: Iterable[Residuals]) -> Residuals:
    """Several controls of one step, of one net or of different ones, block by block added up; nothing at all for none."""
    double: Sequence[Tensor] = ()
    single: Sequence[Tensor] = ()
    for field in fields:
        double, single = _sum(double, field[0]), _sum(single, field[1])
    return double, single


def _sum(first: Sequence[Tensor], second: Sequence[Tensor]) -> Sequence[Tensor]:
    if not first or not second:
        return first or second
    # Neighbours share their residuals, hence also the sum: at 1024 x 1024 each one not made anew is 25 MB (bf16), and there are 57 blocks.
    made: dict[tuple[int, int], Tensor] = {}
    for one, other in zip(first, second, strict=True):
        if (id(one), id(other)) not in made:
            made[id(one), id(other)] = one + other
    return [made[id(one), id(other)] for one, other in zip(first, second, strict=True)]


def _places(blocks: int, residuals: int) -> list[int]:
    """Which residual each block gets: diffusers' own rule (models/transformers/transformer_flux.py: interval_control).

    6 residuals over 19 blocks are spread by fours, hence the sixth is nobody's; empty where there are no residuals.
    """
    return [block // ceil(blocks / residuals) for block in range(blocks)] if residuals else []


def _spread(residuals: Sequence[Tensor] | None, places: Sequence[int]) -> list[Tensor]:
    return [] if residuals is None else [residuals[place] for place in places]


def _drop_what_is_never_read(net: Any, double: Sequence[int], single: Sequence[int]) -> None:
    """Frees the last blocks of a net whose residuals go to no block: the sixth of Union-Pro-2.0, with FLUX.1's 19. Nothing is computed
    from them but these residuals, unless single blocks follow."""
    doubles, singles = max(double, default=-1) + 1, max(single, default=-1) + 1
    net.controlnet_blocks = net.controlnet_blocks[:doubles]
    if not singles:
        net.transformer_blocks = net.transformer_blocks[:doubles]
    net.controlnet_single_blocks = net.controlnet_single_blocks[:singles]
    net.single_transformer_blocks = net.single_transformer_blocks[:singles]


def _refuse_misfit(net: Any, base: Any, folder: Path) -> None:
    if net.conditioning_embedding_channels is not None:
        raise CheckpointMismatch(f"{folder} is a ControlNet that reads pixels, not latents.", "Use a union ControlNet.")
    wrong = [f"{name} {net[name]} instead of {base[name]}" for name in _SHARED if _plain(net[name]) != _plain(base[name])]
    if wrong:
        raise CheckpointMismatch(f"{folder} is a ControlNet of another transformer: {', '.join(wrong)}.", "Use one made for this base.")


def _plain(value: object) -> object:
    """A configuration read from a file has lists where one written in code has tuples."""
    return tuple(value) if isinstance(value, list) else value


def _refuse_modes(modes: Mapping[str, int | None], tokens: int | None, folder: Path) -> None:
    """Stock would fall over a missing number, and let one pass in silence that no token is there for."""
    if tokens is None:
        wrong = [name for name, number in modes.items() if number is not None]
        right = "it has no mode tokens, so no mode has a number"
    else:
        wrong = [name for name, number in modes.items() if number is None or not 0 <= number < tokens]
        right = f"its mode tokens are numbered 0 to {tokens - 1}"
    if wrong:
        raise InvalidCatalog(f"The modes of {folder} are wrong for {', '.join(wrong)}: {right}.", "Correct `modes` of its entry.")
