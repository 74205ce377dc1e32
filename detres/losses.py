"""Every loss of every head.

Legend: N images, B sampled boxes per image, M sampled rows of the whole batch, K classes, J keypoints, S side of a mask or
heatmap.
All take fp32 or lower logits and compute in fp32. Each is a sum divided by a count; the count is averaged over
processes, so that the gradient of N processes is that of one with the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from detres.engine.distributed import mean_over_ranks, world_size
from detres.geometry.boxes import constant, decode, encode

BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the deltas in box heads (py-faster-rcnn: one over their deviations)


def _normalizer(count: Tensor) -> Tensor:
    return mean_over_ranks(count.float()).clamp(min=1 / world_size())


def box_regression(deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, positive: Tensor, kind: str, beta: float,
                   weights: tuple[float, ...] = (1, 1, 1, 1)) -> Tensor:
    """Summed regression loss of the rows where `positive`: l1 or smooth_l1 of deltas, or GIoU of decoded boxes.

    deltas, anchors, gt_boxes (..., 4), positive (...) bool. smooth_l1: Fast R-CNN (arXiv 1504.08083, equation 3) with
    its corner at `beta`; giou: arXiv 1902.09630.
    """
    deltas = deltas.float()
    unit = constant((0.0, 0.0, 1.0, 1.0), anchors.device, anchors.dtype)
    anchors = torch.where(positive[..., None], anchors, unit)  # padded rows must not make NaN gradients
    gt_boxes = torch.where(positive[..., None], gt_boxes, unit)
    if kind == "giou":
        loss = generalized_box_iou_loss(decode(deltas, anchors, weights), gt_boxes)
    else:
        target = encode(gt_boxes, anchors, weights)
        loss = F.l1_loss(deltas, target, reduction="none") if kind == "l1" else \
            F.smooth_l1_loss(deltas, target, reduction="none", beta=beta)
        loss = loss.sum(-1)
    return (loss * positive).sum()


def rpn_losses(logits: Tensor, deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, match: Tensor, *, box_loss: str,
               beta: float, box_weight: float) -> dict[str, Tensor]:
    """Objectness and box loss over the sampled anchors (arXiv 1506.01497, equation 1).

    logits, match (N, B); deltas, anchors, gt_boxes (N, B, 4). Both are divided by the number of sampled anchors.
    """
    objectness, regression = _binary_losses(logits, deltas, anchors, gt_boxes, match, box_loss, beta, (1, 1, 1, 1))
    return {"loss_rpn_cls": objectness, "loss_rpn_box": regression * box_weight}


def region_losses(logits: Tensor, deltas: Tensor, regions: Tensor, gt_boxes: Tensor, match: Tensor, *, box_loss: str,
                  beta: float, box_weight: float) -> dict[str, Tensor]:
    """Of regions that are judged for one class each (arXiv 1512.03385, appendix C): whether they are its object, and
    their boxes. Shapes and counts as in `rpn_losses`, but for any leading dimensions instead of (N, B)."""
    objectness, regression = _binary_losses(logits, deltas, regions, gt_boxes, match, box_loss, beta, BOX_WEIGHTS)
    return {"loss_cls": objectness, "loss_box": regression * box_weight}


def _binary_losses(logits: Tensor, deltas: Tensor, boxes: Tensor, gt_boxes: Tensor, match: Tensor, box_loss: str,
                   beta: float, weights: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    count = _normalizer((match >= 0).sum())
    objectness = F.binary_cross_entropy_with_logits(logits.float(), (match == 1).float(), reduction="none")
    regression = box_regression(deltas, boxes, gt_boxes, match == 1, box_loss, beta, weights)
    return (objectness * (match >= 0)).sum() / count, regression / count


def box_head_losses(logits: Tensor, deltas: Tensor, rois: Tensor, gt_boxes: Tensor, labels: Tensor, valid: Tensor, *,
                    box_loss: str, beta: float, box_weight: float,
                    box_weights: tuple[float, ...] = BOX_WEIGHTS) -> dict[str, Tensor]:
    """Classification and box loss over the sampled RoIs (arXiv 1504.08083, section 2.3).

    logits (M, K + 1), background last; deltas (M, K, 4), or (M, 1, 4) if class-agnostic; rois, gt_boxes (M, 4);
    labels (M,) 0..K, K background; valid (M,). Both are divided by the number of RoIs. box_weights: of the deltas;
    box_weight: of the loss.
    """
    count = _normalizer(valid.sum())
    background = logits.shape[1] - 1
    classification = F.cross_entropy(logits.float(), labels, reduction="none")
    row = torch.arange(len(labels), device=labels.device)
    own = deltas[row, labels.clamp(max=deltas.shape[1] - 1)]  # background rows are masked below
    positive = valid & (labels < background)
    regression = box_regression(own, rois, gt_boxes, positive, box_loss, beta, box_weights)
    return {"loss_cls": (classification * valid).sum() / count, "loss_box": regression / count * box_weight}


def mask_loss(logits: Tensor, targets: Tensor, labels: Tensor, valid: Tensor) -> dict[str, Tensor]:
    """Binary cross-entropy of the mask of the true class (arXiv 1703.06870, section 3).

    logits (M, K, S, S); targets (M, S, S) in [0, 1]; labels (M,) 0..K-1; valid (M,).
    """
    count = _normalizer(valid.sum()) * (logits.shape[2] * logits.shape[3])
    row = torch.arange(len(labels), device=labels.device)
    own = logits[row, labels.clamp(max=logits.shape[1] - 1)].float()
    loss = F.binary_cross_entropy_with_logits(own, targets, reduction="none").sum((1, 2))
    return {"loss_mask": (loss * valid).sum() / count}


def keypoint_loss(heatmaps: Tensor, cells: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """Cross-entropy over the cells of a heatmap, one of which is right (arXiv 1703.06870, section 5).

    heatmaps (M, J, S, S) of logits; cells (M, J), from 0 to S * S - 1; seen (M, J): which keypoints are labelled and in
    their region, by whose number it is divided.
    """
    count = _normalizer(seen.sum())
    loss = F.cross_entropy(heatmaps.float().flatten(0, 1).flatten(1), cells.flatten(), reduction="none")
    return {"loss_keypoint": (loss.view_as(cells) * seen).sum() / count}
