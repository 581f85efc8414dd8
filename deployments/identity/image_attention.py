"""Image attention: the picture's tokens of a FLUX double block read keys and values that were made of a reference picture.

One attention processor for every method that does so, since an attention has one place for a processor. Keys, values and strengths
come with the call, in `joint_attention_kwargs`; without them the blocks are stock, bit for bit. Knows no weights and no encoder.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from torch import Tensor

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

# Of all names this is the one that stock attention passes over in silence where its processor does not read it (single blocks do not).
IMAGE_KEY = "ip_hidden_states"


class ImageTerm(NamedTuple):
    """One reference as every double block reads it.

    keys, values: [blocks, 1 or n, tokens, heads, head_dim]. scales: [blocks]. mask: what each token of the picture takes of it,
    [1 or n, s, 1], or None for all. All of the transformer's type and on its device.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor
    mask: Tensor | None = None


ImageCondition = tuple[ImageTerm, ...]


class ImageAttnProcessor(FluxAttnProcessor):
    """Stock joint attention; with a condition, a third output, which the block adds to the picture's tokens after its feed-forward.

    The picture's queries are those of the joint attention, after their norm and before their rotation; what they find is neither
    projected nor gated (diffusers 0.42, models/transformers/transformer_flux.py: FluxIPAdapterAttnProcessor, after x-flux's
    IPDoubleStreamBlockProcessor).

    position: the block's own number as a tensor [1], since torch.compile makes a graph of its own for every Python integer.
    former: the processor in whose place this one stands. owners: how many adapters count on it.
    """

    def __init__(self, former: FluxAttnProcessor, position: Tensor) -> None:
        super().__init__()
        self.former, self.position, self.owners = former, position, 1
        self._attention_backend = former._attention_backend
        self._parallel_config = former._parallel_config

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        ip_hidden_states: ImageCondition | None = None,
    ) -> tuple[Tensor, ...]:
        """hidden_states: the picture's tokens [n, s, width], encoder_hidden_states: the text's -> picture, text (, addition)."""
        if not ip_hidden_states or encoder_hidden_states is None:
            stock = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
            return cast("tuple[Tensor, ...]", stock)
        text = _projected(attn, encoder_hidden_states, "add_{}_proj", "to_added_qkv", attn.norm_added_q, attn.norm_added_k)
        image = _projected(attn, hidden_states, "to_{}", "to_qkv", attn.norm_q, attn.norm_k)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        if image_rotary_emb is not None:
            query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        joint = dispatch_attention_fn(
            query, key, value, attn_mask=attention_mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        of_text, of_image = joint.flatten(2, 3).to(query.dtype).split([text[0].shape[1], image[0].shape[1]], dim=1)
        of_image = attn.to_out[1](attn.to_out[0](of_image.contiguous()))
        return of_image, attn.to_add_out(of_text.contiguous()), self._found(image[0], ip_hidden_states)

    def _found(self, query: Tensor, condition: ImageCondition) -> Tensor:
        """query: [n, s, heads, head_dim] -> [n, s, width], the sum over all references."""
        total = query.new_zeros(())
        for term in condition:
            keys, values, scale = (x.index_select(0, self.position)[0] for x in (term.keys, term.values, term.scales))
            keys, values = (x.expand(len(query), -1, -1, -1).transpose(1, 2) for x in (keys, values))
            found = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values).transpose(1, 2).flatten(2)
            total = total + scale * (found if term.mask is None else term.mask * found)
        return total


def _projected(attn: Any, tokens: Tensor, name: str, fused: str, norm_query: Any, norm_key: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, both normed, and values of one stream, [n, s, heads, head_dim] each. name: of its layers, with {} for q, k, v."""
    if attn.fused_projections:
        parts: Sequence[Tensor] = getattr(attn, fused)(tokens).chunk(3, dim=-1)
    else:
        parts = [getattr(attn, name.format(letter))(tokens) for letter in "qkv"]
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return norm_query(query), norm_key(key), value


class ImageAttention:
    """The processors on a transformer's double blocks, from construction to `eject`. Adapters that come later share the first one's.

    Move the transformer to its device first: the processors keep the numbers of their blocks there.
    """

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        """Raises ValueError if an attention has a processor that is neither stock nor ours: the two would exclude each other."""
        model = cast(Any, transformer)  # diffusers declares no attribute
        attentions = [block.attn for block in model.transformer_blocks]
        foreign = sorted({type(attn.processor).__name__ for attn in attentions} - {FluxAttnProcessor.__name__, ImageAttnProcessor.__name__})
        if foreign:
            raise ValueError(f"The attentions already have the processors {foreign}; unload what put them there (unload_ip_adapter).")
        for index, attn in enumerate(attentions):
            if isinstance(attn.processor, ImageAttnProcessor):
                attn.processor.owners += 1
            else:
                attn.set_processor(ImageAttnProcessor(attn.processor, torch.tensor([index], device=model.device)))
        self._attentions = attentions

    def eject(self) -> None:
        """Puts back the processors that were there before, unless another adapter still counts on ours. ValueError when called twice."""
        if not self._attentions:
            raise ValueError("Image attention: ejected already.")
        for attn in self._attentions:
            attn.processor.owners -= 1
            if not attn.processor.owners:
                attn.set_processor(attn.processor.former)
        self._attentions = []
