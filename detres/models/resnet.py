"""Residual networks: Deep Residual Learning for Image Recognition (arXiv 1512.03385), Table 1 and section 4.

One class for the ImageNet networks, plain networks, the CIFAR networks, and for ResNeXt, Wide ResNet, ResNet-D,
pre-activation and deformable networks: they differ in arguments. State keys are torchvision's (`conv1`, `bn1`,
`layer1.0.conv1` ...), so its checkpoints load as they are.

Stage k of the paper (conv2_x .. conv5_x) is `layer{k-1}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from detres.models.blocks import BlockOptions, Shortcut, make_stage
from detres.models.norms import FrozenBatchNorm2d, conv_norm, make_conv, make_norm

# depth -> (bottleneck blocks?, blocks per stage), Table 1
DEPTHS = {18: (False, (2, 2, 2, 2)), 34: (False, (3, 4, 6, 3)), 50: (True, (3, 4, 6, 3)),
          101: (True, (3, 4, 23, 3)), 152: (True, (3, 8, 36, 3))}

Stem = Literal["imagenet", "deep", "cifar"]


class DeepStem(nn.Sequential):
    """Three 3x3, the first with stride 2, instead of the 7x7: ResNet-C of arXiv 1812.01187, section 4.2.

    The norm of the last is the network's `bn1`, as with the 7x7; keys are timm's.
    """

    def __init__(self, width: int, norm: str, eps: float):
        half = width // 2
        super().__init__(make_conv(3, half, 3, 2), make_norm(norm, half, eps), nn.ReLU(),
                         make_conv(half, half, 3), make_norm(norm, half, eps), nn.ReLU(), make_conv(half, width, 3))

    def lead_in(self, x: Tensor) -> Tensor:
        """All but the last convolution."""
        for i in (0, 3):
            x = F.relu_(conv_norm(x, self[i], self[i + 1]))
        return x


class ResNet(nn.Module):
    """Stem and stages; `forward` gives the features of every stage, finest first.

    bottleneck, blocks: from `DEPTHS`, or your own.
    width: channels of the stem and inner channels of the first stage, doubled at every stage.
    shortcut: 'A' zero padding, 'B' projection where the size changes, 'C' projections, 'none' a plain network.
    norm: frozen_bn, bn, sync_bn or gn. stride_in_1x1: as in the paper; False as in torchvision.
    dilated_stages: how many of the last stages keep their resolution by dilation instead of stride (DeepLab).
    stem: 'imagenet' 7x7 stride 2 and max pool; 'deep' three 3x3 for the 7x7; 'cifar' one 3x3 (section 4.2).
    groups, group_width: ResNeXt-50 32x4d is (32, 4), Wide ResNet-50-2 is (1, 128).
    preact: norm and relu before convolutions (arXiv 1603.05027). avg_down, with stem 'deep': ResNet-D (1812.01187).
    deform_stages: how many of the last stages have deformable 3x3, modulated (DCNv2, arXiv 1811.11168).
    """

    def __init__(self, *, bottleneck: bool, blocks: Sequence[int], width: int = 64, shortcut: Shortcut = "B",
                 norm: str = "bn", norm_eps: float = 1e-5, stride_in_1x1: bool = False, dilated_stages: int = 0,
                 stem: Stem = "imagenet", groups: int = 1, group_width: int = 64, preact: bool = False,
                 avg_down: bool = False, deform_stages: int = 0, activation_checkpointing: bool = False):
        super().__init__()
        if not bottleneck and (groups, group_width, deform_stages) != (1, 64, 0):
            raise ValueError("groups, group_width and deform_stages must be 1, 64 and 0 without bottlenecks, got "
                             f"{groups}, {group_width} and {deform_stages}. Take depth 50 or more.")
        options = BlockOptions(bottleneck=bottleneck, shortcut=shortcut, norm=norm, norm_eps=norm_eps,
                               stride_in_1x1=stride_in_1x1, groups=groups, group_width=group_width, preact=preact,
                               avg_down=avg_down)
        self.activation_checkpointing = activation_checkpointing
        self.stem = stem
        if stem == "deep":
            self.conv1 = DeepStem(width, norm, norm_eps)
        else:
            self.conv1 = make_conv(3, width, 7, 2) if stem == "imagenet" else make_conv(3, width, 3)
        self.bn1 = make_norm(norm, width, norm_eps)
        channels, total_stride, dilation = width, (1 if stem == "cifar" else 4), 1
        self.stage_names, self.channels, self.strides = [], [], []
        for i, count in enumerate(blocks):
            # the first block of a dilated stage still sees the old grid, as in torchvision
            stride, first_dilation = (1 if i == 0 else 2), dilation
            if i >= len(blocks) - dilated_stages:
                stride, dilation = 1, dilation * stride
            total_stride *= stride
            stage, channels = make_stage(options, count, channels, width * 2**i, stride=stride, dilation=dilation,
                                         first_dilation=first_dilation, deform=i >= len(blocks) - deform_stages)
            self.stage_names.append(f"layer{i + 1}")
            self.add_module(self.stage_names[-1], stage)
            self.channels.append(channels)
            self.strides.append(total_stride)

    def run_stem(self, x: Tensor) -> Tensor:
        conv = self.conv1
        if self.stem == "deep":
            x, conv = self.conv1.lead_in(x), self.conv1[-1]
        x = F.relu_(conv_norm(x, conv, self.bn1))
        return x if self.stem == "cifar" else F.max_pool2d(x, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised images -> one map (N, C, H / stride, W / stride) per stage."""
        x = self.run_stem(x)
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


def cifar_resnet(depth: int, *, width: int = 16, shortcut: Shortcut = "A", **options) -> ResNet:
    """The networks of section 4.2, 6n + 2 layers (20, 32, 44, 56, 110 and 1202 in the paper); `options` are those of
    `ResNet`."""
    if depth < 8 or depth % 6 != 2:
        raise ValueError(f"depth must be 6n + 2 (8, 14, 20, 26, 32 ...), got {depth}. `resnet` makes those of Table 1.")
    return ResNet(bottleneck=False, blocks=(depth // 6,) * 3, width=width, shortcut=shortcut, stem="cifar", **options)
