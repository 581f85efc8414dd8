"""The XLabs IP-Adapter for mini FLUX: the part that is trained, and the file that stock diffusers and x-flux read.

A CLIP picture embedding becomes a few tokens (a linear layer and a norm); each double block attends to them with keys and values
of its own, and adds what it finds to the picture tokens after its feed-forward, ungated (x-flux, src/flux/modules/layers.py,
IPDoubleStreamBlockProcessor and ImageProjModel). Knows neither the transformer nor the encoder, only their widths.
"""

from __future__ import annotations

from typing import Final, cast

from torch import Tensor, nn

from training.mini.flux_folder import CLIP_EMBEDDING_DIM, TEXT_DIM, flux_config

TOKENS: Final = 4
"""What diffusers takes for granted of any file whose projection is not 65536 wide (XLabs' v1; v2 has 16)."""
_FLUX: Final = flux_config()
_FLUX_DIM: Final[int] = _FLUX["num_attention_heads"] * _FLUX["attention_head_dim"]
_FLUX_BLOCKS: Final[int] = _FLUX["num_layers"]


class XLabsAdapter(nn.Module):
    """Begins as no change at all: the values are zero.

    picture_dim: of CLIP's embedding; token_dim: the transformer's `joint_attention_dim`; dim: its width; blocks: its double
    blocks. The defaults fit the mini FLUX folder.
    """

    def __init__(
        self, picture_dim: int = CLIP_EMBEDDING_DIM, token_dim: int = TEXT_DIM, dim: int = _FLUX_DIM, blocks: int = _FLUX_BLOCKS
    ) -> None:
        super().__init__()
        self.token_dim = token_dim
        self.proj = nn.Linear(picture_dim, TOKENS * token_dim)
        self.norm = nn.LayerNorm(token_dim)
        self.keys = nn.ModuleList(nn.Linear(token_dim, dim) for _ in range(blocks))
        self.values = nn.ModuleList(nn.Linear(token_dim, dim) for _ in range(blocks))
        for parameter in self.values.parameters():
            nn.init.zeros_(parameter)

    def tokens(self, image_embeds: Tensor) -> Tensor:
        """[n, picture_dim] (not normalised) -> [n, 4, token_dim]; stock pipelines call them `ip_hidden_states`."""
        return cast(Tensor, self.norm(self.proj(image_embeds).unflatten(-1, (TOKENS, self.token_dim))))

    def key_values(self, tokens: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[n, k, token_dim] -> per double block (keys, values), each [n, k, dim]."""
        return [(key(tokens), value(tokens)) for key, value in zip(self.keys, self.values, strict=True)]

    def forward(self, image_embeds: Tensor) -> list[tuple[Tensor, Tensor]]:
        """[n, picture_dim] -> keys and values per double block."""
        return self.key_values(self.tokens(image_embeds))


def export_xlabs(adapter: XLabsAdapter) -> dict[str, Tensor]:
    """The adapter's weights under the names of XLabs-AI/flux-ip-adapter's `ip_adapter.safetensors`."""
    return {_xlabs_name(name): value for name, value in adapter.state_dict().items()}


def _xlabs_name(name: str) -> str:
    """proj.weight -> ip_adapter_proj_model.proj.weight; keys.0.bias -> double_blocks.0.processor.ip_adapter_double_stream_k_proj.bias."""
    kind, _, rest = name.partition(".")
    if kind not in ("keys", "values"):
        return f"ip_adapter_proj_model.{name}"
    block, field = rest.split(".")
    return f"double_blocks.{block}.processor.ip_adapter_double_stream_{kind[0]}_proj.{field}"
