"""PuLID's denoiser half as an IdentityAdapter: the cross attentions of a file, injected into a transformer.

The encoder of the same file is checked and left behind: it runs elsewhere (see `IdentityEncoder`).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from deployments.errors import InvalidRequest
from deployments.identity.pulid import CONDITION_KEY, PuLID, PuLIDCondition, config_of, inject
from deployments.weights import check_state_dict, read_safetensors, safetensors_header

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

    from deployments.contracts import IdentityRequest

_ATTENTIONS = "pulid_ca."


def load_reading_half(path: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> PuLID:
    """The PuLID of a file without its encoder, in evaluation mode.

    All of the file is checked. Raises UnsafeWeights, DamagedWeights or CheckpointMismatch, which names the keys.
    """
    with torch.device("meta"):
        pulid = PuLID(config_of(safetensors_header(path).metadata))
    state = read_safetensors(path)
    check_state_dict({name: tensor.shape for name, tensor in pulid.state_dict().items()}, state, str(path))
    del pulid.pulid_encoder
    attentions = {name: tensor.to(device, dtype) for name, tensor in state.items() if name.startswith(_ATTENTIONS)}
    pulid.load_state_dict(attentions, assign=True)
    return pulid.to(device=device).requires_grad_(False).eval()


class PuLIDAdapter:
    """The denoiser half at work: an IdentityAdapter. Attach it before caches and offloads of the blocks (see BlockResiduals)."""

    key = CONDITION_KEY

    def __init__(self, transformer: FluxTransformer2DModel, path: Path) -> None:
        """path: the file. Raises as `load_reading_half` does, and as `inject` does (ValueError: made for a transformer of another size)."""
        model = cast(Any, transformer)  # diffusers declares no attribute
        pulid = load_reading_half(path, model.device, model.dtype)
        self._device, self._dtype = model.device, model.dtype
        self._injection = inject(transformer, pulid)

    def condition(self, tokens: Tensor, request: IdentityRequest, mask: Tensor | None = None) -> PuLIDCondition:
        """tokens: [1, n, output_dim] of PuLID's encoder. Raises InvalidRequest: PuLID has no options."""
        if request.options:
            raise InvalidRequest(f"PuLID has no option {', '.join(sorted(request.options))}.", "Leave it out.")
        weight = request.weight if mask is None else request.weight * mask
        return self._injection.condition(tokens.to(self._device, self._dtype), weight)

    def eject(self) -> None:
        """Leaves the transformer as it was. Raises ValueError while a later injection or cache is in force."""
        self._injection.eject()
