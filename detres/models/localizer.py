"""Per-class RPN: finds the object of a class that is known, or guessed, to be in the image (arXiv 1512.03385,
appendix C).

The last feature map, and on it 1x1 convolutions that give each anchor, for each class, a binary logit (is it an object
of this class or not) and a box of its own. Which classes are asked about comes from outside: the true class, or a
classifier's guesses.

An image trains the outputs of its own class only. What counts in testing is which of an image's boxes the outputs of
one class rank first, in images of that class; an image of another class can add nothing to this ranking, and its wrong
guess is wrong whatever its box. To push the logits of the 999 other classes down would answer a question, which class
it is, that the classifier answers better. It would also cost as much as the backbone: as it is, outputs of other
classes are never computed.

Legend: N images, C channels, (H, W) grid, A anchors per cell, M = H * W * A anchors, B sampled anchors per image,
K classes, Q classes asked about in each image.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detres import losses
from detres.geometry.boxes import clip, decode, larger_than, take
from detres.models.anchors import AnchorGenerator
from detres.models.faster_rcnn import Normalize
from detres.models.matching import match_boxes, sample_boxes
from detres.ops.nms import nms
from detres.structures import ImageBatch, Proposals, Targets


class PerClassHead(nn.Module):
    """Logits and deltas for each class and anchor, by sibling 1x1 convolutions; only those asked for are computed."""

    def __init__(self, channels: int, anchors_per_cell: int, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.cls = nn.Conv2d(channels, num_classes * anchors_per_cell, 1)
        self.box = nn.Conv2d(channels, num_classes * anchors_per_cell * 4, 1)
        for layer in (self.cls, self.box):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """features (N, C, H, W), labels (N, Q) -> logits (N, Q, M), deltas (N, Q, M, 4), anchors in the order of
        `AnchorGenerator`."""
        logits, deltas = self._of_classes(self.cls, features, labels), self._of_classes(self.box, features, labels)
        return logits, deltas.view(*logits.shape, 4)

    def _of_classes(self, layer: nn.Conv2d, features: Tensor, labels: Tensor) -> Tensor:
        """What the convolution gives for the classes asked about, (N, Q, H * W * outputs of a class)."""
        weight = F.embedding(labels, layer.weight.reshape(self.num_classes, -1))
        bias = F.embedding(labels, layer.bias.view(self.num_classes, -1)).flatten(1)  # (N, Q * outputs)
        cells = features.flatten(2).transpose(1, 2)  # (N, H * W, C)
        out = torch.baddbmm(bias[:, None], cells, weight.view(len(cells), -1, cells.shape[2]).transpose(1, 2))
        return out.unflatten(2, (labels.shape[1], -1)).transpose(1, 2).flatten(2)


class Localizer(nn.Module):
    """backbone: gives one map. topk: how many of a class's candidates are kept in testing; other options are those of
    `config.RPNConfig`."""

    loss_names = ("loss_rpn_cls", "loss_rpn_box")

    def __init__(self, normalize: Normalize, backbone: nn.Module, head: PerClassHead, anchors: AnchorGenerator, *,
                 topk: int = 1000, min_size: float = 0.0, batch_per_image: int = 8, positive_fraction: float = 0.5,
                 fg_iou: float = 0.7, bg_iou: float = 0.3, box_loss: str = "smooth_l1",
                 smooth_l1_beta: float = 1 / 9, box_loss_weight: float = 1.0):
        super().__init__()
        self.normalize, self.backbone, self.head, self.anchors = normalize, backbone, head, anchors
        self.topk, self.min_size, self.fg_iou, self.bg_iou = topk, min_size, fg_iou, bg_iou
        self.batch_per_image, self.positive_fraction = batch_per_image, positive_fraction
        self.box_loss = {"box_loss": box_loss, "beta": smooth_l1_beta, "box_weight": box_loss_weight}

    def forward(self, images: ImageBatch, targets: Targets | None = None,
                labels: Tensor | None = None) -> dict[str, Tensor] | Proposals:
        """Losses if targets are given; else candidates (N, Q, P) for each class of `labels` (N, Q): the best anchors,
        their boxes in pixels of `images`.

        All boxes of an image's targets are taken to be of one class, that of the first.
        """
        features = self.backbone(self.normalize(images))[-1]
        anchors = self.anchors([features.shape[-2:]], tuple(images.pixels.shape[-2:]), features.device)[0]
        inside = centred_inside(anchors, images.sizes)
        if targets is not None:
            logits, deltas = self.head(features, targets.labels[:, :1])
            return self.losses(logits[:, 0], deltas[:, 0], anchors, inside, targets)
        logits, deltas = self.head(features, labels)
        scores = torch.where(inside[:, None], logits.float().sigmoid(), -1.0)
        scores, index = scores.topk(min(self.topk, scores.shape[2]), dim=2)  # (N, Q, P)
        deltas = deltas.float().gather(2, index[..., None].expand(-1, -1, -1, 4))
        boxes = clip(decode(deltas, anchors[index]).flatten(1, 2), images.sizes).view(deltas.shape)
        return Proposals(boxes, scores, larger_than(boxes, self.min_size) & (scores >= 0))

    def losses(self, logits: Tensor, deltas: Tensor, anchors: Tensor, inside: Tensor,
               targets: Targets) -> dict[str, Tensor]:
        """logits (N, M), deltas (N, M, 4) of the true class, anchors (M, 4), inside (N, M): which of them train. An
        image without a box trains nothing."""
        match, gt_index = match_boxes(anchors, targets.boxes, targets.valid, self.fg_iou, self.bg_iou,
                                      allow_low_quality=True)
        match = torch.where(inside & targets.valid.any(1, keepdim=True), match, -1)
        index, match = sample_boxes(match, targets.seeds, self.batch_per_image, self.positive_fraction, salt=0)
        gt_boxes = take(targets.boxes, gt_index.gather(1, index))
        return losses.rpn_losses(logits.gather(1, index), take(deltas, index), anchors[index], gt_boxes, match,
                                 **self.box_loss)


def centred_inside(anchors: Tensor, sizes: Tensor) -> Tensor:
    """Which anchors (M, 4) have their centre in images of `sizes` (N, 2): (N, M). The others look at padding, which
    crops in training do not have, so what is said of it means nothing."""
    centre = (anchors[:, :2] + anchors[:, 2:]) / 2
    return (centre < sizes.flip(1)[:, None]).all(2)


def best_boxes(found: Proposals, nms_thresh: float, count: int) -> Proposals:
    """The `count` best of M boxes of each class (N, Q, M, 4), best first, after NMS."""
    boxes, scores, valid = found.boxes.flatten(0, 1), found.scores.flatten(0, 1), found.valid.flatten(0, 1)
    keep = nms(boxes, scores, valid, nms_thresh) if count > 1 else valid
    scores, index = torch.where(keep, scores, -1.0).topk(min(count, scores.shape[1]), dim=1)  # (N * Q, count)
    shape = (*found.scores.shape[:2], -1)
    return Proposals(take(boxes, index).unflatten(0, shape[:2]), scores.view(shape), scores.view(shape) >= 0)
