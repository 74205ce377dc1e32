"""Ensembles of models that were trained apart (arXiv 1512.03385, appendix B).

Legend: N images, P proposals of all models, D detections, J keypoints, S side of a mask or heatmap.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detres.config import RCNNS, Config
from detres.engine.checkpoint import WeightsMeta
from detres.inference.localize import LocalizerEnsemble
from detres.models.classifier import ClassifierEnsemble
from detres.models.faster_rcnn import FasterRCNN
from detres.models.region_classifier import RegionEnsemble
from detres.structures import Detections, ImageBatch, Proposals


def build_ensemble(models: Sequence[nn.Module], metas: Sequence[WeightsMeta], configs: Sequence[Config],
                   paths: Sequence[str | Path]) -> nn.Module:
    """One model out of several (of one: that one), in what they share: the first one's.

    Raises ValueError that names what differs where all must be the same: the kind of model, the classes, the sizes that
    images are resized to. Mean, deviation and order of channels are each model's own affair.
    """
    members = [_shared(meta, config) for meta, config in zip(metas, configs)]
    for path, member in zip(paths[1:], members[1:]):
        for name in {**members[0], **member}:
            first, other = members[0].get(name, "none"), member.get(name, "none")
            if first != other:
                is_size = name.startswith("model.input.")
                raise ValueError(f"models of an ensemble must have the same {name}, got {first} ({paths[0]}) and "
                                 f"{other} ({path}). Leave one out{f', or set it for all: {name}={first}' * is_size}.")
    if len(models) == 1:
        return models[0]
    name = configs[0].model.name
    if name not in ENSEMBLES:
        raise ValueError(f"models of an ensemble must be one of {', '.join(sorted(ENSEMBLES))}, got {name} "
                         f"({paths[0]}). Give one model.")
    return ENSEMBLES[name](models)


def _shared(meta: WeightsMeta, config: Config) -> dict[str, Any]:
    sizes = config.model.input.model_dump(exclude={"channel_order", "mean", "std"})
    return {"model.name": config.model.name, **{f"class {i}": name for i, name in enumerate(meta.classes)},
            **{f"model.input.{name}": value for name, value in sizes.items()}}


class DetectorEnsemble(nn.Module):
    """Detectors of the same classes as one: each proposes, and the heads of all judge every proposal.

    The paper says so much, and that class probabilities are averaged. What it leaves open, here: boxes are averaged as
    deltas, so centres by the arithmetic and widths and heights by the geometric mean; each model has one vote, whatever
    its accuracy; masks and heatmaps of keypoints, inside the boxes found together, are averaged as probabilities.
    Thresholds, NMS, refinement and voting, which follow, are set as in the first model. With n models n times the
    proposals pass n heads: the cost of the regions grows with the square of n (`model.rpn.post_nms_topk_test` bounds
    each model's share).
    """

    def __init__(self, models: Sequence[FasterRCNN]):
        super().__init__()
        self.models = nn.ModuleList(models)

    @torch.no_grad()
    def forward(self, images: ImageBatch) -> Detections:
        heads = [model.roi_heads for model in self.models]
        proposals, regions = zip(*(model.propose(images) for model in self.models))

        def score(boxes: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
            """As `RoIHeads.score`. A class-agnostic model has its one delta for all classes of the others."""
            parts = [head.score(own, boxes, valid, images.sizes) for head, own in zip(heads, regions)]
            return tuple(sum(each) / len(each) for each in zip(*parts))

        found = heads[0].detect(score, union(proposals), images.sizes)
        if heads[0].mask_head is not None:
            masks = mean_masks([head.predict_masks(own, found) for head, own in zip(heads, regions)])
            found = replace(found, masks=masks)
        if heads[0].keypoint_head is not None:
            heatmaps = mean_heatmaps([head.predict_heatmaps(own, found) for head, own in zip(heads, regions)])
            points = heads[0].locate_keypoints(heatmaps, found, images.pixels.shape[-2:])
            found = replace(found, keypoints=points)
        return found


def union(proposals: Sequence[Proposals]) -> Proposals:
    """Those of all models, one model after another: (N, P)."""
    return Proposals(**{field.name: torch.cat([getattr(each, field.name) for each in proposals], 1)
                        for field in fields(Proposals)})


def mean_masks(masks: Sequence[Tensor]) -> Tensor:
    """Probabilities (N, D, S, S), at the largest S that a model has."""
    side = max(each.shape[-1] for each in masks)
    same = [each if each.shape[-1] == side else F.interpolate(each, (side, side), mode="bilinear") for each in masks]
    return sum(same) / len(same)


def mean_heatmaps(heatmaps: Sequence[Tensor]) -> Tensor:
    """Logits (N, D, J, S, S) of the mean probabilities."""
    logs = torch.stack([each.flatten(3).log_softmax(-1) for each in heatmaps])
    return (logs.logsumexp(0) - math.log(len(logs))).view_as(heatmaps[0])


ENSEMBLES = {**dict.fromkeys(RCNNS, DetectorEnsemble), "classifier": ClassifierEnsemble, "localizer": LocalizerEnsemble,
             "region_classifier": RegionEnsemble}
