"""Overlaps of pairs of detections and truths: boxes (IoU) and keypoints (OKS), with pycocotools' bits.

Masks are in `mask_overlaps`, their boundaries in `boundary_overlaps`. The pairs are given by row numbers `d` and `g`;
whoever asks picks those of one image and class.

Legend: D detections, G truths, P pairs, J keypoints of an object.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from detres.evaluation.flat import Found, Truths, take

Overlaps = Callable[[Tensor, Tensor], Tensor]  # rows of detections (P,), rows of truths (P,) -> IoU (P,) float64

# Standard deviations of where people put COCO's 17 keypoints, in units of the object's size (pycocotools).
COCO_SIGMAS = tuple(np.array([26, 25, 25, 35, 35, 79, 79, 72, 72, 62, 62, 107, 107, 87, 87, 89, 89]) / 100 / 10)
PAIRS_AT_ONCE = 2**14  # temporaries of a chunk stay in the cache


def box_overlaps(truths: Truths, found: Found) -> Overlaps:
    """IoU of their boxes."""
    return lambda d, g: box_iou_pairs(found.boxes_xywh, truths.boxes_xywh, truths.crowd, d, g)


def box_iou_pairs(dt_xywh: Tensor, gt_xywh: Tensor, crowd: Tensor, d: Tensor, g: Tensor) -> Tensor:
    """IoU (P,) float64 of boxes (D, 4) and (G, 4) float64 at rows d (P,) and g (P,) int64.

    `bbIou` of pycocotools' maskApi.c, in its order of operations: where the truth is a crowd (G,) bool, the union is
    the detection's area; boxes that do not overlap have 0, even two that are the same point.
    """
    found, truths = _corners_and_area(dt_xywh), _corners_and_area(gt_xywh)
    chunks = zip(d.split(PAIRS_AT_ONCE), g.split(PAIRS_AT_ONCE))
    return torch.cat([_box_iou(found, truths, crowd, *rows) for rows in chunks])


def _corners_and_area(xywh: Tensor) -> tuple[Tensor, ...]:
    """x1, y1, x2, y2 and area, each (n,)."""
    x, y, width, height = xywh.unbind(1)
    return x.contiguous(), y.contiguous(), x + width, y + height, width * height


def _box_iou(found: tuple[Tensor, ...], truths: tuple[Tensor, ...], crowd: Tensor, d: Tensor, g: Tensor) -> Tensor:
    iou = torch.zeros_like(d, dtype=torch.float64)
    width, across = _overlap(found[0], found[2], truths[0], truths[2], d, g)
    d, g = take(d, across), take(g, across)  # those apart from left to right, about half, are done
    height, down = _overlap(found[1], found[3], truths[1], truths[3], d, g)
    d, g = take(d, down), take(g, down)
    intersection, da = take(width, down) * height, take(found[4], d)
    union = torch.where(take(crowd, g), da, da + take(truths[4], g) - intersection)
    return iou.index_copy_(0, take(across, down), intersection / union)


def _overlap(d1: Tensor, d2: Tensor, g1: Tensor, g2: Tensor, d: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths (p,) on one axis where positive, and which of the P pairs these are."""
    length = torch.minimum(take(d2, d), take(g2, g)) - torch.maximum(take(d1, d), take(g1, g))
    positive = (length > 0).nonzero()[:, 0]
    return take(length, positive), positive


def oks_pairs(dt_keypoints: Tensor, gt_keypoints: Tensor, gt_boxes_xywh: Tensor, gt_area: Tensor, sigmas: Tensor,
              d: Tensor, g: Tensor) -> Tensor:
    """Object keypoint similarity (P,) float64 of keypoints (D, J, 3) and (G, J, 3), rows (x, y, v), float64.

    `computeOks` of pycocotools' cocoeval.py (cocodataset.org/#keypoints-eval): the mean over the truth's labelled
    keypoints (v > 0) of exp(-distance^2 / (2 area (2 sigma)^2)). Of a truth without any, the distances are those to
    its box (G, 4) doubled, and the mean is over all. `gt_area` is (G,), `sigmas` (J,), d and g (P,) int64.

    On the CPU the bits are pycocotools'. On CUDA exp and the order of the sum differ: the last bits may, too.
    """
    labelled = gt_keypoints[..., 2] > 0  # (G, J)
    labelled = labelled | ~labelled.any(1, keepdim=True)
    variances = (sigmas.double() * 2) ** 2
    scores = []
    for rows, truths in zip(d.split(PAIRS_AT_ONCE), g.split(PAIRS_AT_ONCE)):
        squared = _squared_distances(dt_keypoints[rows], gt_keypoints[truths], gt_boxes_xywh[truths])
        exponents = squared / variances / (gt_area[truths] + np.spacing(1.0))[:, None] / 2
        scores.append(_mean_exp(-exponents, labelled[truths]))
    return torch.cat(scores)


def _squared_distances(found: Tensor, truths: Tensor, boxes: Tensor) -> Tensor:
    """(P, J) from keypoints (P, J, 3) twice and boxes (P, 4)."""
    origin, size = boxes[:, None, :2], boxes[:, None, 2:]
    low, high = origin - size, origin + size * 2
    outside = (low - found[..., :2]).clamp(min=0) + (found[..., :2] - high).clamp(min=0)
    unlabelled = ~(truths[..., 2] > 0).any(1)
    offset = torch.where(unlabelled[:, None, None], outside, found[..., :2] - truths[..., :2])
    return offset[..., 0] ** 2 + offset[..., 1] ** 2


def _mean_exp(exponents: Tensor, counted: Tensor) -> Tensor:
    """(P,) means of exp over the entries (P, J) that are counted."""
    number = counted.sum(1)
    if exponents.is_cuda:
        return (exponents.exp() * counted).sum(1) / number
    means = np.empty(len(exponents))
    exp, kept, number = np.exp(exponents.numpy()), counted.numpy(), number.numpy()
    for n in np.unique(number):  # numpy adds a row of n values in another order than the same ones among zeros
        rows = number == n
        means[rows] = exp[rows][kept[rows]].reshape(-1, n).sum(1) / n
    return torch.from_numpy(means)
