"""Average recall of proposals beside a plain reading of its definition."""

from __future__ import annotations

import random

import pytest
import torch

from detres.evaluation.proposals import AREAS, LIMITS, ProposalEvaluator
from detres.geometry.boxes import pairwise_iou

NAMES = ["AR@100", "ARs@100", "ARm@100", "ARl@100", "AR@1000", "ARs@1000", "ARm@1000", "ARl@1000"]


def recall(truths: dict, found: dict, limit: int, low: float, high: float) -> float:
    """Image by image: the pair of the highest IoU is made and leaves the table, until one side is empty."""
    covered = []
    for i, objects in truths.items():
        boxes = [box for _, box, *flags in objects
                 if low <= (box[2] - box[0]) * (box[3] - box[1]) <= high and not flags]
        best = [box for _, box, score in sorted(found.get(i, []), key=lambda row: -row[2])][:limit]
        iou = pairwise_iou(torch.tensor(best).reshape(-1, 4), torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        made = [0.0] * len(boxes)
        for _ in range(min(iou.shape)):
            d, g = divmod(int(iou.argmax()), len(boxes))
            made[g] = float(iou[d, g])
            iou[d, :] = iou[:, g] = -1
        covered += made
    thresholds = [0.5 + 0.05 * k for k in range(10)]
    return sum(value >= t for value in covered for t in thresholds) / (10 * len(covered)) if covered else -1.0


def test_crowded_images_as_one_by_one(make_dataset, make_batch):
    """Many proposals for each object, more than 100 an image, out of order; objects of all sizes, also crowds; an image
    without objects, one without proposals, one that is seen twice."""
    rng = random.Random(0)

    def box(side):
        x, y = rng.uniform(0, 400), rng.uniform(0, 300)
        return (x, y, x + side * rng.uniform(0.6, 1.4), y + side * rng.uniform(0.6, 1.4))

    truths = {i: [(rng.randrange(2), box(rng.choice((15, 25, 60, 90, 150)))) for _ in range(rng.randrange(1, 14))]
              for i in range(5)} | {5: [], 6: [(0, (0, 0, 50, 50))]}
    truths[2].append((0, (0, 0, 200, 200), {"crowd": True}))
    found = {}
    for i, objects in truths.items():
        near = [tuple(v + rng.gauss(0, 0.12 * (own[2] - own[0])) for v in own)
                for _, own, *_ in objects for _ in range(12)]
        boxes = [each for each in near if each[2] > each[0] and each[3] > each[1]] + [box(40) for _ in range(60)]
        found[i] = [(0, each, rng.random()) for each in boxes] if i != 6 else []
    assert sum(len(rows) > 100 for rows in found.values()) > 2
    dataset = make_dataset(truths, size=(700, 700))
    evaluator = ProposalEvaluator(dataset)
    evaluator.update(*make_batch(dataset, {3: found[4]}))
    for group in ((3, 0), (6, 1, 4), (5, 2)):
        evaluator.update(*make_batch(dataset, {i: found[i] for i in group}, scale=2.0))
    metrics = evaluator.compute().metrics
    assert list(metrics) == [f"box_proposals/{name}" for name in NAMES] == list(evaluator.metric_names)
    expected = [recall(truths, found, limit, *area) for limit in LIMITS for area in AREAS.values()]
    assert list(metrics.values()) == pytest.approx(expected, abs=1e-9)
    assert 0.3 < metrics["box_proposals/AR@100"] < metrics["box_proposals/AR@1000"] < 0.95 and min(expected) > 0


def test_nothing_to_find_and_nothing_found(make_dataset, make_batch):
    empty = make_dataset({1: []})
    evaluator = ProposalEvaluator(empty)
    evaluator.update(*make_batch(empty, {1: [(0, (0, 0, 9, 9), 0.5)]}))
    assert set(evaluator.compute().metrics.values()) == {-1.0}
    dataset = make_dataset({1: [(0, (0, 0, 20, 20))]})
    evaluator = ProposalEvaluator(dataset)
    assert evaluator.compute().metrics["box_proposals/AR@100"] == 0
    evaluator.update(*make_batch(dataset, {1: []}))
    assert evaluator.compute().metrics["box_proposals/ARs@1000"] == 0 and evaluator.compute().metrics[
        "box_proposals/ARm@1000"] == -1
