"""Every loss of every head.

Legend: N images, B sampled boxes per image, M sampled rows of the whole batch, K classes, J keypoints, S side of a mask
or heatmap.
All take fp32 or lower logits and compute in fp32. Each is a sum divided by a count; the count is averaged over
processes, so that the gradient of N processes is that of one with the whole batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import sigmoid_focal_loss

from detres.engine.distributed import mean_over_ranks, world_size
from detres.geometry.boxes import area, constant, decode, encode

IOU_LOSSES = ("giou", "diou", "ciou")
EPS = 1e-7  # added to what is divided by, as in torchvision.ops
LEAST_SIDE = 1e-2  # pixels; in the aspect ratio of CIoU, which is 0 / 0 for a point
BOX_WEIGHTS = (10.0, 10.0, 5.0, 5.0)  # of the deltas in box heads (py-faster-rcnn: one over their deviations)


def _normalizer(count: Tensor) -> Tensor:
    return mean_over_ranks(count.float()).clamp(min=1 / world_size())


def box_regression(deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, positive: Tensor, kind: str, beta: float,
                   weights: tuple[float, ...] = (1, 1, 1, 1)) -> Tensor:
    """Summed regression loss of the rows where `positive`, as `box_losses`."""
    return box_losses(deltas, anchors, gt_boxes, positive, kind, beta, weights).sum()


def box_losses(deltas: Tensor, anchors: Tensor, gt_boxes: Tensor, positive: Tensor, kind: str, beta: float,
               weights: tuple[float, ...] = (1, 1, 1, 1)) -> Tensor:
    """Regression loss (...) of each row, 0 where not `positive`: l1 or smooth_l1 of deltas, or `iou_losses`.

    deltas, anchors, gt_boxes (..., 4), positive (...) bool. smooth_l1: Fast R-CNN (arXiv 1504.08083, equation 3) with
    its corner at `beta`.
    """
    deltas = deltas.float()
    unit = constant((0.0, 0.0, 1.0, 1.0), anchors.device, anchors.dtype)
    anchors = torch.where(positive[..., None], anchors, unit)  # padded rows must not make NaN gradients
    gt_boxes = torch.where(positive[..., None], gt_boxes, unit)
    if kind in IOU_LOSSES:
        return iou_losses(decode(deltas, anchors, weights), gt_boxes, positive, kind)
    target = encode(gt_boxes, anchors, weights)
    loss = F.l1_loss(deltas, target, reduction="none") if kind == "l1" else \
        F.smooth_l1_loss(deltas, target, reduction="none", beta=beta)
    return loss.sum(-1) * positive


def iou_losses(boxes: Tensor, gt_boxes: Tensor, positive: Tensor, kind: str) -> Tensor:
    """Of boxes and gt_boxes (..., 4) each row (...), 0 where not `positive` (...): GIoU (arXiv 1902.09630), DIoU or
    CIoU (both arXiv 1911.08287).

    The numbers are torchvision.ops', which picks the pairs that overlap by a mask: on a GPU the host would wait for it.
    """
    unit = constant((0.0, 0.0, 1.0, 1.0), boxes.device, boxes.dtype)
    boxes, gt_boxes = (torch.where(positive[..., None], each, unit) for each in (boxes, gt_boxes))
    low, high = (pick(boxes, gt_boxes) for pick in (torch.minimum, torch.maximum))
    width, height = (low[..., 2:] - high[..., :2]).clamp(min=0).unbind(-1)
    hull_width, hull_height = (high[..., 2:] - low[..., :2]).unbind(-1)
    intersection = width * height
    union = area(boxes) + area(gt_boxes) - intersection
    iou = intersection / (union + EPS)
    if kind == "giou":
        hull = hull_width * hull_height
        return (1 - iou + (hull - union) / (hull + EPS)) * positive
    shift = (boxes[..., :2] + boxes[..., 2:] - gt_boxes[..., :2] - gt_boxes[..., 2:]) / 2
    loss = 1 - iou + shift.square().sum(-1) / (hull_width.square() + hull_height.square() + EPS)
    if kind == "ciou":
        loss = loss + _aspect_penalty(boxes, gt_boxes, iou)
    return loss * positive


def _aspect_penalty(boxes: Tensor, gt_boxes: Tensor, iou: Tensor) -> Tensor:
    """Of CIoU (arXiv 1911.08287, equations 9 to 11): (...)."""
    sides = [(each[..., 2:] - each[..., :2]).clamp(min=LEAST_SIDE) for each in (boxes, gt_boxes)]
    angle, gt_angle = ((side[..., 0] / side[..., 1]).atan() for side in sides)
    v = 4 / math.pi**2 * (gt_angle - angle).square()
    return (v / (1 - iou + v + EPS)).detach() * v


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


def dense_losses(logits: Tensor, labels: Tensor, match: Tensor, box_losses: Tensor, *, focal_alpha: float,
                 focal_gamma: float, box_weight: float, normalize: str) -> dict[str, Tensor]:
    """Focal loss (RetinaNet, arXiv 1708.02002, section 3) of every place and class, and the boxes of the positives.

    logits (N, A, K); labels (N, A) 0..K-1 of the positives; match (N, A); box_losses (N, A). Both are divided by the
    number of positives of the batch, or with `normalize` 'image' by that of each image, and averaged over images.
    """
    positive = match == 1
    truth = positive[..., None] & (labels[..., None] == torch.arange(logits.shape[2], device=labels.device))
    focal = sigmoid_focal_loss(logits.float(), truth.float(), focal_alpha, focal_gamma) * (match >= 0)[..., None]
    if normalize == "image":
        count = positive.sum(1).clamp(min=1) * len(logits)  # (N,)
    else:
        count = _normalizer(positive.sum())
    return {"loss_cls": (focal.sum((1, 2)) / count).sum(), "loss_box": (box_losses.sum(1) / count).sum() * box_weight}


def centerness_loss(logits: Tensor, gt_distances: Tensor, positive: Tensor) -> dict[str, Tensor]:
    """Binary cross-entropy of how central points are in their objects (FCOS, arXiv 1904.01355, equation 3).

    logits (N, A); gt_distances (N, A, 4) to the left, top, right and bottom; positive (N, A). Divided by the number of
    positives of the batch.
    """
    distances = torch.where(positive[..., None], gt_distances, 1.0)
    horizontal, vertical = distances[..., ::2], distances[..., 1::2]
    ratios = [pair.amin(-1) / pair.amax(-1) for pair in (horizontal, vertical)]
    loss = F.binary_cross_entropy_with_logits(logits.float(), (ratios[0] * ratios[1]).sqrt(), reduction="none")
    return {"loss_centerness": (loss * positive).sum() / _normalizer(positive.sum())}


def mask_loss(logits: Tensor, targets: Tensor, labels: Tensor, valid: Tensor,
              name: str = "loss_mask") -> dict[str, Tensor]:
    """Binary cross-entropy of the mask of the true class (arXiv 1703.06870, section 3).

    logits (M, K, ...) of cells or points; targets (M, ...) in [0, 1]; labels (M,) 0..K-1; valid (M,).
    """
    count = _normalizer(valid.sum()) * math.prod(logits.shape[2:])
    row = torch.arange(len(labels), device=labels.device)
    own = logits[row, labels.clamp(max=logits.shape[1] - 1)].float()
    loss = F.binary_cross_entropy_with_logits(own, targets, reduction="none").flatten(1).sum(1)
    return {name: (loss * valid).sum() / count}


def keypoint_loss(heatmaps: Tensor, cells: Tensor, seen: Tensor) -> dict[str, Tensor]:
    """Cross-entropy over the cells of a heatmap, one of which is right (arXiv 1703.06870, section 5).

    heatmaps (M, J, S, S) of logits; cells (M, J), from 0 to S * S - 1; seen (M, J): which keypoints are labelled and in
    their region, by whose number it is divided.
    """
    count = _normalizer(seen.sum())
    loss = F.cross_entropy(heatmaps.float().flatten(0, 1).flatten(1), cells.flatten(), reduction="none")
    return {"loss_keypoint": (loss.view_as(cells) * seen).sum() / count}


# --- semantic segmentation: logits (N, C, H, W), labels (N, H, W) uint8 with IGNORED where nothing is known ---------

IGNORED = 255


def semantic_loss(logits: Tensor, labels: Tensor, kind: str) -> Tensor:
    """The sum of the losses that `kind` names, joined by '+': keys of `SEMANTIC_LOSSES`."""
    return sum(SEMANTIC_LOSSES[name](logits.float(), labels) for name in kind.split("+"))


def semantic_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the pixels that are not ignored."""
    total = F.cross_entropy(logits, labels.long(), ignore_index=IGNORED, reduction="sum")
    return total / _normalizer((labels != IGNORED).sum())


def dice_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """1 - Dice coefficient of softmax probabilities (V-Net, arXiv 1606.04797, section 3), mean over the classes that
    occur in an image, of all images."""
    truth, valid = _one_hot(labels, logits.shape[1])
    probs = logits.softmax(1)
    common = (probs * truth).sum((2, 3))  # (N, C)
    area = truth.sum((2, 3))
    dice = 2 * common / ((probs.square() * valid).sum((2, 3)) + area.clamp(min=1))
    present = area > 0
    return ((1 - dice) * present).sum() / _normalizer(present.sum())


def lovasz_softmax(logits: Tensor, labels: Tensor) -> Tensor:
    """Lovasz-Softmax (arXiv 1705.08790, section 2.2): the convex extension of 1 - IoU to errors of softmax
    probabilities, mean over the classes that occur in an image, of all images.

    Sorts all pixels for each class: memory is about five times that of the logits.
    """
    truth, valid = _one_hot(labels, logits.shape[1])
    probs = logits.softmax(1)
    errors = torch.where(truth, 1 - probs, probs).where(valid, -1.0).flatten(2)  # (N, C, P); the ignored come last
    errors, order = errors.sort(dim=2, descending=True)
    sorted_truth = truth.flatten(2).gather(2, order).float()
    area = sorted_truth.sum(2, keepdim=True)  # (N, C, 1)
    intersection = area - sorted_truth.cumsum(2)  # where the errors so far, and no others, were made
    union = area + (1 - sorted_truth).cumsum(2)
    jaccard = F.pad(1 - intersection / union, (1, 0))
    weight = jaccard.diff(dim=2)  # the gradient of the extension (equation 9): what one more error costs
    present = area[..., 0] > 0
    return ((errors.clamp(min=0) * weight).sum(2) * present).sum() / _normalizer(present.sum())


def _one_hot(labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """Whether each pixel is of each class (N, C, H, W) bool, and is not ignored (N, 1, H, W)."""
    truth = labels[:, None] == torch.arange(classes, device=labels.device)[:, None, None]
    return truth, (labels != IGNORED)[:, None]


SEMANTIC_LOSSES = {"ce": semantic_cross_entropy, "dice": dice_loss, "lovasz": lovasz_softmax}
