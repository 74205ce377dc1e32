"""RoI pooling from feature pyramids.

Legend: N images, L levels, M RoIs, C channels, S side of the pooled grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor

from detres.geometry.boxes import area, constant


CANONICAL_SIDE = 224.0  # pixels: the side of an image of the pre-training


def assign_levels(boxes: Tensor, levels: int, finest: int = 2, canonical_side: float = CANONICAL_SIDE) -> Tensor:
    """Pyramid level of each box, 0 = finest (FPN, arXiv 1612.03144, equation 1). (M, 4) -> (M,) int64.

    A box of `canonical_side` squared belongs to P4.
    """
    level = torch.floor(4 + torch.log2(area(boxes).clamp(min=0).sqrt() / canonical_side) + 1e-6)  # -inf for an empty box
    return level.clamp(finest, finest + levels - 1).long() - finest


def roi_align(features: list[Tensor], strides: list[int], boxes: Tensor, image_index: Tensor, size: int,
              sampling_ratio: int = 2, aligned: bool = True, canonical_side: float = CANONICAL_SIDE) -> Tensor:
    """RoIAlign (Mask R-CNN, arXiv 1703.06870, section 3) over all levels at once, each box from its FPN level.

    features: L maps (N, C, H_l, W_l); boxes (M, 4) in image pixels; image_index (M,) int64.
    sampling_ratio: samples a bin side; 0 takes one per feature pixel. aligned: shift by half a pixel so that
    bins are centred on pixels (Detectron2); False is torchvision's and the paper's first form. canonical_side: as in
    `assign_levels`.
    Returns (M, C, S, S).

    Bilinear samples averaged over a bin are a weighted sum of feature vectors, so the op is one `embedding_bag`
    over the pyramid laid out as a (pixels, C) table: no loop over levels, both directions run on all cores in
    channels-last order. On two CPU cores it takes about an eighth of torchvision's kernel (benchmarks/roi_align.py).
    """
    if sampling_ratio == 0:
        return _per_level(torchvision.ops.roi_align, features, strides, boxes, image_index, size, canonical_side,
                          sampling_ratio=0, aligned=aligned)
    level = torch.zeros_like(image_index)
    if len(features) > 1:
        level = assign_levels(boxes, len(features), canonical_side=canonical_side)
    samples = (torch.arange(size * sampling_ratio, device=boxes.device) + 0.5) / (size * sampling_ratio)
    stride = constant(tuple(strides), boxes.device, boxes.dtype)[level][:, None]
    boxes = boxes / stride - (0.5 if aligned else 0.0)
    extent = (boxes[:, 2:] - boxes[:, :2]).clamp(min=0.0 if aligned else 1.0)  # unaligned: at least one pixel
    height = constant(tuple(f.shape[2] for f in features), boxes.device)[level][:, None]
    width = constant(tuple(f.shape[3] for f in features), boxes.device)[level][:, None]
    row, row_weight = _axis(boxes[:, 1:2] + extent[:, 1:] * samples, height)  # (M, S * sampling_ratio, 2)
    column, column_weight = _axis(boxes[:, 0:1] + extent[:, :1] * samples, width)

    pixels = [f[:, 0].numel() for f in features]
    first = constant(tuple(sum(pixels[:i]) for i in range(len(pixels))), boxes.device)[level]
    image_start = (first + image_index * (height * width)[:, 0]).view(-1, 1, 1, 1, 1)
    taps = 2 * sampling_ratio  # neighbours a bin reads along each axis
    row, row_weight = row.view(-1, size, 1, taps, 1), row_weight.view(-1, size, 1, taps, 1)
    column, column_weight = column.view(-1, 1, size, 1, taps), column_weight.view(-1, 1, size, 1, taps)
    index = (image_start + row * width.view(-1, 1, 1, 1, 1) + column).view(-1, taps * taps)
    weight = (row_weight * column_weight).view(-1, taps * taps) / sampling_ratio**2

    channels = features[0].shape[1]
    table = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels) for f in features])
    if table.dtype == torch.bfloat16 and not table.is_cuda:  # the CPU's backward sums in the table's type,
        table = table.float()  # and bf16 loses the small terms of a long sum
    pooled = F.embedding_bag(index, table, per_sample_weights=weight.to(table.dtype), mode="sum")
    return pooled.view(-1, size, size, channels).permute(0, 3, 1, 2)


def _axis(position: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """Two neighbouring pixels and their weights for positions along one axis; nothing beyond one pixel outside."""
    inside = (position >= -1) & (position <= length)
    position = position.clamp(min=0).minimum(length - 1)
    low = position.floor()
    high_weight = position - low
    low = low.long()
    index = torch.stack([low, (low + 1).minimum(length - 1)], -1)
    weight = torch.stack([1 - high_weight, high_weight], -1)
    return index, weight * inside[..., None]


def roi_pool(features: list[Tensor], strides: list[int], boxes: Tensor, image_index: Tensor, size: int,
             canonical_side: float = CANONICAL_SIDE) -> Tensor:
    """RoIPool (Fast R-CNN, arXiv 1504.08083, section 2.1): max over bins of whole pixels. Returns (M, C, S, S)."""
    return _per_level(torchvision.ops.roi_pool, features, strides, boxes, image_index, size, canonical_side)


def _per_level(op, features, strides, boxes, image_index, size, canonical_side, **options) -> Tensor:
    """torchvision's kernels take one level a call, and know neither bf16 nor channels-last."""
    rois = torch.cat([image_index[:, None].to(boxes), boxes], 1)
    if len(features) == 1:
        return op(features[0].float(), rois, size, 1 / strides[0], **options)
    level = assign_levels(boxes, len(features), canonical_side=canonical_side)
    pooled = features[0].new_zeros(len(boxes), features[0].shape[1], size, size, dtype=torch.float32)
    for i, (feature, stride) in enumerate(zip(features, strides)):
        rows = (level == i).nonzero()[:, 0]  # data-dependent: each level gets its own RoIs
        pooled = pooled.index_copy(0, rows, op(feature.float(), rois[rows], size, 1 / stride, **options))
    return pooled
