"""RetinaNet (arXiv 1708.02002): anchors of all levels classified at once, balanced by the focal loss.

Legend: N images, A anchors of all levels.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detres import losses
from detres.geometry.boxes import decode, take
from detres.models.anchors import AnchorGenerator
from detres.models.dense_head import DenseHead, select
from detres.models.faster_rcnn import Normalize
from detres.models.matching import match_boxes
from detres.structures import Detections, ImageBatch, Targets


class RetinaNet(nn.Module):
    """Numbers as in `config.DenseHeadConfig`."""

    loss_names = ("loss_cls", "loss_box")

    def __init__(self, normalize: Normalize, backbone: nn.Module, head: DenseHead, anchors: AnchorGenerator, *,
                 fg_iou: float = 0.5, bg_iou: float = 0.4, focal_alpha: float = 0.25, focal_gamma: float = 2.0,
                 box_loss: str = "l1", smooth_l1_beta: float = 0.1, box_loss_weight: float = 1.0,
                 normalize_by: str = "batch", topk: int = 1000, score_thresh: float = 0.05, nms_thresh: float = 0.5,
                 clip_before_nms: bool = False, detections_per_image: int = 100):
        super().__init__()
        self.normalize, self.backbone, self.head, self.anchors = normalize, backbone, head, anchors
        self.fg_iou, self.bg_iou, self.box_loss = fg_iou, bg_iou, {"kind": box_loss, "beta": smooth_l1_beta}
        self.loss = {"focal_alpha": focal_alpha, "focal_gamma": focal_gamma, "box_weight": box_loss_weight,
                     "normalize": normalize_by}
        self.selection = {"topk": topk, "score_thresh": score_thresh, "nms_thresh": nms_thresh,
                          "clip_before_nms": clip_before_nms, "detections_per_image": detections_per_image}

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Losses by name if targets are given, in training and evaluation mode alike; else detections."""
        features = self.backbone(self.normalize(images))
        anchors = self.anchors([f.shape[-2:] for f in features], tuple(images.pixels.shape[-2:]), features[0].device)
        logits, deltas, _ = self.head(features)
        if targets is not None:
            return self.losses(torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors), targets)
        return select(logits, deltas, anchors, [], images.sizes, decode=decode, **self.selection)

    def losses(self, logits: Tensor, deltas: Tensor, anchors: Tensor, targets: Targets) -> dict[str, Tensor]:
        """logits (N, A, K), deltas (N, A, 4), anchors (A, 4). Every anchor trains but those between the thresholds."""
        match, gt_index = match_boxes(anchors, targets.boxes, targets.valid, self.fg_iou, self.bg_iou,
                                      allow_low_quality=True)
        rows = losses.box_losses(deltas, anchors, take(targets.boxes, gt_index), match == 1, **self.box_loss)
        return losses.dense_losses(logits, targets.labels.gather(1, gt_index), match, rows, **self.loss)
