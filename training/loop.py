"""The training loop: from a state to a later state, on one process or on several that share each step.

Knows nothing of catalogues, queues or Ray: whoever runs it hands in the model and the data, and is told. Processes that torch.distributed
has joined split each batch; a step's pictures, noise and result are those of a single process with the whole batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft.helpers import disable_input_dtype_casting
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from deployments.errors import InvalidRequest, TrainingDiverged
from training.adapters import Average, add_lora
from training.buckets import Batches, Bucket
from training.checkpoints import write_checkpoint
from training.export import LoraCard, write_lora
from training.latent_cache import TrainingSet
from training.objective import Batch, Draw, held_out_batch, losses, objective_of
from training.optimisers import optimiser_of, rate_at
from training.settings import TrainingSettings

State = Mapping[str, Any]
_RUN = frozenset(
    ("checkpoint_every", "sample_every", "sample_prompts", "keep_states", "gradient_checkpointing", "compile_blocks", "saved_dtype")
)
"""Settings that change no number of the training."""
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
"""All of torch's but cuDNN's, which it prefers on a Hopper GPU (torch 2.11): of FLUX at 1024 x 1024 its backward (run_cudnn_SDP_bprop)
touches memory that is not its own, or makes a NaN of the loss, in stock diffusers' loop as in this one. docs/training.md has figures."""


@dataclass(frozen=True)
class Progress:
    """After a step. step: how many are done. loss: of the step, mean over its pictures. seconds: the step took. held_out: of the averaged
    weights, where it was measured. checkpoint: its folder, where one was written (by the first process)."""

    step: int
    steps: int
    loss: float
    learning_rate: float
    seconds: float
    held_out: float | None = None
    checkpoint: Path | None = None


Report = Callable[[Progress], None]
Sample = Callable[[int], None]
"""Told the step, while the transformer has the averaged weights."""


@dataclass(frozen=True)
class Outcome:
    """stopped: whether it was cancelled before its ceiling. held_out: the last one measured."""

    step: int
    stopped: bool
    held_out: float | None


def arranged(transformer: Any, *, checkpointing: bool, compiled: bool) -> Any:
    """The transformer as it is to be trained. checkpointing: blocks are computed again in the backward in place of being kept."""
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    if compiled:
        transformer.compile_repeated_blocks()
    return transformer


class Trainer:
    """One LoRA in the making. The transformer is the trainer's from now on; it lies on its device, and its type is the base's."""

    def __init__(
        self, settings: TrainingSettings, transformer: Any, data: TrainingSet, folder: Path, card: LoraCard, sample: Sample | None = None
    ) -> None:
        """folder: of the checkpoints. card: what files say of the LoRA. Raises InvalidRequest for targets that match nothing."""
        self._settings, self._transformer, self._data, self._folder, self._card = settings, transformer, data, folder, card
        self._sample = sample
        targets = settings.targets_of(card.family)
        self.parameters = add_lora(transformer, targets, settings.rank, settings.alpha, settings.seed)
        self.average = Average(self.parameters, settings.ema)
        self._optimiser = optimiser_of(settings, self.parameters)
        self._objective = objective_of(card.family, settings.guidance)
        self._draw = Draw(settings.seed, settings.sigma_sampling, settings.caption_dropout, settings.prior_weight)
        self._rank, self._world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        members: dict[Bucket, list[int]] = {}
        for index, item in enumerate(data.trained):
            members.setdefault(item.bucket, []).append(index)
        self._batches = Batches(members, settings.batch * self._world, settings.seed)
        self._device = self.parameters[0].device
        self._ahead: tuple[int, list[Batch]] | None = None
        self.step = 0

    def run(self, state: State | None, report: Report, cancelled: Callable[[], bool]) -> Outcome:
        """Trains up to the ceiling of steps, from `state` (None: from the start), or until one process's `cancelled` says so: then the
        step under way is the last, and its checkpoint is written. `report` is called after each step by every process.

        Raises InvalidRequest for the state of another training, and TrainingDiverged.
        """
        if state is not None:
            self._restore(state)
        held_out, stopped = None, False
        self._transformer.train()
        with disable_input_dtype_casting(self._transformer), sdpa_kernel(ATTENTION):
            while self.step < self._settings.steps and not stopped:
                started = time.monotonic()
                loss, stopped = self._one_step(cancelled())
                last = stopped or self.step == self._settings.steps
                checkpoint = None
                if last or self.step % self._settings.checkpoint_every == 0:
                    held_out, checkpoint = self._checkpoint()
                elif self._is_sampled(self.step):
                    self._draw_samples()
                rate, seconds = rate_at(self._settings, self.step - 1), time.monotonic() - started
                report(Progress(self.step, self._settings.steps, loss, rate, seconds, held_out if checkpoint else None, checkpoint))
        return Outcome(self.step, stopped and self.step < self._settings.steps, held_out)

    def state(self) -> dict[str, Any]:
        """All that the next step depends on, on the CPU."""
        return {
            "training": self._identity(), "step": self.step, "parameters": _copied(self.parameters),
            "average": _copied(self.average.values), "updates": self.average.updates, "optimiser": _copied(self._optimiser.state_dict()),
        }  # fmt: skip

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """Mean over the held-out pictures at fixed noise levels, of the weights as they are; None without such pictures."""
        found = []
        for item in range(len(self._data.held_out)):
            with self._precision():
                found.append(losses(self._objective, self._transformer, held_out_batch(self._data, item).to(self._device)).mean())
        return float(torch.stack(found).mean()) if found else None

    def _one_step(self, cancel: bool) -> tuple[float, bool]:
        """The step's loss, and whether any process was cancelled. The loss is waited for last: meanwhile a GPU has the step's work, and
        this process draws the next one's noise."""
        settings = self._settings
        for group in self._optimiser.param_groups:
            group["lr"] = rate_at(settings, self.step)
        whole = settings.batch * self._world
        total = torch.zeros((), device=self._device)
        for batch in self._drawn(self.step):
            with self._precision():
                loss = losses(self._objective, self._transformer, batch).sum() / (whole * settings.grad_accum)
            loss.backward()
            total += loss.detach()
        said = self._gathered(total, cancel)
        torch.nn.utils.clip_grad_norm_(self.parameters, settings.clip_norm)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.average.update()
        self.step += 1
        if self.step < settings.steps:
            self._ahead = self.step, self._drawn(self.step)
        found, stopped = said.tolist()
        if not math.isfinite(found):
            raise TrainingDiverged(f"The loss of step {self.step} is {found}.")
        return found, bool(stopped)

    def _drawn(self, step: int) -> list[Batch]:
        """This process's share of a step, a batch a forward, on its device or on the way there."""
        if self._ahead is not None and self._ahead[0] == step:
            return self._ahead[1]
        settings = self._settings
        whole, first = settings.batch * self._world, self._rank * settings.batch
        batches = []
        for forward in range(settings.grad_accum):
            mine = self._batches.at(step * settings.grad_accum + forward)[first : first + settings.batch]
            batches.append(self._draw.batch(self._data, mine, step, forward * whole + first).to(self._device))
        return batches

    def _gathered(self, loss: Tensor, cancel: bool) -> Tensor:
        """[2]: the loss, and above 0 where anybody wishes to stop. With the gradients, summed over the processes in one message: all end
        on the same step."""
        said = torch.stack([loss.float(), torch.full((), float(cancel), device=self._device)])
        if self._world == 1:
            return said
        gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in self.parameters]
        flat = torch.cat([*(g.flatten() for g in gradients), said])
        dist.all_reduce(flat)
        for p, part in zip(self.parameters, flat[:-2].split([g.numel() for g in gradients]), strict=True):
            p.grad = part.view_as(p)
        return flat[-2:]

    def _checkpoint(self) -> tuple[float | None, Path | None]:
        if self._rank != 0:
            return None, None
        state = self.state()
        dtype: torch.dtype = getattr(torch, self._settings.saved_dtype)
        with self._averaged():
            held_out = self.held_out_loss()
            card = _at(self._card, self.step, held_out)
            folder = write_checkpoint(
                self._folder, self.step, state, lambda path: write_lora(path, self._transformer, card, dtype), self._settings.keep_states
            )
        if self._is_sampled(self.step):
            self._draw_samples()
        return held_out, folder

    def _is_sampled(self, step: int) -> bool:
        every = self._settings.sample_every
        return self._sample is not None and self._rank == 0 and every > 0 and step % every == 0

    def _draw_samples(self) -> None:
        assert self._sample is not None
        self._transformer.eval()
        with self._averaged(), torch.no_grad(), self._precision():
            self._sample(self.step)
        self._transformer.train()

    def _averaged(self) -> AbstractContextManager[None]:
        return self.average.applied() if self._settings.ema else nullcontext()

    def _precision(self) -> torch.autocast:
        """fp32 factors in a bf16 base: autocast keeps one copy of each input in place of two."""
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._settings.dtype == "bfloat16")

    def _identity(self) -> str:
        """Equal for trainings of which one may go on where the other stopped."""
        free = _RUN | ({"steps"} if self._settings.schedule == "constant" else set())
        return f"{self._settings.model_dump_json(exclude=set(free))} {self._data.hash}"

    @torch.no_grad()
    def _restore(self, state: State) -> None:
        if state["training"] != self._identity():
            message = "The checkpoint is of a training with other settings or other pictures."
            raise InvalidRequest(message, "Resume with the settings and pictures that it began with, or start anew in an empty folder.")
        for p, saved in zip(self.parameters, state["parameters"], strict=True):
            p.copy_(saved)
        self.average.restore(state["average"], state["updates"])
        self._optimiser.load_state_dict(state["optimiser"])
        self.step = state["step"]


def _copied(value: Any) -> Any:
    """Tensors, in whatever they are nested, as copies on the CPU that no later step changes."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list | tuple) else value


def _at(card: LoraCard, step: int, held_out: float | None) -> LoraCard:
    scores = dict(card.scores) | ({} if held_out is None else {"held_out_loss": round(held_out, 6)})
    return LoraCard(card.base, card.family, card.trigger_word, card.dataset, card.pictures, step, scores)
