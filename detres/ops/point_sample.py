"""Bilinear samples at single points: of feature maps, and of bitmaps.

Positions are (x, y) in pixels of the map, continuous: the centre of its first pixel is (0.5, 0.5). Beyond the map is
zero, as in `torch.nn.functional.grid_sample(align_corners=False)`, which samples one map per row of points.

Legend: N maps, M rows of points, P points a row, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from detres.geometry.boxes import constant

CORNERS = ((0, 0), (1, 0), (0, 1), (1, 1))  # (x, y) of the four pixels around a point


def point_sample(maps: Tensor, points: Tensor, index: Tensor) -> Tensor:
    """Features (M, P, C) at points (M, P, 2) of maps (N, C, H, W), row m of map `index[m]` (M,).

    As `ops.roi_align`, one `embedding_bag` over the maps laid out as a (pixels, C) table.
    """
    channels, height, width = maps.shape[1:]
    pixel, weight = _corners(points, index, height, width)
    table = maps.permute(0, 2, 3, 1).reshape(-1, channels)
    if table.dtype == torch.bfloat16 and not table.is_cuda:  # see `ops.roi_align`
        table = table.float()
    found = F.embedding_bag(pixel.view(-1, 4), table, per_sample_weights=weight.view(-1, 4).to(table.dtype), mode="sum")
    return found.view(*points.shape[:2], channels)


@torch.no_grad()
def bitmap_sample(bitmaps: Tensor, points: Tensor, index: Tensor) -> Tensor:
    """Values (M, P) in [0, 1] at points (M, P, 2) of bitmaps (N, H, W) uint8, of which no float copy is made; zero
    where there is no bitmap at all."""
    if len(bitmaps) == 0:
        return points.new_zeros(points.shape[:2])
    pixel, weight = _corners(points, index, *bitmaps.shape[1:])
    return (bitmaps.flatten()[pixel] * weight).sum(-1)


def _corners(points: Tensor, index: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Positions in all maps (M, P, 4) of the pixels around each point, and their weights (M, P, 4)."""
    low = (points - 0.5).floor()
    corner = low[..., None, :] + constant(CORNERS, points.device)  # (M, P, 4, 2)
    weight = (1 - (points[..., None, :] - 0.5 - corner).abs()).prod(-1)
    x, y = corner.unbind(-1)
    inside = (x >= 0) & (x < width) & (y >= 0) & (y < height)
    pixel = (index[:, None, None] * height + y.clamp(0, height - 1).long()) * width + x.clamp(0, width - 1).long()
    return pixel, weight * inside
