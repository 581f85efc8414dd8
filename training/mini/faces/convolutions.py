"""The few convolutional pieces of which the small face networks are built. Knows no task, no size of picture and no weights.

Full 3x3 convolutions change resolution and width, separable blocks do the rest: most of a network's sight for few of its
parameters, and onnxruntime folds every batch normalisation into the convolution before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N = TypeVar("N", bound=nn.Module)


def conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """A convolution without bias (a normalisation follows) that keeps the size, or divides it exactly by the stride."""
    return nn.Conv2d(inputs, outputs, kernel, stride, (kernel - 1) // 2, groups=groups, bias=False)


def unit(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution, batch normalisation, ReLU."""
    return nn.Sequential(conv(inputs, outputs, kernel, stride), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class SeparableBlock(nn.Module):
    """x + project(expand(depthwise(x))), the inverted residual of MobileNetV2 (Sandler et al. 2018) with the depthwise convolution first,
    where it is narrow (as in ConvNeXt, Liu et al. 2022)."""

    def __init__(self, width: int, kernel: int = 5, expansion: int = 2) -> None:
        super().__init__()
        self.depthwise = nn.Sequential(conv(width, width, kernel, groups=width), nn.BatchNorm2d(width))
        self.expand = unit(width, width * expansion, 1)
        self.project = nn.Sequential(conv(width * expansion, width, 1), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return x + cast(Tensor, self.project(self.expand(self.depthwise(x))))


class Encoder(nn.Module):
    """[n, 3, H, W] -> one map per stage; stage 0 at 1 / stem_stride of the resolution, each later one at half of the one before.

    The stem's kernel is 7 at stride 4, 3 at stride 2. widths, depths: channels and separable blocks per stage.
    """

    def __init__(self, stem_stride: int, widths: Sequence[int], depths: Sequence[int]) -> None:
        super().__init__()
        if stem_stride not in (2, 4):
            raise ValueError(f"an encoder's stem has stride 2 or 4, not {stem_stride}")
        stem = unit(3, widths[0], 7 if stem_stride == 4 else 3, stem_stride)
        downs = [stem, *(unit(a, b, 3, 2) for a, b in zip(widths[:-1], widths[1:], strict=True))]
        self.stages = nn.ModuleList(
            nn.Sequential(down, *(SeparableBlock(width) for _ in range(depth)))
            for down, width, depth in zip(downs, widths, depths, strict=True)
        )

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class TopDown(nn.Module):
    """Feature pyramid (Lin et al. 2017): coarse maps are upsampled and added to finer ones. Returns the maps in the encoder's order,
    all `width` channels wide."""

    def __init__(self, widths: Sequence[int], width: int) -> None:
        super().__init__()
        self.laterals = nn.ModuleList(nn.Sequential(conv(w, width, 1), nn.BatchNorm2d(width)) for w in widths)
        self.smooth = nn.ModuleList(SeparableBlock(width, 3) for _ in widths)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        above: Tensor | None = None
        out: list[Tensor] = []
        for x, lateral, smooth in zip(reversed(maps), reversed(self.laterals), reversed(self.smooth), strict=True):
            merged = lateral(x) if above is None else lateral(x) + F.interpolate(above, scale_factor=2.0, mode="nearest")
            above = cast(Tensor, smooth(merged))
            out.insert(0, above)
        return out


def on_device(network: N, device: torch.device | str) -> N:
    """Moved to a device, weights in the layout in which convolutions are fast there."""
    network.to(device)
    # torch's own types don't know this argument alone.
    cast(Any, network).to(memory_format=torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format)
    return network
