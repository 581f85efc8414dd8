"""InstantX's IP-Adapter for FLUX.1-dev: a SigLIP picture embedding as tokens, and the keys and values by which every block reads them.

Its sizes follow from the shapes in the file that `likeness models convert` makes of the published pickle (conversion/instantx.py). It is
read strictly, one half at a time: the encoder half alone is 1.2 of its 2.6 billion parameters. Knows no SigLIP and no picture: the
embedding comes from outside.

Where a formula was read: InstantX/FLUX.1-dev-IP-Adapter, infer_flux_ipa_siglip.py (MLPProjModel, IPAdapter.set_ip_adapter) and
attention_processor.py (IPAFluxAttnProcessor2_0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from deployments.errors import CheckpointMismatch, InvalidRequest
from deployments.identity.image_attention import IMAGE_KEY, GatedTerm, ImageAttention, ImageCondition
from deployments.weights import check_state_dict, safetensors_header

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from deployments.contracts import IdentityRequest

_PROJECTION, _READERS = "image_proj", "ip_adapter"
_PROBES = (f"{_PROJECTION}.proj.0.weight", f"{_PROJECTION}.proj.2.weight", f"{_PROJECTION}.norm.weight", f"{_READERS}.0.to_k_ip.weight")
# RMSNorm(128, eps=1e-5, elementwise_affine=False), on the keys alone: InstantX's own processor leaves the values as they are, while the
# ComfyUI port of it norms them as well and is therefore stronger or weaker at the same weight.
_KEY_EPSILON = 1e-5


@dataclass(frozen=True, kw_only=True)
class InstantXConfig:
    """Sizes; the defaults are those of the published file.

    image_dim: of the SigLIP embedding; tokens made of it, each token_dim wide; dim: the transformer's width; blocks: all of them, double
    ones first.
    """

    image_dim: int = 1152
    tokens: int = 128
    token_dim: int = 4096
    dim: int = 3072
    blocks: int = 57


def config_of(shapes: Mapping[str, Sequence[int]], source: str) -> InstantXConfig:
    """The configuration that a file's shapes imply. Raises CheckpointMismatch, which calls the file `source`, if they imply none."""
    missing = [name for name in _PROBES if name not in shapes]
    if missing:
        raise CheckpointMismatch(f"{source} is no InstantX IP-Adapter: it has no {', '.join(missing)}.", details={"missing": missing})
    try:
        (_, image_dim), (rows, _), (token_dim,), (dim, _) = (shapes[name] for name in _PROBES)
        blocks = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith(f"{_READERS}."))
    except ValueError as error:
        raise CheckpointMismatch(f"{source} is no InstantX IP-Adapter: a name or a shape in it makes no sense ({error}).") from error
    if token_dim == 0 or rows % token_dim:
        raise CheckpointMismatch(f"{source}: a projection of {rows} rows does not divide into tokens {token_dim} wide.")
    return InstantXConfig(image_dim=image_dim, tokens=rows // token_dim, token_dim=token_dim, dim=dim, blocks=blocks)


class InstantXProjection(nn.Module):
    """The encoder half."""

    def __init__(self, config: InstantXConfig) -> None:
        super().__init__()
        self.config = config
        hidden = 2 * config.image_dim
        self.proj = nn.Sequential(nn.Linear(config.image_dim, hidden), nn.GELU(), nn.Linear(hidden, config.tokens * config.token_dim))
        self.norm = nn.LayerNorm(config.token_dim)

    def tokens(self, image_embeds: Tensor) -> Tensor:
        """[n, image_dim], SigLIP's pooled output as it comes -> [n, tokens, token_dim]."""
        return cast(Tensor, self.norm(self.proj(image_embeds).unflatten(-1, (self.config.tokens, self.config.token_dim))))


class InstantXReader(nn.Module):
    """What one block reads the tokens by."""

    def __init__(self, config: InstantXConfig) -> None:
        super().__init__()
        self.to_k_ip = nn.Linear(config.token_dim, config.dim, bias=False)
        self.to_v_ip = nn.Linear(config.token_dim, config.dim, bias=False)

    def keys_values(self, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """[n, tokens, token_dim] -> keys, normed, and values, [n, tokens, heads, head_dim] each."""
        keys, values = (layer(tokens).unflatten(-1, (heads, -1)) for layer in (self.to_k_ip, self.to_v_ip))
        return F.rms_norm(keys, keys.shape[-1:], eps=_KEY_EPSILON), values


class InstantX(nn.Module):
    """Both halves; its state dict has the names of the converted file."""

    def __init__(self, config: InstantXConfig) -> None:
        super().__init__()
        self.config = config
        self.image_proj = InstantXProjection(config)
        self.ip_adapter = nn.ModuleList(InstantXReader(config) for _ in range(config.blocks))

    def keys_values(self, tokens: Tensor, heads: int) -> list[tuple[Tensor, Tensor]]:
        """Of every block, see InstantXReader."""
        return [cast(InstantXReader, reader).keys_values(tokens, heads) for reader in self.ip_adapter]


def load_projection(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> InstantXProjection:
    """The encoder half of a file, in evaluation mode. Raises as `safetensors_header` does, and CheckpointMismatch, which names the keys."""
    return cast(InstantXProjection, _half(path, _PROJECTION, device, dtype))


def load_readers(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    """The denoiser half of a file, one InstantXReader a block, in evaluation mode. Raises as `load_projection` does."""
    return cast(nn.ModuleList, _half(path, _READERS, device, dtype))


def _half(path: Path, name: str, device: torch.device | str, dtype: torch.dtype) -> nn.Module:
    """One half of a file. All of its names and shapes are checked; of its tensors only this half's are read."""
    shapes = safetensors_header(path).shapes
    with torch.device("meta"):
        whole = InstantX(config_of(shapes, str(path)))
        found = {key: torch.empty(shape) for key, shape in shapes.items()}
    check_state_dict({key: tensor.shape for key, tensor in whole.state_dict().items()}, found, str(path))
    half = whole.get_submodule(name)
    with safe_open(path, "pt") as file:
        mine = {key: file.get_tensor(f"{name}.{key}").to(device, dtype) for key in half.state_dict()}
    half.load_state_dict(mine, assign=True)
    return half.requires_grad_(False).eval()


class InstantXAdapter:
    """The denoiser half at work: an IdentityAdapter."""

    key = IMAGE_KEY

    def __init__(self, transformer: FluxTransformer2DModel, path: Path) -> None:
        """path: the converted file. Raises as `load_readers` and ImageAttention do, and CheckpointMismatch if it is for another size."""
        model = cast(Any, transformer)  # diffusers declares no attribute
        self._readers = load_readers(path, model.device, model.dtype)
        self._heads = model.config.num_attention_heads
        has = (len(model.transformer_blocks) + len(model.single_transformer_blocks), model.inner_dim)
        needs = (len(self._readers), self._first.out_features)
        if has != needs:
            raise CheckpointMismatch(f"{path} is for (blocks, width) = {needs}, the transformer has {has}.")
        self._attention = ImageAttention(transformer)

    def condition(self, tokens: Tensor, request: IdentityRequest, mask: Tensor | None = None) -> ImageCondition:
        """tokens: [1, n, token_dim] of `InstantXProjection.tokens`; no tokens at all, which is what nobody says, add nothing.

        mask: see GatedTerm. Raises InvalidRequest: InstantX has no options.
        """
        if request.options:
            raise InvalidRequest(f"The InstantX IP-Adapter has no option {', '.join(sorted(request.options))}.", "Leave it out.")
        if tokens.ndim != 3 or tokens.shape[-1] != self._first.in_features:
            raise ValueError(f"The adapter's tokens are [n, tokens, {self._first.in_features}], not {list(tokens.shape)}.")
        if not tokens.shape[1]:
            return ()
        read = tokens.to(self._first.weight)
        pairs = [cast(InstantXReader, reader).keys_values(read, self._heads) for reader in self._readers]
        keys, values = (torch.stack(parts) for parts in zip(*pairs, strict=True))
        return (GatedTerm(keys, values, read.new_full((len(pairs),), request.weight), mask),)

    def eject(self) -> None:
        """Puts the stock attention back, unless another adapter reads through it. Raises ValueError when called twice."""
        self._attention.eject()

    @property
    def _first(self) -> nn.Linear:
        return cast(InstantXReader, self._readers[0]).to_k_ip
