"""Linear modules whose weights are stored in 8 or 4 bits and unpacked for each product: smaller, and no longer quite the same.

Biases, norms and whatever lies outside the blocks stay as they are. A packed module is still a `nn.Linear` to a LoRA, which adds to
its result, and its tensors are buffers, so that the type of a model's parameters remains the one it computes in. Plain torch: runs
on a CPU and on any GPU, without a library of kernels. Knows no file and no place where weights lie.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from math import ceil, log2
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, pad

Storage = Literal["fp8", "nf4"]

_FP8 = torch.float8_e4m3fn
# Weights that share one scale. bitsandbytes' default, and QLoRA's (arXiv:2305.14314, section 3).
_NF4_BLOCK = 64
# The quantiles of a normal distribution, with an exact 0: QLoRA, appendix E.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


class Fp8Linear(nn.Linear):
    """packed: [out, in] float8_e4m3fn, to be multiplied by scale, a power of two.

    Scaled, because e4m3 has its full precision only from 2^-6 upwards and most weights of a transformer are smaller. By a power of two,
    because that costs no bit: weights that were published in plain e4m3 stay exactly what they are. By one number for all, because a
    matrix product takes that without another pass over anything.
    """

    packed: Tensor
    scale: float

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in], anew with each call."""
        return self.packed.to(dtype).mul_(self.scale)

    def forward(self, input: Tensor) -> Tensor:
        if self.bias is None:
            return linear(input, self.unpacked(input.dtype))
        flat = torch.addmm(self.bias, input.flatten(0, -2), self.packed.to(input.dtype).t(), alpha=self.scale)
        return flat.view(*input.shape[:-1], self.out_features)


class Nf4Linear(nn.Linear):
    """packed: two codes a byte, the first one high; scale: [blocks, 1] fp32, the largest magnitude among 64 weights. Bytes and scales
    are those of bitsandbytes' `nf4` without double quantisation."""

    packed: Tensor
    scale: Tensor

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """The weight, [out, in], anew with each call."""
        pairs = embedding(self.packed.int(), _nf4_pairs(self.packed.device, dtype))
        flat = pairs.view(-1, _NF4_BLOCK).mul_(self.scale.to(dtype)).view(-1)
        return flat[: self.out_features * self.in_features].view(self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.unpacked(input.dtype), self.bias)


def pack(modules: Iterable[nn.Module], storage: Storage, device: torch.device, rests_on: torch.device) -> None:
    """Packs every linear module below `modules`, one at a time, so that at most one weight is held twice.

    device: where the packing is done; rests_on: where the packed tensors stay. Raises ValueError for a module that is not a plain
    linear one: whoever packed it or made room in it before would lose what it did.
    """
    linears = [module for top in modules for module in top.modules() if isinstance(module, nn.Linear)]
    strange = [type(module).__name__ for module in linears if type(module) is not nn.Linear]
    if strange:
        raise ValueError(
            f"{len(strange)} linear modules are a {strange[0]} already; pack a model once, and before anything else is done to it."
        )
    pack_one = {"fp8": _to_fp8, "nf4": _to_nf4}[storage]
    for module in linears:
        weight = module.weight.detach()
        del module.weight
        pack_one(module, weight.to(device).float(), rests_on)


def _to_fp8(module: Any, weight: Tensor, rests_on: torch.device) -> None:
    largest = float(weight.abs().max())
    module.scale = 2.0 ** ceil(log2(largest / torch.finfo(_FP8).max)) if largest else 1.0
    module.register_buffer("packed", (weight / module.scale).to(_FP8).to(rests_on))
    module.__class__ = Fp8Linear


def _to_nf4(module: Any, weight: Tensor, rests_on: torch.device) -> None:
    flat = pad(weight.flatten(), (0, -weight.numel() % _NF4_BLOCK)).view(-1, _NF4_BLOCK)
    scale = flat.abs().amax(dim=1, keepdim=True)
    shares = flat / scale.clamp_min(torch.finfo(torch.float32).tiny)
    high, low = torch.bucketize(shares, _nf4_middles(weight.device)).to(torch.uint8).view(-1, 2).unbind(1)
    module.register_buffer("packed", ((high << 4) | low).to(rests_on))
    module.register_buffer("scale", scale.to(rests_on))
    module.__class__ = Nf4Linear


def _nf4_middles(device: torch.device) -> Tensor:
    levels = torch.tensor(_NF4, device=device)
    return (levels[1:] + levels[:-1]) / 2


@cache
def _nf4_pairs(device: torch.device, dtype: torch.dtype) -> Tensor:
    """[256, 2]: what each byte stands for. Kept for good, hence no child of the inference mode that it may be asked for in."""
    with torch.inference_mode(False):
        levels = torch.tensor(_NF4, device=device, dtype=dtype)
        byte = torch.arange(256, device=device)
        return torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)
