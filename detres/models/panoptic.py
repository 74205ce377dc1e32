"""Panoptic FPN (arXiv 1901.02446): Mask R-CNN and Semantic FPN on one backbone, and how their answers become one map.

Legend: N images, D instances of an image, S segments, (H, W) pixels of an image or of the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detres import losses
from detres.models.faster_rcnn import FasterRCNN
from detres.models.semantic import SemanticFPNHead, on_canvas
from detres.structures import Detections, ImageBatch, Targets


class PanopticFPN(FasterRCNN):
    """A Mask R-CNN of the parts that `FasterRCNN` takes, and `semantic_head`, whose channel 0 is all things together.

    loss, loss_weight: of semantic_head, see `losses.semantic_loss`."""

    def __init__(self, *parts, semantic_head: SemanticFPNHead, loss: str = "ce", loss_weight: float = 0.5):
        super().__init__(*parts)
        self.semantic_head, self.loss, self.loss_weight = semantic_head, loss, loss_weight

    @property
    def loss_names(self) -> tuple[str, ...]:
        return (*super().loss_names, "loss_semantic")

    def losses(self, features: list[Tensor], images: ImageBatch, targets: Targets) -> dict[str, Tensor]:
        logits = on_canvas(self.semantic_head(features, images.sizes), images)
        semantic = losses.semantic_loss(logits, targets.semantic, self.loss) * self.loss_weight
        return super().losses(features, images, targets) | {"loss_semantic": semantic}

    def detect(self, features: list[Tensor], images: ImageBatch) -> Detections:
        found = super().detect(features, images)
        return replace(found, semantic=on_canvas(self.semantic_head(features, images.sizes), images))


@dataclass(frozen=True)
class PanopticSegments:
    """What the ids of a panoptic map stand for: things, best first, then stuff."""

    ids: Tensor  # (S,) int64: 1..S
    labels: Tensor  # (S,) int64: class of a thing, semantic channel of stuff (1 is the first class of stuff)
    is_thing: Tensor  # (S,) bool
    scores: Tensor  # (S,) of things; 1 for stuff, of which no network gives any


@torch.no_grad()
def merge_panoptic(scores: Tensor, labels: Tensor, bitmaps: Tensor, semantic_labels: Tensor, *,
                   overlap_thresh: float = 0.5, stuff_area: int = 4096,
                   score_thresh: float = 0.5) -> tuple[Tensor, PanopticSegments]:
    """One map (H, W) int32 of segment ids, 0 where there is none, and its segments.

    Instances by scores (D,), labels (D,) and bitmaps (D, H, W) take the pixels that no better one has; those under
    `score_thresh`, and those of which more than `overlap_thresh` is taken, are left out. What remains is stuff by
    semantic_labels (H, W), of at least `stuff_area` pixels in each class; channel 0, things, stays void. So panopticapi
    and Detectron2 do; but a segment always has a pixel here, whatever the thresholds.

    The host waits for the device four times, whatever D, where it must know how many instances or segments there are.
    """
    order = scores.argsort(descending=True, stable=True)
    order = order[scores[order].double() >= score_thresh]
    panoptic = torch.zeros_like(semantic_labels, dtype=torch.int32)
    taken = panoptic.new_zeros(())
    kept = []
    for mask in bitmaps[order].bool():
        free = mask & (panoptic == 0)
        area, free_area = mask.sum(), free.sum()
        kept.append((free_area > 0) & ((area - free_area).double() / area <= overlap_thresh))
        taken = taken + kept[-1]
        panoptic = torch.where(free & kept[-1], taken.to(torch.int32), panoptic)
    things = torch.stack(kept) if kept else order.bool()  # (D,)
    rest = torch.where(panoptic == 0, semantic_labels, 0).flatten().long()
    areas = torch.bincount(rest)  # (C,), of void in channel 0
    stuff = areas >= max(stuff_area, 1)
    stuff[0] = False
    ids = torch.where(stuff, taken + stuff.cumsum(0), 0).to(torch.int32)
    panoptic = torch.where(panoptic == 0, ids[rest].view_as(panoptic), panoptic)
    chosen, channels = order[things], stuff.nonzero()[:, 0]
    is_thing = torch.cat([torch.ones_like(chosen), torch.zeros_like(channels)]).bool()
    segments = PanopticSegments(torch.arange(1, len(is_thing) + 1, device=is_thing.device),
                                torch.cat([labels[chosen], channels]), is_thing,
                                torch.cat([scores[chosen], scores.new_ones(len(channels))]))
    return panoptic, segments
