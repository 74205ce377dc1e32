"""Box geometry: pure functions on tensors.

Boxes are (..., 4) xyxy in pixels, continuous coordinates. Everything broadcasts over leading dimensions.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000 / 16)  # bound on dw, dh in decoding: a 16 px anchor never grows past 1000 px


@lru_cache(maxsize=1024)
def constant(values: tuple[float, ...], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """A small tensor, kept: made anew on a GPU, it would be a copy that the host waits for.

    Never change it in place.
    """
    return torch.tensor(values, device=device, dtype=dtype)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...), square pixels."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def pairwise_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of every pair, (..., G, 4) and (..., P, 4) -> (..., G, P); 0 where the union is empty.

    Works coordinate by coordinate: the largest temporary is one (..., G, P) tensor, not a pair of corners.
    """
    a, b = a[..., :, None, :], b[..., None, :, :]
    width = (torch.minimum(a[..., 2], b[..., 2]) - torch.maximum(a[..., 0], b[..., 0])).clamp_(min=0)
    height = (torch.minimum(a[..., 3], b[..., 3]) - torch.maximum(a[..., 1], b[..., 1])).clamp_(min=0)
    intersection = width.mul_(height)
    union = area(a) + area(b) - intersection
    return torch.where(union > 0, intersection / union, 0.0)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Boxes (N, P, 4) limited to images of `sizes` (N, 2), height and width."""
    limit = sizes.to(boxes).flip(-1).repeat(1, 2)[:, None]  # (N, 1, 4) width, height, width, height
    return boxes.clamp(min=0).minimum(limit)


def larger_than(boxes: Tensor, side: float) -> Tensor:
    """(..., 4) -> (...) bool: both sides longer than `side` pixels."""
    return (boxes[..., 2] - boxes[..., 0] > side) & (boxes[..., 3] - boxes[..., 1] > side)


def from_unit(points: Tensor, boxes: Tensor) -> Tensor:
    """Points (M, P, 2) from 0 to 1 across boxes (M, 4), in pixels."""
    return boxes[:, None, :2] + points * (boxes[:, None, 2:] - boxes[:, None, :2])


def take(boxes: Tensor, index: Tensor) -> Tensor:
    """Rows of boxes (or deltas) chosen per image: (N, P, 4) and index (N, R) int64 -> (N, R, 4)."""
    return boxes.gather(1, index[..., None].expand(-1, -1, 4))


def encode(boxes: Tensor, anchors: Tensor, weights: tuple[float, ...] = (1, 1, 1, 1)) -> Tensor:
    """Regression targets (dx, dy, dw, dh) that turn `anchors` into `boxes` (R-CNN, arXiv 1311.2524, appendix C).

    `weights` multiply the four deltas: (10, 10, 5, 5) in box heads, about one over their standard deviation.
    """
    anchor_wh = anchors[..., 2:] - anchors[..., :2]
    box_wh = boxes[..., 2:] - boxes[..., :2]
    shift = (boxes[..., :2] + 0.5 * box_wh - anchors[..., :2] - 0.5 * anchor_wh) / anchor_wh
    deltas = torch.cat([shift, torch.log(box_wh / anchor_wh)], -1)
    return deltas * constant(tuple(weights), deltas.device, deltas.dtype)


def decode(deltas: Tensor, anchors: Tensor, weights: tuple[float, ...] = (1, 1, 1, 1),
           limit: float = MAX_LOG_SCALE) -> Tensor:
    """The inverse of `encode`; dw and dh are at most `limit`, weights apart."""
    anchor_wh = anchors[..., 2:] - anchors[..., :2]
    center = anchors[..., :2] + 0.5 * anchor_wh
    deltas = deltas / constant(tuple(weights), deltas.device, deltas.dtype)
    center = center + deltas[..., :2] * anchor_wh
    half = 0.5 * anchor_wh * deltas[..., 2:].clamp(max=limit).exp()
    return torch.cat([center - half, center + half], -1)


def encode_linear(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Distances (left, top, right, bottom) from the middle of each anchor to the sides of its box, in units of the
    anchor's sides; negative for a side that the middle is beyond (FCOS, arXiv 1904.01355, section 3.1)."""
    center, wh = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    return torch.cat([(center - boxes[..., :2]) / wh, (boxes[..., 2:] - center) / wh], -1)


def decode_linear(distances: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of `encode_linear`."""
    center, wh = (anchors[..., :2] + anchors[..., 2:]) / 2, anchors[..., 2:] - anchors[..., :2]
    return torch.cat([center - distances[..., :2] * wh, center + distances[..., 2:] * wh], -1)
