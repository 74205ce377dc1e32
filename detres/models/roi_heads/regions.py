"""How heads see an image: its regions, pooled to grids or read at points.

Legend: N images, M regions, P points in each, C channels, S side of a pooled grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from detres.geometry.boxes import from_unit
from detres.ops.point_sample import point_sample
from detres.ops.roi_align import CANONICAL_SIDE, roi_align, roi_pool


@dataclass(frozen=True)
class Pool:
    """Reads regions off feature maps (N, C, H_l, W_l), of which the first have these strides; others are not read.

    type: 'align' or 'pool'; sampling_ratio, aligned, canonical_side: as in `ops.roi_align`.
    """

    strides: Sequence[int]
    type: str = "align"
    sampling_ratio: int = 2
    aligned: bool = True
    canonical_side: float = CANONICAL_SIDE

    def __call__(self, features: list[Tensor], boxes: Tensor, image_index: Tensor, side: int) -> Tensor:
        """Grids (M, C, S, S) of boxes (M, 4), in pixels of images (M,)."""
        op = roi_pool if self.type == "pool" else partial(
            roi_align, sampling_ratio=self.sampling_ratio, aligned=self.aligned)
        return op(features[: len(self.strides)], self.strides, boxes, image_index, side,
                  canonical_side=self.canonical_side)

    def points(self, features: list[Tensor], boxes: Tensor, image_index: Tensor, points: Tensor) -> Tensor:
        """The finest map (M, P, C) at points (M, P, 2) of boxes (M, 4), each from 0 to 1 in x and y."""
        return point_sample(features[0], from_unit(points, boxes) / self.strides[0], image_index)


@dataclass(frozen=True)
class Regions:
    """Those of images whose feature maps are known."""

    pool: Pool
    features: list[Tensor]

    def __call__(self, boxes: Tensor, image_index: Tensor, side: int) -> Tensor:
        """As `Pool.__call__`."""
        return self.pool(self.features, boxes, image_index, side)

    def points(self, boxes: Tensor, image_index: Tensor, points: Tensor) -> Tensor:
        """As `Pool.points`."""
        return self.pool.points(self.features, boxes, image_index, points)
