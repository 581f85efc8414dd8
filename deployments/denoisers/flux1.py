"""FLUX.1 as a denoiser: transformer, sampler and decoder of a diffusers folder, without its text encoders, and what is attached to it.

Works for the embedded mini, FLUX.1-dev and its descendants alike, on a CPU in fp32 or on a GPU in bf16. Knows no method of identity and no
ControlNet: they are handed in as functions that attach or open them, and are found again by the catalogue's id of their weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor, nn

from deployments.contracts import (
    RGB,
    ControlRequest,
    Drawn,
    GenerationSpec,
    Guides,
    IdentityRequest,
    IdentityTokens,
    Mask,
    Progress,
    PromptEmbeds,
)
from deployments.denoisers.base import NO_GUIDES, Cancelled, OnStep, ignored, never
from deployments.denoisers.first_block_cache import FirstBlockCache
from deployments.denoisers.flux1_controlnet import UnionControl
from deployments.denoisers.flux1_loop import TEXT_KEY, Call, Control, Influence, Text, denoise
from deployments.denoisers.folders import open_part
from deployments.denoisers.latents import PATCH, Grid, from_picture, noise, pack, positions, to_picture, unpack
from deployments.denoisers.lora.cache import CacheCounts
from deployments.denoisers.lora.shelf import Files, LoraShelf
from deployments.denoisers.lora.stack import applied
from deployments.denoisers.memory import arrange
from deployments.denoisers.previews import Previews, preview_steps
from deployments.denoisers.schedule import sampler
from deployments.denoisers.single_file import open_transformer, open_vae
from deployments.denoisers.windows import first_step
from deployments.errors import Cancelled as CancelledError
from deployments.errors import InvalidRequest, UnsupportedCombination
from deployments.hardware import MemoryMode

if TYPE_CHECKING:
    from deployments.identity.base import Condition, IdentityAdapter


Attach = Callable[[FluxTransformer2DModel], "IdentityAdapter"]
OpenControl = Callable[..., UnionControl]
"""(transformer, device=, dtype=) -> the net."""
LORA_CACHE_BYTES = 2 * 2**30
"""Of a rank-32 LoRA of FLUX.1-dev, 344 MB in bf16, six."""
# How long a waiting thread sleeps between two looks at whether its request was cancelled. The lock wakes it at once.
_PATIENCE_S = 0.05


class Flux1Denoiser:
    """A Denoiser. Every request draws alone: a lock guards the transformer, and nothing of a request stays on it."""

    def __init__(
        self,
        folder: Path,
        adapters: Mapping[str, Attach] | None = None,
        *,
        controls: Mapping[str, OpenControl] | None = None,
        loras: Files | None = None,
        lora_cache_bytes: int = LORA_CACHE_BYTES,
        files: Mapping[str, Path] | None = None,
        memory: MemoryMode = "full",
        cache_threshold: float = 0.0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        torch_threads: int | None = None,
    ) -> None:
        """folder: of a FluxPipeline. adapters: catalogue id of the weights -> what attaches them, in this order, for good.

        controls: catalogue id of a ControlNet -> what opens it. loras: where the file of a sha256 lies; lora_cache_bytes: of them on the
        device between requests. files: single files to read in place of the folder's weights, `transformer` and
        `vae`; the configurations stay the folder's. memory: how the weights lie, see memory.py.
        cache_threshold: of the first-block cache, which changes pixels; 0 is without it.
        torch_threads: how many CPU threads all of torch may use in this process; None leaves it as it is.
        Raises CheckpointMismatch, and whatever the adapters raise.
        """
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self._device = torch.device(device)
        self._transformer, self._vae = _opened(folder, files or {}, dtype)
        self._schedule = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
        self._dtype = dtype
        self._controls = {model: open_(self._transformer, device=self._device, dtype=dtype) for model, open_ in (controls or {}).items()}
        nets = [control.net for control in self._controls.values()]
        self._lying = arrange(self._transformer, self._vae, memory, self._device, nets)
        self._adapters = {model: attach(self._transformer) for model, attach in (adapters or {}).items()}
        self._cache = FirstBlockCache(self._transformer, cache_threshold) if cache_threshold else None
        self._loras = LoraShelf(self._transformer, loras, lora_cache_bytes)
        self._turn = threading.Lock()

    @property
    def transformer(self) -> FluxTransformer2DModel:
        """For those who measure it or attach more to it; never while a picture is drawn."""
        return self._transformer

    @property
    def lora_counts(self) -> CacheCounts:
        """Of the LoRAs that are kept between requests."""
        return self._loras.counts

    @property
    def pixel_step(self) -> int:
        """Width and height are multiples of this: 16 for FLUX.1, 8 for mini."""
        return PATCH * self._vae_scale

    @property
    def _vae_scale(self) -> int:
        """Pixels along the side of a latent one."""
        return int(2 ** (len(self._vae.config.block_out_channels) - 1))

    def draw(
        self,
        spec: GenerationSpec,
        embeds: PromptEmbeds,
        identities: Sequence[IdentityTokens] = (),
        guides: Guides = NO_GUIDES,
        *,
        on_step: OnStep = ignored,
        cancelled: Cancelled = never,
        previews: int = 0,
    ) -> Drawn:
        """See Denoiser. seconds: `loras` (reading them), `wait` (for other pictures), `condition`, `denoise`, `decode`.

        previews: so many steps, at most, are reported with a preview (deployments/denoisers/previews.py). In memory modes that keep the
        VAE on the CPU it comes beside the transformer for each, then goes: a preview asks for the VAE's 0.2 GB and a little more.
        """
        grid = self._grid(spec)
        self._refuse_misfit(spec, embeds, identities)
        refuse_wrong_guides(spec, guides)
        watch, first = _Watch(), first_step(spec.steps, spec.strength)
        total = spec.steps - first + 1
        seen = Previews(preview_steps(spec.steps - first, previews), grid, self._vae_scale, self._pixels)

        def checkpoint() -> None:
            # Without waiting here the CPU would queue every forward before the first has run, and a cancel would come too late for all.
            self._settle()
            _refuse_cancelled(spec, cancelled)
            # What a control adds lies in what was cached, and the length of the text may change: then nothing is skipped.
            if self._cache is not None and (spec.controls or any(self._adapters[tokens.model].key == TEXT_KEY for tokens in identities)):
                self._cache.forget()

        def look(step: int, clean: Tensor) -> None:
            if not cancelled():
                seen.look(step, clean)

        def report(step: int) -> None:
            self._settle()
            on_step(Progress(step, total, seen.of(step)))

        with self._loras.held(spec.loras) as loras, self._alone(lambda: _refuse_cancelled(spec, cancelled)), torch.inference_mode():
            watch.lap("wait")
            scheduler = sampler(self._schedule, spec.steps, grid.tokens, self._device, first)
            call = self._call(spec, grid, embeds, identities, guides, first, scheduler.sigmas[first])
            watch.lap("condition")
            if self._cache is not None:
                self._cache.forget()
            with self._lying.denoising(self._nets(spec)), applied(self._transformer, loras):
                latents = denoise(
                    self._transformer, scheduler, call, before_forward=checkpoint, after_step=report, estimated=look if previews else None
                )
            watch.lap("denoise")
            checkpoint()
            picture = self._pixels(unpack(latents, grid))
            watch.lap("decode")
        on_step(Progress(total, total))
        return Drawn(picture, watch.seconds, tuple(tokens.left_out for tokens in identities))

    def eject(self) -> None:
        """Takes all adapters off again, the last one first. The transformer is then as it was opened."""
        with self._turn:
            if self._cache is not None:
                self._cache.eject()
                self._cache = None
            for model in reversed(list(self._adapters)):
                self._adapters.pop(model).eject()

    def _grid(self, spec: GenerationSpec) -> Grid:
        step = self.pixel_step
        if min(spec.width, spec.height) < step or spec.width % step or spec.height % step:
            raise InvalidRequest(f"{spec.width} x {spec.height} pixels cannot be drawn by {spec.base}.", f"Use multiples of {step}.")
        if spec.steps < 1:
            raise InvalidRequest(f"A picture takes at least one step, not {spec.steps}.")
        return Grid(spec.height // step, spec.width // step, self._transformer.config.in_channels // PATCH**2)

    def _refuse_misfit(self, spec: GenerationSpec, embeds: PromptEmbeds, identities: Sequence[IdentityTokens]) -> None:
        texts = 2 if spec.needs_negative else 1
        if len(embeds.states) < texts or len(embeds.pooled) < texts:
            raise ValueError(f"The request needs the embeddings of {texts} texts, not of {len(embeds.states)}: prompt, negative prompt.")
        if len(identities) != len(spec.identities):
            raise ValueError(f"{len(identities)} identities came for {len(spec.identities)} in the request; give one for each.")
        for tokens in identities:
            if tokens.model not in self._adapters:
                there = ", ".join(self._adapters) or "none"
                raise UnsupportedCombination(f"{tokens.model} is not attached to {spec.base} here.", f"Attached are: {there}.")
        for control in spec.controls:
            if control.model not in self._controls:
                there = ", ".join(self._controls) or "none"
                raise UnsupportedCombination(f"{control.model} is not deployed with {spec.base} here.", f"Deployed are: {there}.")

    @contextmanager
    def _alone(self, may_leave: Callable[[], None]) -> Iterator[None]:
        """Holds the lock. may_leave: raises if the wait for it is in vain."""
        may_leave()
        while not self._turn.acquire(timeout=_PATIENCE_S):
            may_leave()
        try:
            yield
        finally:
            self._turn.release()

    def _settle(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()

    def _call(
        self,
        spec: GenerationSpec,
        grid: Grid,
        embeds: PromptEmbeds,
        identities: Sequence[IdentityTokens],
        guides: Guides,
        first: int,
        sigma: Tensor,
    ) -> Call:
        """first: the step with which the drawing begins; sigma: its noise level."""
        generator = torch.Generator().manual_seed(spec.seed)
        latents = noise(grid, generator).to(self._device)
        if guides.begin is not None:
            latents = sigma * latents + (1 - sigma) * self._encoded(guides.begin)
        # Weight 0 is exactly the base: it is left out rather than multiplied.
        people = zip(spec.identities, identities, strict=True)
        controls = zip(spec.controls, guides.controls, strict=True)
        return Call(
            latents=latents,
            positions=positions(grid).to(self._device),
            prompt=self._text(embeds, 0),
            guidance=spec.guidance_scale,
            generator=generator,
            negative=self._text(embeds, 1) if spec.needs_negative else None,
            true_cfg_scale=spec.true_cfg_scale,
            true_cfg_start=spec.true_cfg_start,
            influences=[self._influence(request, tokens, grid, spec.needs_negative) for request, tokens in people if request.weight],
            controls=[self._control(request, picture) for request, picture in controls if request.scale],
            first_step=first,
        )

    def _nets(self, spec: GenerationSpec) -> list[nn.Module]:
        return [self._controls[model].net for model in dict.fromkeys(control.model for control in spec.controls if control.scale)]

    def _text(self, embeds: PromptEmbeds, row: int) -> Text:
        return Text(*(x[row : row + 1].to(self._device, self._dtype) for x in (embeds.states, embeds.pooled)))

    def _influence(self, request: IdentityRequest, tokens: IdentityTokens, grid: Grid, with_nobody: bool) -> Influence:
        adapter = self._adapters[tokens.model]
        mask = self._shares(request.mask, grid) if request.mask is not None else None
        own = adapter.condition(tokens.tokens, request, mask)
        nobody: Condition = adapter.condition(tokens.unconditional, request, mask) if with_nobody else ()
        return Influence(adapter.key, own, nobody, request.start, request.end)

    def _shares(self, mask: Mask, grid: Grid) -> Tensor:
        """What each token of the picture takes of a person: the mean of the mask over its patch, [1, tokens, 1]."""
        whole = torch.from_numpy(mask.shares)[None, None]
        return F.interpolate(whole, (grid.rows, grid.columns), mode="area").flatten(2).mT.to(self._device, self._dtype)

    def _control(self, request: ControlRequest, picture: RGB) -> Control:
        return self._controls[request.model].prepare(self._encoded(picture), request.mode, request.scale, request.start, request.end)

    def _encoded(self, picture: RGB) -> Tensor:
        """As tokens like those of a drawing, [1, tokens, channels] fp32. The likeliest latents, not drawn ones as in stock pipelines:
        a seed then means the same noise with a picture and without one."""
        config: Any = self._vae.config
        with self._lying.decoding():
            found: Any = self._vae.encode(from_picture(picture).to(self._device, self._dtype))
        return pack((found.latent_dist.mode().float() - config.shift_factor) * config.scaling_factor)

    def _pixels(self, latents: Tensor) -> RGB:
        """latents: [1, channels, h, w] fp32."""
        config: Any = self._vae.config
        scaled = latents / config.scaling_factor + config.shift_factor
        with self._lying.decoding():
            return to_picture(self._vae.decode(scaled.to(self._dtype), return_dict=False)[0])


def _opened(folder: Path, files: Mapping[str, Path], dtype: torch.dtype) -> tuple[FluxTransformer2DModel, AutoencoderKL]:
    """On the CPU: what of it goes elsewhere is for memory.py to say."""
    transformer = (
        open_transformer(files["transformer"], folder / "transformer", dtype)
        if "transformer" in files
        else open_part(FluxTransformer2DModel, folder, "transformer", dtype)
    )
    vae = open_vae(files["vae"], folder / "vae", dtype) if "vae" in files else open_part(AutoencoderKL, folder, "vae", dtype)
    return transformer, vae


def refuse_wrong_guides(spec: GenerationSpec, guides: Guides) -> None:
    """Raises ValueError where the pictures are not those that the spec asks for: a mistake of the program, not of a user."""
    if len(guides.controls) != len(spec.controls):
        raise ValueError(f"{len(guides.controls)} conditions came for {len(spec.controls)} controls in the request; give one for each.")
    if (guides.begin is None) != (spec.strength == 1):
        raise ValueError(f"A strength of {spec.strength:g} goes {'without' if spec.strength == 1 else 'with'} a picture to begin from.")
    for picture in (*guides.controls, *((guides.begin,) if guides.begin is not None else ())):
        if picture.shape != (spec.height, spec.width, 3):
            raise ValueError(f"A guide has the shape {picture.shape}, the drawing is {spec.height} x {spec.width} x 3.")


def _refuse_cancelled(spec: GenerationSpec, cancelled: Cancelled) -> None:
    if cancelled():
        raise CancelledError(f"The picture with seed {spec.seed} was cancelled.")


class _Watch:
    """Seconds by stage, in the order in which the stages ended."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, stage: str) -> None:
        now = time.perf_counter()
        self.seconds[stage] = now - self._last
        self._last = now
