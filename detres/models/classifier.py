"""Image classification: section 3.3 of arXiv 1512.03385. Global average pooling of the last stage, one fc layer.

Legend: N images, K classes, C channels.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from detres.models.backbone import LastStageBackbone
from detres.models.faster_rcnn import Normalize
from detres.structures import ClassTargets, ImageBatch


class Classifier(nn.Module):
    """backbone: gives one map (N, C, H, W), whose weights are `backbone.body`'s."""

    loss_names = ("loss_cls",)

    def __init__(self, normalize: Normalize, backbone: LastStageBackbone, num_classes: int):
        super().__init__()
        self.normalize, self.backbone = normalize, backbone
        self.fc = nn.Linear(backbone.channels, num_classes)
        nn.init.kaiming_normal_(self.fc.weight, nonlinearity="linear")
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: ImageBatch, targets: ClassTargets | None = None) -> dict[str, Tensor] | Tensor:
        """Logits (N, K); with targets the loss, and "error", the part of the images whose best class is wrong."""
        logits = self.fc(self.features(images).mean((2, 3))).float()
        if targets is None:
            return logits
        wrong = logits.argmax(1) != targets.labels
        return {"loss_cls": F.cross_entropy(logits, targets.labels), "error": wrong.float().mean()}

    def features(self, images: ImageBatch) -> Tensor:
        """The map that is pooled (N, C, H, W)."""
        return self.backbone(self.normalize(images))[-1]
