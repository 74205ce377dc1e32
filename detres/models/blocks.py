"""Units of residual networks: convolutions of a branch, the order of their norms and relus, and shortcuts.

A unit is a list of convolutions (`basic`, `bottleneck`) in an order of operations (`Block`, `PreActBlock`) beside a
shortcut (`make_shortcut`). `make_stage` stacks them. Figures and sections are those of arXiv 1512.03385.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from detres.models.deform_conv import DeformConv2d
from detres.models.norms import conv_norm, make_conv, make_norm

Shortcut = Literal["A", "B", "C", "none"]


@dataclass(frozen=True)
class BlockOptions:
    """What all units of a network share; see `resnet.ResNet`."""

    bottleneck: bool
    shortcut: Shortcut
    norm: str
    norm_eps: float
    stride_in_1x1: bool
    groups: int
    group_width: int
    preact: bool
    avg_down: bool


def make_stage(options: BlockOptions, count: int, in_channels: int, width: int, *, stride: int, dilation: int,
               first_dilation: int, deform: bool) -> tuple[nn.Sequential, int]:
    """`count` units, the first of which strides, and their channels.

    A stage of pre-activation units ends with the norm and relu that in its authors' code the next stage's first unit
    begins with, before branch and shortcut part: the same network (arXiv 1603.05027, appendix, on the first and the
    last unit), and whoever reads a stage (a pyramid, regions, the classifier) finds activations, as in others.
    """
    stage = nn.Sequential()
    for k in range(count):
        stage.append(make_block(options, in_channels, width, stride=1 if k else stride, first=k == 0, deform=deform,
                                dilation=dilation if k else first_dilation))
        in_channels = width * (4 if options.bottleneck else 1)
    if options.preact:
        stage.add_module("norm", make_norm(options.norm, in_channels, options.norm_eps))
        stage.add_module("relu", nn.ReLU())
    return stage, in_channels


def make_block(options: BlockOptions, in_channels: int, width: int, *, stride: int, dilation: int, first: bool,
               deform: bool) -> Block:
    if options.bottleneck:
        convs = bottleneck(in_channels, width, stride, dilation, stride_in_1x1=options.stride_in_1x1,
                           groups=options.groups, group_width=options.group_width, deform=deform)
    else:
        convs = basic(in_channels, width, stride, dilation)
    shortcut = make_shortcut(options.shortcut, in_channels, convs[-1].out_channels, stride,
                             "none" if options.preact else options.norm, options.norm_eps, options.avg_down)
    if options.preact:
        return PreActBlock(convs, shortcut, options.norm, options.norm_eps, first)
    return Block(convs, shortcut, options.norm, options.norm_eps)


# --- convolutions of a branch -------------------------------------------------------------------------------------


def basic(in_channels: int, width: int, stride: int, dilation: int) -> list[nn.Conv2d]:
    """Two 3x3 (Figure 5 left)."""
    return [make_conv(in_channels, width, 3, stride, dilation), make_conv(width, width, 3, dilation=dilation)]


def bottleneck(in_channels: int, width: int, stride: int, dilation: int, *, stride_in_1x1: bool, groups: int,
               group_width: int, deform: bool) -> list[nn.Conv2d]:
    """1x1, 3x3, 1x1 (Figure 5 right); grouped 3x3 is ResNeXt (arXiv 1611.05431), wide 3x3 Wide ResNet (1605.07146)."""
    inner = width * group_width // 64 * groups
    first, second = (stride, 1) if stride_in_1x1 else (1, stride)
    make_3x3 = DeformConv2d if deform else make_conv
    return [make_conv(in_channels, inner, 1, first), make_3x3(inner, inner, 3, second, dilation, groups),
            make_conv(inner, width * 4, 1)]


# --- order of operations ------------------------------------------------------------------------------------------


class Block(nn.Module):
    """relu(branch(x) + shortcut(x)); in the branch a norm after each convolution and relu between (Figure 2).

    Convolutions are `conv1`, `conv2` ..., norms `bn1` ..., the shortcut `downsample`, as in torchvision.
    """

    preact = False

    def __init__(self, convs: Sequence[nn.Conv2d], shortcut: nn.Module | None, norm: str, eps: float):
        super().__init__()
        self.depth = len(convs)
        for i, conv in enumerate(convs, 1):
            self.add_module(f"conv{i}", conv)
            self.add_module(f"bn{i}", make_norm(norm, conv.in_channels if self.preact else conv.out_channels, eps))
        self.downsample = shortcut

    def layers(self) -> list[tuple[nn.Conv2d, nn.Module]]:
        return [(getattr(self, f"conv{i + 1}"), getattr(self, f"bn{i + 1}")) for i in range(self.depth)]

    def add_shortcut(self, out: Tensor, x: Tensor) -> Tensor:
        """In place; a plain network has none."""
        if self.downsample is not None:
            out += self.downsample(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        *inner, last = self.layers()
        out = x
        for conv, norm in inner:
            out = F.relu_(conv_norm(out, conv, norm))
        return F.relu_(self.add_shortcut(conv_norm(out, *last), x))


class PreActBlock(Block):
    """branch(x) + shortcut(x); in the branch norm and relu before each convolution (arXiv 1603.05027, Figure 1b).

    first: of a stage, whose input is activated already (`make_stage`, or the stem): it has no `bn1`.
    """

    preact = True

    def __init__(self, convs: Sequence[nn.Conv2d], shortcut: nn.Module | None, norm: str, eps: float, first: bool):
        super().__init__(convs, shortcut, norm, eps)
        if first:
            self.bn1 = None

    def forward(self, x: Tensor) -> Tensor:
        convs, norms = zip(*self.layers())
        out = x if self.bn1 is None else F.relu_(self.bn1(x))
        for conv, norm in zip(convs, norms[1:]):  # the norm before a convolution is the one after its predecessor
            out = F.relu_(conv_norm(out, conv, norm))
        return self.add_shortcut(convs[-1](out), x)


# --- shortcuts (section 3.3) --------------------------------------------------------------------------------------


class ZeroPadShortcut(nn.Module):
    """Option A: strided identity, new channels are zero; no parameters."""

    def __init__(self, new_channels: int, stride: int):
        super().__init__()
        self.new_channels, self.stride = new_channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        return F.pad(x, (0, 0, 0, 0, 0, self.new_channels))


class ProjectionShortcut(nn.Sequential):
    """Option B: 1x1 convolution and norm. avg_down: the mean of 2x2 pixels goes into it, not every other pixel
    (ResNet-D, arXiv 1812.01187, section 4.2; with that the keys are timm's)."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str, eps: float, avg_down: bool):
        pool = []
        if avg_down:  # the last mean of an odd side is of the pixels that exist
            pool = [nn.AvgPool2d(stride, ceil_mode=True) if stride > 1 else nn.Identity()]
        super().__init__(*pool, make_conv(in_channels, channels, 1, 1 if avg_down else stride),
                         make_norm(norm, channels, eps))

    def forward(self, x: Tensor) -> Tensor:
        *pool, conv, norm = self
        return conv_norm(pool[0](x) if pool else x, conv, norm)


def make_shortcut(kind: Shortcut, in_channels: int, channels: int, stride: int, norm: str, eps: float,
                  avg_down: bool) -> nn.Module | None:
    """Of one unit: 'B' projects where the size changes, 'C' always; None in a plain network."""
    changes = stride != 1 or in_channels != channels
    if kind == "none":
        return None
    if kind == "C" or (kind == "B" and changes):
        return ProjectionShortcut(in_channels, channels, stride, norm, eps, avg_down)
    return ZeroPadShortcut(channels - in_channels, stride) if changes else nn.Identity()
