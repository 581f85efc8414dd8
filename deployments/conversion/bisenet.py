"""The published face parser (BiSeNet, Yu et al., arXiv:1808.00897, on CelebAMask's 19 classes) -> ONNX.

The network is restated here for this purpose only: what runs is the ONNX file (deployments/faces/parsing.py). Names are those of the
checkpoint, facexlib/parsing/bisenet.py and resnet.py at 260620a, so that it loads strictly. Of its three outputs the first is kept; the
other two helped training.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from deployments.conversion.pickles import read_pickle, tensors_of
from deployments.weights import check_state_dict

CLASSES = 19
INPUT_PX = 512
# Read and written by every onnxruntime this project allows; the lowest that torch's exporter writes without converting.
_OPSET = 18
_COUNTER = ".num_batches_tracked"


class ConvNormReLU(nn.Module):
    def __init__(self, source: int, target: int, size: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(source, target, size, padding=size // 2, bias=False)
        self.bn = nn.BatchNorm2d(target)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class BasicBlock(nn.Module):
    """ResNet-18's (He et al., arXiv:1512.03385)."""

    def __init__(self, source: int, target: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(source, target, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(target)
        self.conv2 = nn.Conv2d(target, target, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(target)
        changes = source != target or stride != 1
        self.downsample = (
            nn.Sequential(nn.Conv2d(source, target, 1, stride, bias=False), nn.BatchNorm2d(target)) if changes else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        inner = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.downsample(x) + inner)


class ResNet18(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, 1), BasicBlock(64, 64, 1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, 2), BasicBlock(128, 128, 1))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, 2), BasicBlock(256, 256, 1))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, 2), BasicBlock(512, 512, 1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """-> features at 1/8, 1/16 and 1/32 of the resolution."""
        x = self.layer1(F.max_pool2d(F.relu(self.bn1(self.conv1(x))), 3, 2, 1))
        eighth = self.layer2(x)
        sixteenth = self.layer3(eighth)
        return eighth, sixteenth, self.layer4(sixteenth)


class AttentionRefinement(nn.Module):
    """Figure 2 b of the paper: channels weighted by what the whole picture says."""

    def __init__(self, source: int, target: int) -> None:
        super().__init__()
        self.conv = ConvNormReLU(source, target)
        self.conv_atten = nn.Conv2d(target, target, 1, bias=False)
        self.bn_atten = nn.BatchNorm2d(target)

    def forward(self, x: Tensor) -> Tensor:
        features = self.conv(x)
        weights = self.bn_atten(self.conv_atten(_pooled(features)))
        return cast(Tensor, features * torch.sigmoid(weights))


class ContextPath(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.resnet = ResNet18()
        self.arm16 = AttentionRefinement(256, 128)
        self.arm32 = AttentionRefinement(512, 128)
        self.conv_head32 = ConvNormReLU(128, 128)
        self.conv_head16 = ConvNormReLU(128, 128)
        self.conv_avg = ConvNormReLU(512, 128, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """-> the backbone's features and the context's, both [n, 128, H / 8, W / 8]."""
        eighth, sixteenth, last = self.resnet(x)
        deep = self.arm32(last) + self.conv_avg(_pooled(last))
        deep = self.conv_head32(F.interpolate(deep, scale_factor=2.0, mode="nearest"))
        middle = self.arm16(sixteenth) + deep
        return eighth, self.conv_head16(F.interpolate(middle, scale_factor=2.0, mode="nearest"))


class FeatureFusion(nn.Module):
    """Figure 2 c of the paper."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.convblk = ConvNormReLU(width, width, 1)
        self.conv1 = nn.Conv2d(width, width // 4, 1, bias=False)
        self.conv2 = nn.Conv2d(width // 4, width, 1, bias=False)

    def forward(self, detail: Tensor, context: Tensor) -> Tensor:
        features = self.convblk(torch.cat([detail, context], dim=1))
        weights = torch.sigmoid(self.conv2(F.relu(self.conv1(_pooled(features)))))
        return cast(Tensor, features * weights + features)


class Head(nn.Module):
    def __init__(self, source: int, middle: int) -> None:
        super().__init__()
        self.conv = ConvNormReLU(source, middle)
        self.conv_out = nn.Conv2d(middle, CLASSES, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.conv_out(self.conv(x)))


class BiSeNet(nn.Module):
    """ImageNet-normalised RGB [n, 3, H, W], H and W divisible by 32 -> logits [n, 19, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.cp = ContextPath()
        self.ffm = FeatureFusion()
        self.conv_out = Head(256, 256)
        self.conv_out16 = Head(128, 64)
        self.conv_out32 = Head(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        detail, context = self.cp(x)
        return F.interpolate(self.conv_out(self.ffm(detail, context)), size=x.shape[-2:], mode="bilinear", align_corners=True)


def convert(source: Path, target: Path) -> None:
    """Writes an ONNX file: `input` [n, 3, 512, 512] -> `logits` [n, 19, 512, 512]. Raises CheckpointMismatch for any misfit."""
    found = tensors_of(read_pickle(source), str(source))
    model = BiSeNet()
    # Older checkpoints lack the counters of batch normalisation, which nothing at inference reads.
    wanted = {name: tensor.shape for name, tensor in model.state_dict().items() if not name.endswith(_COUNTER)}
    state = {name: tensor.float() for name, tensor in found.items() if not name.endswith(_COUNTER)}
    check_state_dict(wanted, state, str(source))
    model.load_state_dict(state, strict=False)
    _export(model.eval(), target)


def _export(model: nn.Module, target: Path) -> None:
    example = torch.zeros(2, 3, INPUT_PX, INPUT_PX)
    batch = torch.export.Dim("n", min=1)
    program = torch.onnx.export(
        model, (example,), input_names=["input"], output_names=["logits"], opset_version=_OPSET,
        dynamo=True, dynamic_shapes=({0: batch},), external_data=False, verbose=False,
    )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    onnx.checker.check_model(proto)
    target.write_bytes(proto.SerializeToString(deterministic=True))


def _pooled(x: Tensor) -> Tensor:
    return x.mean(dim=(2, 3), keepdim=True)
