"""Masks inside regions (Mask R-CNN, arXiv 1703.06870, Figure 4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from detres.models.norms import conv_norm, make_conv, make_norm


class MaskHead(nn.Module):
    """3x3 convolutions, one upsampling by two, one mask per class. (M, C, S, S) -> logits (M, K, 2S, 2S)."""

    loss_names = ("loss_mask",)

    def __init__(self, in_channels: int, num_classes: int, channels: int = 256, convs: int = 4,
                 norm: str = "none"):
        super().__init__()
        widths = [in_channels] + [channels] * convs
        self.convs = nn.ModuleList(make_conv(a, b, 3, bias=norm == "none") for a, b in zip(widths, widths[1:]))
        self.norms = nn.ModuleList(make_norm(norm, channels) for _ in range(convs))
        self.deconv = nn.ConvTranspose2d(widths[-1], channels, 2, stride=2)
        self.predict = nn.Conv2d(channels, num_classes, 1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predict.weight, std=0.001)
        nn.init.zeros_(self.deconv.bias)
        nn.init.zeros_(self.predict.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms):
            pooled = F.relu_(conv_norm(pooled, conv, norm))
        return self.predict(F.relu_(self.deconv(pooled)))


@torch.no_grad()
def crop_masks(masks: Tensor, index: Tensor, boxes: Tensor, size: int, aligned: bool = True) -> Tensor:
    """Targets (M, size, size) in [0, 1]: the bitmap `masks[index]` (-> (M, H, W) uint8) inside each box (M, 4),
    by RoIAlign of the bitmap. aligned: as in `ops.roi_align`; the same as for the features."""
    if len(masks) == 0:  # then no row is foreground
        return boxes.new_zeros(len(boxes), size, size)
    rois = torch.cat([index[:, None].to(boxes), boxes], 1)
    return torchvision.ops.roi_align(masks[:, None].to(boxes), rois, size, aligned=aligned)[:, 0]
