"""Image classification: section 3.3 of arXiv 1512.03385. Global average pooling of the last stage, one fc layer.

Legend: N images, K classes, C channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
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

    def dense_logits(self, images: ImageBatch, crop: int) -> Tensor:
        """Logits (N, K) of whole images, fully convolutional: section 3.4.

        The average pool that covers the map of a crop, 7x7 for 224 pixels, slides over the map of the image; the fc
        layer, a 1x1 convolution, gives scores at each place; these are averaged. As it is linear, it may as well be
        given the average. Images must fill their canvas: padding would count.
        """
        window = -(-crop // self.backbone.strides[-1])
        pooled = F.avg_pool2d(self.features(images), window, stride=1)  # (N, C, H', W')
        return self.fc(pooled.mean((2, 3))).float()

    def features(self, images: ImageBatch) -> Tensor:
        """The map that is pooled (N, C, H, W)."""
        return self.backbone(self.normalize(images))[-1]


class ClassifierEnsemble(nn.Module):
    """Classifiers of the same classes as one, which gives the logarithm of their mean probabilities."""

    def __init__(self, models: Sequence[Classifier]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: ImageBatch) -> Tensor:
        return mean_probabilities([model(images) for model in self.models])

    def dense_logits(self, images: ImageBatch, crop: int) -> Tensor:
        return mean_probabilities([model.dense_logits(images, crop) for model in self.models])


def mean_probabilities(logits: Sequence[Tensor]) -> Tensor:
    """The logarithm of the mean of the probabilities that several logits (N, K) stand for: logits again."""
    return torch.stack([each.log_softmax(1) for each in logits]).logsumexp(0) - math.log(len(logits))
