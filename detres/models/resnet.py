"""Residual networks: Deep Residual Learning for Image Recognition (arXiv 1512.03385), Table 1 and section 4.

One class for the ImageNet networks, plain networks, ResNeXt, Wide ResNet and the CIFAR networks: they differ in
arguments. State keys are torchvision's (`conv1`, `bn1`, `layer1.0.conv1` ...), so its checkpoints load as they are.

Stage k of the paper (conv2_x .. conv5_x) is `layer{k-1}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detres.models.norms import FrozenBatchNorm2d, conv_norm, make_conv, make_norm

# depth -> (bottleneck blocks?, blocks per stage), Table 1
DEPTHS = {18: (False, (2, 2, 2, 2)), 34: (False, (3, 4, 6, 3)), 50: (True, (3, 4, 6, 3)),
          101: (True, (3, 4, 23, 3)), 152: (True, (3, 8, 36, 3))}

Shortcut = Literal["A", "B", "C", "none"]


class ZeroPadShortcut(nn.Module):
    """Option A of section 3.3: strided identity, new channels are zero; no parameters."""

    def __init__(self, new_channels: int, stride: int):
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


class ProjectionShortcut(nn.Sequential):
    """Option B: 1x1 convolution and norm."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str, eps: float):
        super().__init__(make_conv(in_channels, channels, 1, stride), make_norm(norm, channels, eps))

    def forward(self, x: Tensor) -> Tensor:
        return conv_norm(x, self[0], self[1])


def make_shortcut(kind: Shortcut, in_channels: int, channels: int, stride: int, norm: str, eps: float):
    """Shortcut of one block: None is the identity. 'B' projects where the size changes, 'C' always."""
    changes = stride != 1 or in_channels != channels
    if kind == "C" or (kind == "B" and changes):
        return ProjectionShortcut(in_channels, channels, stride, norm, eps)
    if kind == "A" and changes:
        return ZeroPadShortcut(channels - in_channels, stride)
    return None


class Block(nn.Module):
    """What basic and bottleneck blocks share: out = relu(branch(x) + shortcut(x)); shortcut 'none' is a plain net."""

    downsample: nn.Module | None
    residual: bool

    def branch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        out = self.branch(x)
        if self.residual:
            out += x if self.downsample is None else self.downsample(x)
        return F.relu_(out)


class BasicBlock(Block):
    """Two 3x3 convolutions (Figure 5 left)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, shortcut: Shortcut, norm: str,
                 eps: float, stride_in_1x1: bool, groups: int, group_width: int):
        super().__init__()
        self.conv1 = make_conv(in_channels, width, 3, stride, dilation)
        self.bn1 = make_norm(norm, width, eps)
        self.conv2 = make_conv(width, width, 3, dilation=dilation)
        self.bn2 = make_norm(norm, width, eps)
        self.residual = shortcut != "none"
        self.downsample = make_shortcut(shortcut, in_channels, width, stride, norm, eps)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu_(conv_norm(x, self.conv1, self.bn1))
        return conv_norm(x, self.conv2, self.bn2)


class Bottleneck(Block):
    """1x1, 3x3, 1x1 (Figure 5 right); grouped 3x3 is ResNeXt (arXiv 1611.05431)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, stride: int, dilation: int, shortcut: Shortcut, norm: str,
                 eps: float, stride_in_1x1: bool, groups: int, group_width: int):
        super().__init__()
        inner = width * group_width // 64 * groups
        channels = width * self.expansion
        self.conv1 = make_conv(in_channels, inner, 1, stride if stride_in_1x1 else 1)
        self.bn1 = make_norm(norm, inner, eps)
        self.conv2 = make_conv(inner, inner, 3, 1 if stride_in_1x1 else stride, dilation, groups)
        self.bn2 = make_norm(norm, inner, eps)
        self.conv3 = make_conv(inner, channels, 1)
        self.bn3 = make_norm(norm, channels, eps)
        self.residual = shortcut != "none"
        self.downsample = make_shortcut(shortcut, in_channels, channels, stride, norm, eps)

    def branch(self, x: Tensor) -> Tensor:
        x = F.relu_(conv_norm(x, self.conv1, self.bn1))
        x = F.relu_(conv_norm(x, self.conv2, self.bn2))
        return conv_norm(x, self.conv3, self.bn3)


class ResNet(nn.Module):
    """Stem and stages; `forward` gives the features of every stage, finest first.

    bottleneck, blocks: from `DEPTHS`, or your own.
    width: channels of the stem and inner channels of the first stage, doubled at every stage.
    shortcut: 'A' zero padding, 'B' projection where the size changes, 'C' projections, 'none' a plain network.
    norm: frozen_bn, bn, sync_bn or gn. stride_in_1x1: as in the paper; False as in torchvision.
    dilated_stages: how many of the last stages keep their resolution by dilation instead of stride (DeepLab).
    stem: 'imagenet' 7x7 stride 2 and max pool; 'cifar' one 3x3 (section 4.2).
    groups, group_width: ResNeXt-50 32x4d is (32, 4), Wide ResNet-50-2 is (1, 128).
    """

    def __init__(self, *, bottleneck: bool, blocks: Sequence[int], width: int = 64, shortcut: Shortcut = "B",
                 norm: str = "bn", norm_eps: float = 1e-5, stride_in_1x1: bool = False, dilated_stages: int = 0,
                 stem: Literal["imagenet", "cifar"] = "imagenet", groups: int = 1, group_width: int = 64,
                 activation_checkpointing: bool = False):
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        self.stem = stem
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = make_conv(3, width, kernel, stride)
        self.bn1 = make_norm(norm, width, norm_eps)
        block, in_channels, dilation = (Bottleneck if bottleneck else BasicBlock), width, 1
        total_stride = 4 if stem == "imagenet" else 1
        self.stage_names, self.channels, self.strides = [], [], []
        for i, count in enumerate(blocks):
            stride, previous_dilation = (1 if i == 0 else 2), dilation
            if i >= len(blocks) - dilated_stages:
                stride, dilation = 1, dilation * stride
            total_stride *= stride
            stage_width = width * 2**i
            stage = []
            for k in range(count):  # the first block of a dilated stage still sees the old grid, as in torchvision
                stage.append(block(in_channels, stage_width, stride if k == 0 else 1,
                                   previous_dilation if k == 0 else dilation, shortcut, norm, norm_eps,
                                   stride_in_1x1, groups, group_width))
                in_channels = stage_width * block.expansion
            self.stage_names.append(f"layer{i + 1}")
            self.add_module(self.stage_names[-1], nn.Sequential(*stage))
            self.channels.append(in_channels)
            self.strides.append(total_stride)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised images -> one map (N, C, H / stride, W / stride) per stage."""
        x = F.relu_(conv_norm(x, self.conv1, self.bn1))
        if self.stem == "imagenet":
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        features = []
        for name in self.stage_names:
            for block in getattr(self, name):
                if self.activation_checkpointing and torch.is_grad_enabled():
                    x = checkpoint(block, x, use_reentrant=False)
                else:
                    x = block(x)
            features.append(x)
        return features

    def pop_last_stage(self) -> nn.Sequential:
        """Take conv5_x out of the trunk, to be the per-region head of a C4 detector (appendix A)."""
        name = self.stage_names.pop()
        stage = getattr(self, name)
        delattr(self, name)
        self.channels.pop()
        self.strides.pop()
        return stage

    def freeze(self, stages: int) -> None:
        """No gradient and no statistics for the first `stages`: 1 the stem, 2 the stem and conv2_x, and so on."""
        names = ["conv1", "bn1", *self.stage_names][: stages + 1 if stages else 0]
        for name in names:
            setattr(self, name, freeze_batch_norms(getattr(self, name)).requires_grad_(False))


def freeze_batch_norms(module: nn.Module) -> nn.Module:
    """`module` with every batch norm in it replaced by a frozen one of the same values."""
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        frozen = FrozenBatchNorm2d(module.num_features, module.eps)
        frozen.load_state_dict(module.state_dict())
        return frozen
    for name, child in module.named_children():
        setattr(module, name, freeze_batch_norms(child))
    return module


def resnet(depth: int, **options) -> ResNet:
    """ResNet-18, 34, 50, 101 or 152 (Table 1); `options` are those of `ResNet`."""
    if depth not in DEPTHS:
        raise ValueError(f"depth must be one of {sorted(DEPTHS)}, got {depth}. Pass blocks to ResNet for another.")
    bottleneck, blocks = DEPTHS[depth]
    return ResNet(bottleneck=bottleneck, blocks=blocks, **options)
