"""LoRAs of the embedded transformer in every published spelling, random and small: what the tests of reading them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from tests.mini_drawing import FLUX

RANK = 4
State = dict[str, Tensor]
Names = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Change:
    """A random change of one module, as its file will name it. modules: the diffusers modules whose outputs it holds, one after another."""

    name: str
    modules: tuple[str, ...]
    down: Tensor
    up: Tensor

    def delta(self, scale: float) -> dict[str, Tensor]:
        whole = scale * self.up @ self.down
        if self.name == "final_layer.adaLN_modulation.1":
            whole = torch.cat(whole.chunk(2)[::-1])
        sizes = [size(module)[0] for module in self.modules]
        return dict(zip(self.modules, whole.split(sizes), strict=True))


# Written down a second time, as a reader of black-forest-labs/flux would: the tables of `places` are checked against diffusers' below.
QKV, TEXT_QKV = ("attn.to_q", "attn.to_k", "attn.to_v"), ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
BFL = {
    "double_blocks.1.img_attn.qkv": tuple(f"transformer_blocks.1.{name}" for name in QKV),
    "double_blocks.1.txt_attn.qkv": tuple(f"transformer_blocks.1.{name}" for name in TEXT_QKV),
    "double_blocks.0.img_attn.proj": ("transformer_blocks.0.attn.to_out.0",),
    "double_blocks.0.txt_mlp.0": ("transformer_blocks.0.ff_context.net.0.proj",),
    "double_blocks.0.img_mod.lin": ("transformer_blocks.0.norm1.linear",),
    "single_blocks.5.linear1": tuple(f"single_transformer_blocks.5.{name}" for name in (*QKV, "proj_mlp")),
    "single_blocks.0.linear2": ("single_transformer_blocks.0.proj_out",),
    "single_blocks.0.modulation.lin": ("single_transformer_blocks.0.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
}
XLABS = {
    "double_blocks.0.processor.qkv_lora1": tuple(f"transformer_blocks.0.{name}" for name in QKV),
    "double_blocks.0.processor.qkv_lora2": tuple(f"transformer_blocks.0.{name}" for name in TEXT_QKV),
    "double_blocks.1.processor.proj_lora1": ("transformer_blocks.1.attn.to_out.0",),
    "double_blocks.1.processor.proj_lora2": ("transformer_blocks.1.attn.to_add_out",),
    "single_blocks.2.processor.qkv_lora": tuple(f"single_transformer_blocks.2.{name}" for name in QKV),
    "single_blocks.2.processor.proj_lora": ("single_transformer_blocks.2.proj_out",),
}
TRANSFORMER: Any = FluxTransformer2DModel.from_pretrained(FLUX / "transformer").requires_grad_(False).eval()
LINEARS: dict[str, nn.Linear] = {name: module for name, module in TRANSFORMER.named_modules() if isinstance(module, nn.Linear)}
DIFFUSERS = {name: (name,) for name in LINEARS}


def size(module: str) -> tuple[int, int]:
    return LINEARS[module].out_features, LINEARS[module].in_features


def random(*shape: int, seed: int) -> Tensor:
    drawn: Tensor = torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / shape[-1] ** 0.5
    return drawn


def changes(names: Names) -> list[Change]:
    made = []
    for seed, (name, modules) in enumerate(names.items()):
        rows = sum(size(module)[0] for module in modules)
        made.append(Change(name, modules, random(RANK, size(modules[0])[1], seed=seed), random(rows, RANK, seed=1000 + seed)))
    return made


def export(names: Names, spell: Callable[[str], str], down: str, up: str, alpha: float | None) -> State:
    state = {}
    for change in changes(names):
        state[f"{spell(change.name)}.{down}.weight"] = change.down
        state[f"{spell(change.name)}.{up}.weight"] = change.up
        if alpha is not None:
            state[f"{spell(change.name)}.alpha"] = torch.tensor(alpha)
    return state


def under(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def joined(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name.replace(".", "_")


FORMATS: dict[str, tuple[Names, Callable[[str], str], str, str, float | None]] = {
    "diffusers": (DIFFUSERS, under("transformer."), "lora_A", "lora_B", None),
    "diffusers, alphas": (DIFFUSERS, under("transformer."), "lora_A", "lora_B", 2.0),
    "diffusers of old": (DIFFUSERS, under("transformer."), "lora.down", "lora.up", None),
    "peft": (DIFFUSERS, under("base_model.model."), "lora_A", "lora_B", None),
    "peft, live": (DIFFUSERS, under("base_model.model."), "lora_A.default", "lora_B.default", None),
    "peft, bare": (DIFFUSERS, under(""), "lora_A", "lora_B", None),
    "peft, compiled": (DIFFUSERS, under("base_model.model._orig_mod."), "lora_A", "lora_B", None),
    "kohya": (BFL, joined("lora_unet_"), "lora_down", "lora_up", 1.0),
    "comfyui": (BFL, under("diffusion_model."), "lora_down", "lora_up", 3.0),
    "comfyui, peft's parts": (BFL, under("diffusion_model."), "lora_A", "lora_B", None),
    "onetrainer": (DIFFUSERS, joined("lora_transformer_"), "lora_down", "lora_up", 8.0),
    "lycoris": (DIFFUSERS, joined("lycoris_"), "lora_down", "lora_up", 8.0),
    "xlabs": (XLABS, under(""), "down", "up", None),
    "bfl": (BFL, under(""), "lora_A", "lora_B", None),
    "peft of bfl": (BFL, under("base_model.model."), "lora_A", "lora_B", None),
}


def kohya() -> State:
    return export(*FORMATS["kohya"])
