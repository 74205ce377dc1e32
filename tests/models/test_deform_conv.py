"""Modulated deformable convolution (arXiv 1811.11168) against its definition in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from detres.models.deform_conv import DeformConv2d
from detres.models.norms import conv_norm, make_norm
from detres.models.resnet import resnet


def naive_deform(layer, x, offset, modulation):
    """Sum over taps of weight * modulation * bilinear sample; outside the image is zero."""
    def pixel(image, i, j):
        inside = 0 <= i < image.shape[1] and 0 <= j < image.shape[2]
        return image[:, i, j] if inside else torch.zeros_like(image[:, 0, 0])

    def sample(image, y, x):
        i, j = math.floor(y), math.floor(x)
        return sum((1 - abs(y - a)) * (1 - abs(x - b)) * pixel(image, a, b) for a in (i, i + 1) for b in (j, j + 1))

    (n, channels), per_group = x.shape[:2], layer.weight.shape[1]
    out = torch.zeros(n, layer.out_channels, *offset.shape[2:], dtype=x.dtype)
    stride, dilation, padding = layer.stride[0], layer.dilation[0], layer.padding[0]
    for image, i, j in torch.cartesian_prod(*map(torch.arange, (n, *offset.shape[2:]))).tolist():
        for tap in range(9):
            y = i * stride - padding + tap // 3 * dilation + offset[image, 2 * tap, i, j].item()
            xx = j * stride - padding + tap % 3 * dilation + offset[image, 2 * tap + 1, i, j].item()
            value = sample(x[image], y, xx) * modulation[image, tap, i, j]
            for c in range(layer.out_channels):
                first = c // (layer.out_channels // (channels // per_group)) * per_group
                out[image, c, i, j] += layer.weight[c, :, tap // 3, tap % 3] @ value[first:first + per_group]
    return out


@pytest.mark.parametrize("stride, dilation, groups", [(1, 1, 1), (2, 1, 2), (1, 2, 1)])
@torch.no_grad()
def test_deformable_convolution_is_its_definition(stride, dilation, groups):
    torch.manual_seed(0)
    layer = DeformConv2d(4, 6, 3, stride, dilation, groups).double()
    layer.offset.weight.normal_(std=0.3)
    layer.offset.bias.normal_()
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    predicted = F.conv2d(x, layer.offset.weight, layer.offset.bias, stride, dilation, dilation)
    expected = naive_deform(layer, x, predicted[:, :18], predicted[:, 18:].sigmoid())
    torch.testing.assert_close(layer(x), expected)
    norm = make_norm("frozen_bn", 6).double()
    norm.weight.uniform_(0.5, 2), norm.bias.normal_(), norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
    torch.testing.assert_close(conv_norm(x, layer, norm), norm(expected))


def test_at_first_it_is_half_the_plain_convolution():
    layer = DeformConv2d(8, 4, 3, 2, 1, 2)
    x = torch.randn(2, 8, 9, 7)
    plain = F.conv2d(x, layer.weight, stride=2, padding=1, groups=2)
    torch.testing.assert_close(layer(x), plain / 2, rtol=1e-5, atol=1e-6)
    layer(x).square().sum().backward()
    assert all(p.grad.abs().max() > 0 for p in layer.parameters())  # offsets leave zero with the first step


def test_it_runs_under_bf16():
    layer = DeformConv2d(8, 4, 3)
    x = torch.randn(1, 8, 6, 6).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and layer.weight.grad.dtype == torch.float32
    torch.testing.assert_close(out.float(), layer(x.float()), rtol=0.01, atol=0.01)


def test_the_last_stages_are_deformable():
    body = resnet(50, width=8, deform_stages=3)
    names = [name for name, m in body.named_modules() if isinstance(m, DeformConv2d)]
    assert names == [f"layer{s}.{k}.conv2" for s, count in ((2, 4), (3, 6), (4, 3)) for k in range(count)]
