"""PASCAL VOC average precision (Everingham et al., IJCV 2010 and 2015), as the development kit computes it.

Each detection is compared with the object of its image and class that it overlaps most (the first among equals): right
if their IoU reaches the threshold and no detection of higher score took the object, wrong otherwise, and neither if
the object is difficult. Equal scores are ordered by image id, then by the model's order, on every machine.

The kit's coordinates are 1-based and inclusive: xmin = x1 + 1, xmax = x2, and widths are xmax - xmin + 1. That is
x2 - x1 in this project's continuous boxes, so plain IoU on them *is* the kit's IoU. `border` is for boxes or libraries
with another convention: pixels that are added to every width and height before overlaps are taken.

- 0: continuous boxes, the kit's numbers.
- 1: widths written as xmax - xmin of inclusive corners, the kit's numbers.
- -1: continuous boxes as they are seen by libraries that leave the kit's + 1 out: xmax - xmin.

Where the kit's ports differ: a match needs IoU >= threshold, as in the kit (VOCevaldet.m) and in COCO, while the port
in py-faster-rcnn, which Detectron2 took over, wants IoU > threshold and leaves the order of equal scores to the
machine. Sums are rounded once (math.fsum), so that no order of adding shows.

Legend: K classes, D detections, G truths (annotated objects), P pairs of a detection and a truth of its image and
class, d detections of one class.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detres.data.dataset import Dataset
from detres.evaluation.base import EvalResult, Evaluator, truths_of
from detres.evaluation.flat import Found, Truths, by_class, pairs_of
from detres.geometry.boxes import pairwise_iou

THRESHOLDS = np.linspace(0.5, 0.95, 10).tolist()


class VocEvaluator(Evaluator):
    """VOC AP of boxes. Difficult objects (and crowds) are ignored; a second detection of an object is wrong.

    `border` is explained at the head of this module.
    """

    metric_names = ("voc/AP", "voc/AP50", "voc/AP50_11point")

    def __init__(self, dataset: Dataset, border: float = 0.0):
        super().__init__(dataset)
        self.border = border

    def compute(self) -> EvalResult:
        """Metrics "voc/AP50" (area under the curve, VOC 2010 on), "voc/AP50_11point" (VOC 2007) and "voc/AP" (area,
        mean over IoU .5:.05:.95), each a mean over the classes that have ground truth; -1 where there is none.

        "voc/AP" averages over thresholds as COCO does, and as Detectron2 does for VOC, and keeps all else VOC's: every
        point of the curve, all detections, the difficult neutral. COCO's own protocol (`CocoEvaluator`) on VOC data
        gives another number: it knows no difficult objects, reads 101 points and counts 100 detections of an image.
        """
        found = self.found()
        matches = match(truths_of(self.records, found.scores.device), found, len(self.dataset.classes), self.border)
        verdicts = [judge(matches, threshold) for threshold in THRESHOLDS]
        areas = [verdict.average_precision(area) for verdict in verdicts]
        columns = [[fmean(values) for values in zip(*areas)], areas[0], verdicts[0].average_precision(eleven_point)]
        per_class = {name: dict(zip(self.metric_names, values))
                     for name, values in zip(self.dataset.classes, zip(*columns))}
        return EvalResult(dict(zip(self.metric_names, map(mean_of_measured, columns))), per_class)


def save_for_server(results: Sequence[dict[str, Any]], dataset: Dataset, folder: str | Path) -> None:
    """COCO results as the kit and the evaluation server read them: `comp4_det_test_dog.txt` and so on, a file for each
    class, a line for each detection: image id, score, xmin, ymin, xmax, ymax.

    The file's name has the image set, the last word of a VOC data set's name; comp4 is the kit's number for detectors
    that saw other data than VOC's, such as ImageNet. Pixels count from 1, and boxes include the last: as in VOC's XML.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lines: dict[int, list[str]] = {category: [] for category in dataset.category_ids}
    for result in results:
        x, y, width, height = result["bbox"]
        lines[result["category_id"]].append(f"{result['image_id']} {result['score']:.6f} {x + 1:.3f} {y + 1:.3f} "
                                            f"{x + width:.3f} {y + height:.3f}\n")
    for name, own in zip(dataset.classes, lines.values()):
        (folder / f"comp4_det_{dataset.name.split()[-1]}_{name}.txt").write_text("".join(own), encoding="utf-8")


def voc_ap(truths: Truths, found: Found, classes: int, threshold: float = 0.5, *, eleven_points: bool = False,
           border: float = 0.0) -> list[float]:
    """AP (K,) of each class at one IoU threshold; -1 for a class without objects, or with difficult ones alone.

    Args:
        truths, found: on any device; `truths.ignore` are the difficult. Areas and crowds play no part.
        classes: K; labels are 0..K-1.
        eleven_points: VOC 2007's mean over recalls 0, 0.1 ... 1, in place of the area under the curve.
        border: see the head of this module.

    Raises ValueError for labels out of range and for boxes or scores that are not finite.
    """
    verdicts = judge(match(truths, found, classes, border), threshold)
    return verdicts.average_precision(eleven_point if eleven_points else area)


def mean_of_measured(values: Sequence[float]) -> float:
    """The mean of those that are not -1; -1 if all are."""
    measured = [value for value in values if value != -1]
    return fmean(measured) if measured else -1.0


# From detections to verdicts, on the device of the data


@dataclass(frozen=True)
class Matches:
    """Detections by class, then best first, each with the truth of its image and class that it overlaps most."""

    label: Tensor  # (D,) int64, ascending
    overlap: Tensor  # (D,) float64, IoU with it; 0 where there is none
    target: Tensor  # (D,) int64, its row; G where there is none
    truths: Truths
    classes: int


@dataclass(frozen=True)
class Verdicts:
    """Detections by class, then best first, on the host: right, wrong, or neither."""

    label: np.ndarray  # (D,) int64, ascending
    right: np.ndarray  # (D,) bool
    wrong: np.ndarray  # (D,) bool
    positives: np.ndarray  # (K,) int64, objects to be found

    def curve(self, label: int) -> tuple[np.ndarray, np.ndarray]:
        """Recall and precision (d,) after each detection of a class that has objects to be found."""
        rows = slice(*np.searchsorted(self.label, (label, label + 1)))
        true, false = np.cumsum(self.right[rows]), np.cumsum(self.wrong[rows])
        return true / self.positives[label], true / np.maximum(true + false, 1)

    def average_precision(self, average: Callable[[np.ndarray, np.ndarray], float]) -> list[float]:
        """(K,) of `average` (`area` or `eleven_point`); -1 where there is nothing to be found."""
        return [average(*self.curve(label)) if count else -1.0 for label, count in enumerate(self.positives)]


def match(truths: Truths, found: Found, classes: int, border: float = 0.0) -> Matches:
    """The most overlapped truth of each detection. Raises as `voc_ap`."""
    rows = by_class(found)
    d, g, overlap = pairs(truths, found, rows, classes, border)
    count = len(truths.label)
    best = overlap.new_zeros(len(rows)).scatter_reduce_(0, d, overlap, "amax")
    first = torch.where((overlap == best[d]) & (overlap > 0), g, count)
    target = torch.full_like(rows, count).scatter_reduce_(0, d, first, "amin")
    return Matches(found.label[rows], best, target, truths, classes)


def judge(matches: Matches, threshold: float) -> Verdicts:
    """What is right and wrong at an IoU threshold."""
    truths, target = matches.truths, matches.target
    nothing = len(truths.label)
    ignore = torch.cat([truths.ignore, truths.ignore.new_zeros(1)])[target]
    hit = (matches.overlap >= threshold) & (target < nothing)
    place = torch.arange(len(target), device=target.device)
    first = place.new_full((nothing + 1,), len(target))  # the place of the first that hits each truth
    first.scatter_reduce_(0, torch.where(hit, target, nothing), place, "amin")
    right = hit & (first[target] == place)
    return verdicts_of(matches.label, right & ~ignore, ~right & ~(hit & ignore), truths.label[~truths.ignore],
                       matches.classes)


def verdicts_of(label: Tensor, right: Tensor, wrong: Tensor, sought: Tensor, classes: int) -> Verdicts:
    """Verdicts from tensors (D,) on any device; `sought` are the labels of the objects to be found."""
    return Verdicts(*(x.cpu().numpy() for x in (label, right, wrong, sought.bincount(minlength=classes))))


def pairs(truths: Truths, found: Found, rows: Tensor, classes: int, border: float) -> tuple[Tensor, Tensor, Tensor]:
    """All pairs of a detection and a truth of one image and class: places in `rows` (P,), ascending, rows of truths
    (P,), ascending for each detection, and IoU (P,) float64. Raises as `voc_ap`."""
    _check(truths, found, classes)
    d, g = pairs_of(found.image[rows] * classes + found.label[rows], truths.image * classes + truths.label)
    return d, g, _iou(found.boxes_xywh[rows[d]], truths.boxes_xywh[g], border)


def _iou(a_xywh: Tensor, b_xywh: Tensor, border: float) -> Tensor:
    """IoU (P,) of rows (P, 4) with rows (P, 4)."""
    a, b = (torch.cat([x[:, :2], x[:, :2] + x[:, 2:] + border], 1) for x in (a_xywh, b_xywh))
    return pairwise_iou(a[:, None], b[:, None])[:, 0, 0]


def _check(truths: Truths, found: Found, classes: int) -> None:
    for name, labels in (("ground truth", truths.label), ("detections", found.label)):
        wrong = labels[(labels < 0) | (labels >= classes)]
        if len(wrong):
            raise ValueError(f"labels must be 0..{classes - 1}, got {int(wrong[0])} ({name}). "
                             "Number the classes from 0, in the order of the class names.")
    for name, values in (("scores", found.scores[:, None]), ("boxes", found.boxes_xywh)):
        wrong = (~values.isfinite().all(1)).nonzero()[:, 0]
        if len(wrong):
            raise ValueError(f"{name} must be finite, got {values[wrong[0]].tolist()} (detection {int(wrong[0])}). "
                             "Look for a division by zero or a logarithm in what made them.")


# From a curve to a number, on the host


def area(recall: np.ndarray, precision: np.ndarray) -> float:
    """Area under the curve made monotonous: "every point", VOC 2010 and later."""
    envelope = np.maximum.accumulate(precision[::-1])[::-1]
    steps = np.diff(recall, prepend=0.0)
    found = np.flatnonzero(steps)
    return math.fsum((steps[found] * envelope[found]).tolist())


def eleven_point(recall: np.ndarray, precision: np.ndarray) -> float:
    """Mean of the best precision at recall 0, 0.1 ... 1 or more: VOC 2007."""
    # np.arange as in the ports: its 0.3, 0.6 and 0.7 lie one rounding above, and the numbers in print depend on it.
    return fmean(precision[recall >= point].max(initial=0.0) for point in np.arange(0.0, 1.1, 0.1))
