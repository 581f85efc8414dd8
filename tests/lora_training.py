"""A FLUX of random weights that trains in milliseconds, data for it, a training in several processes: what tests of the trainer share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from diffusers import FluxTransformer2DModel

from benchmarks.true_size import tiny_sizes
from deployments.contracts import PromptEmbeds
from tests.named_weights import named_tensor
from training.buckets import Bucket
from training.checkpoints import newest_state
from training.export import LoraCard
from training.latent_cache import Item, TrainingSet
from training.loop import Outcome, Progress, Trainer
from training.settings import TrainingSettings, checked

CARD = LoraCard("flux1-mini", "flux1", "ohwx", "0" * 64, 6)
TEXT = 6


def settings(**changes: Any) -> TrainingSettings:
    usual: dict[str, Any] = {
        "base": "flux1-mini", "rank": 4, "alpha": 8, "learning_rate": 1e-2, "steps": 6, "batch": 2, "resolutions": (64,), "ema": 0.9,
        "checkpoint_every": 3, "dtype": "float32", "saved_dtype": "float32", "gradient_checkpointing": "off",
    }  # fmt: skip
    return checked(usual | changes)


def transformer(dtype: torch.dtype = torch.float32) -> Any:
    """Width 32, 2 + 3 blocks; the same numbers each time."""
    model: Any = FluxTransformer2DModel(**tiny_sizes().flux)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            p.copy_(named_tensor(name, *p.shape) * (0.5 / p.shape[-1] ** 0.5))
    return model.to(dtype).requires_grad_(False)


def training_set(masked: bool = False, width: int = 32) -> TrainingSet:
    """Six pictures in two buckets, two held out, three captions. width: of the text states."""
    sizes = [(8, 8)] * 5 + [(4, 8)]
    items = [_item(k, height, w, masked) for k, (height, w) in enumerate([*sizes, (8, 8), (8, 8)])]
    prompts = PromptEmbeds(named_tensor("states", 4, TEXT, width), named_tensor("pooled", 4, 24))
    return TrainingSet(tuple(items[:6]), tuple(items[6:]), prompts, "0" * 64, "ohwx")


def _item(number: int, height: int, width: int, masked: bool) -> Item:
    mean = named_tensor(f"mean {number}", 16, height, width)
    weights = torch.ones(height * width // 4)
    weights[0] = 0.1
    found = weights / weights.mean() if masked and number == 0 else None
    return Item(Bucket(8 * width, 8 * height), mean, torch.full_like(mean, 0.1), found, number % 3, prior=number == 5)


def trainer(folder: Path, chosen: TrainingSettings, model: Any = None, data: TrainingSet | None = None) -> Trainer:
    return Trainer(chosen, transformer() if model is None else model, training_set() if data is None else data, folder, CARD)


def run(made: Trainer, folder: Path, until: int | None = None) -> tuple[Outcome, list[Progress]]:
    """From the newest state in the folder. until: the step during which somebody cancels."""
    seen: list[Progress] = []
    return made.run(newest_state(folder), seen.append, _cancels(seen, until)), seen


def _cancels(seen: list[Progress], until: int | None) -> Callable[[], bool]:
    return lambda: until is not None and len(seen) + 1 >= until


Plan = tuple[str, TrainingSettings, int | None]
"""Of one training: its folder, its settings, and the rank that cancels it in its second step, if any."""


def work_in_group(rank: int, world: int, meeting: str, plans: Sequence[Plan]) -> None:
    """One process of trainings that several share, one after the other; each leaves its state in `rank-N.pt`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for place, chosen, cancelling in plans:
        folder = Path(place)
        made = trainer(folder, chosen)
        run(made, folder, 2 if rank == cancelling else None)
        torch.save(made.state(), folder / f"rank-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()
