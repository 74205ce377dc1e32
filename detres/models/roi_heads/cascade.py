"""Cascade R-CNN (arXiv 1712.00726): heads that each start from the boxes of the one before, at a higher IoU.

Legend: as in `standard`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from detres import losses
from detres.geometry.boxes import clip, decode, encode, larger_than
from detres.models.matching import match_boxes
from detres.models.roi_heads.regions import Regions
from detres.models.roi_heads.standard import RoIHeads, RoIs, padded
from detres.structures import Targets


class CascadeRoIHeads(RoIHeads):
    """A box head and a class-agnostic predictor for each stage; the deltas of stage k (0, 1 ...) have k + 1 times the
    weights of an ordinary detector's (section 4.2: their spread shrinks from stage to stage).

    ious: least IoU of foreground in the stages after the first, whose is `fg_iou`. average: see `score`.
    For detection the cascade is one head: `score` gives what moves a box through all stages as one delta, so that
    refinement, voting and ensembles work as ever.
    """

    def __init__(self, box_heads: Sequence[nn.Module], box_predictors: Sequence[nn.Module],
                 mask_head: nn.Module | None = None, *, ious: Sequence[float], average: str = "probs", **options):
        super().__init__(nn.ModuleList(box_heads), nn.ModuleList(box_predictors), mask_head, **options)
        self.ious, self.average = tuple(ious), average

    @property
    def box_loss_names(self) -> tuple[str, ...]:
        return tuple(f"{name}_stage{k}" for k in range(len(self.box_head)) for name in ("loss_cls", "loss_box"))

    def _stages(self) -> Iterator[tuple[nn.Module, nn.Module, tuple[float, ...]]]:
        """Head, predictor and weights of deltas."""
        for k, (head, predictor) in enumerate(zip(self.box_head, self.box_predictor), start=1):
            yield head, predictor, tuple(k * weight for weight in losses.BOX_WEIGHTS)

    def box_losses(self, regions: Regions, rois: RoIs, targets: Targets,
                   sizes: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor, RoIs]:
        """Of all stages, those of features scaled by one over their number; rows, what a head made of them and RoIs are
        the first stage's."""
        def scaled(boxes: Tensor, image: Tensor, side: int) -> Tensor:
            return _ScaleGradient.apply(regions(boxes, image, side), 1 / len(self.box_head))

        found, of_first = {}, ()
        for k, (head, predictor, weights) in enumerate(self._stages()):
            if k > 0:
                rois = self.relabel(rois, rows, deltas, before, targets, sizes, self.ious[k - 1])
            own, rows, hidden, deltas = self.stage_losses(head, predictor, weights, scaled, rois, targets, sizes)
            found |= {f"{name}_stage{k}": loss for name, loss in own.items()}
            before, of_first = weights, of_first or (rows, hidden, rois)
        return found, *of_first

    @torch.no_grad()
    def relabel(self, rois: RoIs, rows: Tensor, deltas: Tensor, weights: tuple[float, ...], targets: Targets,
                sizes: Tensor, iou: float) -> RoIs:
        """RoIs of the next stage: boxes moved by the deltas (M, 1, 4) of `rows`, clipped, and labelled by their IoU
        with the ground truth, all of them; without those that clipping left empty."""
        boxes = clip(decode(padded(deltas[:, 0].float(), rows, rois.valid), rois.boxes, weights), sizes)
        valid = rois.valid & larger_than(boxes, 0.0)
        boxes = torch.where(valid[..., None], boxes, 0.0)
        match, gt_index = match_boxes(boxes, targets.boxes, targets.valid, iou, iou)
        labels = torch.where(match == 1, targets.labels.gather(1, gt_index), self.num_classes)
        return RoIs(boxes, labels, gt_index, valid)

    @torch.no_grad()
    def score(self, regions: Regions, boxes: Tensor, valid: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
        """As `RoIHeads.score`: the mean probabilities of the stages, or those of their mean logits, and deltas
        (N, P, 1, 4) from the boxes given to those of the last stage."""
        total, moved = 0.0, boxes
        for head, predictor, weights in self._stages():
            logits, deltas = self.stage_outputs(head, predictor, regions, moved, valid, sizes)
            total = total + (logits if self.average == "logits" else logits.softmax(-1))
            moved = clip(decode(deltas[:, :, 0], moved, weights), sizes)
        mean = total / len(self.box_head)
        deltas = encode(moved, boxes, losses.BOX_WEIGHTS)
        deltas = torch.where(valid[..., None], deltas, 0.0)  # padding has no size to divide by
        return (mean.softmax(-1) if self.average == "logits" else mean)[..., :-1], deltas[:, :, None]


class _ScaleGradient(torch.autograd.Function):
    """Features as they are, of which each stage has its share of the gradient: in the sum of the stages' losses their
    own parameters learn at the full rate, what they share at that of one head."""

    @staticmethod
    def forward(ctx, features: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return features.view_as(features)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.scale, None
