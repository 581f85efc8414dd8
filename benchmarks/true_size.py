"""Models of FLUX.1-dev's true size with random weights, for what depends on sizes alone: memory and time.

No file is read or written: everything is made on the device, which takes seconds. `tiny` is the same at sizes a CPU can hold.
Sizes: the configurations published with black-forest-labs/FLUX.1-dev, guozinan/PuLID and Shakker-Labs/FLUX.1-dev-ControlNet-Union-Pro.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

import torch
from diffusers import AutoencoderKL, FluxControlNetModel, FluxTransformer2DModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from deployments.denoisers.flux1_loop import Forward, Residuals
from deployments.denoisers.lora.places import places
from deployments.denoisers.lora.weights import LoraFacts, LoraWeights, LowRank
from deployments.identity.eva_clip import EvaConfig, EvaVisionTransformer
from deployments.identity.pulid import PuLID, PuLIDConfig

SCHEDULER = {"shift": 3.0, "use_dynamic_shifting": True}


@dataclass(frozen=True)
class Sizes:
    """What is measured. flux, vae, control: constructor arguments; text: tokens of T5; pixels: of a side."""

    flux: dict[str, Any]
    vae: dict[str, Any]
    control: dict[str, Any]
    pulid: PuLIDConfig
    t5: T5Config
    clip: CLIPTextConfig
    eva: EvaConfig
    text: int = 512
    pixels: int = 1024


def true_sizes() -> Sizes:
    flux = {"guidance_embeds": True, "axes_dims_rope": (16, 56, 56)}
    return Sizes(
        flux=flux,
        vae=_vae((128, 256, 512, 512), layers=2),
        control={"num_layers": 5, "num_single_layers": 10, "num_mode": 10, "guidance_embeds": True},
        pulid=PuLIDConfig(),
        # google/t5-v1_1-xxl and openai/clip-vit-large-patch14: config.json
        t5=T5Config(d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64, feed_forward_proj="gated-gelu", vocab_size=32128),
        clip=CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12, projection_dim=768),
        eva=EvaConfig(),
    )


def tiny_sizes() -> Sizes:
    flux = {
        "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16, "num_attention_heads": 2, "joint_attention_dim": 32,
        "pooled_projection_dim": 24, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6),
    }  # fmt: skip
    pulid = PuLIDConfig(
        dim=32, depth=5, heads=2, head_dim=16, queries=4, output_dim=16, mapping_width=16, face_dim=16, vision_dim=12, vision_width=16,
        vision_tokens=5, ca_dim=32, ca_heads=2, ca_head_dim=16, num_double=2, num_single=3,
    )  # fmt: skip
    return Sizes(
        flux=flux,
        vae=_vae((32, 32, 32, 32), layers=1),
        control={**flux, "num_layers": 1, "num_single_layers": 1, "num_mode": 10},
        pulid=pulid,
        t5=T5Config(d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, vocab_size=64),
        clip=CLIPTextConfig(hidden_size=24, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=64),
        eva=EvaConfig(image_size=28, width=32, depth=6, heads=2, mlp_width=48, embed_dim=12, taps=(1, 2, 3, 4, 5)),
        text=16,
        pixels=128,
    )


def _vae(widths: tuple[int, ...], layers: int) -> dict[str, Any]:
    return {
        "block_out_channels": widths, "layers_per_block": layers, "latent_channels": 16, "use_quant_conv": False,
        "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
        "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4,
    }  # fmt: skip


@contextmanager
def _made_on(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """What is constructed within it has the weights that torch would begin training with, the same ones each time."""
    former = torch.get_default_dtype()
    torch.manual_seed(0)
    try:
        torch.set_default_dtype(dtype)
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(former)


class Maker:
    """Makes models of one set of sizes."""

    def __init__(self, sizes: Sizes, device: torch.device, dtype: torch.dtype) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype

    def transformer(self) -> FluxTransformer2DModel:
        return self._finished(lambda: FluxTransformer2DModel(**self.sizes.flux))

    def vae(self) -> AutoencoderKL:
        return self._finished(lambda: AutoencoderKL(**self.sizes.vae))

    def control(self) -> FluxControlNetModel:
        net = self._finished(lambda: FluxControlNetModel(**self.sizes.control))
        for gate in (*net.controlnet_blocks, *net.controlnet_single_blocks):  # zero in an untrained ControlNet
            nn.init.normal_(gate.weight, std=0.01)
        return net

    def pulid(self) -> PuLID:
        """Its encoder is there too; whoever denoises drops it."""
        return cast(PuLID, self._finished(lambda: PuLID(self.sizes.pulid)))

    def encoders(self) -> list[nn.Module]:
        """What reads texts and faces before a picture is drawn: T5, CLIP's text tower, EVA-CLIP's vision tower, PuLID's encoder."""
        sizes = self.sizes
        makers = (lambda: T5EncoderModel(sizes.t5), lambda: CLIPTextModel(sizes.clip), lambda: EvaVisionTransformer(sizes.eva))
        return [*(self._finished(make) for make in makers), self.pulid().pulid_encoder]

    def lora(self, transformer: FluxTransformer2DModel, rank: int) -> LoraWeights:
        """One on every linear module that a LoRA can name."""
        modules = {}
        for name in {piece.module for place in places(transformer).values() for piece in place.pieces}:
            linear = cast(nn.Linear, cast(nn.Module, transformer).get_submodule(name))
            down, up = (self.random(rank, linear.in_features), self.random(linear.out_features, rank))
            modules[name] = LowRank(down / linear.in_features**0.5, up / rank, 0.1)
        return LoraWeights(modules, LoraFacts("made", 2 * len(modules), (rank, rank)))

    def random(self, *shape: int) -> Tensor:
        """Normal; the next numbers of torch's own generator of the device."""
        return torch.randn(*shape, device=self.device, dtype=self.dtype)

    def _finished(self, make: Any) -> Any:
        with _made_on(self.device, self.dtype):
            model = make()
        # Some models insist on float32, or on the CPU, for tables of theirs.
        return model.to(self.device).requires_grad_(False).eval()


@dataclass(frozen=True, eq=False)
class RandomControl:
    """A ControlNet of random weights as the denoise loop asks it. latents: [1, tokens, channels]."""

    net: Any
    latents: Tensor
    blocks: tuple[int, int]
    start: float = 0.0
    end: float = 1.0

    def residuals(self, forward: Forward) -> Residuals:
        double, single = self.net(
            hidden_states=forward.latents, controlnet_cond=self.latents, controlnet_mode=torch.tensor([[4]], device=self.latents.device),
            conditioning_scale=0.5, encoder_hidden_states=forward.text.states, pooled_projections=forward.text.pooled,
            timestep=forward.time, guidance=forward.guidance, txt_ids=forward.text_positions, img_ids=forward.positions, return_dict=False,
        )  # fmt: skip
        return _spread(double, self.blocks[0]), _spread(single, self.blocks[1])


def _spread(residuals: Any, blocks: int) -> list[Tensor]:
    return [residuals[block // ceil(blocks / len(residuals))] for block in range(blocks)]
