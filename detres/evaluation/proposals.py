"""Average recall of class-agnostic proposals (Hosang et al., arXiv 1502.05082), as Detectron2 measures it for an RPN.

Of the best 100 or 1000 proposals of an image each covers at most one object, and each object is covered by at most one,
pairs being made in order of their IoU. Recall is the part of the objects covered with at least an IoU; average recall
its mean over IoU .5:.05:.95. Classes play no part; crowds and difficult objects are left out.

COCO's AR (`coco_engine`) is another number: there proposals choose in order of their scores, at each IoU anew, and one
proposal may be right for each class. An image without a single proposal counts here, with all its objects missed.

Legend: D proposals, G objects, P pairs of both in one image that overlap by .5 or more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from detres.evaluation.base import EvalResult, Evaluator, truths_of
from detres.evaluation.flat import by_score, pairs_of, place_in_run
from detres.evaluation.overlaps import box_overlaps

THRESHOLDS = (0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95)
LIMITS = (100, 1000)  # proposals of an image
AREAS = {"": (0, 1e5**2), "s": (0, 32**2), "m": (32**2, 96**2), "l": (96**2, 1e5**2)}  # square pixels of objects


class ProposalEvaluator(Evaluator):
    """Metrics "box_proposals/AR@100" and so on, with s, m or l after AR for small, medium and large objects; -1 where
    there are none."""

    metric_names = tuple(f"box_proposals/AR{area}@{limit}" for limit in LIMITS for area in AREAS)

    def compute(self) -> EvalResult:
        found = self.found()
        device = found.scores.device
        truths = truths_of(self.records, device)
        order = by_score(found)
        order = order[found.image[order].argsort(stable=True)]
        place = torch.empty_like(order)  # of each proposal among those of its image
        place[order] = place_in_run(found.image[order])
        d, g = pairs_of(found.image, truths.image)
        iou = box_overlaps(truths, found)(d, g)
        near = iou >= THRESHOLDS[0]
        d, g, iou = d[near], g[near], iou[near]
        thresholds = torch.tensor(THRESHOLDS, dtype=torch.float64, device=device)
        recalls = []
        for limit in LIMITS:
            for low, high in AREAS.values():
                counts = ~truths.ignore & (truths.area >= low) & (truths.area <= high)
                rows = (place[d] < limit) & counts[g]
                covered = cover(d[rows], g[rows], iou[rows], len(place), len(counts))[counts]
                recalls.append(float((covered[:, None] >= thresholds).double().mean()) if len(covered) else -1.0)
        return EvalResult(dict(zip(self.metric_names, recalls)))


def cover(d: Tensor, g: Tensor, iou: Tensor, proposals: int, objects: int) -> Tensor:
    """IoU (G,) with which each object is covered, 0 if it is not, when pairs (P,) of proposals d and objects g are made
    greedily, the highest IoU first. Pairs that are the best of both their partners are made at once."""
    order = iou.argsort(descending=True, stable=True)
    d, g, iou = d[order], g[order], iou[order]
    covered = iou.new_zeros(objects)
    while len(d):
        rank = torch.arange(len(d), device=d.device)
        first_of_d, first_of_g = (rank.new_full((count,), len(d)).scatter_reduce(0, index, rank, "amin")
                                  for index, count in ((d, proposals), (g, objects)))
        made = (first_of_d[d] == rank) & (first_of_g[g] == rank)
        covered[g[made]] = iou[made]
        used_d, used_g = (torch.zeros(count, dtype=torch.bool, device=d.device).index_fill(0, index[made], True)
                          for index, count in ((d, proposals), (g, objects)))
        left = ~(used_d[d] | used_g[g])
        d, g, iou = d[left], g[left], iou[left]
    return covered
