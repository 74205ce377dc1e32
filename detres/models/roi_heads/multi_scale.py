"""Multi-scale testing of regions (arXiv 1512.03385, appendix B; max-out as in arXiv 1504.06066).

Only the heads see several scales; proposals come from the ordinary one. Images are resized from their files by the
loader, with the filter of training: a scale that equals the ordinary one has its very pixels.

Legend: N images, S scales, M regions, C channels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from detres.geometry.boxes import area
from detres.models.roi_heads.regions import Pool
from detres.models.roi_heads.standard import rows_of
from detres.ops.roi_align import CANONICAL_SIDE
from detres.structures import ImageBatch


def lower_scale(areas: Tensor, growth: Tensor, canonical_side: float = CANONICAL_SIDE) -> Tensor:
    """The smaller of the two adjacent scales of each region, as int64 (M,) from 0 to max(0, S - 2).

    areas (M,) at the ordinary scale; growth (M, S), increasing: by what factor each scale multiplies them. The two
    scales are the one at which the region's area is nearest to `canonical_side` squared, by ratio, and the nearer to it
    of that one's neighbours; of two that are equally near, the smaller. So scales j and j + 1 give way to j + 1 and
    j + 2 where the area at j is farther from it than that at j + 2: where the geometric mean of both is below it.
    """
    middle = areas[:, None] * (growth[:, :-2] * growth[:, 2:]).sqrt()  # (M, S - 2)
    return (middle < canonical_side**2).sum(1)


def multi_scale_regions(pool: Pool, backbone: Callable[[ImageBatch], list[Tensor]], images: ImageBatch,
                        canonical_side: float = CANONICAL_SIDE) -> ScaledRegions:
    """Regions read from `images.pyramid`.

    backbone: images -> feature maps that `pool` reads. Boxes are in pixels of `images`; of a feature pyramid they read
    the level that fits their size at each scale.
    """
    features = [backbone(scaled) for scaled in images.pyramid]
    ratios = torch.stack([scaled.sizes / images.sizes for scaled in images.pyramid], 1)
    return ScaledRegions(pool, features, ratios, canonical_side)


@dataclass(frozen=True)
class ScaledRegions:
    """As `Regions`, of images at several scales: each region at two adjacent ones (`lower_scale`), by the larger value
    of both."""

    pool: Pool
    features: list[list[Tensor]]  # of each scale
    ratios: Tensor  # (N, S, 2) height, width, to those of the images that boxes are in
    canonical_side: float

    def __call__(self, boxes: Tensor, image_index: Tensor, side: int) -> Tensor:
        return self._larger(boxes, image_index, lambda maps, scaled, rows: self.pool(
            maps, scaled, image_index[rows], side))

    def points(self, boxes: Tensor, image_index: Tensor, points: Tensor) -> Tensor:
        return self._larger(boxes, image_index, lambda maps, scaled, rows: self.pool.points(
            maps, scaled, image_index[rows], points[rows]))

    def _larger(self, boxes: Tensor, image_index: Tensor,
                read: Callable[[list[Tensor], Tensor, Tensor], Tensor]) -> Tensor:
        """read: maps, boxes and the regions they are of -> (M, ...)."""
        ratio = self.ratios[image_index]  # (M, S, 2)
        lower = lower_scale(area(boxes), ratio.prod(-1), self.canonical_side)
        found: Tensor | None = None
        for scale, maps in enumerate(self.features):
            chosen = (lower == scale) | (lower + 1 == scale)
            rows = rows_of(chosen)
            seen = read(maps, boxes[rows] * ratio[rows, scale].flip(-1).repeat(1, 2), rows)
            seen = torch.where(chosen[rows].view(-1, *[1] * (seen.dim() - 1)), seen, -torch.inf)
            if found is None:
                found = seen.new_full((len(boxes), *seen.shape[1:]), -torch.inf)
            found[rows] = torch.maximum(found[rows], seen)
        return found
