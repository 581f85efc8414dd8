"""The generator of a pack, opened by stock diffusers and asked for pictures in batches. For measuring; serving has its own loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import FluxControlNetModel, FluxControlNetPipeline, FluxPipeline
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from deployments.contracts import IdentityRequest
from deployments.identity.image_attention import IMAGE_KEY
from deployments.identity.instantx_ip_adapter import InstantXAdapter, load_projection
from deployments.identity.pulid import CONDITION_KEY, PuLID, PuLIDInjection, inject, load_pulid
from deployments.identity.siglip import Siglip
from training.mini.generator.pose_control import POSE_MODE
from training.mini.generator.text import TEXT_TOKENS
from training.mini.world.render import PICTURE_SIZE_PX

Pictures = NDArray[np.uint8]
"""[n, 192, 192, 3] RGB."""

STEPS = 20
GUIDANCE = 2.5


class Studio:
    """One generator, with whichever adapter is attached. Picture k of a call depends on seeds[k] and its own inputs alone."""

    def __init__(self, pack: Path, device: torch.device, batch: int | None = None) -> None:
        """batch: pictures drawn at once (default: 64 on a GPU, 4 on a CPU)."""
        self.pack, self.device = pack, device
        self.batch = batch if batch is not None else (64 if device.type == "cuda" else 4)
        self.pipe = FluxPipeline.from_pretrained(pack / "flux1", dtype=torch.float32).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self._injection: PuLIDInjection | None = None
        self._instantx: InstantXAdapter | None = None

    def draw(self, prompts: Sequence[str], seeds: Sequence[int], steps: int = STEPS, guidance: float = GUIDANCE) -> Pictures:
        """The prompts alone."""

        def call(part: slice) -> Pictures:
            return self._call(self.pipe, prompts[part], seeds[part], steps, guidance)

        return self._in_batches(len(prompts), call)

    def attach_pulid(self) -> PuLID:
        pulid = load_pulid(self.pack / "pulid" / "pulid_flux_mini.safetensors", self.device)
        self._injection = inject(self.pipe.transformer, pulid)
        return pulid

    def draw_identity(
        self, prompts: Sequence[str], seeds: Sequence[int], tokens: Tensor, weight: float, steps: int = STEPS, guidance: float = GUIDANCE
    ) -> Pictures:
        """With PuLID (attach it first). tokens: [n, queries, width], one identity a picture."""
        assert self._injection is not None, "attach_pulid() first"
        injection = self._injection

        def call(part: slice) -> Pictures:
            condition = injection.condition(tokens[part].to(self.device), weight)
            return self._call(self.pipe, prompts[part], seeds[part], steps, guidance, joint_attention_kwargs={CONDITION_KEY: condition})

        return self._in_batches(len(prompts), call)

    def detach_pulid(self) -> None:
        if self._injection is not None:
            self._injection.eject()
            self._injection = None

    def attach_ip_adapter(self) -> None:
        self.pipe.load_ip_adapter(
            self.pack / "xlabs-ip-adapter",
            weight_name="ip_adapter.safetensors",
            image_encoder_pretrained_model_name_or_path=str(self.pack / "clip-vision"),
            image_encoder_dtype=torch.float32,
        )

    def draw_like(self, prompts: Sequence[str], seeds: Sequence[int], references: Pictures, weight: float, steps: int = STEPS) -> Pictures:
        """With the IP-Adapter (attach it first). references: one picture a prompt.

        One at a time: stock FluxPipeline (diffusers 0.42) repeats the embeddings of a batch once more for each of its pictures, and its
        attention then mixes everybody's tokens.
        """
        self.pipe.set_ip_adapter_scale(weight)

        def call(part: slice) -> Pictures:
            embeds = self._image_embeds(references[part])
            return self._call(
                self.pipe, prompts[part], seeds[part], steps, GUIDANCE,
                ip_adapter_image_embeds=[embeds], negative_ip_adapter_image_embeds=[torch.zeros_like(embeds)],
            )  # fmt: skip

        return np.concatenate([call(slice(k, k + 1)) for k in range(len(prompts))])

    def detach_ip_adapter(self) -> None:
        self.pipe.unload_ip_adapter()

    def attach_instantx(self) -> None:
        self._instantx = InstantXAdapter(self.pipe.transformer, self._instantx_file)

    def instantx_tokens(self, references: Pictures) -> Tensor:
        """[n, tokens, width]: what InstantX's encoder half makes of whole pictures."""
        siglip, projection = Siglip(self.pack / "siglip-vision", self.device), load_projection(self._instantx_file, self.device)
        with torch.no_grad():
            tokens: Tensor = projection.tokens(torch.cat([siglip.pooled(reference) for reference in references]))
        return tokens

    def draw_instantx(self, prompts: Sequence[str], seeds: Sequence[int], tokens: Tensor, weight: float, steps: int = STEPS) -> Pictures:
        """With InstantX's IP-Adapter (attach it first). tokens: of instantx_tokens, one reference a prompt."""
        assert self._instantx is not None, "attach_instantx() first"
        adapter, asked = self._instantx, IdentityRequest(method="instantx-ip-adapter", weight=weight)

        def call(part: slice) -> Pictures:
            condition = adapter.condition(tokens[part], asked)
            return self._call(self.pipe, prompts[part], seeds[part], steps, GUIDANCE, joint_attention_kwargs={IMAGE_KEY: condition})

        return self._in_batches(len(prompts), call)

    def detach_instantx(self) -> None:
        if self._instantx is not None:
            self._instantx.eject()
            self._instantx = None

    def draw_posed(
        self, prompts: Sequence[str], seeds: Sequence[int], skeletons: Pictures, scale: float = 1.0, steps: int = STEPS
    ) -> Pictures:
        """With the union ControlNet in its pose mode; skeletons: one picture a prompt."""
        controlnet = FluxControlNetModel.from_pretrained(self.pack / "flux1-controlnet-union", dtype=torch.float32).to(self.device)
        pipe = FluxControlNetPipeline.from_pipe(self.pipe, controlnet=controlnet)
        pipe.set_progress_bar_config(disable=True)

        def call(part: slice) -> Pictures:
            images = [Image.fromarray(s) for s in skeletons[part]]
            return self._call(
                pipe, prompts[part], seeds[part], steps, GUIDANCE,
                control_image=images, control_mode=POSE_MODE, controlnet_conditioning_scale=scale,
            )  # fmt: skip

        return self._in_batches(len(prompts), call)

    @property
    def _instantx_file(self) -> Path:
        return self.pack / "instantx-ip-adapter" / "ip-adapter.safetensors"

    def _image_embeds(self, references: Pictures) -> Tensor:
        """[n, 1, width]: the CLIP embeddings as the pipeline would make them, one picture each."""
        pixels = self.pipe.feature_extractor(images=[Image.fromarray(r) for r in references], return_tensors="pt").pixel_values
        with torch.no_grad():
            return self.pipe.image_encoder(pixels.to(self.device)).image_embeds[:, None]  # type: ignore[no-any-return]

    def _call(self, pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int, guidance: float, **extra: Any) -> Pictures:
        drawn = pipe(
            list(prompts),
            height=PICTURE_SIZE_PX,
            width=PICTURE_SIZE_PX,
            num_inference_steps=steps,
            guidance_scale=guidance,
            max_sequence_length=TEXT_TOKENS,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
            **extra,
        ).images
        return (drawn * 255).round().astype(np.uint8)  # type: ignore[no-any-return]

    def _in_batches(self, n: int, call: Callable[[slice], Pictures]) -> Pictures:
        return np.concatenate([call(slice(start, start + self.batch)) for start in range(0, n, self.batch)])
