"""FLUX Redux: the patches of a SigLIP picture as words, which follow the prompt's own and are read by the same attention.

The projection holds the method's weights, and they are all on the encoder's side; the denoiser half decides how many words there are
and how loud. Knows no SigLIP, no picture and no text encoder.

Where a formula was read: black-forest-labs/flux, src/flux/modules/image_embedders.py (ReduxImageEncoder) and src/flux/sampling.py
(prepare_redux: the picture's tokens behind the text's). The two dials, a grid averaged down by a factor and words multiplied by a
weight, by which the prompt gets its say again: kaibioinfo/ComfyUI_AdvancedRefluxControl and invoke-ai/InvokeAI (pull request 7875).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deployments.errors import CheckpointMismatch, InvalidRequest
from deployments.weights import check_state_dict, read_safetensors, safetensors_header

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from deployments.contracts import IdentityRequest

TEXT_KEY = "text_tokens"
"""What the denoise loop appends to the prompt's states."""
DOWNSAMPLING = "downsampling"
FACTORS = range(1, 6)
"""1 is the published form; at 5 the 27 x 27 words of a picture are 5 x 5."""
_PROBES = ("redux_up.weight", "redux_down.weight")


@dataclass(frozen=True, kw_only=True)
class ReduxConfig:
    """Sizes; the defaults are the published ones. image_dim: of SigLIP's patches; text_dim: of the transformer's text states."""

    image_dim: int = 1152
    text_dim: int = 4096


def config_of(shapes: Mapping[str, Sequence[int]], source: str) -> ReduxConfig:
    """The configuration that a file's shapes imply. Raises CheckpointMismatch, which calls the file `source`, if they imply none."""
    missing = [name for name in _PROBES if name not in shapes]
    if missing:
        raise CheckpointMismatch(f"{source} is no Redux: it has no {', '.join(missing)}.", details={"missing": missing})
    try:
        (_, image_dim), (text_dim, _) = (shapes[name] for name in _PROBES)
    except ValueError as error:
        raise CheckpointMismatch(f"{source} is no Redux: a shape in it makes no sense ({error}).") from error
    return ReduxConfig(image_dim=image_dim, text_dim=text_dim)


class ReduxProjection(nn.Module):
    """The encoder half; its state dict has the names of the published file."""

    def __init__(self, config: ReduxConfig) -> None:
        super().__init__()
        self.config = config
        self.redux_up = nn.Linear(config.image_dim, 3 * config.text_dim)
        self.redux_down = nn.Linear(3 * config.text_dim, config.text_dim)

    def tokens(self, patches: Tensor) -> Tensor:
        """[n, patches, image_dim], SigLIP's last hidden state -> [n, patches, text_dim]."""
        return cast(Tensor, self.redux_down(F.silu(self.redux_up(patches))))


def load_projection(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> ReduxProjection:
    """The projection of a file, in evaluation mode. Raises as `safetensors_header` does, and CheckpointMismatch, which names the keys."""
    with torch.device("meta"):
        projection = ReduxProjection(config_of(safetensors_header(path).shapes, str(path)))
    state = read_safetensors(path)
    check_state_dict({key: tensor.shape for key, tensor in projection.state_dict().items()}, state, str(path))
    projection.load_state_dict({key: tensor.to(device, dtype) for key, tensor in state.items()}, assign=True)
    return projection.requires_grad_(False).eval()


def averaged(tokens: Tensor, factor: int) -> Tensor:
    """A square grid of words [n, side * side, width], rows from the top -> every factor x factor of them as their mean.

    side // factor of them remain on a side, as in ComfyUI_AdvancedRefluxControl; where that leaves a rest, windows overlap and no edge is
    lost (`interpolate` in the mode `area`).
    Raises ValueError if the words are no square.
    """
    side = math.isqrt(tokens.shape[1])
    if side * side != tokens.shape[1]:
        raise ValueError(f"{tokens.shape[1]} words are no square grid of a picture's patches.")
    if factor == 1:
        return tokens
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    return F.adaptive_avg_pool2d(grid, max(side // factor, 1)).flatten(2).transpose(1, 2)


class ReduxAdapter:
    """The denoiser half at work: an IdentityAdapter that attaches nothing, since stock attention reads words."""

    key = TEXT_KEY

    def __init__(self, transformer: FluxTransformer2DModel, path: Path) -> None:
        """path: the file, of which only the shapes are read. Raises as `safetensors_header` does, and CheckpointMismatch."""
        model = cast(Any, transformer)  # diffusers declares no attribute
        self._width = config_of(safetensors_header(path).shapes, str(path)).text_dim
        reads = model.config.joint_attention_dim
        if self._width != reads:
            raise CheckpointMismatch(f"{path} makes words of {self._width} numbers, the transformer reads words of {reads}.")
        self._transformer = model

    def condition(self, tokens: Tensor, request: IdentityRequest, mask: Tensor | None = None) -> tuple[Tensor, ...]:
        """tokens: [pictures, words, width]; no words at all, which is what nobody says, give `()`. -> a tensor [1, n, width] a picture.

        Raises InvalidRequest for an option or a factor that there is not, and for a mask: words are read everywhere.
        """
        factor = downsampling(request.options)
        if mask is not None:
            raise InvalidRequest("Redux acts on the whole picture: it takes no mask.", "Use an IP-Adapter or PuLID for a part of it.")
        if tokens.ndim != 3 or tokens.shape[-1] != self._width:
            raise ValueError(f"Redux's words are [pictures, words, {self._width}], not {list(tokens.shape)}.")
        if not tokens.shape[1]:
            return ()
        words = request.weight * averaged(tokens.to(self._transformer.device, self._transformer.dtype), factor)
        return tuple(words.split(1))

    def eject(self) -> None:
        """Nothing was attached."""


def downsampling(options: Mapping[str, str | float]) -> int:
    """The factor that the option `downsampling` names, 1 where it is left out. Raises InvalidRequest."""
    unknown = sorted(options.keys() - {DOWNSAMPLING})
    if unknown:
        raise InvalidRequest(f"Redux has no option {', '.join(unknown)}.", f"Its one option is `{DOWNSAMPLING}`.")
    factor = options.get(DOWNSAMPLING, 1)
    if isinstance(factor, (str, bool)) or factor not in FACTORS:
        raise InvalidRequest(f"There is no {DOWNSAMPLING} {factor!r}.", f"Use a whole number from {FACTORS[0]} to {FACTORS[-1]}.")
    return int(factor)
