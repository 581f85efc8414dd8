"""FluxTransformer2DModel, run block by block for training: the stock weights and formulas, made compilable, with the places where
adapters add their residuals. Serving does not use this file: it runs the stock forward.

Differences from the stock forward, none of them in value beyond rounding: rotary embedding as a matrix product (the stock form
crashed in a compiled backward on torch 2.11), attention through scaled_dot_product_attention with contiguous operands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers import FluxTransformer2DModel
from torch import Tensor, nn

from training.mini.generator.flow import position_ids

KeysValues = tuple[Tensor, Tensor]
Residual = Callable[[int, Tensor], Tensor]
Velocity = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(noisy tokens [n, s, 64], times [n], guidance [n]) -> velocity [n, s, 64]."""


@dataclass(frozen=True, eq=False)
class Prompt:
    """states: [n, tokens, 128] of T5; pooled: [n, 128] of CLIP."""

    states: Tensor
    pooled: Tensor


class TrainingAttention:
    """FluxAttnProcessor, FluxIPAdapterAttnProcessor and InstantX's in one. rotary: (cos [s, d], sin [s, d], rotation [d, d])."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor, Tensor] | None = None,
        image_keys_values: KeysValues | None = None,
        gated_keys_values: KeysValues | None = None,
    ) -> Any:
        query, key, value = (_heads(p(hidden_states), attn.head_dim) for p in (attn.to_q, attn.to_k, attn.to_v))
        query, key = attn.norm_q(query), attn.norm_k(key)
        picture_query = query
        if encoder_hidden_states is not None:
            text = [_heads(p(encoder_hidden_states), attn.head_dim) for p in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj)]
            query = torch.cat([attn.norm_added_q(text[0]), query], 1)
            key = torch.cat([attn.norm_added_k(text[1]), key], 1)
            value = torch.cat([text[2], value], 1)
        assert image_rotary_emb is not None
        mixed = _attend(_rotated(query, image_rotary_emb, value.dtype), _rotated(key, image_rotary_emb, value.dtype), value)
        if encoder_hidden_states is None:
            return mixed if gated_keys_values is None else mixed + _read(query, gated_keys_values)
        n = encoder_hidden_states.shape[1]
        if gated_keys_values is not None:
            mixed = torch.cat([mixed[:, :n], mixed[:, n:] + _read(picture_query, gated_keys_values)], 1)
        outputs = attn.to_out[1](attn.to_out[0](mixed[:, n:])), attn.to_add_out(mixed[:, :n])
        if image_keys_values is None:
            return outputs
        k, v = (_heads(t, attn.head_dim) for t in image_keys_values)
        return (*outputs, _attend(picture_query.to(v.dtype), k, v))


def _heads(x: Tensor, head_dim: int) -> Tensor:
    split: Tensor = x.unflatten(-1, (-1, head_dim))
    return split


def _rotated(x: Tensor, rotary: tuple[Tensor, Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    cos, sin, rotation = rotary
    return (x * cos[:, None] + (x.to(rotation.dtype) @ rotation) * sin[:, None]).to(dtype)


def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """[n, tokens, heads, d] -> [n, tokens, heads * d]."""
    q, k, v = (t.transpose(1, 2).contiguous() for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _read(query: Tensor, keys_values: KeysValues) -> Tensor:
    """keys, values: [n, tokens, heads, d]."""
    keys, values = keys_values
    return _attend(query.to(values.dtype), keys.to(values.dtype), values)


def initialise(transformer: FluxTransformer2DModel) -> None:
    """DiT's initialisation: xavier weights, modulations and output at zero (diffusers leaves torch's defaults)."""
    for module in transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for block in cast(Sequence[Any], transformer.transformer_blocks):
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1_context.linear.weight)
    for block in cast(Sequence[Any], transformer.single_transformer_blocks):
        nn.init.zeros_(block.norm.linear.weight)
    nn.init.zeros_(transformer.norm_out.linear.weight)
    nn.init.zeros_(transformer.proj_out.weight)


class TrainableFlux:
    """The transformer with everything that is constant over training: positions, processors, compiled blocks."""

    def __init__(self, transformer: FluxTransformer2DModel, latent_size: int, text_tokens: int, compiled: bool) -> None:
        """latent_size: side of the (unpacked) latents. compiled: on a GPU, worth some 20 s of compilation."""
        self.transformer = transformer
        transformer.set_attn_processor(cast(Any, TrainingAttention()))
        device = next(transformer.parameters()).device
        cos, sin = transformer.pos_embed(position_ids(latent_size, latent_size, text_tokens, device))
        self.rotary = (cos.float(), sin.float(), _rotation(cos.shape[1], device))
        if compiled:
            transformer.compile_repeated_blocks(fullgraph=True)

    def velocity(
        self,
        tokens: Tensor,
        prompt: Prompt,
        times: Tensor,
        guidance: Tensor,
        *,
        identity: Residual | None = None,
        image: Sequence[KeysValues] | None = None,
        gated: Sequence[KeysValues] | None = None,
        words: Tensor | None = None,
        control: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """tokens [n, s, 64] -> velocity [n, s, 64].

        times, guidance: [n], unscaled (0..1, 1..). identity(i, picture tokens) is added after block i (double blocks first,
        then single); image: keys and values [n, k, dim] per double block (XLabs); gated: keys and values [n, k, heads, head_dim] per
        block (InstantX); words: [n, k, 128] behind the prompt's states (Redux); control: residuals of a ControlNet's double blocks,
        spread as the stock forward spreads them.
        """
        m = cast(Any, self.transformer)
        states, rotary = (prompt.states, self.rotary) if words is None else self._with_words(prompt.states, words)
        hidden, text = m.x_embedder(tokens), m.context_embedder(states)
        temb = m.time_text_embed(times * 1000, guidance * 1000, prompt.pooled)
        doubles = len(m.transformer_blocks)
        for i, block in enumerate(m.transformer_blocks):
            extra = {} if image is None else {"image_keys_values": image[i]}
            text, hidden = block(hidden, text, temb, rotary, extra | _gated(gated, i))
            if identity is not None:
                hidden = hidden + identity(i, hidden)
            if control is not None:
                hidden = hidden + control[i // -(-doubles // len(control))]
        for i, block in enumerate(m.single_transformer_blocks):
            text, hidden = block(hidden, text, temb, rotary, _gated(gated, doubles + i))
            if identity is not None:
                hidden = hidden + identity(doubles + i, hidden)
        return cast(Tensor, m.proj_out(m.norm_out(hidden, temb)))

    def _with_words(self, states: Tensor, words: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """All text has the position zero, which turns nothing: a longer one takes more of the same rows."""
        cos, sin, rotation = self.rotary
        more = words.shape[1], cos.shape[1]
        longer = torch.cat([cos.new_ones(more), cos]), torch.cat([sin.new_zeros(more), sin])
        return torch.cat([states, words.to(states.dtype)], 1), (*longer, rotation)


def _gated(gated: Sequence[KeysValues] | None, block: int) -> dict[str, KeysValues]:
    return {} if gated is None else {"gated_keys_values": gated[block]}


def _rotation(dim: int, device: torch.device) -> Tensor:
    """x @ rotation swaps each pair (a, b) into (-b, a): the imaginary half of the rotary embedding."""
    rotation = torch.zeros(dim, dim)
    even = torch.arange(0, dim, 2)
    rotation[even + 1, even] = -1
    rotation[even, even + 1] = 1
    return rotation.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
