"""Normalisation layers by name, and the fused convolution + frozen BN."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm with constant statistics and affine parameters (He et al., arXiv 1512.03385, appendix A).

    State keys are BatchNorm2d's, less the counter. Before pretrained values are loaded it is the identity.
    """

    def __init__(self, channels: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """(C,), (C,) fp32: the norm is x * scale + shift."""
        scale = self.weight * torch.rsqrt(self.running_var + self.eps)
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale_and_shift()
        return x * scale[:, None, None].to(x.dtype) + shift[:, None, None].to(x.dtype)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        state_dict.pop(prefix + "num_batches_tracked", None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class GroupNorm32(nn.GroupNorm):
    """GroupNorm (arXiv 1803.08494) of 32 groups, fewer where the channels do not divide: at least 4 in a group."""

    def __init__(self, channels: int, eps: float = 1e-5):
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if channels % g == 0 and channels // g >= min(4, channels))
        super().__init__(groups, channels, eps)


NORMS = {"frozen_bn": FrozenBatchNorm2d, "bn": nn.BatchNorm2d, "sync_bn": nn.SyncBatchNorm, "gn": GroupNorm32}


def make_norm(name: str, channels: int, eps: float = 1e-5) -> nn.Module:
    """A norm layer over `channels`; name is a key of `NORMS`, or 'none'."""
    return nn.Identity() if name == "none" else NORMS[name](channels, eps=eps)


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
    """norm(conv(x)), in one convolution where the norm is frozen: its scale goes into the weights, its shift
    becomes the bias. That spares two passes over the activations; gradients reach `conv.weight` as before."""
    if not isinstance(norm, FrozenBatchNorm2d):
        return norm(conv(x))
    scale, shift = norm.scale_and_shift()
    weight = conv.weight * scale[:, None, None, None]
    return conv._conv_forward(x, weight, shift)  # what conv.forward calls; a deformable one has its own


def make_conv(in_channels: int, out_channels: int, kernel: int, stride: int = 1, dilation: int = 1, groups: int = 1,
              bias: bool = False) -> nn.Conv2d:
    """A convolution padded to keep the size at stride 1; He initialisation (arXiv 1502.01852)."""
    layer = nn.Conv2d(in_channels, out_channels, kernel, stride, dilation * (kernel // 2), dilation, groups, bias)
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
    if bias:
        nn.init.zeros_(layer.bias)
    return layer
