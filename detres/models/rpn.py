"""Region Proposal Network (Faster R-CNN, arXiv 1506.01497, section 3.1).

Legend: N images, L levels, A anchors of all levels, B sampled anchors per image, P proposals.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detres import losses
from detres.geometry.boxes import clip, decode, larger_than, take
from detres.models.anchors import AnchorGenerator
from detres.models.matching import match_boxes, sample_boxes
from detres.ops.nms import nms
from detres.structures import Proposals, Targets


class RPNHead(nn.Module):
    """3x3 convolutions, one in the paper, then objectness and deltas by 1x1; shared by the levels."""

    def __init__(self, channels: int, anchors_per_cell: int, convs: int = 1):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels, channels, 3, padding=1) for _ in range(convs))
        self.cls = nn.Conv2d(channels, anchors_per_cell, 1)
        self.box = nn.Conv2d(channels, anchors_per_cell * 4, 1)
        for layer in (*self.convs, self.cls, self.box):
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: logits (N, A_l) and deltas (N, A_l, 4), anchors in the order of `AnchorGenerator`."""
        logits, deltas = [], []
        for feature in features:
            hidden = feature
            for conv in self.convs:
                hidden = F.relu_(conv(hidden))
            logits.append(self.cls(hidden).permute(0, 2, 3, 1).flatten(1))
            deltas.append(self.box(hidden).permute(0, 2, 3, 1).reshape(*logits[-1].shape, 4))
        return logits, deltas


class RPN(nn.Module):
    """Head, anchors, losses and the selection of proposals; numbers as in `config.RPNConfig`.

    The pairs of `pre_nms_topk` (per level) and `post_nms_topk` (per image) are (training, test).
    """

    def __init__(self, head: RPNHead, anchors: AnchorGenerator, *, pre_nms_topk: tuple[int, int] = (2000, 1000),
                 post_nms_topk: tuple[int, int] = (1000, 1000), nms_thresh: float = 0.7, min_size: float = 0.0,
                 batch_per_image: int = 256, positive_fraction: float = 0.5, fg_iou: float = 0.7, bg_iou: float = 0.3,
                 inside_only: bool = False, box_loss: str = "l1", smooth_l1_beta: float = 1 / 9,
                 box_loss_weight: float = 1.0):
        super().__init__()
        self.head, self.anchors = head, anchors
        self.pre_nms_topk, self.post_nms_topk = pre_nms_topk, post_nms_topk
        self.nms_thresh, self.min_size = nms_thresh, min_size
        self.batch_per_image, self.positive_fraction = batch_per_image, positive_fraction
        self.fg_iou, self.bg_iou, self.inside_only = fg_iou, bg_iou, inside_only
        self.box_loss = {"box_loss": box_loss, "beta": smooth_l1_beta, "box_weight": box_loss_weight}

    def forward(self, features: list[Tensor], canvas: tuple[int, int], sizes: Tensor,
                targets: Targets | None = None) -> tuple[Proposals, dict[str, Tensor]]:
        """Proposals, best first, and the losses (none without targets). canvas: padded size; sizes (N, 2): contents."""
        logits, deltas, anchors = self.predict(features, canvas)
        training = targets is not None
        proposals = self.select(logits, deltas, anchors, sizes, self.pre_nms_topk[not training],
                                self.post_nms_topk[not training])
        return proposals, self.losses(logits, deltas, anchors, sizes, targets) if training else {}

    def predict(self, features: list[Tensor], canvas: tuple[int, int]) -> tuple[list[Tensor], ...]:
        """Per level: logits (N, A_l), deltas (N, A_l, 4) and anchors (A_l, 4)."""
        anchors = self.anchors([f.shape[-2:] for f in features], tuple(canvas), features[0].device)
        return *self.head(features), anchors

    @torch.no_grad()
    def select(self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor,
               pre_nms_topk: int, post_nms_topk: int) -> Proposals:
        """The best `pre_nms_topk` of each level, decoded, clipped, NMS within a level, the best of all levels."""
        most = min(pre_nms_topk, max(level.shape[1] for level in logits))
        boxes, scores = [], []
        for level_logits, level_deltas, level_anchors in zip(logits, deltas, anchors):
            score, index = level_logits.float().topk(min(most, level_logits.shape[1]), dim=1)  # (N, k)
            delta = take(level_deltas.float(), index)
            box = clip(decode(delta, level_anchors[index]), sizes)
            missing = most - index.shape[1]  # small levels are padded: one (N, L, most) block for NMS
            boxes.append(F.pad(box, (0, 0, 0, missing)))
            scores.append(F.pad(score, (0, missing), value=-torch.inf))
        box, score = torch.stack(boxes, 1), torch.stack(scores, 1)  # (N, L, most, 4), (N, L, most)
        valid = larger_than(box, self.min_size) & score.isfinite()
        keep = nms(box.flatten(0, 1), score.flatten(0, 1), valid.flatten(0, 1), self.nms_thresh).view_as(valid)
        score = torch.where(keep, score, -torch.inf).flatten(1)
        score, index = score.topk(min(post_nms_topk, score.shape[1]), dim=1)  # (N, P)
        box = take(box.flatten(1, 2), index)
        return Proposals(boxes=box, scores=score.sigmoid(), valid=score.isfinite())

    def losses(self, logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], sizes: Tensor,
               targets: Targets) -> dict[str, Tensor]:
        """logits, deltas and anchors as `predict` gives them; sizes (N, 2): contents."""
        logits, deltas, anchors = torch.cat(logits, 1), torch.cat(deltas, 1), torch.cat(anchors)
        boxes, inside = anchors, None
        if self.inside_only:
            inside = (clip(anchors[None], sizes) == anchors).all(-1)  # (N, A)
            boxes = torch.where(inside[..., None], anchors, 0.0)  # the others are no object's best
        match, gt_index = match_boxes(boxes, targets.boxes, targets.valid, self.fg_iou, self.bg_iou,
                                      allow_low_quality=True)
        match = match if inside is None else torch.where(inside, match, -1)
        index, match = sample_boxes(match, targets.seeds, self.batch_per_image, self.positive_fraction, salt=0)
        gt_boxes = take(targets.boxes, gt_index.gather(1, index))
        return losses.rpn_losses(logits.gather(1, index), take(deltas, index), anchors[index], gt_boxes, match,
                                 **self.box_loss)
