"""Heads that judge every place of every level, and how detections are chosen from what they say (RetinaNet, arXiv
1708.02002, section 4; FCOS, arXiv 1904.01355).

Legend: N images, A_l anchors (or points) of a level, a those of them that are candidates, K classes, D detections.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detres.geometry.boxes import clip, larger_than, take
from detres.models.norms import make_norm
from detres.ops.nms import nms
from detres.structures import Detections


class DenseHead(nn.Module):
    """Two towers of 3x3 convolutions, shared by the levels: one for classes, one for boxes and, if asked for,
    centerness.

    bias: of the convolutions in the towers.
    """

    def __init__(self, channels: int, per_cell: int, num_classes: int, *, convs: int = 4, norm: str = "none",
                 bias: bool = True, prior: float = 0.01, centerness: bool = False):
        super().__init__()
        self.num_classes = num_classes
        self.cls_tower, self.box_tower = (nn.ModuleList(_conv(channels, channels, bias) for _ in range(convs))
                                          for _ in range(2))
        self.cls_norm, self.box_norm = (nn.ModuleList(make_norm(norm, channels) for _ in range(convs))
                                        for _ in range(2))
        self.cls, self.box = _conv(channels, per_cell * num_classes), _conv(channels, per_cell * 4)
        self.centerness = _conv(channels, per_cell) if centerness else None
        nn.init.constant_(self.cls.bias, -math.log((1 - prior) / prior))

    def forward(self, features: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Per level: logits (N, A_l, K), deltas (N, A_l, 4) and logits of centerness (N, A_l), if there are, in the
        order of `AnchorGenerator`."""
        logits, deltas, centerness = [], [], []
        for feature in features:
            hidden = _through(feature, self.cls_tower, self.cls_norm)
            logits.append(_rows(self.cls(hidden), self.num_classes))
            hidden = _through(feature, self.box_tower, self.box_norm)
            deltas.append(_rows(self.box(hidden), 4))
            if self.centerness is not None:
                centerness.append(_rows(self.centerness(hidden), 1)[..., 0])
        return logits, deltas, centerness


def _conv(in_channels: int, out_channels: int, bias: bool = True) -> nn.Conv2d:
    layer = nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=bias)
    nn.init.normal_(layer.weight, std=0.01)
    if bias:
        nn.init.zeros_(layer.bias)
    return layer


def _through(hidden: Tensor, tower: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
    for conv, norm in zip(tower, norms):
        hidden = F.relu_(norm(conv(hidden)))
    return hidden


def _rows(maps: Tensor, width: int) -> Tensor:
    """(N, per_cell * width, H, W) -> (N, H * W * per_cell, width)."""
    return maps.permute(0, 2, 3, 1).reshape(len(maps), -1, width)


@torch.no_grad()
def select(logits: list[Tensor], deltas: list[Tensor], anchors: list[Tensor], centerness: list[Tensor],
           sizes: Tensor, *,
           decode: Callable[[Tensor, Tensor], Tensor], topk: int, score_thresh: float, nms_thresh: float,
           clip_before_nms: bool, detections_per_image: int) -> Detections:
    """The best `topk` pairs of box and class of each level, decoded, NMS within a class, the best of all.

    Per level logits (N, A_l, K), deltas (N, A_l, 4), anchors (A_l, 4) and logits of centerness (N, A_l), or no levels
    of these; sizes (N, 2): height and width of the contents, which boxes are clipped to. A score is the probability of
    the class, with centerness the geometric mean of both.
    """
    levels = zip(logits, deltas, anchors, centerness or [None] * len(logits))
    parts = [_candidates(*level, decode, topk) for level in levels]
    scores, labels, boxes = (torch.cat(part, 1) for part in zip(*parts))
    boxes = clip(boxes, sizes) if clip_before_nms else boxes
    kept = torch.where(nms(boxes, scores, scores > score_thresh, nms_thresh, groups=labels), scores, -1.0)
    kept, best = kept.topk(min(detections_per_image, kept.shape[1]), dim=1)  # (N, D)
    found, valid = take(boxes, best), kept >= 0
    if not clip_before_nms:
        found = clip(found, sizes)
        valid &= larger_than(found, 0)
    return Detections(boxes=torch.where(valid[..., None], found, 0.0), scores=torch.where(valid, kept, 0.0),
                      labels=torch.where(valid, labels.gather(1, best), 0), valid=valid)


def _candidates(logits: Tensor, deltas: Tensor, anchors: Tensor, centerness: Tensor | None,
                decode: Callable[[Tensor, Tensor], Tensor], topk: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of one level the scores (N, a), labels (N, a) and boxes (N, a, 4) of the best `topk` pairs.

    They are among the anchors whose best class is among the best `topk`, so that the pairs of all anchors need not be
    compared.
    """
    best = _scores(logits.amax(2, keepdim=True), centerness)[..., 0]  # (N, A_l)
    index = best.topk(min(topk, best.shape[1]), dim=1)[1]
    image = torch.arange(len(index), device=index.device)[:, None]
    scores = _scores(logits[image, index], None if centerness is None else centerness[image, index]).flatten(1)
    scores, pair = scores.topk(min(topk, scores.shape[1]), dim=1)
    classes = logits.shape[2]
    index = index.gather(1, pair // classes)
    return scores, pair % classes, decode(take(deltas.float(), index), anchors[index])


def _scores(logits: Tensor, centerness: Tensor | None) -> Tensor:
    """(N, a, K), and (N, a) if there is centerness."""
    probs = logits.float().sigmoid()
    return probs if centerness is None else (probs * centerness.float().sigmoid()[..., None]).sqrt()
