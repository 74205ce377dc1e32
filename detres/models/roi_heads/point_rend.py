"""PointRend for masks (arXiv 1912.08193): a coarse mask, made finer where it is uncertain.

The point head says at single points whether they are inside, from features of the finest map and the coarse mask there.
In training it is asked at points drawn near the outline; in inference a grid doubles its side step by step, and of each
step only the most uncertain points are computed anew, the others are interpolated.

Legend: M regions, K classes, C channels, P points of a region, S side of the coarse mask, D side of the finest.
Points are (x, y) from 0 to 1 across their region.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detres import losses
from detres.geometry.boxes import from_unit
from detres.models.matching import hash_noise
from detres.models.roi_heads.box_head import ConvFCHead
from detres.models.roi_heads.mask_head import crop_masks
from detres.models.roi_heads.regions import Regions
from detres.ops.point_sample import bitmap_sample, point_sample

SALT = 1000  # of the draw of points; that of an image's k-th region is this plus k


class CoarseHead(ConvFCHead):
    """Halves the grid, two fc layers, masks of S = R / 2 (section 4.1, "coarse mask head").
    (M, C, R, R) -> logits (M, K, S, S)."""

    def __init__(self, in_channels: int, num_classes: int, channels: int, resolution: int, fc_dim: int):
        self.side = resolution // 2
        super().__init__(channels, self.side, fc_dim)
        self.conv = nn.Conv2d(in_channels, channels, 2, stride=2)
        self.predict = nn.Linear(fc_dim, num_classes * self.side**2)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.predict.weight, std=0.001)
        nn.init.zeros_(self.conv.bias)
        nn.init.zeros_(self.predict.bias)

    def forward(self, pooled: Tensor) -> Tensor:
        return self.predict(super().forward(F.relu_(self.conv(pooled)))).unflatten(1, (-1, self.side, self.side))


class PointHead(nn.Module):
    """What is at a point, for each class: fc layers, each of which reads the coarse logits, too (section 3.3).
    Features (M, P, C) and coarse logits (M, P, K) -> logits (M, P, K)."""

    def __init__(self, in_channels: int, num_classes: int, fc_dim: int, fcs: int):
        super().__init__()
        widths = [in_channels] + [fc_dim] * fcs
        self.fcs = nn.ModuleList(nn.Linear(a + num_classes, b) for a, b in zip(widths, widths[1:]))
        self.predict = nn.Linear(widths[-1] + num_classes, num_classes)
        for layer in self.fcs:
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predict.weight, std=0.001)
        nn.init.zeros_(self.predict.bias)

    def forward(self, features: Tensor, coarse: Tensor) -> Tensor:
        for layer in self.fcs:
            features = F.relu_(layer(torch.cat([features, coarse], -1)))
        return self.predict(torch.cat([features, coarse], -1))


class PointRendHead(nn.Module):
    """The mask head of PointRend. It pools for itself: R x R points of the finest map, whatever the region's size.

    channels, resolution (R), coarse_fc_dim: of the coarse head. fc_dim, fcs: of the point head.
    train_points, oversample, importance: as in `uncertain_points`, of train_points * oversample candidates.
    steps, step_points: S is doubled so often, and so many points are computed at each step.
    """

    loss_names = ("loss_mask", "loss_mask_point")

    def __init__(self, in_channels: int, num_classes: int, *, channels: int = 256, resolution: int = 14,
                 coarse_fc_dim: int = 1024, fc_dim: int = 256, fcs: int = 3, train_points: int = 196,
                 oversample: int = 3, importance: float = 0.75, steps: int = 5, step_points: int = 784):
        super().__init__()
        self.coarse_head = CoarseHead(in_channels, num_classes, channels, resolution, coarse_fc_dim)
        self.point_head = PointHead(in_channels, num_classes, fc_dim, fcs)
        self.resolution, self.train_points, self.importance = resolution, train_points, importance
        self.draws = train_points * oversample + train_points - int(train_points * importance)
        self.first_side, self.steps, self.step_points = self.coarse_head.side, steps, step_points
        while self.steps and (2 * self.first_side)**2 <= step_points:  # steps that would compute every point
            self.first_side, self.steps = self.first_side * 2, self.steps - 1

    def coarse(self, regions: Regions, boxes: Tensor, image: Tensor) -> Tensor:
        """Logits (M, K, S, S), fp32."""
        points = grid(self.resolution, boxes.device).expand(len(boxes), -1, -1)
        pooled = regions.points(boxes, image, points).mT.unflatten(-1, (self.resolution, self.resolution))
        return self.coarse_head(pooled).float()

    def at(self, regions: Regions, coarse: Tensor, boxes: Tensor, image: Tensor, points: Tensor) -> Tensor:
        """Logits (M, P, K) at points (M, P, 2), fp32."""
        return self.point_head(regions.points(boxes, image, points), sample_masks(coarse, points)).float()

    def losses(self, regions: Regions, boxes: Tensor, image: Tensor, labels: Tensor, valid: Tensor, bitmaps: Tensor,
               index: Tensor, seeds: Tensor, column: Tensor) -> dict[str, Tensor]:
        """Of the coarse masks, and of the point head (section 3.3).

        boxes (M, 4) in images (M,), labels, valid, and `bitmaps[index]` (-> (M, H, W) uint8) what is true; seeds (M,)
        of the images and column (M,), the region's number in its image, from which the points are drawn.
        """
        coarse = self.coarse(regions, boxes, image)
        cropped = (crop_masks(bitmaps, index, boxes, coarse.shape[-1]) >= 0.5).float()
        noise = hash_noise(seeds, 2 * self.draws, SALT + column).view(-1, self.draws, 2)
        points = uncertain_points(of_class(coarse, labels), noise, self.train_points, self.importance)
        truth = bitmap_sample(bitmaps, from_unit(points, boxes), index)
        logits = self.at(regions, coarse, boxes, image, points).mT  # (M, K, P)
        return losses.mask_loss(coarse, cropped, labels, valid) | \
            losses.mask_loss(logits, truth, labels, valid, name="loss_mask_point")

    @torch.no_grad()
    def predict(self, regions: Regions, boxes: Tensor, image: Tensor, labels: Tensor) -> Tensor:
        """Probabilities (M, D, D) of the masks of boxes (M, 4) in images (M,), of classes (M,) (section 3.1)."""
        coarse, side = self.coarse(regions, boxes, image), self.first_side
        every = grid(side, boxes.device).expand(len(boxes), -1, -1)
        logits = of_class(self.at(regions, coarse, boxes, image, every).mT, labels)  # (M, side squared)
        for _ in range(self.steps):
            logits = F.interpolate(logits.view(-1, 1, side, side), scale_factor=2, mode="bilinear").flatten(1)
            side *= 2
            chosen = (-logits.abs()).topk(min(self.step_points, side**2)).indices  # (M, P)
            found = self.at(regions, coarse, boxes, image, grid(side, boxes.device)[chosen])
            logits = logits.scatter(1, chosen, of_class(found.mT, labels))
        return logits.view(-1, side, side).sigmoid()


def grid(side: int, device: torch.device) -> Tensor:
    """Points (side squared, 2) in the middle of the cells of a grid, row by row."""
    middle = (torch.arange(side, device=device) + 0.5) / side
    return torch.stack([middle.repeat(side), middle.repeat_interleave(side)], -1)


def of_class(logits: Tensor, labels: Tensor) -> Tensor:
    """Those (M, ...) of the classes (M,) out of (M, K, ...); of any class where that is background."""
    return logits[torch.arange(len(labels), device=labels.device), labels.clamp(max=logits.shape[1] - 1)]


def sample_masks(logits: Tensor, points: Tensor) -> Tensor:
    """Logits (M, P, K) of masks (M, K, S, S) at points (M, P, 2)."""
    every = torch.arange(len(logits), device=logits.device)
    return point_sample(logits, points * logits.shape[-1], every)


@torch.no_grad()
def uncertain_points(logits: Tensor, noise: Tensor, count: int, importance: float) -> Tensor:
    """Points (M, count, 2) that the point head trains on (section 3.2).

    logits (M, S, S) of the coarse masks; noise (M, candidates + others, 2) in [0, 1). Of the candidates those whose
    logits, interpolated, are nearest to zero make up `importance` of the points; the others are as they were drawn.
    """
    uncertain = int(importance * count)
    candidates, others = noise.split([noise.shape[1] - (count - uncertain), count - uncertain], 1)
    doubt = -sample_masks(logits[:, None], candidates)[..., 0].abs()
    chosen = doubt.topk(uncertain).indices
    return torch.cat([candidates.gather(1, chosen[..., None].expand(-1, -1, 2)), others], 1)
