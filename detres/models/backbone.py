"""From images to the feature maps that heads read: FPN, C4, dilated C5 and all stages of a ResNet."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detres.models.norms import conv_norm, make_norm
from detres.models.resnet import ResNet


class FPN(nn.Module):
    """Feature Pyramid Network (arXiv 1612.03144, section 3): P2..P5 from C2..C5, and P6 by subsampling P5.

    top 'c5' or 'p5': from C3..C5 P3..P5, and P6 and P7 by convolutions with stride 2, that of P6 on C5 (RetinaNet,
    arXiv 1708.02002, section 4, footnote 2) or P5; top_relu: what P7 is made of is the relu of P6. `forward` returns
    maps (N, channels, H_l, W_l), finest first.
    """

    def __init__(self, in_channels: list[int], channels: int = 256, norm: str = "none", top: str = "pool",
                 top_relu: bool = True):
        super().__init__()
        self.top, self.top_relu = top, top_relu
        if top != "pool":
            in_channels = in_channels[1:]
            self.p6 = _fpn_conv(in_channels[-1] if top == "c5" else channels, channels, 3, "none", stride=2)
            self.p7 = _fpn_conv(channels, channels, 3, "none", stride=2)
        self.lateral = nn.ModuleList(_fpn_conv(c, channels, 1, norm) for c in in_channels)
        self.lateral_norm = nn.ModuleList(make_norm(norm, channels) for _ in in_channels)
        self.output = nn.ModuleList(_fpn_conv(channels, channels, 3, norm) for _ in in_channels)
        self.output_norm = nn.ModuleList(make_norm(norm, channels) for _ in in_channels)

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        pyramid: list[Tensor] = []
        top, features = None, features[-len(self.lateral):]
        for i in reversed(range(len(features))):
            lateral = conv_norm(features[i], self.lateral[i], self.lateral_norm[i])
            if top is not None:
                lateral += F.interpolate(top, size=lateral.shape[-2:], mode="nearest")
            top = lateral
            pyramid.insert(0, conv_norm(top, self.output[i], self.output_norm[i]))
        if self.top == "pool":
            return [*pyramid, F.max_pool2d(pyramid[-1], 1, stride=2)]
        p6 = self.p6(features[-1] if self.top == "c5" else pyramid[-1])
        return [*pyramid, p6, self.p7(F.relu(p6) if self.top_relu else p6)]


def _fpn_conv(in_channels: int, channels: int, kernel: int, norm: str, stride: int = 1) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, channels, kernel, stride, padding=kernel // 2, bias=norm == "none")
    nn.init.kaiming_uniform_(layer.weight, a=1)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class FPNBackbone(nn.Module):
    """P2..P6, strides 4 to 64, or with another `top` than 'pool' P3..P7, strides 8 to 128."""

    def __init__(self, body: ResNet, channels: int = 256, norm: str = "none", top: str = "pool", top_relu: bool = True):
        super().__init__()
        self.body = body
        self.fpn = FPN(body.channels, channels, norm, top, top_relu)
        self.channels = channels
        self.strides = [*body.strides, body.strides[-1] * 2]
        if top != "pool":
            self.strides = [*self.strides[1:], body.strides[-1] * 4]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.fpn(self.body(pixels))


class LastStageBackbone(nn.Module):
    """The last stage alone: C4 (stride 16, conv5 taken out to be the head), or C5, dilated or not."""

    def __init__(self, body: ResNet):
        super().__init__()
        self.body = body
        self.channels = body.channels[-1]
        self.strides = body.strides[-1:]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.body(pixels)[-1:]


class AllStagesBackbone(nn.Module):
    """C2..C5, of which heads of semantic segmentation choose; dilated or not."""

    def __init__(self, body: ResNet):
        super().__init__()
        self.body = body
        self.channels, self.strides = body.channels, body.strides

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return self.body(pixels)
