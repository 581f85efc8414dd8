"""What is learned: flow matching, for FLUX and for Qwen-Image. The network predicts noise - clean at clean + sigma (noise - clean).

(Liu et al. 2022, "Flow Straight and Fast"; every published trainer of these two families has this target and weight 1.) Everything random
about a picture in a step comes from `draw`, a function of (seed, step, place in the batch, item): nothing has to be saved to resume, and
how many processes share a batch changes nothing. Knows no optimiser and no files.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from deployments.denoisers.latents import Grid, pack, positions
from deployments.errors import UnsupportedCombination
from training.latent_cache import Item, TrainingSet
from training.settings import SigmaSampling

HELD_OUT_SIGMAS = (0.1, 0.3, 0.5, 0.7, 0.9)
"""kohya-ss/sd-scripts, docs/validation.md, and SimpleTuner, EVAL_LOSS.md: fixed levels make two checkpoints comparable."""
_HELD_OUT_SEED = "held out"

# (tokens, exponent) at two sizes; the exponent is on the line through them: the pipelines' `calculate_shift` over the published schedulers
# (FLUX.1-dev and Qwen-Image, scheduler_config.json: base_shift, max_shift, base_image_seq_len, max_image_seq_len).
_SHIFTS = {"flux_shift": ((256, 0.5), (4096, 1.15)), "qwen_shift": ((256, 0.5), (8192, 0.9))}


@dataclass(frozen=True, eq=False)
class Batch:
    """clean, noise: [n, tokens, channels], packed; sigmas: [n]; states: [n, text, width], pooled: [n, width], fp32 or the encoders' type.
    weights: [n, tokens] with a mean of 1 each, or None. importance: [n], of whole pictures. grid: of the tokens. lengths: tokens of each
    text; what `states` holds behind them is filling."""

    clean: Tensor
    noise: Tensor
    sigmas: Tensor
    states: Tensor
    pooled: Tensor
    weights: Tensor | None
    importance: Tensor
    grid: Grid
    lengths: tuple[int, ...]

    @property
    def noisy(self) -> Tensor:
        sigmas = self.sigmas.view(-1, 1, 1)
        return (1 - sigmas) * self.clean + sigmas * self.noise

    def to(self, device: torch.device) -> Batch:
        """Copied there without waiting for what the device still does."""
        if device.type == "cpu":
            return self
        moved: dict[str, Any] = {
            item.name: value.pin_memory().to(device, non_blocking=True)
            for item in fields(self)
            if isinstance(value := getattr(self, item.name), Tensor)
        }
        return replace(self, **moved)


class Objective(Protocol):
    """One family's way of asking its transformer."""

    def velocity(self, transformer: Any, batch: Batch) -> Tensor:
        """[n, tokens, channels]."""
        ...


@dataclass(frozen=True)
class FluxObjective:
    """guidance: the embedding's value; 1.0 is the plain flow, for which FLUX.1-dev was distilled away (ostris/ai-toolkit and SimpleTuner
    train under 1.0 and sample with 3.5)."""

    guidance: float = 1.0

    def velocity(self, transformer: Any, batch: Batch) -> Tensor:
        device, dtype = batch.clean.device, transformer.dtype
        guidance = torch.full_like(batch.sigmas, self.guidance) if transformer.config.guidance_embeds else None
        # The transformer multiplies time and guidance by 1000 itself; positions stay fp32, where bf16 would round a row beyond 256.
        velocity: Tensor = transformer(
            hidden_states=batch.noisy.to(dtype), timestep=batch.sigmas, guidance=guidance, encoder_hidden_states=batch.states.to(dtype),
            pooled_projections=batch.pooled.to(dtype), txt_ids=torch.zeros(batch.states.shape[1], 3, device=device),
            img_ids=positions(batch.grid).to(device), return_dict=False,
        )[0]  # fmt: skip
        return velocity


@dataclass(frozen=True)
class QwenObjective:
    """No guidance and no pooled text. The transformer sees the tokens of a text and nothing behind them, as where stock diffusers draws one
    picture: texts of one length share a forward, and others have their own. So nothing is padded, which Qwen-Image would attend to, and
    nothing masked: any mask, even of ones, keeps attention from its fast kernel, and a real one was a source of corrupt batches
    (huggingface/diffusers#12294)."""

    def velocity(self, transformer: Any, batch: Batch) -> Tensor:
        rows: dict[int, list[int]] = {}
        for row, length in enumerate(batch.lengths):
            rows.setdefault(length, []).append(row)
        found: dict[int, Tensor] = {}
        for length, alike in rows.items():
            found |= dict(zip(alike, self._of_one_length(transformer, batch, alike, length), strict=True))
        return torch.stack([found[row] for row in range(len(batch.clean))])

    def _of_one_length(self, transformer: Any, batch: Batch, rows: Sequence[int], length: int) -> Tensor:
        """Of some pictures of the batch, in the order of `rows`."""
        dtype, noisy = transformer.dtype, batch.noisy
        velocity: Tensor = transformer(
            hidden_states=torch.stack([noisy[row] for row in rows]).to(dtype),
            timestep=torch.stack([batch.sigmas[row] for row in rows]),
            encoder_hidden_states=torch.stack([batch.states[row, :length] for row in rows]).to(dtype),
            encoder_hidden_states_mask=None, img_shapes=[[(1, batch.grid.rows, batch.grid.columns)]] * len(rows), return_dict=False,
        )[0]  # fmt: skip
        return velocity


def objective_of(family: str, guidance: float) -> Objective:
    """Raises UnsupportedCombination for a family that cannot be trained."""
    if family == "flux1":
        return FluxObjective(guidance)
    if family == "qwen-image":
        return QwenObjective()
    raise UnsupportedCombination(f"LoRAs of {family} cannot be trained.", "Use a base model of flux1 or qwen-image.")


def losses(objective: Objective, transformer: Any, batch: Batch) -> Tensor:
    """[n]: mean squared error of each picture's velocity, weighted by place and by picture."""
    error = ((objective.velocity(transformer, batch).float() - (batch.noise - batch.clean)) ** 2).mean(-1)
    if batch.weights is not None:
        error = error * batch.weights
    return error.mean(-1) * batch.importance


@dataclass(frozen=True)
class Draw:
    """How a step's batch is drawn. prior_weight: importance of pictures that preserve the class."""

    seed: int
    sigma_sampling: SigmaSampling
    caption_dropout: float = 0.0
    prior_weight: float = 1.0

    def batch(self, data: TrainingSet, items: Sequence[int], step: int, first: int) -> Batch:
        """On the CPU. items: indexes into data.trained, all of one bucket. first: place of the first of them in the step's whole batch."""
        chosen = [data.trained[item] for item in items]
        keys = [f"{self.seed} {step} {first + slot} {item}" for slot, item in enumerate(items)]
        generators = [_generator(key) for key in keys]
        sigmas = torch.cat([sigma_of(self.sigma_sampling, _tokens(item), g) for item, g in zip(chosen, generators, strict=True)])
        dropped = [float(torch.rand(1, generator=g)) < self.caption_dropout for g in generators]
        captions = [data.empty_caption if gone else item.caption for item, gone in zip(chosen, dropped, strict=True)]
        importance = torch.tensor([self.prior_weight if item.prior else 1.0 for item in chosen])
        return _assembled(data, chosen, captions, generators, sigmas, importance)


def held_out_batch(data: TrainingSet, item: int) -> Batch:
    """On the CPU: one held-out picture at each of HELD_OUT_SIGMAS, always with the same latent and noise."""
    chosen = [data.held_out[item]] * len(HELD_OUT_SIGMAS)
    generators = [_generator(f"{_HELD_OUT_SEED} {item}") for _ in chosen]
    sigmas = torch.tensor(HELD_OUT_SIGMAS)
    return _assembled(data, chosen, [c.caption for c in chosen], generators, sigmas, torch.ones(len(chosen)))


def sigma_of(sampling: SigmaSampling, tokens: int, generator: torch.Generator) -> Tensor:
    """[1] in 0..1: logit-normal (Esser et al. 2024, "Scaling Rectified Flow Transformers", section 3.1), shifted towards noise with the
    picture's size unless `sigmoid`."""
    return shifted(torch.sigmoid(torch.randn(1, generator=generator)), sampling, tokens)


def shifted(sigma: Tensor, sampling: SigmaSampling, tokens: int) -> Tensor:
    if sampling == "sigmoid":
        return sigma
    (few, low), (many, high) = _SHIFTS[sampling]
    factor = math.exp(low + (high - low) * (tokens - few) / (many - few))
    return factor * sigma / (1 + (factor - 1) * sigma)


def _assembled(
    data: TrainingSet, chosen: Sequence[Item], captions: Sequence[int], generators: Sequence[torch.Generator], sigmas: Tensor,
    importance: Tensor,
) -> Batch:  # fmt: skip
    # On the CPU, where the same generator gives the same numbers on every machine.
    eps = [torch.randn(item.mean.shape, generator=g) for item, g in zip(chosen, generators, strict=True)]
    noise = [torch.randn(item.mean.shape, generator=g) for item, g in zip(chosen, generators, strict=True)]
    clean = torch.stack([item.mean + item.std * e for item, e in zip(chosen, eps, strict=True)])
    channels, height, width = clean.shape[1:]
    weights = _weights(chosen, height * width // 4)
    return Batch(
        clean=pack(clean), noise=pack(torch.stack(noise)), sigmas=sigmas, states=data.prompts.states[list(captions)],
        pooled=data.prompts.pooled[list(captions)], weights=weights, importance=importance,
        grid=Grid(height // 2, width // 2, channels), lengths=tuple(data.text_lengths[caption] for caption in captions),
    )  # fmt: skip


def _weights(chosen: Sequence[Item], tokens: int) -> Tensor | None:
    """[n, tokens], or None where none of the pictures has a mask."""
    if all(item.weights is None for item in chosen):
        return None
    return torch.stack([torch.ones(tokens) if item.weights is None else item.weights for item in chosen])


def _tokens(item: Item) -> int:
    return item.mean.shape[1] * item.mean.shape[2] // 4


def _generator(key: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1
    return torch.Generator().manual_seed(number)
