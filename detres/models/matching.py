"""Which ground truth a box answers for, and which boxes are trained on.

Legend: N images, G padded ground truth, P boxes (anchors or proposals), B boxes sampled per image.
Match values: 1 foreground, 0 background, -1 ignore.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detres.geometry.boxes import area, pairwise_iou

GT_AT_ONCE = 16  # bounds the largest temporary to (N, 16, P)


@torch.no_grad()
def match_boxes(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, fg_iou: float, bg_iou: float,
                allow_low_quality: bool = False) -> tuple[Tensor, Tensor]:
    """Match every box to the ground truth it overlaps most (arXiv 1506.01497, section 3.1.2).

    boxes (P, 4) shared by the batch or (N, P, 4); gt_boxes (N, G, 4); gt_valid (N, G).
    IoU >= fg_iou is foreground, < bg_iou background, between them ignored. allow_low_quality: the best boxes of
    each ground truth are foreground at any IoU above 0, so that none is left without.
    Returns match (N, P) int8 and gt_index (N, P) int64, the row of the best ground truth (0 where there is none).
    """
    best = gt_boxes.new_full((len(gt_boxes), boxes.shape[-2]), -1.0)
    gt_index = torch.zeros_like(best, dtype=torch.int64)
    is_best_of_gt = torch.zeros_like(best, dtype=torch.bool)
    for start in range(0, gt_boxes.shape[1], GT_AT_ONCE):
        part = slice(start, start + GT_AT_ONCE)
        iou = pairwise_iou(gt_boxes[:, part], boxes).masked_fill_(~gt_valid[:, part, None], -1.0)  # (N, <=16, P)
        part_best, part_index = iou.max(1)
        gt_index = torch.where(part_best > best, part_index + start, gt_index)
        best = torch.maximum(best, part_best)
        if allow_low_quality:
            gt_best = iou.amax(2, keepdim=True)
            is_best_of_gt |= ((iou == gt_best) & (gt_best > 0)).any(1)
    match = torch.full_like(best, -1, dtype=torch.int8)
    match.masked_fill_(best < bg_iou, 0).masked_fill_((best >= fg_iou) | is_best_of_gt, 1)
    return match, gt_index


@torch.no_grad()
def match_points(cells: Tensor, ranges: Tensor, gt_boxes: Tensor, gt_valid: Tensor,
                 center_radius: float) -> tuple[Tensor, Tensor]:
    """Match every point of a pyramid to an object that it is inside of (FCOS, arXiv 1904.01355, section 3.2).

    cells (P, 4): squares around the points, with the stride of their level as side; ranges (P, 2): a point is for
    objects whose farthest side is at a distance between these, in pixels; gt_boxes (N, G, 4); gt_valid (N, G). The
    point must also be within `center_radius` strides of the object's middle, on both axes (center sampling, arXiv
    2006.09214, section 3.1). Of several objects it takes the one of least area. Returns match and gt_index as
    `match_boxes`; nothing is ignored.
    """
    center, radius = (cells[:, :2] + cells[:, 2:]) / 2, center_radius * (cells[:, 2:] - cells[:, :2])  # (P, 2)
    least = gt_boxes.new_full((len(gt_boxes), len(cells)), torch.inf)
    gt_index = torch.zeros_like(least, dtype=torch.int64)
    for start in range(0, gt_boxes.shape[1], GT_AT_ONCE):
        boxes, valid = gt_boxes[:, start: start + GT_AT_ONCE, None], gt_valid[:, start: start + GT_AT_ONCE, None]
        near = (((boxes[..., :2] + boxes[..., 2:]) / 2 - center).abs() < radius).all(-1)  # (N, <=16, P)
        sides = torch.cat([center - boxes[..., :2], boxes[..., 2:] - center], -1)  # (N, <=16, P, 4)
        farthest = sides.amax(-1)
        own = valid & near & (sides.amin(-1) > 0) & (farthest > ranges[:, 0]) & (farthest < ranges[:, 1])
        part_least, part_index = torch.where(own, area(boxes), torch.inf).min(1)
        gt_index = torch.where(part_least < least, part_index + start, gt_index)
        least = torch.minimum(least, part_least)
    return least.isfinite().to(torch.int8), gt_index


@torch.no_grad()
def sample_boxes(match: Tensor, seeds: Tensor, batch_per_image: int, positive_fraction: float,
                 salt: int) -> tuple[Tensor, Tensor]:
    """Draw a fixed number of boxes per image: at most `positive_fraction` foreground, the rest background.

    match (N, P); seeds (N,). Returns index (N, B) int64, foreground first, and sampled_match (N, B) int8, -1 where an
    image had too few boxes. Foreground lies within the first `int(batch_per_image * positive_fraction)` columns.
    The draw depends on the image's seed and `salt` alone: not on the batch, the process or the random state.
    """
    batch_per_image = min(batch_per_image, match.shape[1])
    max_positive = min(int(batch_per_image * positive_fraction), match.shape[1])
    noise = hash_noise(seeds, match.shape[1], salt)  # (N, P) in [0, 1)
    positive_key, positive_index = torch.where(match == 1, noise, -1.0).topk(max_positive, dim=1)
    key = torch.where(match == 0, noise, -1.0)
    key.scatter_(1, positive_index, torch.where(positive_key >= 0, positive_key + 1, key.gather(1, positive_index)))
    key, index = key.topk(batch_per_image, dim=1)
    return index, torch.where(key >= 0, match.gather(1, index), -1)


def hash_noise(seeds: Tensor, count: int, salt: int | Tensor) -> Tensor:
    """Uniform noise (N, count) in [0, 1) from integer seeds (N,): a hash of (seed, salt, position), no state.
    salt: what tells draws apart, one or one per seed (N,)."""
    start = _mix(seeds ^ (seeds >> 32) ^ (salt * 0x85EBCA6B))
    position = torch.arange(count, device=seeds.device)[None] * 0x9E3779B1
    return (_mix(_mix(position + start[:, None])) >> 8).float() / 2**24  # 24 bits are exact in float32


def _mix(x: Tensor) -> Tensor:
    """Scrambles the low 32 bits of int64."""
    x = x & 0xFFFFFFFF
    for _ in range(2):
        x = ((x ^ (x >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    return x ^ (x >> 16)
