"""Where a detector loses its AP: kinds of mistakes, confusions of classes, thresholds, and which objects are hard.

`analyse_errors` gives numbers (`ErrorAnalysis`), as a table, as JSON and as pictures (`error_plots`).

Legend: D detections by image, then score; G truths; K classes; C confidences; B bins.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from detres.engine.checkpoint import atomic_write
from detres.evaluation.coco import coco_arrays
from detres.evaluation.coco_engine import Protocol, inside
from detres.evaluation.coco_numbers import Row
from detres.evaluation.flat import Found, Truths
from detres.evaluation.overlaps import Overlaps, box_overlaps
from detres.evaluation.tide import (Case, Pairs, Ranking, Tide, assign, best_per_image, best_truth,
                                    excused, overlapping, precision_curves, rank, tide)

CONFIDENCES = 101
MANY = 10  # rows of a list in the printed table


@dataclass(frozen=True)
class Confusion:
    """Detections with at least a score, each assigned to at most one truth of whatever class, best score first."""

    matrix: Tensor  # (K + 1, K + 1) int64, [class of the truth, of the detection]; K is background: false and missed
    score_threshold: float
    iou_threshold: float

    def largest(self, classes: tuple[str, ...], limit: int) -> list[tuple[str, str, int]]:
        """Truth, detection and count of the most frequent confusions of two classes."""
        wrong = self.matrix[:-1, :-1].clone().fill_diagonal_(0)
        counts, places = wrong.flatten().sort(descending=True, stable=True)
        return [(classes[place // len(classes)], classes[place % len(classes)], count)
                for count, place in zip(counts[:limit].tolist(), places[:limit].tolist()) if count]


@dataclass(frozen=True)
class OperatingPoint:
    """The score threshold with the best F1. All -1 without truths; `threshold` -1 where nothing right was found."""

    threshold: float
    f1: float
    precision: float
    recall: float


@dataclass(frozen=True)
class Curves:
    """At the IoU threshold. Rows are classes; where there is one more, it has the detections of all in one pool."""

    precision: Tensor  # (K, 101), best at recall 0, 0.01 ... 1 or more; -1 for a class without truths
    confidence: Tensor  # (C,), ascending: 0 .. 1, or as far as scores go
    f1: Tensor  # (K + 1, C), of detections with at least a confidence; -1 without truths
    best: tuple[OperatingPoint, ...]  # K + 1

    def ap(self) -> Tensor:
        """(K,) mean precision."""
        return self.precision.mean(1)

    def mean_precision(self) -> Tensor:
        """(101,) over the classes that have truths; nan without any."""
        return self.precision[self.precision[:, 0] >= 0].mean(0)


@dataclass(frozen=True)
class Bin:
    """AP, mean over IoU .5:.05:.95, and AP50 of some of the truths; -1 without any."""

    name: str
    truths: int
    ap: float
    ap50: float


@dataclass(frozen=True)
class ErrorAnalysis:
    """Result of `analyse_errors`: tensors are on the CPU, numbers are fractions of 1."""

    classes: tuple[str, ...]
    overall: Bin  # AP and AP50 of COCO
    tide: Tide
    confusion: Confusion
    curves: Curves
    bins: dict[str, tuple[Bin, ...]]  # "size", "aspect ratio", "objects in the image", "overlap with another object"

    def as_dict(self) -> dict:
        """For JSON: plain numbers, lists and dicts."""
        curves = self.curves
        per_class = {name: {"ap50": ap, **asdict(best), "precision_at_recall": precision, "f1_at_confidence": f1}
                     for name, ap, best, precision, f1 in zip(self.classes, curves.ap().tolist(), curves.best,
                                                              curves.precision.tolist(), curves.f1.tolist())}
        confusion = {**asdict(replace(self.confusion, matrix=None)), "classes": [*self.classes, "background"],
                     "matrix": self.confusion.matrix.tolist()}
        return {"overall": asdict(self.overall), "tide": asdict(self.tide), "confusion": confusion,
                "confidence": curves.confidence.tolist(), "per_class": per_class,
                "all_classes": {**asdict(curves.best[-1]), "f1_at_confidence": curves.f1[-1].tolist()},
                "bins": {name: list(map(asdict, bins)) for name, bins in self.bins.items()}}

    def table(self) -> str:
        """What a person wants to read first."""
        costs = [[name.replace("_", " "), _number(cost), str(self.tide.counts.get(name, ""))]
                 for name, cost in self.tide.dap.items()]
        bins = [[name, _number(b.ap), _number(b.ap50), str(b.truths)] for name, b in
                [("all", self.overall), *((f"{key}: {b.name}", b) for key, group in self.bins.items() for b in group)]]
        confusions = [[f"{truth} taken for {found}", str(count)]
                      for truth, found, count in self.confusion.largest(self.classes, MANY)]
        names, ap50 = [*self.classes, "all (F1 of one pool)"], [*self.curves.ap().tolist(), self.overall.ap50]
        points = [[name, *map(_number, (ap, p.f1, p.precision, p.recall, p.threshold))]
                  for name, ap, p in zip(names, ap50, self.curves.best)]
        return "\n\n".join([
            _text_table(["kind of mistake", "dAP50", "count"], costs),
            _text_table(["objects", "AP", "AP50", "number"], bins),
            _text_table([f"confusions at score >= {self.confusion.score_threshold:.3f}", "count"], confusions),
            _text_table(["class", "AP50", "best F1", "precision", "recall", "at score"], points)])

    def save(self, folder: str | Path) -> None:
        """Writes errors.json and pictures (errors.png has all on one page) into `folder`, which may be new."""
        from detres.evaluation.error_plots import plot_errors

        with atomic_write(Path(folder) / "errors.json") as temporary:
            temporary.write_text(json.dumps(self.as_dict(), indent=1) + "\n")
        plot_errors(self, Path(folder))


def _number(value: float) -> str:
    return "n/a" if value == -1 else f"{value:.3f}"


def _text_table(header: list[str], rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(header, *rows)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in [header, *rows]]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def analyse_errors(truths: Truths, found: Found, classes: tuple[str, ...], overlaps: Overlaps | None = None, *,
                   iou_threshold: float = 0.5, background_threshold: float = 0.1, score_threshold: float | None = None,
                   max_detections: int = 100) -> ErrorAnalysis:
    """Find out where the detections fall short of the truths.

    Args:
        overlaps: IoU of rows of `found` with rows of `truths` of one image and whatever classes; by default of boxes.
        iou_threshold: from which on a detection has found a truth (TIDE's tf).
        background_threshold: up to which a detection has hit nothing at all (TIDE's tb).
        score_threshold: of the confusion matrix; by default that with the best F1 of all classes pooled.
        max_detections: the best-scored of each image; others are left out.
    """
    if not 0 < background_threshold <= iou_threshold <= 1:
        raise ValueError("thresholds must satisfy 0 < background_threshold <= iou_threshold <= 1, got "
                         f"{background_threshold} and {iou_threshold}. The usual ones are 0.1 and 0.5.")
    found, overlaps = best_per_image(found, overlaps or box_overlaps(truths, found), max_detections)
    pairs = overlapping(truths, found, overlaps, background_threshold)
    near = (pairs.iou >= iou_threshold) & ~pairs.ignored
    target = assign(pairs, near & pairs.same, len(found.label), len(truths.label))
    spared = excused(pairs, iou_threshold, found)
    totals = truths.label[~truths.ignore].bincount(minlength=len(classes))
    case = Case(found.label, found.scores, target >= 0, (target >= 0) | ~spared, totals)
    curves = _curves(case)
    if score_threshold is None:
        score_threshold = max(curves.best[-1].threshold, 0.0)
    strong = found.scores >= score_threshold
    matrix = _confusion(pairs, near & strong[pairs.found], strong, spared, truths, found, len(classes))
    measure = partial(_measure, classes=len(classes), overlaps=overlaps, max_detections=max_detections)
    overall, *sizes = measure(Protocol(), truths, found)
    mistakes = tide(case, pairs, target, truths, iou_threshold, background_threshold)
    confusion = Confusion(matrix.cpu(), score_threshold, iou_threshold)
    bins = {"size": tuple(sizes), **_bins(truths, found, pairs, measure)}
    return ErrorAnalysis(tuple(classes), overall, mistakes, confusion, curves, bins)


def _confusion(pairs: Pairs, near: Tensor, strong: Tensor, spared: Tensor, truths: Truths, found: Found,
               classes: int) -> Tensor:
    """Counts (K + 1, K + 1); `near` are the pairs that may be assigned."""
    target = assign(pairs, near, len(strong), len(truths.label))
    rows = (strong & ((target >= 0) | ~spared)).nonzero()[:, 0]
    truth = torch.where(target[rows] >= 0, _label_of(truths, target[rows]), classes)
    missed = ~truths.ignore
    missed[target[target >= 0]] = False
    cells = torch.cat([truth * (classes + 1) + found.label[rows], truths.label[missed] * (classes + 1) + classes])
    return cells.bincount(minlength=(classes + 1) ** 2).view(classes + 1, classes + 1)


def _label_of(truths: Truths, rows: Tensor) -> Tensor:
    """Labels of rows of truths; anything for the row -1."""
    return torch.cat([truths.label, truths.label.new_zeros(1)])[rows]


def _curves(case: Case) -> Curves:
    scores = case.scores[case.keep]
    low, high = (float(x) for x in scores.aminmax()) if len(scores) else (0.0, 1.0)
    confidence = torch.linspace(min(low, 0.0), max(high, 1.0), CONFIDENCES, dtype=torch.float64, device=scores.device)
    pooled = replace(case, label=torch.zeros_like(case.label), totals=case.totals.sum()[None])
    of_classes, of_all = rank(case), rank(pooled)
    precision = precision_curves(of_classes, case.totals).masked_fill_(case.totals[:, None] == 0, -1.0)
    f1 = torch.cat([_f1(of_classes, case.totals, confidence), _f1(of_all, pooled.totals, confidence)])
    best = torch.cat([_best_points(of_classes, case.totals), _best_points(of_all, pooled.totals)])
    return Curves(precision.cpu(), confidence.cpu(), f1.cpu(), tuple(OperatingPoint(*row) for row in best.tolist()))


def _f1(ranking: Ranking, totals: Tensor, confidence: Tensor) -> Tensor:
    """(K, C) 2 TP / (TP + FP + all truths) of the detections with at least each confidence."""
    step = torch.searchsorted(confidence, ranking.scores, right=True) - 1
    cell = ranking.label * CONFIDENCES + step
    true, count = (cell[rows].bincount(minlength=len(totals) * CONFIDENCES).view(len(totals), -1)
                   .flip(1).cumsum(1).flip(1) for rows in (ranking.hit, slice(None)))
    return (2 * true.double() / (count + totals[:, None])).masked_fill_(totals[:, None] == 0, -1.0)


def _best_points(ranking: Ranking, totals: Tensor) -> Tensor:
    """(K, 4) as in `OperatingPoint`; of equal F1 the higher threshold."""
    total = totals[ranking.label]
    true, count = ranking.true.double(), ranking.count
    numbers = torch.stack([ranking.scores, 2 * true / (count + total), true / count, true / total], 1)
    last = torch.ones_like(ranking.hit)  # of equal scores, which no threshold parts
    last[:-1] = (ranking.label[1:] != ranking.label[:-1]) | (ranking.scores[1:] != ranking.scores[:-1])
    peak = true.new_zeros(len(totals)).scatter_reduce_(0, ranking.label[last], numbers[last, 1], "amax")
    rows = (last & (true > 0) & (numbers[:, 1] == peak[ranking.label])).nonzero()[:, 0]
    first = torch.full_like(totals, len(true)).scatter_reduce_(0, ranking.label[rows], rows, "amin")
    nothing = numbers.new_tensor([[-1.0, 0.0, 0.0, 0.0]])
    return torch.cat([numbers, nothing])[first].masked_fill_(totals[:, None] == 0, -1.0)


# AP of some of the truths. As with COCO's areas, others are ignored, and so are unmatched detections of another bin.

ASPECTS = (1 / 3, 2 / 3, 3 / 2, 3.0), ("< 1:3", "1:3 - 2:3", "2:3 - 3:2", "3:2 - 3:1", "> 3:1")
NUMBERS = (2, 6, 16), ("1", "2 - 5", "6 - 15", "> 15")
OVERLAPS = (0.1, 0.3, 0.5), ("< .1", ".1 - .3", ".3 - .5", "> .5")


def _bins(truths: Truths, found: Found, pairs: Pairs, measure: Callable[..., tuple[Bin, ...]]
          ) -> dict[str, tuple[Bin, ...]]:
    """AP by width : height and by crowding.

    A detection has the shape of its box, the neighbours of the truth that it overlaps most, and the number of objects
    of its image.
    """
    number = _objects_per_image(truths, found)
    neighbour = _neighbour_overlap(truths)
    nearest, _ = best_truth(pairs, ~pairs.ignored, len(found.label))
    at_nearest = torch.cat([neighbour, neighbour.new_zeros(1)])[nearest]  # 0 for -1, none
    values = {"aspect ratio": (_aspect(truths), _aspect(found), *ASPECTS),
              "objects in the image": (number[truths.image], number[found.image], *NUMBERS),
              "overlap with another object": (neighbour, at_nearest, *OVERLAPS)}
    bins = {}
    for attribute, (of_truths, of_found, edges, names) in values.items():
        # The engine knows ranges of areas; numbers of bins in their place are ranges of anything.
        protocol = Protocol(areas=tuple((i, i) for i in range(len(names))), area_names=names)
        bins[attribute] = measure(protocol, replace(truths, area=_bin(of_truths, edges)),
                                  replace(found, area=_bin(of_found, edges)))
    return bins


def _bin(values: Tensor, edges: tuple[float, ...]) -> Tensor:
    """Number of the bin of each value; an edge belongs to the bin above it."""
    return torch.bucketize(values.double(), torch.tensor(edges, device=values.device).double(), right=True).double()


def _aspect(items: Truths | Found) -> Tensor:
    return items.boxes_xywh[:, 2] / items.boxes_xywh[:, 3]


def _objects_per_image(truths: Truths, found: Found) -> Tensor:
    images = 1 + max((int(image.max()) for image in (truths.image, found.image) if len(image)), default=-1)
    return truths.image[~truths.ignore].bincount(minlength=images)


def _neighbour_overlap(truths: Truths) -> Tensor:
    """The largest IoU (G,) of each box with that of another truth of its image that is not ignored; 0 without one."""
    order = truths.image.argsort()
    boxes = Found(truths.image[order], truths.label[order], truths.boxes_xywh[order], truths.area, truths.area)
    pairs = overlapping(truths, boxes, box_overlaps(truths, boxes), torch.finfo(torch.float64).tiny)
    rows = (~pairs.ignored & (order[pairs.found] != pairs.truth)).nonzero()[:, 0]
    return torch.zeros_like(truths.area).scatter_reduce_(0, order[pairs.found[rows]], pairs.iou[rows], "amax")


def _measure(protocol: Protocol, truths: Truths, found: Found, classes: int, overlaps: Overlaps, max_detections: int
             ) -> tuple[Bin, ...]:
    """AP in each area range, with one limit on detections."""
    protocol = replace(protocol, max_detections=(max_detections,))
    arrays = coco_arrays(truths, found, classes, overlaps, protocol)
    counts = (inside(truths.area, protocol) & ~truths.ignore).sum(1).tolist()
    return tuple(Bin(name, count, Row("AP", "AP", area=name).of(arrays, protocol),
                     Row("AP50", "AP", 0.5, name).of(arrays, protocol))
                 for name, count in zip(protocol.area_names, counts))
