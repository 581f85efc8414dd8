"""Writes goldens/instantx.npz by running InstantX's published code on stock diffusers' blocks: see goldens/README.md.

    PYTHONPATH=. python tests/parity/make_instantx_goldens.py <folder of InstantX/FLUX.1-dev-IP-Adapter>

No test: it needs the folder's attention_processor.py and infer_flux_ipa_siglip.py. Nothing of ours computes a stored number, except for
drawing inputs and weights.
"""

from __future__ import annotations

import importlib
import sys
from typing import Any

import torch
from torch import Tensor, nn

from tests.named_weights import fill
from tests.parity import cases
from tests.parity.original_flux import provide, write


def _adapter() -> Any:
    """The published checkpoint's tree, made of the folder's own modules."""
    config = cases.INSTANTX
    adapter: Any = nn.Module()
    projection = importlib.import_module("infer_flux_ipa_siglip").MLPProjModel
    adapter.image_proj = projection(config.token_dim, config.image_dim, config.tokens)
    reader = importlib.import_module("attention_processor").IPAFluxAttnProcessor2_0
    adapter.ip_adapter = nn.ModuleList(reader(config.dim, config.token_dim, num_tokens=config.tokens) for _ in range(config.blocks))
    fill(adapter)
    return adapter


class _Named:
    """A published processor, called by names: today's blocks hand on by position what it expects in another order."""

    def __init__(self, processor: Any) -> None:
        self._processor = processor

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        image_emb: Tensor | None = None,
    ) -> Any:
        return self._processor(
            attn, hidden_states=hidden_states, image_emb=image_emb, encoder_hidden_states=encoder_hidden_states,
            attention_mask=attention_mask, image_rotary_emb=image_rotary_emb,
        )  # fmt: skip


def instantx_golden() -> dict[str, Tensor]:
    """Two pictures at once, each with its own reference."""
    adapter, transformer = _adapter(), cases.transformer()
    tokens = adapter.image_proj(torch.cat(list(cases.image_embeds().values())))
    golden = {"tokens": tokens, "velocity_base": transformer(**cases.flux_input(), return_dict=False)[0]}
    # Their order is that in which the published file numbers them: double blocks, then single ones.
    named = [_Named(processor) for processor in adapter.ip_adapter]
    transformer.set_attn_processor(dict(zip(transformer.attn_processors, named, strict=True)))
    for scale in cases.IP_SCALES:
        for processor in adapter.ip_adapter:
            processor.scale = scale
        velocity = transformer(**cases.flux_input(), joint_attention_kwargs={"image_emb": tokens}, return_dict=False)[0]
        golden[f"velocity_{scale}"] = velocity
    return golden


def main() -> None:
    sys.path.insert(0, sys.argv[1])
    # What the published script imports for its example: copies of diffusers' pipeline and transformer that hand `image_emb` on.
    provide("pipeline_flux_ipa", FluxPipeline=None)
    provide("transformer_flux", FluxTransformer2DModel=None)
    torch.set_num_threads(1)
    with torch.no_grad():
        write("instantx", instantx_golden())


if __name__ == "__main__":
    main()
