"""`python -m benchmarks.memory_modes [--tiny] [--seconds 240] [--write docs/memory_modes.md]`: each memory mode in figures.

At FLUX.1-dev's true size with random weights, on one GPU: peak memory while denoising and while decoding, seconds a step, and how far
the result is from that of `full`. Rows are printed as they come; a row that fails says why, and the others go on; rows for which no
time is left are left out by name. `--tiny` goes the same ways on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.hooks import apply_group_offloading
from torch import Tensor

from benchmarks.memory_page import page
from benchmarks.true_size import SCHEDULER, Maker, RandomControl, Sizes, tiny_sizes, true_sizes
from deployments.denoisers.flux1_loop import Call, Influence, Text, denoise
from deployments.denoisers.latents import Grid, positions, unpack
from deployments.denoisers.lora.stack import applied
from deployments.denoisers.lora.weights import LoraWeights
from deployments.denoisers.memory import Arrangement, arrange
from deployments.denoisers.placement import Resident, Whole
from deployments.denoisers.schedule import sampler
from deployments.hardware import MemoryMode
from deployments.identity.pulid import CONDITION_KEY, PuLIDCondition, inject

STEPS = 4
_VAE_FACTOR = 16
_GIB = 2**30
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError, ImportError, OSError)


@dataclass
class Row:
    """One way of drawing. Memory in GiB, of tensors (allocated) at its peak; used: of the whole GPU at the end, with what torch keeps and
    CUDA's own. first_s: the first step, with what has to be brought for it; step_s: median of the others. difference: of the latents
    from those of `full`, relative."""

    name: str
    denoise_gib: float | None = None
    decode_gib: float | None = None
    used_gib: float | None = None
    arrange_s: float | None = None
    first_s: float | None = None
    step_s: float | None = None
    decode_s: float | None = None
    difference: float | None = None
    error: str = ""
    notes: dict[str, Any] = field(default_factory=dict)


class Bench:
    """Everything that rows share: one VAE, one PuLID, the inputs, and the latents of `full` with PuLID once they are known."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype, seconds: float, only: Sequence[str]) -> None:
        """seconds: after which no row begins. only: names of rows; none: all."""
        self._only = (*only, "full") if only else ()
        self.make, self.device, self.sizes = Maker(sizes, device, dtype), device, sizes
        self.rows: list[Row] = []
        self.reference: Tensor | None = None
        self._ends = time.perf_counter() + seconds
        self.vae: Any = self.make.vae()
        self.pulid = self.make.pulid()
        del self.pulid.pulid_encoder  # runs in another process
        self.transformer: Any = self.make.transformer()
        self.injection = inject(self.transformer, self.pulid)
        side = sizes.pixels // _VAE_FACTOR
        self.grid = Grid(side, side, 16)
        self.call = self._call()

    def _call(self) -> Call:
        config = self.transformer.config
        prompt = Text(self.make.random(1, self.sizes.text, config.joint_attention_dim), self.make.random(1, config.pooled_projection_dim))
        latents = self.make.random(1, self.grid.tokens, config.in_channels).float()
        return Call(latents=latents, positions=positions(self.grid).to(self.device), prompt=prompt, guidance=3.5)

    def with_person(self, call: Call | None = None) -> Call:
        config = self.pulid.config
        torch.manual_seed(1)
        tokens = self.make.random(1, config.queries, config.output_dim)
        condition: PuLIDCondition = self.injection.condition(tokens)
        return replace(call or self.call, influences=[Influence(CONDITION_KEY, condition, (), 0.0, 1.0)])

    def with_control(self, call: Call, net: Any) -> Call:
        config = self.transformer.config
        control = RandomControl(net, self.make.random(*call.latents.shape), (config.num_layers, config.num_single_layers))
        return replace(call, controls=[control])

    def renew(self) -> None:
        """A transformer whose weights nothing was done to, the same as before."""
        del self.transformer, self.injection
        _tidy()
        self.transformer = self.make.transformer()
        self.injection = inject(self.transformer, self.pulid)

    def measure(self, name: str, fill: Callable[[Row], None]) -> None:
        """One row, printed. What goes wrong while it is filled stands in it."""
        if self._only and name not in self._only:
            return
        row = Row(name)
        self.rows.append(row)
        try:
            if time.perf_counter() > self._ends:
                raise RuntimeError("left out, no time was left")
            fill(row)
        except _FAILURES as error:
            row.error = f"{type(error).__name__}: {str(error)[:300]}"
        print(json.dumps({key: value for key, value in asdict(row).items() if value not in (None, "", {})}), flush=True)
        _tidy()

    def draw(self, row: Row, call: Call, arrangement: Arrangement, nets: Sequence[Any] = (), loras: Sequence[LoraWeights] = ()) -> None:
        """Fills the row in."""
        laps: list[float] = []

        def lap(step: int) -> None:
            _settle(self.device)
            laps.append(time.perf_counter())

        _tidy()
        _reset_peak(self.device)
        scheduler = sampler(SCHEDULER, STEPS, self.grid.tokens, self.device)
        with torch.inference_mode():
            lap(0)
            with arrangement.denoising(nets), applied(self.transformer, [(lora, 1.0) for lora in loras]):
                latents = denoise(self.transformer, scheduler, call, before_forward=lambda: None, after_step=lap)
            seconds = [after - before for before, after in zip(laps, laps[1:], strict=False)]
            row.first_s, row.step_s = round(seconds[0], 3), round(sorted(seconds[1:])[len(seconds[1:]) // 2], 4)
            row.denoise_gib = _reset_peak(self.device)
            self._decode(row, latents, arrangement)
        if not latents.isfinite().all():
            row.notes["finite"] = False
        if self.reference is not None:
            row.difference = float((latents - self.reference).norm() / self.reference.norm())
        self.latents = latents

    def _decode(self, row: Row, latents: Tensor, arrangement: Arrangement) -> None:
        started = time.perf_counter()
        with arrangement.decoding():
            self.vae.decode(unpack(latents, self.grid).to(self.make.dtype), return_dict=False)
            _settle(self.device)
        row.decode_s, row.decode_gib, row.used_gib = round(time.perf_counter() - started, 3), _reset_peak(self.device), _used(self.device)


def on_top(bench: Bench) -> None:
    """In bf16 with everything on the GPU: the base, and one after the other what goes on top. PuLID alone is the reference."""
    resident = arrange(bench.transformer, bench.vae, "full", bench.device)
    loras: list[LoraWeights] = []

    def with_lora(row: Row) -> None:
        loras.append(bench.make.lora(bench.transformer, rank=32))
        bench.draw(row, bench.call, resident, loras=loras)

    def with_control(row: Row) -> None:
        net = bench.make.control()
        row.notes["controlnet_parameters"] = sum(weight.numel() for weight in net.parameters())
        bench.draw(row, bench.with_control(bench.with_person(), net), resident, loras=loras)

    def with_encoders(row: Row) -> None:
        encoders = bench.make.encoders()
        row.notes["encoder_parameters"] = sum(weight.numel() for encoder in encoders for weight in encoder.parameters())
        bench.draw(row, bench.with_person(), resident)

    bench.draw(Row("to warm up"), bench.call, resident)
    bench.measure("base", lambda row: bench.draw(row, bench.call, resident))
    bench.measure("base + LoRA", with_lora)
    bench.measure("base + LoRA + PuLID", lambda row: bench.draw(row, bench.with_person(), resident, loras=loras))
    bench.measure("base + LoRA + PuLID + ControlNet", with_control)
    loras.clear()
    bench.measure("full", lambda row: bench.draw(row, bench.with_person(), resident))
    bench.reference = bench.latents
    bench.measure("full, and every encoder in the same process", with_encoders)


def in_modes(bench: Bench) -> None:
    """Each mode with PuLID, from a transformer to which nothing was done."""
    modes: list[MemoryMode] = ["offload", "group", "sequential", "fp8", "fp8-offload", "fp8-sequential", "nf4", "nf4-offload"]

    def fill(row: Row, mode: MemoryMode) -> None:
        bench.renew()
        started = time.perf_counter()
        arrangement = arrange(bench.transformer, bench.vae, mode, bench.device)
        row.arrange_s = round(time.perf_counter() - started, 1)
        bench.draw(row, bench.with_person(), arrangement)
        arrangement.release()

    for mode in modes:
        bench.measure(mode, partial(fill, mode=mode))


def as_stock(bench: Bench) -> None:
    """diffusers' own ways to the same ends, for comparison."""
    on_gpu = bench.device.type == "cuda"

    def casting(row: Row) -> None:
        bench.renew()
        bench.transformer.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=bench.make.dtype)
        bench.draw(row, bench.with_person(), Arrangement(_AsItIs(), Resident([bench.vae], bench.device), {}))

    def offloading(row: Row, level: str, **options: Any) -> None:
        bench.renew()
        started = time.perf_counter()
        apply_group_offloading(bench.transformer, bench.device, offload_type=level, use_stream=on_gpu, **options)
        row.arrange_s = round(time.perf_counter() - started, 1)
        bench.draw(row, bench.with_person(), Arrangement(_AsItIs(), Whole([bench.vae], bench.device), {}))

    bench.measure("diffusers: layerwise casting to fp8", casting)
    bench.measure("diffusers: group offloading by blocks", partial(offloading, level="block_level", num_blocks_per_group=1))
    bench.measure("diffusers: group offloading by leaves", partial(offloading, level="leaf_level"))


class _AsItIs:
    """The placement of a module that others placed."""

    def present(self) -> AbstractContextManager[None]:
        return nullcontext()

    def release(self) -> None:
        """There is nothing to undo."""


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> float | None:
    """GiB at the peak since the last call."""
    if device.type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated(device) / _GIB
    torch.cuda.reset_peak_memory_stats(device)
    return round(peak, 2)


def _used(device: torch.device) -> float | None:
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return round((total - free) / _GIB, 2)


def _tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def machine(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU, tiny sizes"
    return f"{name}, torch {torch.__version__}, diffusers {diffusers.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="tiny models on the CPU")
    parser.add_argument("--seconds", type=float, default=220, help="no row begins after that many")
    parser.add_argument("--write", type=Path, help="a Markdown file for the figures; beside it they go into a .json file")
    parser.add_argument("--only", nargs="*", default=[], metavar="ROW", help="names of rows; the others keep the figures of the .json file")
    options = parser.parse_args()
    device, dtype = (torch.device("cpu"), torch.float32) if options.tiny else (torch.device("cuda"), torch.bfloat16)
    bench = Bench(tiny_sizes() if options.tiny else true_sizes(), device, dtype, options.seconds, options.only)
    for stage in (on_top, in_modes, as_stock):
        stage(bench)
    if options.write is not None:
        _write(options.write, {"machine": machine(device), "rows": [asdict(row) for row in bench.rows]})


def _write(path: Path, figures: dict[str, Any]) -> None:
    former = path.with_suffix(".json")
    if former.is_file():
        measured = {row["name"]: row for row in figures["rows"]}
        rows = json.loads(former.read_text(encoding="utf-8"))["rows"]
        figures["rows"] = [measured.pop(row["name"], row) for row in rows] + list(measured.values())
    former.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    identity = path.with_name("packed_identity.json")
    likeness = json.loads(identity.read_text(encoding="utf-8")) if identity.is_file() else None
    path.write_text(page(figures, likeness), encoding="utf-8")


if __name__ == "__main__":
    main()
