"""PASCAL VOC average precision (Everingham et al., IJCV 2010 and 2015), as the development kit computes it.

The kit's coordinates are 1-based and inclusive: xmin = x1 + 1, xmax = x2, and widths are xmax - xmin + 1. That is
x2 - x1 in this project's continuous boxes, so plain IoU on them *is* the kit's IoU.

Where the kit's ports differ: a match needs IoU >= threshold, as in the kit (VOCevaldet.m) and in COCO, while the port
in py-faster-rcnn, which Detectron2 took over, wants IoU > threshold. Equal scores are ordered by image, then by the
model's order, on every machine.

Legend: D detections of one class over all images, best first; G ground truths of that class.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from detres.evaluation.base import EvalResult, Evaluator
from detres.geometry.boxes import pairwise_iou

THRESHOLDS = np.linspace(0.5, 0.95, 10)


class Matches(NamedTuple):
    """Detections of one class, best first, each with the ground truth in its image that it overlaps most."""

    overlap: np.ndarray  # (D,) IoU with it; 0 where there is none
    target: np.ndarray  # (D,) its row; -1 where there is none
    difficult: np.ndarray  # (G,) bool: neither missed nor wrong when found


class VocEvaluator(Evaluator):
    """VOC AP of boxes. Difficult objects (and crowds) are ignored; a second detection of an object is wrong."""

    metric_names = ("voc/AP", "voc/AP50", "voc/AP50_11point")

    def compute(self) -> EvalResult:
        """Metrics "voc/AP50" (area under the curve, VOC 2010 on), "voc/AP50_11point" (VOC 2007) and "voc/AP" (area,
        mean over IoU .5:.05:.95), each a mean over the classes that have ground truth; -1 where there is none."""
        per_class = {name: self._class_metrics(label) for label, name in enumerate(self.dataset.classes)}
        measured = [numbers for numbers in per_class.values() if numbers["voc/AP50"] != -1]
        means = {name: float(np.mean([numbers[name] for numbers in measured])) if measured else -1.0
                 for name in self.metric_names}
        return EvalResult(means, per_class)

    def _class_metrics(self, label: int) -> dict[str, float]:
        matches = self.matches(label)
        if matches.difficult.all():
            return dict.fromkeys(self.metric_names, -1.0)
        curves = [curve(matches, threshold) for threshold in THRESHOLDS]
        mean = float(np.mean([area(*points) for points in curves]))
        return dict(zip(self.metric_names, (mean, area(*curves[0]), eleven_point(*curves[0]))))

    def matches(self, label: int) -> Matches:
        """The best overlap of each detection of a class."""
        scores, overlaps, targets, difficult = [np.zeros(0)], [np.zeros(0)], [np.zeros(0, int)], []
        for record in self.dataset.records:
            truths = [item for item in record.annotations if item.label == label]
            found = self._seen.get(record.id)
            if found is not None:
                rows = found.labels == label
                overlap, target = _best(found.boxes[rows], np.array([item.box for item in truths]).reshape(-1, 4))
                scores.append(found.scores[rows])
                overlaps.append(overlap)
                targets.append(np.where(target < 0, -1, target + len(difficult)))
            difficult += [item.difficult or item.crowd for item in truths]
        order = np.argsort(-np.concatenate(scores), kind="stable")
        return Matches(np.concatenate(overlaps)[order], np.concatenate(targets)[order], np.array(difficult, bool))


def _best(boxes: np.ndarray, truths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Highest IoU of each box (D, 4) with the truths (G, 4), and its row (the first among equals; -1 for none)."""
    if not len(truths):
        return np.zeros(len(boxes)), np.full(len(boxes), -1)
    iou = pairwise_iou(torch.from_numpy(boxes).double(), torch.from_numpy(truths)).numpy()
    return iou.max(1), iou.argmax(1)


def curve(matches: Matches, threshold: float) -> tuple[np.ndarray, np.ndarray]:
    """Recall and precision (D,) after each detection."""
    hit = (matches.overlap >= threshold) & (matches.target >= 0)
    ignored = hit & matches.difficult[matches.target] if len(matches.difficult) else hit
    candidates = np.flatnonzero(hit & ~ignored)
    _, first = np.unique(matches.target[candidates], return_index=True)
    right = np.zeros(len(hit), bool)
    right[candidates[first]] = True
    true, false = np.cumsum(right), np.cumsum(~right & ~ignored)
    return true / np.count_nonzero(~matches.difficult), true / np.maximum(true + false, 1)


def area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the curve made monotonous: "every point", VOC 2010 and later."""
    recall = np.concatenate([[0.0], recall, [1.0]])
    precision = np.maximum.accumulate(np.concatenate([[0.0], precision, [0.0]])[::-1])[::-1]
    return float(np.sum(np.diff(recall) * precision[1:]))


def eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean of the best precision at recall 0, 0.1 ... 1 or more: VOC 2007."""
    # np.arange as in the ports: its 0.3, 0.6 and 0.7 lie one rounding above, and the numbers in print depend on it.
    return float(np.mean([precision[recall >= point].max(initial=0.0) for point in np.arange(0.0, 1.1, 0.1)]))
