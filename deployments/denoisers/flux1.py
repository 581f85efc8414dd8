"""FLUX.1 as a denoiser: transformer, sampler and decoder of a diffusers folder, without its text encoders, and what is attached to it.

Works for the embedded mini, FLUX.1-dev and its descendants alike, on a CPU in fp32 or on a GPU in bf16. Knows no method of identity: an
adapter is handed in as a function that attaches it, and is found again by the catalogue's id of its weights.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
from torch import Tensor

from deployments.contracts import RGB, Drawn, GenerationSpec, IdentityRequest, IdentityTokens, Progress, PromptEmbeds
from deployments.denoisers.base import Cancelled, OnStep, ignored, never
from deployments.denoisers.flux1_loop import Call, Influence, Text, denoise
from deployments.denoisers.folders import open_part
from deployments.denoisers.latents import PATCH, Grid, noise, positions, to_picture, unpack
from deployments.denoisers.schedule import sampler
from deployments.errors import Cancelled as CancelledError
from deployments.errors import InvalidRequest, UnsupportedCombination

if TYPE_CHECKING:
    from deployments.identity.base import Condition, IdentityAdapter

Attach = Callable[[FluxTransformer2DModel], "IdentityAdapter"]
# How long a waiting thread sleeps between two looks at whether its request was cancelled. The lock wakes it at once.
_PATIENCE_S = 0.05


class Flux1Denoiser:
    """A Denoiser. Every request draws alone: a lock guards the transformer, and nothing of a request stays on it."""

    def __init__(
        self,
        folder: Path,
        adapters: Mapping[str, Attach] | None = None,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        torch_threads: int | None = None,
    ) -> None:
        """folder: of a FluxPipeline. adapters: catalogue id of the weights -> what attaches them, in this order, for good.

        torch_threads: how many CPU threads all of torch may use in this process; None leaves it as it is.
        Raises CheckpointMismatch, and whatever the adapters raise.
        """
        if torch_threads is not None:
            torch.set_num_threads(torch_threads)
        self._device = torch.device(device)
        self._transformer = open_part(FluxTransformer2DModel, folder, "transformer", dtype).to(self._device)
        self._vae = open_part(AutoencoderKL, folder, "vae", dtype).to(self._device)
        self._schedule = FlowMatchEulerDiscreteScheduler.load_config(folder, subfolder="scheduler", local_files_only=True)
        self._dtype = dtype
        self._adapters = {model: attach(self._transformer) for model, attach in (adapters or {}).items()}
        self._turn = threading.Lock()

    @property
    def transformer(self) -> FluxTransformer2DModel:
        """For those who measure it or attach more to it; never while a picture is drawn."""
        return self._transformer

    @property
    def pixel_step(self) -> int:
        """Width and height are multiples of this: 16 for FLUX.1, 8 for mini."""
        return PATCH * int(2 ** (len(self._vae.config.block_out_channels) - 1))

    def draw(
        self,
        spec: GenerationSpec,
        embeds: PromptEmbeds,
        identities: Sequence[IdentityTokens] = (),
        *,
        on_step: OnStep = ignored,
        cancelled: Cancelled = never,
    ) -> Drawn:
        """See Denoiser. seconds: `wait` (for other pictures), `condition`, `denoise`, `decode`."""
        grid = self._grid(spec)
        self._refuse_misfit(spec, embeds, identities)
        watch, total = _Watch(), spec.steps + 1

        def checkpoint() -> None:
            # Without waiting here the CPU would queue every forward before the first has run, and a cancel would come too late for all.
            self._settle()
            _refuse_cancelled(spec, cancelled)

        def report(step: int) -> None:
            self._settle()
            on_step(Progress(step, total))

        with self._alone(lambda: _refuse_cancelled(spec, cancelled)), torch.inference_mode():
            watch.lap("wait")
            call = self._call(spec, grid, embeds, identities)
            watch.lap("condition")
            scheduler = sampler(self._schedule, spec.steps, grid.tokens, self._device)
            latents = denoise(self._transformer, scheduler, call, before_forward=checkpoint, after_step=report)
            watch.lap("denoise")
            checkpoint()
            picture = self._decode(latents, grid)
            watch.lap("decode")
        on_step(Progress(total, total))
        return Drawn(picture, watch.seconds)

    def eject(self) -> None:
        """Takes all adapters off again, the last one first. The transformer is then as it was opened."""
        with self._turn:
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

    def _call(self, spec: GenerationSpec, grid: Grid, embeds: PromptEmbeds, identities: Sequence[IdentityTokens]) -> Call:
        generator = torch.Generator().manual_seed(spec.seed)
        pairs = zip(spec.identities, identities, strict=True)
        # Weight 0 is exactly the base: it is left out rather than multiplied.
        influences = [self._influence(request, tokens, spec.needs_negative) for request, tokens in pairs if request.weight]
        return Call(
            latents=noise(grid, generator).to(self._device),
            positions=positions(grid).to(self._device),
            prompt=self._text(embeds, 0),
            guidance=spec.guidance_scale,
            generator=generator,
            negative=self._text(embeds, 1) if spec.needs_negative else None,
            true_cfg_scale=spec.true_cfg_scale,
            true_cfg_start=spec.true_cfg_start,
            influences=influences,
        )

    def _text(self, embeds: PromptEmbeds, row: int) -> Text:
        return Text(*(x[row : row + 1].to(self._device, self._dtype) for x in (embeds.states, embeds.pooled)))

    def _influence(self, request: IdentityRequest, tokens: IdentityTokens, with_nobody: bool) -> Influence:
        adapter = self._adapters[tokens.model]
        own = adapter.condition(tokens.tokens, request)
        nobody: Condition = adapter.condition(tokens.unconditional, request) if with_nobody else ()
        return Influence(adapter.key, own, nobody, request.start, request.end)

    def _decode(self, latents: Tensor, grid: Grid) -> RGB:
        config: Any = self._vae.config
        scaled = unpack(latents, grid) / config.scaling_factor + config.shift_factor
        return to_picture(self._vae.decode(scaled.to(self._dtype), return_dict=False)[0])


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
