"""Image attention: the tokens of FLUX blocks read keys and values that were made of a reference picture.

One attention processor for every method that does so, since an attention has one place for a processor. Keys, values and strengths
come with the call, in `joint_attention_kwargs`; without them the blocks are stock, bit for bit. Knows no weights and no encoder.

Methods differ in who reads and in where the finding goes, hence two kinds of terms: `ImageTerm` (XLabs) and `GatedTerm` (InstantX).
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

# Of all names this is the one that stock attention passes over in silence where its processor does not read it.
IMAGE_KEY = "ip_hidden_states"


class ImageTerm(NamedTuple):
    """One reference as every double block reads it; what is found is added after the feed-forward, neither projected nor gated.

    (x-flux, IPDoubleStreamBlockProcessor; diffusers 0.42, models/transformers/transformer_flux.py: FluxIPAdapterAttnProcessor.)

    keys, values: [blocks, 1 or n, tokens, heads, head_dim]. scales: [blocks]. mask: what each token of the picture takes of it,
    [1 or n, s, 1], or None for all. All of the transformer's type and on its device.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor
    mask: Tensor | None = None


class GatedTerm(NamedTuple):
    """One reference as every block reads it, double or single; what is found is added to what the attention itself finds.

    It is therefore projected and gated with that. The picture's queries read it in double blocks, the text's as well in single ones,
    where all tokens are one stream (InstantX/FLUX.1-dev-IP-Adapter, attention_processor.py: IPAFluxAttnProcessor2_0).

    keys (normed), values: [all blocks, 1 or n, tokens, heads, head_dim], double blocks first. scales: [all blocks]. mask: as of
    ImageTerm. The published code has no mask; with one, the text's tokens take nothing: they are nowhere in the picture, and through
    them a person would reach all of it.
    """

    keys: Tensor
    values: Tensor
    scales: Tensor
    mask: Tensor | None = None


ImageCondition = tuple[ImageTerm | GatedTerm, ...]
Terms = Sequence[ImageTerm] | Sequence[GatedTerm]


class ImageAttnProcessor(FluxAttnProcessor):
    """Stock attention of a double or of a single block, and what a condition adds to it.

    All queries are those of the joint attention, after their norm and before their rotation. With ImageTerms a double block gets a third
    output, which it adds to the picture's tokens by itself.

    position: the block's own number, single blocks after double ones, as a tensor [1], since torch.compile makes a graph of its own for
    every Python integer. former: the processor in whose place this one stands. owners: how many adapters count on it.
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
    ) -> Tensor | tuple[Tensor, ...]:
        """Double block: picture [n, s, width] and text -> picture, text (, addition). Single: both, text first -> both."""
        added = [term for term in ip_hidden_states or () if isinstance(term, ImageTerm)]
        gated = [term for term in ip_hidden_states or () if isinstance(term, GatedTerm)]
        if encoder_hidden_states is None and gated:
            return self._single(attn, hidden_states, attention_mask, image_rotary_emb, gated)
        if encoder_hidden_states is not None and (added or gated):
            return self._double(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb, added, gated)
        stock = super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)
        return cast("Tensor | tuple[Tensor, ...]", stock)

    def _single(
        self, attn: Any, tokens: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None, gated: Sequence[GatedTerm]
    ) -> Tensor:
        query, key, value = _projected(attn, tokens, "to_{}", "to_qkv", attn.norm_q, attn.norm_k)
        return self._attended(query, key, value, mask, rotary) + self._found(query, gated)

    def _double(
        self,
        attn: Any,
        picture: Tensor,
        words: Tensor,
        mask: Tensor | None,
        rotary: tuple[Tensor, Tensor] | None,
        added: Sequence[ImageTerm],
        gated: Sequence[GatedTerm],
    ) -> tuple[Tensor, ...]:
        text = _projected(attn, words, "add_{}_proj", "to_added_qkv", attn.norm_added_q, attn.norm_added_k)
        image = _projected(attn, picture, "to_{}", "to_qkv", attn.norm_q, attn.norm_k)
        query, key, value = (torch.cat(pair, dim=1) for pair in zip(text, image, strict=True))
        joint = self._attended(query, key, value, mask, rotary)
        of_text, of_image = joint.split([words.shape[1], picture.shape[1]], dim=1)
        if gated:
            of_image = of_image + self._found(image[0], gated)
        outputs = attn.to_out[1](attn.to_out[0](of_image.contiguous())), attn.to_add_out(of_text.contiguous())
        return (*outputs, self._found(image[0], added)) if added else outputs

    def _attended(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """[n, tokens, heads, head_dim] each -> [n, tokens, width]."""
        if rotary is not None:
            query, key = (apply_rotary_emb(x, rotary, sequence_dim=1) for x in (query, key))
        found = dispatch_attention_fn(
            query, key, value, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        return cast(Tensor, found.flatten(2, 3).to(query.dtype))

    def _found(self, query: Tensor, terms: Terms) -> Tensor:
        """query: [n, tokens, heads, head_dim] -> [n, tokens, width], the sum over all references."""
        total = query.new_zeros(())
        for term in terms:
            keys, values, scale = (x.index_select(0, self.position)[0] for x in (term.keys, term.values, term.scales))
            keys, values = (x.expand(len(query), -1, -1, -1).transpose(1, 2) for x in (keys, values))
            found = F.scaled_dot_product_attention(query.transpose(1, 2), keys, values).transpose(1, 2).flatten(2)
            total = total + scale * (found if term.mask is None else _behind_text(term.mask, query.shape[1]) * found)
        return total


def _behind_text(mask: Tensor, tokens: int) -> Tensor:
    """The mask of a picture's tokens [1, s, 1] as one of `tokens` tokens, the first of which are the text's and take nothing."""
    return F.pad(mask, (0, 0, tokens - mask.shape[1], 0))


def _projected(attn: Any, tokens: Tensor, name: str, fused: str, norm_query: Any, norm_key: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, both normed, and values of one stream, [n, s, heads, head_dim] each. name: of its layers, with {} for q, k, v."""
    if attn.fused_projections:
        parts: Sequence[Tensor] = getattr(attn, fused)(tokens).chunk(3, dim=-1)
    else:
        parts = [getattr(attn, name.format(letter))(tokens) for letter in "qkv"]
    query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in parts)
    return norm_query(query), norm_key(key), value


class ImageAttention:
    """The processors on all attentions of a transformer, from construction to `eject`. Adapters that come later share the first one's.

    Move the transformer to its device first: the processors keep the numbers of their blocks there.
    """

    def __init__(self, transformer: FluxTransformer2DModel) -> None:
        """Raises ValueError if an attention has a processor that is neither stock nor ours: the two would exclude each other."""
        model = cast(Any, transformer)  # diffusers declares no attribute
        attentions = [block.attn for blocks in (model.transformer_blocks, model.single_transformer_blocks) for block in blocks]
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
