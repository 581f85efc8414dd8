"""The embedded pack's denoiser, small requests for it, and people who are mere numbers: what the tests of drawing share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import FluxPipeline

from deployments.contracts import GenerationSpec, IdentityRequest, IdentityTokens, PromptEmbeds
from deployments.denoisers.flux1 import Attach, Flux1Denoiser
from deployments.identity import instantx_ip_adapter as instantx
from deployments.identity.pulid import config_of
from deployments.identity.pulid_adapter import PuLIDAdapter
from deployments.identity.xlabs_ip_adapter import XLabsAdapter, load_projection
from deployments.weights import models_root, safetensors_header
from tests.named_weights import named_tensor

PACK: Path = models_root() / "mini"
FLUX = PACK / "flux1"
PULID_FILE = PACK / "pulid" / "pulid_flux_mini.safetensors"
XLABS_FILE = PACK / "xlabs-ip-adapter" / "ip_adapter.safetensors"
INSTANTX_FILE = PACK / "instantx-ip-adapter" / "ip-adapter.safetensors"
PULID, XLABS, INSTANTX = "pulid-mini", "xlabs-ip-adapter-mini", "instantx-ip-adapter-mini"
ATTACH: dict[str, Attach] = {
    PULID: partial(PuLIDAdapter, path=PULID_FILE),
    XLABS: partial(XLabsAdapter, path=XLABS_FILE),
    INSTANTX: partial(instantx.InstantXAdapter, path=INSTANTX_FILE),
}
SIZE, STEPS, LENGTH = 64, 4, 48
PROMPT, NEGATIVE = "a portrait of a smiling person wearing a red t-shirt in a cafe", "a full body photo in a desert"


def denoiser(*models: str, **options: Any) -> Flux1Denoiser:
    return Flux1Denoiser(FLUX, {model: ATTACH[model] for model in models}, **options)


def spec(*identities: IdentityRequest, **changes: Any) -> GenerationSpec:
    usual: dict[str, Any] = {
        "base": "flux1-mini", "prompt": PROMPT, "negative_prompt": NEGATIVE, "width": SIZE, "height": SIZE, "steps": STEPS,
        "guidance_scale": 2.5, "seed": 7, "max_sequence_length": LENGTH,
    }  # fmt: skip
    return GenerationSpec(identities=identities, **(usual | changes))


@cache
def pipeline() -> FluxPipeline:
    pipe = FluxPipeline.from_pretrained(FLUX, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def texts() -> PromptEmbeds:
    """The prompt and the negative prompt."""
    with torch.no_grad():
        states, pooled, _ = pipeline().encode_prompt([PROMPT, NEGATIVE], None, max_sequence_length=LENGTH)
    return PromptEmbeds(states, pooled)


def pulid_person(name: str) -> IdentityTokens:
    config = config_of(safetensors_header(PULID_FILE).metadata)
    own, nobody = (named_tensor(f"{who}'s tokens", 1, config.queries, config.output_dim) for who in (name, "nobody"))
    return IdentityTokens(PULID, own, nobody)


def clip_embedding(name: str) -> torch.Tensor:
    """[1, image_dim]"""
    return named_tensor(f"{name}'s picture", 1, load_projection(XLABS_FILE).config.image_dim)


def xlabs_person(name: str) -> IdentityTokens:
    projection, embedding = load_projection(XLABS_FILE), clip_embedding(name)
    return IdentityTokens(XLABS, projection.tokens(embedding), projection.tokens(torch.zeros_like(embedding)))


def instantx_person(name: str) -> IdentityTokens:
    projection = instantx.load_projection(INSTANTX_FILE)
    tokens = projection.tokens(named_tensor(f"{name}'s picture, as SigLIP sees it", 1, projection.config.image_dim))
    return IdentityTokens(INSTANTX, tokens, tokens[:, :0])


PERSON: dict[str, Callable[[str], IdentityTokens]] = {PULID: pulid_person, XLABS: xlabs_person, INSTANTX: instantx_person}
METHOD = {PULID: "pulid", XLABS: "xlabs-ip-adapter-v2", INSTANTX: "instantx-ip-adapter"}


def request(model: str, **changes: Any) -> IdentityRequest:
    return IdentityRequest(method=METHOD[model], **changes)


@contextmanager
def forwards(flux: Flux1Denoiser) -> Iterator[list[int]]:
    """Grows by one whenever a forward of the transformer starts, seen by a hook of torch's own."""
    transformer: Any = flux.transformer
    started: list[int] = []
    handle = transformer.register_forward_pre_hook(lambda module, args: started.append(1))
    try:
        yield started
    finally:
        handle.remove()


@contextmanager
def adapter_layers(flux: Flux1Denoiser) -> Iterator[list[int]]:
    """Grows by the id of each linear layer that is called and is none of the transformer's own."""
    own = {id(module) for module in flux.transformer.modules()}
    called: list[int] = []

    def note(module: torch.nn.Module, args: object, output: object) -> None:
        if isinstance(module, torch.nn.Linear) and id(module) not in own:
            called.append(id(module))

    handle = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        yield called
    finally:
        handle.remove()
