"""The page that memory_modes.py writes, out of its figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

from deployments.denoisers.memory import CHANGES_PIXELS
from deployments.hardware import MemoryMode

# What others report for pipelines of the same parts, in GB: PuLID's own demo (ToTheBeginning/PuLID, docs/pulid_for_flux.md; its
# "aggressive offload" is our `sequential`), and a character workflow in ComfyUI on an RTX A6000, bf16.
_REPORTED: Mapping[str, str] = {
    "base": "33",
    "base + LoRA": "34",
    "base + LoRA + PuLID": "36",
    "base + LoRA + PuLID + ControlNet": "40",
    "full, and every encoder in the same process": "45",
    "offload": "30",
    "sequential": "23",
    "fp8-offload": "17",
    "fp8-sequential": "11",
}
_COLUMNS = ("denoise_gib", "decode_gib", "used_gib", "step_s", "first_s", "difference")


def page(figures: Mapping[str, Any], identity: Mapping[str, Any] | None = None) -> str:
    """figures: `machine`, `rows`, and a `remark` where someone has one to make; identity: of packed_identity.py, if it was measured."""
    rows, modes = figures["rows"], get_args(MemoryMode)
    stock = [row for row in rows if row["name"].startswith("diffusers")]
    on_top = [row for row in rows if row["name"] not in modes and row not in stock]
    return f"""# Memory modes, measured

`memory` of a denoiser says how the weights of the blocks are stored and where they are while they do not work
(deployments/denoisers/memory.py). Where they lie changes no pixel; how they are stored does.

| mode | the blocks of the transformer | the VAE | other pixels than `full` |
|---|---|---|---|
| `full` | on the GPU | on the GPU | – |
| `offload` | come to denoise, go to decode | comes to decode | no |
| `group` | two at a time, the next one comes while one computes | comes to decode | no |
| `sequential` | the same, linear module by linear module | comes to decode | no |
| `fp8` | in 8 bits (e4m3, scaled), on the GPU | on the GPU | yes |
| `fp8-offload`, `fp8-sequential` | in 8 bits, otherwise as above | comes to decode | yes |
| `nf4`, `nf4-offload` | in 4 bits (nf4, as in bitsandbytes), otherwise as above | as above | yes |

Adapters, LoRAs and what lies beside the blocks (half a percent of the transformer) stay on the GPU; ControlNets lie as the transformer.

## On one GPU

Written by `python -m benchmarks.memory_modes --write docs/memory_modes.md`: {figures["machine"]}.
FLUX.1-dev's true size with random weights, bf16, 1024 x 1024, 512 tokens of text, 4 steps. Text and face encoders run in other
processes, except where a row says otherwise.

GiB of tensors at the peak while denoising and while decoding, and of the whole GPU, CUDA's own included, after both. First step: with what
has to be brought before it. Difference: of the latents from those of `full`, relative; 0 is bit for bit. Reported: GB, by others, for
pipelines of the same parts.

{_table("in bf16, all on the GPU", on_top)}

{_table("mode, with PuLID", [row for row in rows if row["name"] in modes])}

diffusers' own ways to the same ends, with PuLID:

{_table("", stock)}
{_remark(figures.get("remark", ""))}{_identity(identity) if identity else ""}"""


def _table(title: str, rows: Sequence[Mapping[str, Any]]) -> str:
    names = (title, "denoising", "decoding", "whole GPU", "reported", "s a step", "first step", "difference")
    return "\n".join([f"| {' | '.join(names)} |", "|---" * len(names) + "|", *(_line(row) for row in rows)])


def _line(row: Mapping[str, Any]) -> str:
    name = f"`{row['name']}`" if row["name"] in CHANGES_PIXELS else row["name"]
    if row["error"]:
        return f"| {name} | {row['error']} |" + " |" * len(_COLUMNS)
    cells = ["–" if row[column] is None else f"{row[column]:.3g}" for column in _COLUMNS]
    return f"| {name} | " + " | ".join([*cells[:3], _REPORTED.get(row["name"], "–"), *cells[3:]]) + " |"


def _remark(remark: str) -> str:
    return f"\n{remark}\n" if remark else ""


def _identity(figures: Mapping[str, Any]) -> str:
    lines = [
        f"| {way} | {found['likeness']:.3f} | {found['change']:+.3f} ± {found['standard_error']:.3f} | {found['pixels']:.1f} |"
        for way, found in figures.items()
    ]
    return f"""
## What packing does to a likeness

Written by `python -m benchmarks.packed_identity --write docs/packed_identity.jpg`: the sample characters, drawn with PuLID on the embedded
base by the same seeds. Its weights are published in plain fp8, and the mode `fp8` draws from them what `full` draws, to the last bit. So
each of them was first moved at random, by up to half a step of fp8: rounding them takes most back to where they were trained, hence it is
the size of the change that counts, not its sign. The embedded base is a thousandth of FLUX.1-dev and feels rounding more than that does.

| weights | likeness (the judge's cosine) | change, ± standard error | mean change of a pixel, of 255 |
|---|---|---|---|
{chr(10).join(lines)}

![fp32, fp8 and nf4 beside one another](packed_identity.jpg)
"""
