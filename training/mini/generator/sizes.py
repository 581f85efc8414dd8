"""Mini's sizes of the models whose classes are the product's own. FLUX's, and the stock encoders', are in flux_folder.py."""

from __future__ import annotations

from typing import Final

from deployments.identity.eva_clip import EvaConfig
from deployments.identity.instantx_ip_adapter import InstantXConfig
from deployments.identity.pulid import PuLIDConfig
from deployments.identity.redux import ReduxConfig
from training.mini.flux_folder import SIGLIP_DIM, TEXT_DIM, flux_config

EVA: Final = EvaConfig(
    image_size=112, patch_size=14, width=128, depth=6, heads=4, mlp_width=256, embed_dim=128, rope_grid=8, taps=(1, 2, 3, 4, 5)
)

_FLUX = flux_config()
PULID: Final = PuLIDConfig(
    dim=128,
    depth=5,
    heads=4,
    head_dim=32,
    id_tokens=2,
    queries=8,
    output_dim=128,
    mapping_width=128,
    face_dim=512,
    vision_dim=EVA.embed_dim,
    vision_width=EVA.width,
    vision_tokens=EVA.tokens,
    ca_dim=_FLUX["num_attention_heads"] * _FLUX["attention_head_dim"],
    ca_heads=4,
    ca_head_dim=64,
    double_interval=1,  # eight blocks are few: every one gets an attention
    single_interval=1,
    num_double=_FLUX["num_layers"],
    num_single=_FLUX["num_single_layers"],
)

# The published adapter's tokens are as wide as the text's, which nothing depends on. Half as wide they take a quarter of a MiB less.
INSTANTX: Final = InstantXConfig(
    image_dim=SIGLIP_DIM,
    tokens=8,
    token_dim=64,
    dim=_FLUX["num_attention_heads"] * _FLUX["attention_head_dim"],
    blocks=_FLUX["num_layers"] + _FLUX["num_single_layers"],
)
REDUX: Final = ReduxConfig(image_dim=SIGLIP_DIM, text_dim=TEXT_DIM)
