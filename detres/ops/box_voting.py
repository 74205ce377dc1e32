"""Box voting (Gidaris and Komodakis, arXiv 1505.01749, section 5).

Legend: N images, D boxes that NMS kept, V boxes that went into it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detres.geometry.boxes import pairwise_iou


@torch.no_grad()
def vote_boxes(boxes: Tensor, labels: Tensor, voters: Tensor, voter_labels: Tensor, weights: Tensor,
               iou_threshold: float = 0.5) -> Tensor:
    """Each box becomes the weighted mean of the voters of its class that overlap it by at least the threshold.

    boxes (N, D, 4), labels (N, D), voters (N, V, 4), voter_labels (N, V), weights (N, V) >= 0: their scores, 0 for what
    does not count. Returns (N, D, 4); a box without a voter is as it was. The largest temporary is (N, D, V). Means
    are taken in float64: neither autocast nor TF32 touches it, and none leaves the image in which its voters are.
    """
    counts = weights > 0
    same = labels[:, :, None] == voter_labels[:, None]
    weights = torch.where(same & (pairwise_iou(boxes, voters) >= iou_threshold), weights[:, None], 0.0).double()
    total = weights.sum(2, keepdim=True)
    voters = torch.where(counts[..., None], voters, 0.0)  # or 0 * inf would spoil the sum
    mean = weights @ voters.double() / total
    return torch.where(total > 0, mean.to(boxes), boxes)
