"""PuLID for FLUX (Guo et al., arXiv:2404.16022): identity tokens from one face, and the cross attentions that read them.

The encoder half turns a recogniser's embedding and an EVA tower's states into tokens. The denoiser half adds, after chosen blocks of
a FLUX transformer, what the picture's tokens read from them. Any size; the defaults hold the published `pulid_flux_v0.9.*` files.
Knows no detector, no picture files, no schedule: when identity acts, and how strongly, comes with every call.

Where a formula was read: ToTheBeginning/PuLID at 1aa2fc7, pulid/encoders_transformer.py, pulid/pipeline_flux.py, flux/model.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deployments.errors import DamagedWeights
from deployments.identity.block_residuals import BlockResiduals, Residual

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

CONFIG_KEY = "config"
# The item of `joint_attention_kwargs` that carries a condition to the blocks.
CONDITION_KEY = "pulid"
# The states of the vision tower that the encoder reads, one after the other.
SCALES = 5
# CelebAMask classes that the encoder never sees: background, ears, earring, neck, necklace, cloth, hat. Hair and glasses stay.
WHITENED_CLASSES = (0, 7, 8, 9, 14, 15, 16, 18)
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601
# eva_clip/constants.py: OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True, kw_only=True)
class PuLIDConfig:
    """Sizes; the defaults are those of the published files.

    Encoder: dim, depth (a multiple of five), heads, head_dim, ff_mult; id_tokens made of the face embedding, queries = tokens that
    come out, each output_dim wide; mapping_width inside the input layers; face_dim, vision_dim: the two embeddings; vision_width,
    vision_tokens: the tower's states. Denoiser: ca_dim (the transformer's width), ca_heads, ca_head_dim; a cross attention follows
    every double_interval-th of num_double and every single_interval-th of num_single blocks, beginning with the first.
    """

    dim: int = 1024
    depth: int = 10
    heads: int = 16
    head_dim: int = 64
    ff_mult: int = 4
    id_tokens: int = 5
    queries: int = 32
    output_dim: int = 2048
    mapping_width: int = 1024
    face_dim: int = 512
    vision_dim: int = 768
    vision_width: int = 1024
    vision_tokens: int = 577
    ca_dim: int = 3072
    ca_heads: int = 16
    ca_head_dim: int = 128
    double_interval: int = 2
    single_interval: int = 4
    num_double: int = 19
    num_single: int = 38

    def __post_init__(self) -> None:
        wrong = {name: value for name, value in asdict(self).items() if not isinstance(value, int) or value < 1}
        if wrong:
            raise ValueError(f"PuLIDConfig: every size is a positive integer, unlike {wrong}.")
        if self.depth % SCALES:
            raise ValueError(f"PuLIDConfig: depth {self.depth} is not a multiple of {SCALES}, the number of states that are read in turn.")

    def attention_after(self, block: int) -> int | None:
        """Index of the cross attention that follows a block (double blocks first, then single ones), None where there is none."""
        doubles = -(-self.num_double // self.double_interval)
        single = block - self.num_double
        if single < 0:
            return block // self.double_interval if block % self.double_interval == 0 else None
        return doubles + single // self.single_interval if single % self.single_interval == 0 else None

    @property
    def blocks(self) -> int:
        return self.num_double + self.num_single

    @property
    def attentions(self) -> int:
        """Number of cross attentions: 20 in the published files."""
        return -(-self.num_double // self.double_interval) + -(-self.num_single // self.single_interval)


def config_of(metadata: Mapping[str, str]) -> PuLIDConfig:
    """The configuration in a safetensors file's metadata; absent means the published sizes. Raises DamagedWeights."""
    if CONFIG_KEY not in metadata:
        return PuLIDConfig()
    try:
        return PuLIDConfig(**json.loads(metadata[CONFIG_KEY]))
    except (TypeError, ValueError) as error:
        raise DamagedWeights(f"The file's metadata is no configuration of PuLID: {error}") from error


def metadata_of(config: PuLIDConfig) -> dict[str, str]:
    """What `config_of` reads, to be stored with the tensors."""
    return {CONFIG_KEY: json.dumps(asdict(config), sort_keys=True)}


def face_to_grey(rgb: Tensor, labels: Tensor, whitened: Sequence[int] = WHITENED_CLASSES) -> Tensor:
    """The face alone, in grey on white: colour and surroundings would otherwise be copied into the picture.

    rgb: [n, 3, H, W] in 0..1, the FFHQ-aligned crop. labels: [n, H, W] long, CelebAMask order. -> [n, 3, H, W] in 0..1.
    """
    grey = torch.einsum("nchw,c->nhw", rgb, rgb.new_tensor(_LUMA))
    hidden = torch.isin(labels, torch.tensor(tuple(whitened), device=labels.device))
    return torch.where(hidden, 1.0, grey)[:, None].expand(-1, 3, -1, -1)


def eva_pixels(rgb: Tensor, size: int) -> Tensor:
    """[n, 3, S, S] in 0..1 -> [n, 3, size, size] as the vision tower reads it: bicubic, anti-aliased, CLIP's mean and deviation.

    The reference anti-aliases or not as its torchvision does by default; it is always done here, as by the newer ones.
    """
    resized = F.interpolate(rgb, size=(size, size), mode="bicubic", align_corners=False, antialias=True)
    return (resized - rgb.new_tensor(_CLIP_MEAN).view(3, 1, 1)) / rgb.new_tensor(_CLIP_STD).view(3, 1, 1)


def identity_condition(face_embedding: Tensor, vision_embedding: Tensor) -> Tensor:
    """[n, face_dim] as the recogniser gives it (its length is meant to stay) and [n, vision_dim], which is normalised here."""
    return torch.cat([face_embedding, F.normalize(vision_embedding, dim=-1)], dim=-1)


class _CrossAttention(nn.Module):
    """Attention without biases; both sides are normed before they are projected.

    dim: width of the reading side (norm2), source_dim: of the side that is read (norm1).
    """

    def __init__(self, dim: int, source_dim: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(source_dim)
        self.norm2 = nn.LayerNorm(dim)
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(source_dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def project(self, normed: Tensor) -> tuple[Tensor, Tensor]:
        """[n, tokens, source_dim] -> keys, values [n, heads, tokens, head_dim]."""
        keys, values = self.to_kv(normed).chunk(2, dim=-1)
        return self._split(keys), self._split(values)

    def read(self, normed: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """[n, tokens, dim] -> [n, tokens, dim]; keys and values of one item serve any n."""
        query = self._split(self.to_q(normed))
        keys, values = (x.expand(len(query), -1, -1, -1) for x in (keys, values))
        return cast(Tensor, self.to_out(F.scaled_dot_product_attention(query, keys, values).transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], self.heads, -1).transpose(1, 2)


class PerceiverAttention(_CrossAttention):
    """Latents read the context and themselves (the encoder's attention)."""

    def forward(self, context: Tensor, latents: Tensor) -> Tensor:
        normed: Tensor = self.norm2(latents)
        return self.read(normed, *self.project(torch.cat([self.norm1(context), normed], dim=1)))


class PerceiverAttentionCA(_CrossAttention):
    """A picture's tokens read the identity's (the denoiser's attention). Keys and values are made once for all steps.

    position: its own index among its siblings, as a tensor, since torch.compile makes a graph of its own for every Python integer.
    """

    position: Tensor

    def __init__(self, config: PuLIDConfig, position: int) -> None:
        super().__init__(config.ca_dim, config.output_dim, config.ca_heads, config.ca_head_dim)
        # On the CPU even while a model is built on the meta device: no checkpoint will fill this in.
        self.register_buffer("position", torch.tensor([position], device="cpu"), persistent=False)

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return self.project(self.norm1(tokens))

    def forward(self, image_tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self.read(self.norm2(image_tokens), keys, values)


def _feed_forward(dim: int, mult: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, mult * dim, bias=False), nn.GELU(), nn.Linear(mult * dim, dim, bias=False))


def _mapping(source: int, width: int, target: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(source, width), nn.LayerNorm(width), nn.LeakyReLU(),
        nn.Linear(width, width), nn.LayerNorm(width), nn.LeakyReLU(),
        nn.Linear(width, target),
    )  # fmt: skip


class IDFormer(nn.Module):
    """Learned queries and tokens made of the face embedding read five states of the vision tower, one after the other."""

    def __init__(self, config: PuLIDConfig) -> None:
        super().__init__()
        self.config = config
        scale = config.dim**-0.5
        self.latents = nn.Parameter(torch.randn(1, config.queries, config.dim) * scale)
        self.proj_out = nn.Parameter(torch.randn(config.dim, config.output_dim) * scale)
        self.layers = nn.ModuleList(
            nn.ModuleList(
                [PerceiverAttention(config.dim, config.dim, config.heads, config.head_dim), _feed_forward(config.dim, config.ff_mult)]
            )
            for _ in range(config.depth)
        )
        for index in range(SCALES):
            self.add_module(f"mapping_{index}", _mapping(config.vision_width, config.mapping_width, config.dim))
        embeddings = config.face_dim + config.vision_dim
        self.id_embedding_mapping = _mapping(embeddings, config.mapping_width, config.dim * config.id_tokens)

    def forward(self, condition: Tensor, states: Sequence[Tensor]) -> Tensor:
        """condition [n, face_dim + vision_dim], five states [n, tokens, vision_width] -> identity tokens [n, queries, output_dim]."""
        if len(states) != SCALES:
            raise ValueError(f"PuLID reads {SCALES} states of the vision tower, not {len(states)}; give the tower as many taps.")
        face: Tensor = self.id_embedding_mapping(condition).unflatten(-1, (self.config.id_tokens, self.config.dim))
        latents = torch.cat([self.latents.expand(len(condition), -1, -1), face], dim=1)
        per_state = self.config.depth // SCALES
        for index, state in enumerate(states):
            context = torch.cat([face, self.get_submodule(f"mapping_{index}")(state)], dim=1)
            for layer in self.layers[index * per_state : (index + 1) * per_state]:
                attention, feed_forward = layer.children()
                latents = latents + attention(context, latents)
                latents = latents + feed_forward(latents)
        return latents[:, : self.config.queries] @ self.proj_out


class PuLID(nn.Module):
    """Both halves; its state dict has the names of the published files."""

    def __init__(self, config: PuLIDConfig) -> None:
        super().__init__()
        self.config = config
        self.pulid_encoder = IDFormer(config)
        self.pulid_ca = nn.ModuleList(PerceiverAttentionCA(config, index) for index in range(config.attentions))

    def forward(self, condition: Tensor, states: Sequence[Tensor]) -> Tensor:
        """The encoder: see IDFormer.forward. condition: of `identity_condition`."""
        return cast(Tensor, self.pulid_encoder(condition, states))

    def unconditional(self, n: int = 1) -> Tensor:
        """[n, queries, output_dim]: nobody's tokens, for the negative pass. They are not zeros: zeros go *into* the encoder."""
        config, latents = self.config, self.pulid_encoder.latents
        condition = latents.new_zeros(n, config.face_dim + config.vision_dim)
        states = [latents.new_zeros(n, config.vision_tokens, config.vision_width)] * SCALES
        return cast(Tensor, self.pulid_encoder(condition, states))

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[n, tokens, output_dim] -> keys, values of every cross attention [attentions, n, ca_heads, tokens, ca_head_dim]."""
        keys, values = zip(*(self.attention(index).keys_values(tokens) for index in range(len(self.pulid_ca))), strict=True)
        return torch.stack(keys), torch.stack(values)

    def residual(self, index: int, image_tokens: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """What cross attention `index` adds, at weight 1, to a picture's tokens [n, s, ca_dim]; keys, values: its own
        [n or 1, ca_heads, tokens, ca_head_dim]. For loops that run the blocks themselves; elsewhere use `inject`.
        """
        return cast(Tensor, self.attention(index)(image_tokens, keys, values))

    def attention(self, index: int) -> PerceiverAttentionCA:
        return cast(PerceiverAttentionCA, self.pulid_ca[index])


def load_pulid(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PuLID:
    """The module that a safetensors file holds, in evaluation mode.

    Raises UnsafeWeights, DamagedWeights, or CheckpointMismatch, which names the keys that are missing, left over or misshapen.
    """
    from deployments.weights import check_state_dict, read_safetensors, safetensors_header

    config = config_of(safetensors_header(path).metadata)
    with torch.device("meta"):
        model = PuLID(config)
    state = read_safetensors(path, device=str(device))
    check_state_dict({name: tensor.shape for name, tensor in model.state_dict().items()}, state, str(path))
    model.load_state_dict({name: tensor.to(dtype) for name, tensor in state.items()}, assign=True)
    return model.to(device=device, dtype=dtype).eval()


class PuLIDTerm(NamedTuple):
    """One identity as the blocks read it. keys, values: of `PuLID.keys_values`; weight: [], [n, 1, 1] or [1, s, 1], same device."""

    keys: Tensor
    values: Tensor
    weight: Tensor


PuLIDCondition = tuple[PuLIDTerm, ...]


def _contribution(attention: PerceiverAttentionCA, image: Tensor, condition: PuLIDCondition) -> Tensor:
    """Every identity reads the tokens as the block left them, so that the order of identities does not matter."""
    total = image.new_zeros(())
    for term in condition:
        keys, values = (x.index_select(0, attention.position)[0] for x in (term.keys, term.values))
        total = total + term.weight * attention(image, keys, values)
    return total


class PuLIDInjection:
    """A transformer that obeys `joint_attention_kwargs={"pulid": condition}`, until `eject`. Made by `inject`.

    It holds no identity: that travels with the call, hence requests cannot mix. PuLID stays outside the transformer's tree of
    modules (no key of a checkpoint or LoRA changes), so its owner moves it to the transformer's device and type.
    """

    def __init__(self, transformer: FluxTransformer2DModel, pulid: PuLID) -> None:
        _refuse_misfit(transformer, pulid.config)
        self._pulid = pulid
        self._residuals = BlockResiduals(
            transformer, CONDITION_KEY, [_residual_after(pulid, index) for index in range(pulid.config.blocks)]
        )

    def condition(self, tokens: Tensor, weight: Tensor | float = 1.0) -> PuLIDCondition:
        """What to pass as `joint_attention_kwargs["pulid"]`; None there, or nothing, leaves the transformer as it was.

        tokens: [1 or n, tokens, output_dim]. weight: a number, [] or [n], or [1, s, 1] for each of the picture's tokens; 0 is exactly
        the base, without another compiled graph.
        Conditions of several people are added with `+`. Gradients flow through it into PuLID and the tokens.
        """
        width = self._pulid.config.output_dim
        if tokens.ndim != 3 or tokens.shape[-1] != width:
            raise ValueError(f"Identity tokens are [n, tokens, {width}], not {list(tokens.shape)}; use what PuLID's encoder gives.")
        strength = torch.as_tensor(weight, dtype=tokens.dtype, device=tokens.device)
        return (PuLIDTerm(*self._pulid.keys_values(tokens), strength.view(-1, 1, 1) if strength.ndim == 1 else strength),)

    def eject(self) -> None:
        """Leaves the transformer as it was before. Raises ValueError while a cache that was enabled later is in force."""
        self._residuals.eject()


def _residual_after(pulid: PuLID, block: int) -> Residual | None:
    index = pulid.config.attention_after(block)
    return None if index is None else partial(_contribution, pulid.attention(index))


def _refuse_misfit(transformer: FluxTransformer2DModel, config: PuLIDConfig) -> None:
    model = cast(Any, transformer)  # diffusers declares no attribute
    has = (len(model.transformer_blocks), len(model.single_transformer_blocks), model.inner_dim)
    needs = (config.num_double, config.num_single, config.ca_dim)
    if has != needs:
        raise ValueError(
            f"This PuLID is for (double blocks, single blocks, width) = {needs}, the transformer has {has}; use one made for it."
        )


def inject(transformer: FluxTransformer2DModel, pulid: PuLID) -> PuLIDInjection:
    """Makes a transformer read identities. Its weights and, without a condition, its outputs stay bit for bit the same.

    Raises ValueError if the sizes differ, or if the blocks have hooks already (see BlockResiduals). Under `compile_repeated_blocks`
    FLUX.1-dev takes six graphs for one person, five more for calls without a condition and five for each other number of people,
    all of them counted on one function: set torch._dynamo.config.recompile_limit to 64, or pass weight 0 in place of None.
    """
    return PuLIDInjection(transformer, pulid)
