"""`python -m benchmarks.packed_identity [--people 8] [--write docs/packed_identity.jpg]`: what packed weights do to a likeness, on a CPU.

Draws the sample characters with PuLID on the embedded base, its weights as they are and packed, and lets the judge compare. The pack is
published in plain fp8, which Likeness's fp8 keeps to the last bit; so every weight is first moved, at random, to somewhere between
its two neighbours in fp8, as if it had never been rounded. Needs no server.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

from benchmarks.likeness_studio import Drawings, Studio, compared
from deployments.contact_sheet import contact_sheet
from deployments.denoisers.packed import Storage, pack

# e4m3: three bits of mantissa, and nothing finer than 2^-9 (OCP 8-bit floating point, table 1).
_MANTISSA_BITS, _FINEST = 3, -9


def unrounded(model: nn.Module) -> None:
    """Moves every weight of the blocks by up to half a step of plain e4m3: rounded again, most are what they were."""
    generator = torch.Generator().manual_seed(0)
    for weight in _weights(model):
        exponent = weight.abs().clamp_min(1e-30).log2().floor() - _MANTISSA_BITS
        weight += torch.exp2(exponent.clamp_min(_FINEST)) * (torch.rand(weight.shape, generator=generator) - 0.5)


def packed(model: nn.Module, storage: Storage) -> None:
    pack(_blocks(model), storage, torch.device("cpu"), torch.device("cpu"))


def _blocks(model: Any) -> list[nn.Module]:
    return [*model.transformer_blocks, *model.single_transformer_blocks]


def _weights(model: nn.Module) -> list[torch.Tensor]:
    return [layer.weight.data for block in _blocks(model) for layer in block.modules() if isinstance(layer, nn.Linear)]


_WAYS: Mapping[str, Callable[[nn.Module], None]] = {
    "fp32": lambda model: None,
    "fp8": lambda model: packed(model, "fp8"),
    "nf4": lambda model: packed(model, "nf4"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--write", type=Path, help="a picture of all pictures; the figures go beside it, as .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    studio = Studio(options.people)
    drawn = {way: _drawn(studio, change) for way, change in _WAYS.items()}
    figures = {way: compared(drawn[way], drawn["fp32"]) for way in _WAYS}
    print(json.dumps(figures, indent=1))
    if options.write is not None:
        order = [(way, number) for number in range(options.people) for way in _WAYS]
        captions = [f"{way}: {drawn[way].cosines[number]:.3f}" for way, number in order]
        sheet = contact_sheet([drawn[way].pictures[number] for way, number in order], captions, columns=2 * len(_WAYS))
        Image.fromarray(sheet).save(options.write, quality=88)
        options.write.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _drawn(studio: Studio, change: Callable[[nn.Module], None]) -> Drawings:
    """With weights that were changed so."""
    denoiser = studio.denoiser()
    unrounded(denoiser.transformer)
    change(denoiser.transformer)
    pictures = studio.draw(denoiser)
    return Drawings(pictures, studio.cosines(pictures))


if __name__ == "__main__":
    main()
