"""The RPN alone (Faster R-CNN, arXiv 1506.01497, section 3.1), trained and evaluated for its proposals."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from detres.models.faster_rcnn import Normalize
from detres.models.rpn import RPN
from detres.structures import Detections, ImageBatch, Targets


class ProposalNetwork(nn.Module):
    """An RPN alone: detects objects of one class, whatever they are."""

    loss_names = ("loss_rpn_cls", "loss_rpn_box")

    def __init__(self, normalize: Normalize, backbone: nn.Module, rpn: RPN):
        super().__init__()
        self.normalize, self.backbone, self.rpn = normalize, backbone, rpn

    def forward(self, images: ImageBatch, targets: Targets | None = None) -> dict[str, Tensor] | Detections:
        """Losses by name if targets are given, in training and evaluation mode alike; else proposals, with label 0."""
        features = self.backbone(self.normalize(images))
        canvas = tuple(images.pixels.shape[-2:])
        if targets is not None:
            logits, deltas, anchors = self.rpn.predict(features, canvas)
            return self.rpn.losses(logits, deltas, anchors, images.sizes, targets)
        found, _ = self.rpn(features, canvas, images.sizes)
        return Detections(found.boxes, found.scores, torch.zeros_like(found.valid, dtype=torch.int64), found.valid)
