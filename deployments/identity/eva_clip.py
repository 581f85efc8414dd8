"""The vision tower of EVA02-CLIP, with the intermediate states that PuLID reads.

Any size: the defaults are EVA02-CLIP-L-14-336 (Fang et al., arXiv:2303.11331; Sun et al., arXiv:2303.15389), whose published
`visual.*` tensors load strictly. Knows no text tower, no picture files and nothing of what is done with the states.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deployments.errors import CheckpointMismatch, DamagedWeights

VISUAL_PREFIX = "visual."
CONFIG_KEY = "config"
_NORM_EPS = 1e-6
_ROPE_THETA = 10_000.0
# Tables that the published file repeats in every block; ours are computed from the configuration.
_ROPE_TABLE = re.compile(r"(blocks\.\d+\.attn\.)?rope\.freqs_(cos|sin)")
# The text tower of the published file, in either of the two spellings that eva_clip/factory.py accepts.
_TEXT_TOWER = ("text.", "logit_scale", "text_projection", "positional_embedding", "token_embedding.", "transformer.", "ln_final.")


@dataclass(frozen=True, kw_only=True)
class EvaConfig:
    """Sizes of the tower; the defaults are eva_clip/model_configs/EVA02-CLIP-L-14-336.json.

    image_size, patch_size: pixels. mlp_width: the published ratio is int(1024 * 2.6667). rope_grid: side in patches of the grid
    that the model was pretrained on (224 / 14); finer grids are squeezed into its range of positions. taps: blocks whose *inputs*
    are handed out.
    """

    image_size: int = 336
    patch_size: int = 14
    width: int = 1024
    depth: int = 24
    heads: int = 16
    mlp_width: int = 2730
    embed_dim: int = 768
    rope_grid: int = 16
    taps: tuple[int, ...] = (4, 8, 12, 16, 20)

    def __post_init__(self) -> None:
        # Half of a head turns with the row and half with the column, each in pairs of channels: hence the factor of four.
        if self.width % (4 * self.heads):
            raise ValueError(f"EvaConfig: width {self.width} is not divisible by 4 x {self.heads} heads; choose another width or number.")
        if self.image_size % self.patch_size:
            raise ValueError(f"EvaConfig: image_size {self.image_size} is not a multiple of patch_size {self.patch_size}.")
        if list(self.taps) != sorted(set(self.taps)) or not all(0 < tap < self.depth for tap in self.taps):
            raise ValueError(f"EvaConfig: taps {self.taps} must rise and lie between 1 and depth - 1 = {self.depth - 1}.")

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def tokens(self) -> int:
        """Length of a state: the class token and every patch."""
        return self.grid**2 + 1


def config_of(metadata: Mapping[str, str]) -> EvaConfig:
    """The configuration in a safetensors file's metadata; absent means the published sizes. Raises DamagedWeights."""
    if CONFIG_KEY not in metadata:
        return EvaConfig()
    try:
        fields = json.loads(metadata[CONFIG_KEY])
        return EvaConfig(**{**fields, "taps": tuple(fields["taps"])})
    except (KeyError, TypeError, ValueError) as error:
        raise DamagedWeights(f"The file's metadata is no configuration of an EVA tower: {error}.") from error


def metadata_of(config: EvaConfig) -> dict[str, str]:
    """What `config_of` reads, to be stored with the tensors."""
    return {CONFIG_KEY: json.dumps(asdict(config), sort_keys=True)}


def visual_state(checkpoint: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The vision tower's tensors out of a published CLIP checkpoint: the prefix, the rotary tables and the text tower go.

    Raises CheckpointMismatch for a name that belongs to neither tower.
    """
    unknown = [name for name in checkpoint if not name.startswith((VISUAL_PREFIX, *_TEXT_TOWER))]
    if unknown:
        raise CheckpointMismatch(
            f"An EVA-CLIP checkpoint has names under {VISUAL_PREFIX!r} and of its text tower; this one also has {', '.join(unknown[:5])}"
            f"{f' and {len(unknown) - 5} more' if len(unknown) > 5 else ''}.",
            details={"left_over": unknown},
        )
    own = {name.removeprefix(VISUAL_PREFIX): tensor for name, tensor in checkpoint.items() if name.startswith(VISUAL_PREFIX)}
    return {name: tensor for name, tensor in own.items() if not _ROPE_TABLE.fullmatch(name)}


class RotaryTable(nn.Module):
    """Rotary position embedding over a square grid (eva_clip/rope.py: VisionRotaryEmbeddingFast).

    cos, sin: [patches, head_dim]; the first half of the channels turns with the row, the second with the column.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, head_dim: int, grid: int, pretrained_grid: int) -> None:
        super().__init__()
        # On the CPU even while a model is built on the meta device: no checkpoint will fill these in.
        half = head_dim // 2
        rates = _ROPE_THETA ** -(torch.arange(0, half, 2, dtype=torch.float32, device="cpu") / half)
        positions = torch.arange(grid, device="cpu") / grid * pretrained_grid
        angles = torch.outer(positions, rates).repeat_interleave(2, dim=-1)
        both = torch.cat([angles[:, None].expand(-1, grid, -1), angles[None].expand(grid, -1, -1)], dim=-1).flatten(0, 1)
        self.register_buffer("cos", both.cos(), persistent=False)
        self.register_buffer("sin", both.sin(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, heads, 1 + patches, head_dim]: turns the patches, leaves the class token."""
        patches = x[:, :, 1:]
        turned = torch.stack([-patches[..., 1::2], patches[..., ::2]], dim=-1).flatten(-2)
        # Under autocast the tables are fp32 where x is not.
        return torch.cat([x[:, :, :1], (patches * self.cos + turned * self.sin).to(x.dtype)], dim=2)


class SelfAttention(nn.Module):
    """Queries and values have a bias, keys have none; a norm before the output projection (sub-LN)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.q_bias = nn.Parameter(torch.zeros(width))
        self.v_bias = nn.Parameter(torch.zeros(width))
        self.inner_attn_ln = nn.LayerNorm(width, eps=_NORM_EPS)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, rope: RotaryTable) -> Tensor:
        """[n, tokens, width] -> [n, tokens, width]."""
        query = rope(self._heads(F.linear(x, self.q_proj.weight, self.q_bias)))
        key = rope(self._heads(F.linear(x, self.k_proj.weight)))
        value = self._heads(F.linear(x, self.v_proj.weight, self.v_bias))
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return cast(Tensor, self.proj(self.inner_attn_ln(mixed)))

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class SwiGLU(nn.Module):
    """Gated feed-forward layer (Shazeer, arXiv:2002.05202) with a norm before its last projection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden)
        self.w2 = nn.Linear(width, hidden)
        self.ffn_ln = nn.LayerNorm(hidden, eps=_NORM_EPS)
        self.w3 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x))))


class Block(nn.Module):
    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.attn = SelfAttention(config.width, config.heads)
        self.norm2 = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.mlp = SwiGLU(config.width, config.mlp_width)

    def forward(self, x: Tensor, rope: RotaryTable) -> Tensor:
        x = x + self.attn(self.norm1(x), rope)
        return cast(Tensor, x + self.mlp(self.norm2(x)))


class PatchEmbed(nn.Module):
    """Cuts the picture into patches and projects each, row by row."""

    def __init__(self, patch_size: int, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, pixels: Tensor) -> Tensor:
        return cast(Tensor, self.proj(pixels)).flatten(2).transpose(1, 2)


class EvaVisionTransformer(nn.Module):
    """The tower. Its state dict has the published names without their `visual.` prefix."""

    def __init__(self, config: EvaConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config.patch_size, config.width)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(torch.zeros(1, config.tokens, config.width))
        self.rope = RotaryTable(config.width // config.heads, config.grid, config.rope_grid)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.width, eps=_NORM_EPS)
        self.head = nn.Linear(config.width, config.embed_dim)

    def forward(self, pixels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """pixels [n, 3, image_size, image_size], RGB, normalised as CLIP's -> (embedding [n, embed_dim], not normalised;
        for each tap the state [n, tokens, width] that enters its block, class token first).
        """
        size = self.config.image_size
        if pixels.shape[1:] != (3, size, size):
            raise ValueError(f"The EVA tower reads pictures [n, 3, {size}, {size}], not {list(pixels.shape)}; resize them first.")
        x = torch.cat([self.cls_token.expand(len(pixels), -1, -1), self.patch_embed(pixels)], dim=1) + self.pos_embed
        states = []
        for index, block in enumerate(self.blocks):
            if index in self.config.taps:
                states.append(x)
            x = block(x, self.rope)
        return self.head(self.norm(x[:, 0])), tuple(states)


def initialise(model: EvaVisionTransformer) -> None:
    """Weights to train from: BEiT's scheme as in eva_vit_model.py, except the head, which is not scaled down to 0.001 here."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for tokens in (model.cls_token, model.pos_embed):
        nn.init.trunc_normal_(tokens, std=0.02)
    with torch.no_grad():
        for depth, block in enumerate(model.blocks, start=1):
            assert isinstance(block, Block)
            block.attn.proj.weight.div_((2.0 * depth) ** 0.5)
            block.mlp.w3.weight.div_((2.0 * depth) ** 0.5)


def load_eva(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> EvaVisionTransformer:
    """The tower that a safetensors file holds (names under `visual.`), in evaluation mode.

    Raises UnsafeWeights, DamagedWeights, or CheckpointMismatch, which names the keys that are missing, left over or misshapen.
    """
    from deployments.weights import check_state_dict, read_safetensors, safetensors_header

    config = config_of(safetensors_header(path).metadata)
    with torch.device("meta"):
        model = EvaVisionTransformer(config)
    state = visual_state(read_safetensors(path, device=str(device)))
    check_state_dict({name: tensor.shape for name, tensor in model.state_dict().items()}, state, str(path))
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return model.to(device=device, dtype=dtype).eval()
