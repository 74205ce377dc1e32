"""Deformable convolution, version 2: Deformable ConvNets v2 (arXiv 1811.11168), section 3.2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d


class DeformConv2d(nn.Conv2d):
    """A convolution whose samples are moved and weighted: each tap of the kernel has, at each pixel, an offset in
    pixels and a modulation in 0..1, which `offset`, a convolution of the same input, predicts.

    It starts at zero: all offsets 0, all modulations 1/2, so that the layer is half the plain convolution. Weights
    have the names of the plain one; a file without `offset` leaves it at zero. On CUDA the gradient is summed in no
    fixed order: two runs differ in the last bits.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1,
                 groups: int = 1):
        padding = dilation * (kernel // 2)
        super().__init__(in_channels, out_channels, kernel, stride, padding, dilation, groups, bias=False)
        nn.init.kaiming_normal_(self.weight, mode="fan_out", nonlinearity="relu")
        self.taps = kernel**2
        self.offset = nn.Conv2d(in_channels, 3 * self.taps, kernel, stride, padding, dilation)
        nn.init.zeros_(self.offset.weight)
        nn.init.zeros_(self.offset.bias)

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """What `forward` and the folding of norms call; in fp32 at least, as the kernel of the CPU has no bf16."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        # (N, 2 * taps, H', W'), dy and dx of each tap in turn, and (N, taps, H', W')
        offset, modulation = self.offset(x).to(dtype).split([2 * self.taps, self.taps], 1)
        bias = None if bias is None else bias.to(dtype)
        out = deform_conv2d(x.to(dtype), offset, weight.to(dtype), bias, self.stride, self.padding, self.dilation,
                            modulation.sigmoid())
        return out.to(x.dtype)
