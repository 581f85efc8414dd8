"""`python -m benchmarks.training_step`: seconds and peak memory of a training step of a LoRA, at FLUX.1-dev's true size on one GPU.

Random weights, cached latents and captions, two pictures of 1024 x 1024, rank 32. Our trainer and stock diffusers' loop, in one process one
after the other, with blocks computed twice or kept, compiled or not. `--tiny` runs the same on a CPU and says nothing about speed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from diffusers.training_utils import cast_training_params, compute_density_for_timestep_sampling
from peft import LoraConfig
from torch import Tensor
from torch.nn.attention import sdpa_kernel

from benchmarks.true_size import SCHEDULER, Maker, tiny_sizes, true_sizes
from deployments.contracts import PromptEmbeds
from training.buckets import Bucket
from training.export import LoraCard
from training.latent_cache import Item, TrainingSet
from training.loop import ATTENTION, Progress, Trainer, arranged
from training.settings import ATTENTION_ALONE, TARGETS, TrainingSettings, preset

RANK, PICTURES = 32, 2
_WARM_UP = 3
"""Steps that are not counted: compiling, and choosing kernels."""


@dataclass(frozen=True)
class Way:
    """ours: our trainer; else stock diffusers' loop."""

    ours: bool
    checkpointing: bool
    compiled: bool

    def __str__(self) -> str:
        blocks = "computed twice" if self.checkpointing else "kept"
        return f"{'ours' if self.ours else 'stock diffusers'}, blocks {blocks}{', compiled' if self.compiled else ''}"


@dataclass(frozen=True)
class Measured:
    """step_seconds: median. peak_gb: of 1e9 bytes, as torch's allocator counts; 0 on a CPU. loss: of the last step."""

    way: str
    step_seconds: float
    peak_gb: float
    loss: float


WAYS = tuple(Way(ours, twice, compiled) for ours in (False, True) for compiled in (False, True) for twice in (True, False))


def measure(way: Way, maker: Maker, steps: int, targets: str = TARGETS["flux1"]) -> Measured:
    """targets: regular expression of the modules that get a LoRA."""
    device = maker.device
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    transformer: Any = maker.transformer()
    with sdpa_kernel(ATTENTION):  # stock diffusers' loop takes whatever torch prefers, and dies of it where blocks are not compiled
        seconds, loss = (_ours if way.ours else _stock)(way, maker, transformer, steps + _WARM_UP, targets)
    peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return Measured(str(way), round(statistics.median(seconds[_WARM_UP:]), 4), round(peak, 2), round(loss, 4))


def _ours(way: Way, maker: Maker, transformer: Any, steps: int, targets: str) -> tuple[list[float], float]:
    arranged(transformer, checkpointing=way.checkpointing, compiled=way.compiled)
    settings = _settings(maker, steps, targets)
    seen: list[Progress] = []
    with tempfile.TemporaryDirectory() as folder:
        card = LoraCard("flux1-dev", "flux1", "", "0" * 64, PICTURES)
        trainer = Trainer(settings, transformer, _data(maker), Path(folder), card)
        # The last step also writes a checkpoint, which belongs to no step.
        trainer.run(None, seen.append, lambda: len(seen) + 1 >= steps)
    return [progress.seconds for progress in seen[:-1]], seen[-1].loss


def _settings(maker: Maker, steps: int, targets: str) -> TrainingSettings:
    dtype = str(maker.dtype).removeprefix("torch.")
    return preset(
        "flux-a100",
        batch=PICTURES,
        rank=RANK,
        alpha=RANK,
        targets=targets,
        steps=steps + 1,
        resolutions=[maker.sizes.pixels],
        checkpoint_every=10**6,
        dtype=dtype,
    )


def _data(maker: Maker) -> TrainingSet:
    """As the caches would give it."""
    sizes, side = maker.sizes, maker.sizes.pixels // 8
    items = [
        Item(Bucket(8 * side, 8 * side), mean, torch.full_like(mean, 0.1), None, 0, False)
        for mean in torch.randn(PICTURES, 16, side, side, generator=torch.Generator().manual_seed(0))
    ]
    width, pooled = sizes.flux.get("joint_attention_dim", 4096), sizes.flux.get("pooled_projection_dim", 768)
    prompts = PromptEmbeds(torch.randn(2, sizes.text, width, dtype=maker.dtype), torch.randn(2, pooled, dtype=maker.dtype))
    return TrainingSet(tuple(items), (), prompts, "0" * 64)


def _stock(way: Way, maker: Maker, transformer: Any, steps: int, targets: str) -> tuple[list[float], float]:
    """What huggingface/diffusers, examples/dreambooth/train_dreambooth_lora_flux.py does in a step, on cached latents and prompts."""
    device, data = maker.device, _data(maker)
    if way.checkpointing:
        transformer.enable_gradient_checkpointing()
    transformer.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, init_lora_weights="gaussian", target_modules=targets))
    cast_training_params(transformer, torch.float32)
    if way.compiled:
        transformer.compile_repeated_blocks()
    parameters = [p for p in transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4, eps=1e-8)
    transformer.train()
    step = _stock_step(transformer, maker, torch.stack([item.mean for item in data.trained]).to(device), data.prompts)
    seconds, found = [], 0.0
    for _ in range(steps):
        started = time.monotonic()
        with torch.autocast(device.type, torch.bfloat16, enabled=maker.dtype == torch.bfloat16):
            loss = step()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found = loss.item()  # the script logs it each step
        seconds.append(time.monotonic() - started)
    return seconds, found


def _stock_step(transformer: Any, maker: Maker, latents: Tensor, prompts: PromptEmbeds) -> Callable[[], Tensor]:
    scheduler: Any = FlowMatchEulerDiscreteScheduler.from_config(SCHEDULER)
    device, (n, channels, height, width) = maker.device, latents.shape
    states, pooled = (part[:1].expand(n, *part.shape[1:]).to(device) for part in (prompts.states, prompts.pooled))
    ids = FluxPipeline._prepare_latent_image_ids(n, height // 2, width // 2, device, maker.dtype)
    text_ids = torch.zeros(states.shape[1], 3, device=device, dtype=maker.dtype)
    guidance = torch.ones(n, device=device)

    def step() -> Tensor:
        noise = torch.randn_like(latents)
        drawn = compute_density_for_timestep_sampling("none", n, 0.0, 1.0, 1.29)
        index = (drawn * scheduler.config.num_train_timesteps).long()
        sigmas, times = (table[index].to(device) for table in (scheduler.sigmas, scheduler.timesteps))
        spread = sigmas.view(-1, 1, 1, 1)
        noisy = (1 - spread) * latents + spread * noise
        packed = FluxPipeline._pack_latents(noisy, n, channels, height, width).to(maker.dtype)
        predicted = transformer(
            hidden_states=packed, timestep=times / 1000, guidance=guidance, pooled_projections=pooled, encoder_hidden_states=states,
            txt_ids=text_ids, img_ids=ids, return_dict=False,
        )[0]  # fmt: skip
        unpacked = FluxPipeline._unpack_latents(predicted, 8 * height, 8 * width, 8)
        loss: Tensor = ((unpacked.float() - (noise - latents).float()) ** 2).reshape(n, -1).mean(1).mean()
        return loss

    return step


def table(found: list[Measured], device: str, on: str) -> str:
    rows = [f"| {one.way} | {one.step_seconds:.3f} | {one.peak_gb:.1f} |" for one in found]
    title = ["# A training step at true size, measured", "", "`python -m benchmarks.training_step --write docs/training_step.md`", ""]
    head = f"{device}, {PICTURES} pictures of 1024 x 1024, rank {RANK} on {on}, bf16."
    return "\n".join([*title, head, "", "| way | step (s) | peak (GB) |", "|---|---|---|", *rows, ""])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser("benchmarks.training_step", description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="at sizes that a CPU holds: proves that it runs")
    parser.add_argument("--steps", type=int, default=10, help="counted steps a way (default 10)")
    parser.add_argument("--attention", action="store_true", help="LoRAs on attention alone, not on every linear module but modulations")
    parser.add_argument("--eager", action="store_true", help="only the ways that compile nothing")
    parser.add_argument("--write", type=Path, help="a Markdown file for the table")
    told = parser.parse_args(argv)
    if not told.tiny and not torch.cuda.is_available():
        parser.error("the true size needs a GPU; --tiny runs here")
    device, dtype = (torch.device("cpu"), torch.float32) if told.tiny else (torch.device("cuda"), torch.bfloat16)
    maker = Maker(tiny_sizes() if told.tiny else true_sizes(), device, dtype)
    found = []
    for way in WAYS:
        if not (told.eager and way.compiled):
            found.append(measure(way, maker, told.steps, ATTENTION_ALONE if told.attention else TARGETS["flux1"]))
            print(json.dumps(asdict(found[-1])), flush=True)
    if told.write is not None:
        on = "attention alone" if told.attention else "every linear module of the blocks but modulations"
        told.write.write_text(table(found, "CPU" if told.tiny else torch.cuda.get_device_name(), on), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
