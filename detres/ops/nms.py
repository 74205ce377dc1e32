"""Non-maximum suppression over padded batches."""

from __future__ import annotations

import torch
import torchvision
from torch import Tensor


BOXES_AT_ONCE = 40_000


@torch.no_grad()
def nms(boxes: Tensor, scores: Tensor, valid: Tensor, iou_threshold: float, groups: Tensor | None = None) -> Tensor:
    """Greedy NMS in each row: which boxes stay.

    boxes (B, n, 4), scores (B, n), valid (B, n) bool, groups (B, n) int64 >= 0: boxes of different groups
    (classes, levels) never suppress one another. Returns keep (B, n) bool, False wherever `valid` is.

    The list of survivors is ragged by nature; here it is the only thing with a data-dependent shape. On a GPU
    many rows are one kernel, kept apart by moving each (row, group) to its own place on the plane, in float64 so
    that the shift does not round coordinates; its work and memory grow with the square of the boxes, so at most
    `BOXES_AT_ONCE` go into one. On the CPU rows are separate calls: the cost grows
    with the square of the boxes in one.
    """
    if boxes.numel() == 0:
        return torch.zeros_like(valid)
    boxes = torch.where(valid[..., None], boxes, 0)  # an empty box suppresses nothing
    scores = torch.where(valid, scores, -torch.inf)
    if boxes.is_cuda:
        rows = torch.arange(len(boxes), device=boxes.device)[:, None].expand_as(valid)
        spread = rows if groups is None else rows * (groups.max() + 1) + groups
        chunk = max(1, BOXES_AT_ONCE // boxes.shape[1])
        keep = [_nms_row(b.flatten(0, 1), s.flatten(), iou_threshold, g.flatten()).view_as(s)
                for b, s, g in zip(boxes.split(chunk), scores.split(chunk), spread.split(chunk))]
        return torch.cat(keep) & valid
    each_groups = [None] * len(boxes) if groups is None else groups
    keep = [_nms_row(b, s, iou_threshold, g) for b, s, g in zip(boxes, scores, each_groups)]
    return torch.stack(keep) & valid


def _nms_row(boxes: Tensor, scores: Tensor, iou_threshold: float, groups: Tensor | None) -> Tensor:
    if groups is not None:
        boxes = boxes.double() + (groups * (boxes.max() - boxes.min() + 1))[:, None]
        scores = scores.double()
    kept = torchvision.ops.nms(boxes, scores, iou_threshold)
    return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device).index_fill_(0, kept, True)
