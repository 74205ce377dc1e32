"""The R-CNN stage of localization (arXiv 1512.03385, appendix C): regions that a localizer proposed for a class are cut
out of the image, warped to the network's input size, and each goes through the whole network, which judges for that
class whether it is the object, and moves the box. Other than in Fast R-CNN, images of a step are few and regions are
samples of their own ("RoI-centric", as R-CNN, arXiv 1311.2524).

As in `localizer`, whose reasons hold here, too, a region trains the outputs of its image's class only.

Legend: N images, Q classes asked about in each, P regions proposed for each class, B sampled per image, M rows that the
network runs on, K classes, S side of the network's input, C channels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detres import losses
from detres.geometry.boxes import clip, decode, take
from detres.models.backbone import LastStageBackbone
from detres.models.faster_rcnn import Normalize
from detres.models.matching import match_boxes, sample_boxes
from detres.models.roi_heads.standard import rows_of
from detres.ops.roi_align import roi_align
from detres.structures import ImageBatch, Proposals, Targets


class RegionClassifier(nn.Module):
    """side: S; context: pixels of it, at each border, that show what surrounds the region (R-CNN, appendix A: 16 of
    227); others as in `config.BoxHeadConfig`."""

    loss_names = ("loss_cls", "loss_box")

    def __init__(self, normalize: Normalize, backbone: LastStageBackbone, num_classes: int, *, side: int,
                 context: int = 16, batch_per_image: int = 64, positive_fraction: float = 0.25, fg_iou: float = 0.5,
                 box_loss: str = "smooth_l1", smooth_l1_beta: float = 1.0, box_loss_weight: float = 1.0):
        super().__init__()
        self.normalize, self.backbone, self.side, self.context = normalize, backbone, side, context
        self.cls, self.box = nn.Linear(backbone.channels, num_classes), nn.Linear(backbone.channels, num_classes * 4)
        for layer, std in ((self.cls, 0.01), (self.box, 0.001)):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)
        self.batch_per_image, self.positive_fraction, self.fg_iou = batch_per_image, positive_fraction, fg_iou
        self.box_loss = {"box_loss": box_loss, "beta": smooth_l1_beta, "box_weight": box_loss_weight}

    def forward(self, images: ImageBatch, targets: Targets | None = None, proposals: Proposals | None = None,
                labels: Tensor | None = None) -> dict[str, Tensor] | Proposals:
        """Losses if targets (with proposals) are given; else the proposals (N, Q, P) for the classes `labels` (N, Q),
        judged and moved, in their order."""
        return self.losses(images, targets) if targets is not None else self.judge(images, proposals, labels)

    def losses(self, images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        boxes, match, gt_index = self.sample(targets)
        valid = match >= 0
        rows = rows_of(valid)
        labels = targets.labels[:, :1].expand_as(match)
        boxes, gt_boxes, match, labels = (x.flatten(0, 1)[rows] for x in (boxes, take(targets.boxes, gt_index), match,
                                                                          labels))
        logits, deltas = self.look(images, boxes, rows // valid.shape[1], labels)
        return losses.region_losses(logits, deltas, boxes, gt_boxes, match, **self.box_loss)

    @torch.no_grad()
    def sample(self, targets: Targets) -> tuple[Tensor, Tensor, Tensor]:
        """Proposals for the true class, and the true boxes themselves: boxes (N, B, 4), match (N, B) and gt_index."""
        proposals = targets.proposals
        boxes, valid = torch.cat([proposals.boxes, targets.boxes], 1), torch.cat([proposals.valid, targets.valid], 1)
        match, gt_index = match_boxes(boxes, targets.boxes, targets.valid, self.fg_iou, self.fg_iou)
        match = torch.where(valid & targets.valid.any(1, keepdim=True), match, -1)
        index, match = sample_boxes(match, targets.seeds, self.batch_per_image, self.positive_fraction, salt=1)
        return take(boxes, index), match, gt_index.gather(1, index)

    def judge(self, images: ImageBatch, proposals: Proposals, labels: Tensor) -> Proposals:
        rows = rows_of(proposals.valid)
        boxes, classes = proposals.boxes.flatten(0, 2), labels[..., None].expand_as(proposals.valid).flatten()
        per_image = proposals.valid[0].numel()
        logits, deltas = self.look(images, boxes[rows], rows // per_image, classes[rows])
        moved = decode(deltas.float(), boxes[rows], losses.BOX_WEIGHTS)
        boxes = boxes.index_copy(0, rows, moved).view(len(labels), per_image, 4)
        scores = torch.zeros_like(proposals.scores).flatten().index_copy(0, rows, logits.float().sigmoid())
        return Proposals(clip(boxes, images.sizes).view(proposals.boxes.shape), scores.view(proposals.scores.shape),
                         proposals.valid)

    def look(self, images: ImageBatch, boxes: Tensor, image: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """boxes (M, 4) in images (M,), and the classes they are judged for (M,) -> logits (M,), deltas (M, 4)."""
        regions = warp(self.normalize(images), boxes, image, self.side, self.context)
        features = self.backbone(regions)[-1].mean((2, 3))  # (M, C)
        weight, bias = F.embedding(labels, self.cls.weight), F.embedding(labels, self.cls.bias[:, None])
        channels = self.box.in_features
        box_weight = F.embedding(labels, self.box.weight.view(-1, 4 * channels)).view(-1, 4, channels)
        box_bias = F.embedding(labels, self.box.bias.view(-1, 4))
        logits = (features * weight).sum(1) + bias[:, 0]
        return logits, (box_weight @ features[..., None])[..., 0] + box_bias


def warp(pixels: Tensor, boxes: Tensor, image: Tensor, side: int, context: int) -> Tensor:
    """Regions (M, 3, S, S) of normalised images (N, 3, H, W): each box, whatever its shape, fills the middle of its
    square but for `context` pixels at each border. Outside the image they are zero, the mean colour."""
    margin = (boxes[:, 2:] - boxes[:, :2]) * (context / (side - 2 * context))
    boxes = torch.cat([boxes[:, :2] - margin, boxes[:, 2:] + margin], 1)
    return roi_align([pixels], [1], boxes, image, side)


class RegionEnsemble(nn.Module):
    """Region classifiers of the same classes as one: probabilities and boxes are averaged."""

    def __init__(self, models: Sequence[RegionClassifier]):
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: ImageBatch, proposals: Proposals, labels: Tensor) -> Proposals:
        found = [model(images, proposals=proposals, labels=labels) for model in self.models]
        boxes, scores = (torch.stack([getattr(each, name) for each in found]).mean(0) for name in ("boxes", "scores"))
        return Proposals(boxes, scores, proposals.valid)
