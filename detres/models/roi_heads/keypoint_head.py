"""Keypoints inside regions (Mask R-CNN, arXiv 1703.06870, section 5).

Legend: M regions, J keypoints, C channels, S side of the pooled grid; heatmaps have 4 S cells a side.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detres.models.norms import make_conv


class KeypointHead(nn.Module):
    """3x3 convolutions, then two upsamplings by two, learned and bilinear. (M, C, S, S) -> logits (M, J, 4S, 4S).

    The logits are fp32 whatever the convolutions compute in: their peak would be lost in the 8 bits of bf16.
    """

    def __init__(self, in_channels: int, num_keypoints: int, channels: int = 512, convs: int = 8):
        super().__init__()
        widths = [in_channels] + [channels] * convs
        self.convs = nn.ModuleList(make_conv(a, b, 3, bias=True) for a, b in zip(widths, widths[1:]))
        self.deconv = nn.ConvTranspose2d(widths[-1], num_keypoints, 4, stride=2, padding=1)
        nn.init.kaiming_normal_(self.deconv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.deconv.bias)

    @staticmethod
    def side(resolution: int) -> int:
        """Of the heatmaps, for a pooled grid of `resolution`."""
        return 4 * resolution

    def forward(self, pooled: Tensor) -> Tensor:
        for layer in self.convs:
            pooled = F.relu_(layer(pooled))
        return F.interpolate(self.deconv(pooled).float(), scale_factor=2.0, mode="bilinear", align_corners=False)


@torch.no_grad()
def keypoint_cells(keypoints: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Which cell of a heatmap over its box each keypoint is in, row by row: (..., J) int64; and whether it is labelled
    and in the box at all (..., J) bool. keypoints (..., J, 3) x, y, visibility; boxes (..., 4).

    A keypoint on the right or lower edge belongs to the last cell.
    """
    corner, end = boxes[..., None, :2], boxes[..., None, 2:]
    points = keypoints[..., :2]
    cell = ((points - corner) * (side / (end - corner))).floor()  # not finite for an empty box
    cell = torch.where(points == end, side - 1, cell)
    seen = ((cell >= 0) & (cell < side)).all(-1) & (keypoints[..., 2] > 0)
    column, row = torch.where(seen[..., None], cell, 0).long().unbind(-1)
    return row * side + column, seen
