"""The XLabs IP-Adapter for FLUX, v1 and v2: a CLIP picture embedding as tokens, and the keys and values by which blocks read them.

Its sizes follow from the shapes in the file (published: v1 has 4 tokens, v2 has 16), which is read strictly, one half at a time.
Knows no CLIP and no picture: the embedding comes from outside. It carries likeness of style and subject more than of a face.

Where a formula was read: XLabs-AI/x-flux at 4749542, src/flux/modules/layers.py (ImageProjModel, IPDoubleStreamBlockProcessor), and
diffusers 0.42, loaders/transformer_flux.py and models/embeddings.py (ImageProjection), after it. The ramps: XLabs-AI/x-flux-comfyui at
0032855, utils.py (LinearStrengthModel and its like) and nodes.py (ApplyAdvancedFluxIPAdapter).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from deployments.errors import CheckpointMismatch, InvalidRequest
from deployments.identity.image_attention import IMAGE_KEY, ImageAttention, ImageCondition, ImageTerm
from deployments.weights import check_state_dict, read_safetensors, safetensors_header

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from deployments.contracts import IdentityRequest

_PROJECTION, _BLOCKS = "ip_adapter_proj_model", "double_blocks"
_KEYS, _VALUES = "ip_adapter_double_stream_k_proj", "ip_adapter_double_stream_v_proj"
_PROBES = (f"{_PROJECTION}.proj.weight", f"{_PROJECTION}.norm.weight", f"{_BLOCKS}.0.processor.{_KEYS}.weight")
# LinearStrengthModel(0.3, 0.92, 19): diffusers, loaders/ip_adapter.py, docstring of set_ip_adapter_scale; v2 does poorly at a flat scale.
_LINEAR = (0.3, 0.92)
# How steeply the sigmoid ramp climbs over all blocks (SigmoidStrengthModel).
_STEEPNESS = 8.0


@dataclass(frozen=True, kw_only=True)
class XLabsConfig:
    """Sizes; the defaults are those of the published v2.

    image_dim: of the CLIP embedding; tokens made of it, each token_dim wide; dim: the transformer's width; blocks: its double blocks.
    """

    image_dim: int = 768
    tokens: int = 16
    token_dim: int = 4096
    dim: int = 3072
    blocks: int = 19


def config_of(shapes: Mapping[str, Sequence[int]], source: str) -> XLabsConfig:
    """The configuration that a file's shapes imply. Raises CheckpointMismatch, which calls the file `source`, if they imply none."""
    missing = [name for name in _PROBES if name not in shapes]
    if missing:
        raise CheckpointMismatch(f"{source} is no XLabs IP-Adapter: it has no {', '.join(missing)}.", details={"missing": missing})
    try:
        (rows, image_dim), (token_dim,), (dim, _) = (shapes[name] for name in _PROBES)
        blocks = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith(f"{_BLOCKS}."))
    except ValueError as error:
        raise CheckpointMismatch(f"{source} is no XLabs IP-Adapter: a name or a shape in it makes no sense ({error}).") from error
    if token_dim == 0 or rows % token_dim:
        raise CheckpointMismatch(f"{source}: a projection of {rows} rows does not divide into tokens {token_dim} wide.")
    return XLabsConfig(image_dim=image_dim, tokens=rows // token_dim, token_dim=token_dim, dim=dim, blocks=blocks)


class XLabsProjection(nn.Module):
    """The encoder half."""

    def __init__(self, config: XLabsConfig) -> None:
        super().__init__()
        self.config = config
        self.proj = nn.Linear(config.image_dim, config.tokens * config.token_dim)
        self.norm = nn.LayerNorm(config.token_dim)

    def tokens(self, image_embeds: Tensor) -> Tensor:
        """[n, image_dim], CLIP's projected embedding as it comes, not normalised -> [n, tokens, token_dim]. Zeros stand for nobody."""
        return cast(Tensor, self.norm(self.proj(image_embeds).unflatten(-1, (self.config.tokens, self.config.token_dim))))


class XLabs(nn.Module):
    """Both halves; its state dict has the names of the published files."""

    def __init__(self, config: XLabsConfig) -> None:
        super().__init__()
        self.config = config
        self.ip_adapter_proj_model = XLabsProjection(config)
        self.double_blocks = nn.ModuleList(
            nn.ModuleDict({"processor": nn.ModuleDict({name: nn.Linear(config.token_dim, config.dim) for name in (_KEYS, _VALUES)})})
            for _ in range(config.blocks)
        )


def load_projection(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> XLabsProjection:
    """The encoder half of a file, in evaluation mode. Raises as `safetensors_header` does, and CheckpointMismatch, which names the keys."""
    return cast(XLabsProjection, _half(path, _PROJECTION, device, dtype))


def load_readers(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """The denoiser half of a file, one module a double block, in evaluation mode. Raises as `load_projection` does."""
    return cast(nn.ModuleList, _half(path, _BLOCKS, device, dtype))


def _half(path: Path, name: str, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """One half of a file, all of which is checked."""
    config = config_of(safetensors_header(path).shapes, str(path))
    with torch.device("meta"):
        whole = XLabs(config)
    state = read_safetensors(path)
    check_state_dict({key: tensor.shape for key, tensor in whole.state_dict().items()}, state, str(path))
    half = whole.get_submodule(name)
    mine = {key.removeprefix(f"{name}."): tensor for key, tensor in state.items() if key.startswith(f"{name}.")}
    half.load_state_dict({key: tensor.to(device, dtype) for key, tensor in mine.items()}, assign=True)
    return half.requires_grad_(False).eval()


def _rise(begin: float, end: float, steps: int) -> list[float]:
    """Evenly from begin to end; a single step is the end, so that no form is nothing at all where there are few blocks."""
    return [begin + (end - begin) * index / (steps - 1) for index in range(steps)] if steps > 1 else [end] * steps


def _sigmoid(blocks: int) -> list[float]:
    """From nearly 0 to nearly 1, half of it at the middle block: the node at begin_strength 0.5 and end_strength 1.5.

    At its usual 0 and 1 the node climbs from -1/2 to +1/2, since it adds to begin_strength the sigmoid less a half: the first half of
    the blocks would push the picture away from the reference, and none would reach the weight. Nobody asks for that by a weight of 0 to 1.
    """
    return [1 / (1 + math.exp(-(index - blocks / 2) * _STEEPNESS / blocks)) for index in range(blocks)]


# Strength of each double block, by form, all from 0 to 1, so that the weight is the most that any block gets and its sign is everywhere
# the same. They run over the blocks, never over time. All but `constant` are a `smothing_type` of the node ApplyAdvancedFluxIPAdapter:
# its begin_strength is the first block's, its end_strength the last one's (but see `_sigmoid`). Ours: 0 and 1; `linear`: 0.3 and 0.92.
RAMPS: Mapping[str, Callable[[int], list[float]]] = {
    "linear": lambda blocks: _rise(*_LINEAR, blocks),
    "constant": lambda blocks: [1.0] * blocks,
    "first_half": lambda blocks: _rise(0.0, 1.0, blocks // 2) + [1.0] * (blocks - blocks // 2),
    "second_half": lambda blocks: [0.0] * (blocks - blocks // 2) + _rise(0.0, 1.0, blocks // 2),
    "sigmoid": _sigmoid,
}
WEIGHT_TYPE = "weight_type"
DEFAULT_RAMP = "linear"


def ramp(options: Mapping[str, str | float], blocks: int) -> list[float]:
    """The strengths of the double blocks that the option `weight_type` names. Raises InvalidRequest for what there is not."""
    unknown = sorted(options.keys() - {WEIGHT_TYPE})
    if unknown:
        raise InvalidRequest(f"The XLabs IP-Adapter has no option {', '.join(unknown)}.", f"Its one option is `{WEIGHT_TYPE}`.")
    form = options.get(WEIGHT_TYPE, DEFAULT_RAMP)
    if not isinstance(form, str) or form not in RAMPS:
        raise InvalidRequest(f"There is no {WEIGHT_TYPE} {form!r}.", f"Use one of {', '.join(RAMPS)}.")
    return RAMPS[form](blocks)


class XLabsAdapter:
    """The denoiser half at work: an IdentityAdapter."""

    key = IMAGE_KEY

    def __init__(self, transformer: FluxTransformer2DModel, path: Path) -> None:
        """path: the adapter's file. Raises as `load_readers` and ImageAttention do, and CheckpointMismatch if it is for another size."""
        model = cast(Any, transformer)  # diffusers declares no attribute
        self._readers = load_readers(path, model.device, model.dtype)
        self._heads = model.config.num_attention_heads
        has = (len(model.transformer_blocks), model.inner_dim)
        needs = (len(self._readers), self._reader(0, _KEYS).out_features)
        if has != needs:
            raise CheckpointMismatch(f"{path} is for (double blocks, width) = {needs}, the transformer has {has}.")
        self._attention = ImageAttention(transformer)

    def condition(self, tokens: Tensor, request: IdentityRequest, mask: Tensor | None = None) -> ImageCondition:
        """tokens: [1, n, token_dim] of `XLabsProjection.tokens`; several references: their tokens in a row."""
        first = self._reader(0, _KEYS)
        if tokens.ndim != 3 or tokens.shape[-1] != first.in_features:
            raise ValueError(f"The adapter's tokens are [n, tokens, {first.in_features}], not {list(tokens.shape)}.")
        read = tokens.to(first.weight)
        strengths = [request.weight * strength for strength in ramp(request.options, len(self._readers))]
        return (ImageTerm(self._all(_KEYS, read), self._all(_VALUES, read), read.new_tensor(strengths), mask),)

    def eject(self) -> None:
        """Puts the stock attention back, unless another adapter reads through it. Raises ValueError when called twice."""
        self._attention.eject()

    def _all(self, name: str, tokens: Tensor) -> Tensor:
        """[blocks, n, tokens, heads, head_dim]"""
        made = [self._reader(block, name)(tokens).unflatten(-1, (self._heads, -1)) for block in range(len(self._readers))]
        return torch.stack(made)

    def _reader(self, block: int, name: str) -> nn.Linear:
        return cast(nn.Linear, self._readers[block].get_submodule(f"processor.{name}"))
