"""From pictures with captions to a LoRA in a folder: memory planned, caches filled, encoders freed, trained, resumed.

    FOLDER/settings.yaml          what was asked for
    FOLDER/checkpoints/step-...   see checkpoints.py
    FOLDER/samples/...            where samples were asked for
    FOLDER/lora.safetensors       the LoRA of the last step

Knows nothing of jobs, owners or Ray. Run it again in the same folder, and it goes on where it stopped.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from deployments.catalog import Catalog, load_catalog
from deployments.contracts import PromptEmbeds
from deployments.errors import InvalidRequest
from deployments.prompts.cache import PromptCache
from deployments.prompts.shared_folder import SharedFolder
from training.base_models import Base, open_base
from training.checkpoints import LORA, checkpoints, newest_state
from training.export import LoraCard
from training.latent_cache import Example, MomentsCache, Told, TrainingSet, prepare
from training.loop import Outcome, Report, Trainer, arranged
from training.memory_plan import MemoryPlan, free_bytes, plan
from training.settings import TrainingSettings, base_entry
from training.trigger_words import trigger_warnings

FEW = 10
"""Accepted pictures below which likeness suffers (peers ask for 10 to 30)."""


@dataclass(frozen=True)
class Trained:
    """checkpoints: LoRA files by step. lora: of the last step. memory: as planned. warnings: sentences for people."""

    lora: Path
    checkpoints: dict[int, Path]
    outcome: Outcome
    dataset: str
    memory: MemoryPlan
    warnings: tuple[str, ...]


def train_lora(
    settings: TrainingSettings,
    examples: Sequence[Example],
    trigger_word: str,
    folder: Path,
    cache: Path,
    device: torch.device,
    *,
    report: Report = lambda progress: None,
    cancelled: Callable[[], bool] = lambda: False,
    told: Told = lambda what, done, of: None,
    catalog: Catalog | None = None,
) -> Trained:
    """cache: of latents and captions, shared by trainings. device: of this process. Every process of a distributed training calls it.

    Raises UnknownModel, UnsupportedCombination, InvalidImage, InvalidRequest, NotEnoughMemory, TrainingDiverged, and what opening the
    base model raises. Nothing is trained unless all is well up to the first step.
    """
    catalog = catalog if catalog is not None else load_catalog()
    base = open_base(catalog, base_entry(settings, catalog), device, getattr(torch, settings.dtype))
    warnings = warnings_of(examples, trigger_word, base)
    memory = planned(settings, base, device)
    data, sample_prompts = _encoded(settings, examples, trigger_word, cache, base, told)
    _freed(device)
    _kept_settings(settings, folder)
    transformer = arranged(base.transformer(), checkpointing=memory.checkpointing, compiled=settings.compile_blocks)
    card = LoraCard(base.entry.id, base.entry.family, trigger_word, data.hash, sum(not example.prior for example in examples))
    sample = None
    if sample_prompts is not None:
        empty = _row(data.prompts, data.empty_caption)
        sample = _sampler(settings, base, transformer, sample_prompts, empty, folder / "samples")
    trainer = Trainer(settings, transformer, data, folder / "checkpoints", card, sample)
    outcome = trainer.run(newest_state(folder / "checkpoints"), report, cancelled)
    if dist.is_initialized():
        dist.barrier()
    found = checkpoints(folder / "checkpoints")
    if _first():
        _put(found[outcome.step], folder / LORA)
    return Trained(folder / LORA, found, outcome, data.hash, memory, warnings)


def curated(folder: Path) -> tuple[list[Example], str]:
    """The pictures of a dataset that `likeness dataset curate` made, and its trigger word. Raises InvalidRequest as `read_dataset`."""
    from training.dataset.dataset import read_dataset

    dataset = read_dataset(folder)
    found = [
        Example(folder / picture.file, picture.caption, None if picture.mask is None else folder / picture.mask, picture.face)
        for picture in dataset.pictures
    ]
    return found, dataset.trigger


def planned(settings: TrainingSettings, base: Base, device: torch.device) -> MemoryPlan:
    """What the training will take of the device. Raises NotEnoughMemory, which says what would fit."""
    targets = settings.targets_of(base.entry.family)
    return plan(settings, base.outline(), targets, base.pixels_of_a_token, base.text_tokens, free_bytes(device))


def warnings_of(examples: Sequence[Example], trigger_word: str, base: Base) -> tuple[str, ...]:
    """Raises InvalidRequest where there is nothing to train on."""
    subject = [example for example in examples if not example.prior]
    if not subject:
        raise InvalidRequest("There are no pictures of the subject to train on.", "Bring ten or more, each of the one person.")
    few = [f"There are only {len(subject)} pictures; below {FEW} a LoRA learns them rather than the person."] if len(subject) < FEW else []
    return (*few, *trigger_warnings(trigger_word, [example.caption for example in subject], base.tokenisers()))


def _encoded(
    settings: TrainingSettings, examples: Sequence[Example], trigger_word: str, cache: Path, base: Base, told: Told
) -> tuple[TrainingSet, PromptEmbeds | None]:
    """The data, and the prompts of samples. What encodes lives no longer than this call."""
    captions = PromptCache(base.prompts(), folder=SharedFolder(cache / "captions"))
    moments = MomentsCache(cache / "latents", base.moments, base.vae_revision())
    data = prepare(
        examples, captions, moments, resolutions=settings.resolutions, divisor=base.pixels_of_a_token, max_length=base.text_tokens,
        mask_weight=settings.mask_weight, face_share=settings.face_share, held_out=settings.held_out, trigger_word=trigger_word, told=told,
    )  # fmt: skip
    return data, captions.encode(settings.sample_prompts, base.text_tokens) if settings.sample_every else None


def _sampler(
    settings: TrainingSettings, base: Base, transformer: Any, prompts: PromptEmbeds, empty: PromptEmbeds, folder: Path
) -> Callable[[int], None]:
    """Draws each sample prompt with the seed of its place, so that the samples of two checkpoints can be compared."""
    draw, side = base.drawing(transformer), max(settings.resolutions)

    def sample(step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for number in range(len(settings.sample_prompts)):
            drawn = draw(_row(prompts, number), empty, side, settings.seed + number)
            drawn.save(folder / f"step-{step:06d}-{number}.png")

    return sample


def _row(prompts: PromptEmbeds, row: int) -> PromptEmbeds:
    return PromptEmbeds(prompts.states[row : row + 1], prompts.pooled[row : row + 1])


def _kept_settings(settings: TrainingSettings, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if _first():
        (folder / "settings.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False), encoding="utf-8")


def _put(source: Path, target: Path) -> None:
    draft = target.with_name(f".{target.name}.part")
    shutil.copyfile(source, draft)
    os.replace(draft, target)


def _freed(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0
