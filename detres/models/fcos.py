"""FCOS (arXiv 1904.01355, and 2006.09214): every point of every level is for the object around it, without anchors.

A point is the middle of an `AnchorGenerator`'s one square a cell, whose side is the stride of the level.

Legend: N images, L levels, A points of all levels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detres import losses
from detres.geometry.boxes import decode_linear, encode_linear, take
from detres.models.anchors import AnchorGenerator
from detres.models.dense_head import DenseHead, select
from detres.models.faster_rcnn import Normalize
from detres.models.matching import match_points
from detres.structures import Detections, ImageBatch, Targets

RANGE = (4, 8)  # of the distance from a point to the farthest side of its object, in strides (64 to 128 px of P4)


class FCOS(nn.Module):
    """head: with centerness; points: one square a cell. Numbers as in `config.DenseHeadConfig`.

    As in torchvision and Detectron2, centerness is read off the tower of the boxes, distances are relu, in strides, and
    the loss of a box is not weighted by its centerness.
    """

    loss_names = ("loss_cls", "loss_box", "loss_centerness")

    def __init__(self, normalize: Normalize, backbone: nn.Module, head: DenseHead, points: AnchorGenerator, *,
                 center_radius: float = 1.5, focal_alpha: float = 0.25, focal_gamma: float = 2.0,
                 box_loss: str = "giou",
                 box_loss_weight: float = 1.0, normalize_by: str = "batch", topk: int = 1000, score_thresh: float = 0.2,
                 nms_thresh: float = 0.6, clip_before_nms: bool = False, detections_per_image: int = 100):
        super().__init__()
        self.normalize, self.backbone, self.head, self.points = normalize, backbone, head, points
        self.center_radius, self.box_loss = center_radius, box_loss
        self.loss = {"focal_alpha": focal_alpha, "focal_gamma": focal_gamma, "box_weight": box_loss_weight,
                     "normalize": normalize_by}
        self.selection = {"topk": topk, "score_thresh": score_thresh, "nms_thresh": nms_thresh,
                          "clip_before_nms": clip_before_nms, "detections_per_image": detections_per_image}

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Losses by name if targets are given, in training and evaluation mode alike; else detections."""
        features = self.backbone(self.normalize(images))
        cells = self.points([f.shape[-2:] for f in features], tuple(images.pixels.shape[-2:]), features[0].device)
        logits, distances, centerness = self.head(features)
        distances = [F.relu(level) for level in distances]
        if targets is not None:
            return self.losses(torch.cat(logits, 1), torch.cat(distances, 1), torch.cat(centerness, 1), cells, targets)
        return select(logits, distances, cells, centerness, images.sizes, decode=decode_linear, **self.selection)

    def losses(self, logits: Tensor, distances: Tensor, centerness: Tensor, cells: list[Tensor],
               targets: Targets) -> dict[str, Tensor]:
        """logits (N, A, K), distances (N, A, 4), centerness (N, A), cells (A_l, 4) of each level."""
        cells, ranges = torch.cat(cells), torch.cat(self.ranges(cells))
        match, gt_index = match_points(cells, ranges, targets.boxes, targets.valid, self.center_radius)
        positive, gt_boxes = match == 1, take(targets.boxes, gt_index)
        rows = losses.iou_losses(decode_linear(distances.float(), cells), gt_boxes, positive, self.box_loss)
        found = losses.dense_losses(logits, targets.labels.gather(1, gt_index), match, rows, **self.loss)
        return found | losses.centerness_loss(centerness, encode_linear(gt_boxes, cells), positive)

    def ranges(self, cells: list[Tensor]) -> list[Tensor]:
        """Of the points of each level (A_l, 2): least and greatest distance to the farthest side, in pixels; the finest
        level has no least, the coarsest no greatest."""
        ranges = [torch.stack([(level[:, 2] - level[:, 0]) * bound for bound in RANGE], 1) for level in cells]
        ranges[0][:, 0] = 0
        ranges[-1][:, 1] = torch.inf
        return ranges
