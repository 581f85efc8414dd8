"""`python -m benchmarks.packed_identity [--people 8] [--write docs/packed_identity.jpg]`: what packed weights do to a likeness, on a CPU.

Draws the sample characters with PuLID on the embedded base, its weights as they are and packed, and lets the judge compare. The pack is
published in plain fp8, which Likeness's fp8 keeps to the last bit; so every weight is first moved, at random, to somewhere between
its two neighbours in fp8, as if it had never been rounded. Needs no server.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from deployments.catalog import load_catalog
from deployments.contact_sheet import contact_sheet
from deployments.contracts import RGB, GenerationSpec, IdentityRequest, PersonPictures
from deployments.denoisers.flux1 import Flux1Denoiser
from deployments.denoisers.packed import Storage, pack
from deployments.face_server import FaceServer, FaceSettings
from deployments.hardware import TorchSettings
from deployments.identity.pulid_adapter import PuLIDAdapter
from deployments.identity_server import IdentityServer
from deployments.prompt_server import PromptServer, PromptSettings

_BASE, _METHOD = "flux1-mini", "pulid-mini"
_CHARACTERS = sorted((Path(__file__).parents[1] / "samples" / "characters").glob("*-1.png"))
_PROMPT = "a close-up portrait of a neutral person wearing a green hoodie in a forest with soft daylight"
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


class Studio:
    """Everything but the denoiser, which is opened anew for each way."""

    def __init__(self, people: int) -> None:
        torch_settings = TorchSettings(torch_threads=1)
        self._pulid = load_catalog().entry(_METHOD).located("adapter")
        self._folder = load_catalog().entry(_BASE).located("pipeline")
        self._faces = FaceServer(FaceSettings(faces="faces-mini", judge="face-judge-mini", parser="face-parser-mini"))
        pictures = [PersonPictures((path.read_bytes(),)) for path in _CHARACTERS[:people]]
        self._people = self._faces.people(pictures, ("embedding", "aligned", "judge"))
        self._request = IdentityRequest(method="pulid")
        self._tokens = IdentityServer([_METHOD], torch_settings).encode(self._people, [self._request] * people).tokens
        self._embeds = PromptServer(_BASE, PromptSettings()).encode([_PROMPT], 48).embeds

    def draw(self, change: Callable[[nn.Module], None]) -> list[RGB]:
        """One picture a person, with weights that were changed so."""
        denoiser = Flux1Denoiser(self._folder, {_METHOD: lambda transformer: PuLIDAdapter(transformer, path=self._pulid)})
        unrounded(denoiser.transformer)
        change(denoiser.transformer)
        pictures = []
        for seed, tokens in enumerate(self._tokens):
            spec = GenerationSpec(
                base=_BASE, prompt=_PROMPT, width=192, height=192, steps=20, guidance_scale=2.5, seed=seed, max_sequence_length=48,
                identities=(self._request,),
            )  # fmt: skip
            pictures.append(denoiser.draw(spec, self._embeds, [tokens]).picture)
        return pictures

    def cosines(self, pictures: list[RGB]) -> list[float]:
        """The judge's, of each picture against its person; no face counts as 0."""
        found = [self._faces.scores(picture, self._only(number))[0].cosines[0] for number, picture in enumerate(pictures)]
        return [cosine if cosine is not None else 0.0 for cosine in found]

    def _only(self, number: int) -> Any:
        return type(self._people)((self._people.persons[number],), {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--people", type=int, default=8)
    parser.add_argument("--write", type=Path, help="a picture of all pictures; the figures go beside it, as .json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    studio = Studio(options.people)
    drawn = {way: studio.draw(change) for way, change in _WAYS.items()}
    cosines = {way: studio.cosines(pictures) for way, pictures in drawn.items()}
    figures = {way: _figures(way, drawn, cosines) for way in _WAYS}
    print(json.dumps(figures, indent=1))
    if options.write is not None:
        order = [(way, number) for number in range(options.people) for way in _WAYS]
        captions = [f"{way}: {cosines[way][number]:.3f}" for way, number in order]
        sheet = contact_sheet([drawn[way][number] for way, number in order], captions, columns=2 * len(_WAYS))
        Image.fromarray(sheet).save(options.write, quality=88)
        options.write.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _figures(way: str, drawn: Mapping[str, list[RGB]], cosines: Mapping[str, list[float]]) -> dict[str, float]:
    """likeness: mean of the judge's cosine; change: its mean difference from fp32's, with its standard error; pixels: mean absolute
    difference from fp32's, of 255."""
    differences = [own - theirs for own, theirs in zip(cosines[way], cosines["fp32"], strict=True)]
    pixels = [np.abs(own.astype(int) - theirs).mean() for own, theirs in zip(drawn[way], drawn["fp32"], strict=True)]
    return {
        "likeness": round(statistics.mean(cosines[way]), 4),
        "change": round(statistics.mean(differences), 4),
        "standard_error": round(statistics.stdev(differences) / len(differences) ** 0.5, 4),
        "pixels": round(float(statistics.mean(pixels)), 3),
    }


if __name__ == "__main__":
    main()
