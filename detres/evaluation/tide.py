"""TIDE: which kinds of mistakes a detector makes, and what each costs in AP50 (Bolya et al., arXiv 2008.08115).

Every false positive has one kind, the first of these that holds (section 2.2 of the paper; order and bounds as in its
code, dbolya/tide). With IoU against the truths of its image, ignored ones aside:

- localization: tb <= best IoU with its own class <= tf
- classification: best IoU with another class >= tf
- duplicate: best IoU with its own class > tf, of a truth that a better detection has taken
- background: best IoU with any class <= tb
- both (class and place wrong): all others

and a truth is *missed* when no detection has it and no localization or classification error could be put right to
have it. Excused detections, those on ignored truths, have a kind too: they are not counted, but they may be put right
(since version 1.0.1 of the code). The cost dAP of a kind is the AP50 with its mistakes mended less the AP50 as it is:
the best-scored of the localization and classification errors at a free truth becomes right, all others vanish; a missed
truth no longer counts.

This AP50 is TIDE's. It differs from COCO's by a class that has detections and no truth, which counts as 0; by ignored
truths, which excuse detections with IoU > tf (not >=) in any number; and by the limit on detections, which is for a
whole image. Equal scores rank by image, then as they came, before and after mending; in TIDE's code the mistakes come
first after mending, which changes a dAP where scores are equal.

Legend: D detections by image, then score; G truths; K classes; P pairs of a detection and a truth in one image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from detres.evaluation.flat import Found, Truths, argsort, by_score, pairs_of, place_in_run
from detres.evaluation.overlaps import Overlaps
from detres.ops.greedy_match import greedy_match

KINDS = ("classification", "localization", "both", "duplicate", "background", "missed")
CLASSIFICATION, LOCALIZATION, BOTH, DUPLICATE, BACKGROUND, _ = range(6)
RECALLS = 101
ROWS_AT_ONCE = 2**15  # detections whose pairs are in memory together


@dataclass(frozen=True)
class Tide:
    """AP50 and what it would gain, as fractions of 1; `ap50` is -1 where there are neither truths nor detections."""

    ap50: float
    dap: dict[str, float]  # of each of KINDS, and of all "false_positives" and "false_negatives"
    counts: dict[str, int]  # mistakes of each of KINDS


@dataclass(frozen=True)
class Pairs:
    """Detections with truths that they overlap, in the order of detections, then best first."""

    found: Tensor  # (P,) int64, rows of detections
    truth: Tensor  # (P,) int64
    iou: Tensor  # (P,) float64
    same: Tensor  # (P,) bool: of one class
    ignored: Tensor  # (P,) bool: the truth is
    image: Tensor  # (P,) int64


def best_per_image(found: Found, overlaps: Overlaps, limit: int) -> tuple[Found, Overlaps]:
    """Up to `limit` detections of each image, by image, then score; and `overlaps` for their rows."""
    rows = by_score(found)
    rows = rows[argsort(found.image[rows])]
    rows = rows[place_in_run(found.image[rows]) < limit]
    best = Found(*(value if value is None else value[rows] for value in vars(found).values()))
    return best, lambda d, g: overlaps(rows[d], g)


def overlapping(truths: Truths, found: Found, overlaps: Overlaps, minimum: float) -> Pairs:
    """Pairs with IoU >= `minimum`, of whatever classes. `found` is sorted by image."""
    parts = []
    for rows in torch.arange(len(found.image), device=found.image.device).split(ROWS_AT_ONCE):
        d, g = pairs_of(found.image[rows], truths.image)
        iou = overlaps(rows[d], g)
        near = (iou >= minimum).nonzero()[:, 0]
        parts.append((rows[d[near]], g[near], iou[near]))
    d, g, iou = map(torch.cat, zip(*parts))
    order = argsort(-iou)
    order = order[argsort(d[order])]
    d, g, iou = d[order], g[order], iou[order]
    return Pairs(d, g, iou, found.label[d] == truths.label[g], truths.ignore[g], found.image[d])


def assign(pairs: Pairs, candidates: Tensor, detections: int, truths: int) -> Tensor:
    """The truth (D,) of each detection, -1 for none: by score, the best of those still free among `candidates` (P,)."""
    d, g = pairs.found[candidates], pairs.truth[candidates]
    shared = torch.zeros(truths, dtype=torch.bool, device=d.device)
    won = greedy_match(pairs.image[candidates], d, g, torch.ones_like(d), shared).bool()
    return _filled(detections, -1, d[won], g[won])


def excused(pairs: Pairs, threshold: float, found: Found) -> Tensor:
    """(D,) bool: not wrong when it has no truth, as it lies on an ignored one of its class or comes excused."""
    rows = pairs.found[pairs.ignored & pairs.same & (pairs.iou > threshold)]
    spared = _filled(len(found.label), False, rows, True)
    return spared if found.excused is None else spared | found.excused


def _filled(size: int, default: int | bool, rows: Tensor, values: Tensor | bool) -> Tensor:
    result = torch.full((size,), default, device=rows.device)
    result[rows] = values
    return result


@dataclass(frozen=True)
class Case:
    """What AP is computed from: detections by image and score, and the number of truths of each class."""

    label: Tensor  # (D,) int64
    scores: Tensor  # (D,) float64
    hit: Tensor  # (D,) bool
    keep: Tensor  # (D,) bool: neither excused nor taken out
    totals: Tensor  # (K,) int64


@dataclass(frozen=True)
class Ranking:
    """The kept detections by class, then score, with the counts up to each of them in its class."""

    label: Tensor  # (D',) int64
    scores: Tensor  # (D',) float64
    hit: Tensor  # (D',) bool
    true: Tensor  # (D',) int64
    count: Tensor  # (D',) int64, true and false


def rank(case: Case) -> Ranking:
    rows = case.keep.nonzero()[:, 0]
    rows = rows[argsort(-case.scores[rows])]
    rows = rows[argsort(case.label[rows])]
    label, hit = case.label[rows], case.hit[rows]
    place = place_in_run(label)
    before = hit.cumsum(0) - hit.long()
    start = torch.arange(len(rows), device=rows.device) - place
    return Ranking(label, case.scores[rows], hit, before - before[start] + hit.long(), place + 1)


def precision_curves(ranking: Ranking, totals: Tensor) -> Tensor:
    """Best precision (K, 101) at recall 0, 0.01 ... 1 or more, and 0 where that is not reached."""
    label, true, count = (x[ranking.hit] for x in (ranking.label, ranking.true, ranking.count))
    recalls = torch.arange(RECALLS, dtype=torch.float64, device=label.device) / (RECALLS - 1)
    reached = torch.searchsorted(recalls, true.double() / totals[label], right=True) - 1
    best = recalls.new_zeros(len(totals) * RECALLS)
    best.scatter_reduce_(0, label * RECALLS + reached, true.double() / count, "amax")
    return best.view(-1, RECALLS).flip(1).cummax(1).values.flip(1)


def average_precision(case: Case) -> float:
    """Mean over the classes that have truths or detections; -1 without any."""
    ranking = rank(case)
    measured = (case.totals > 0) | (ranking.label.bincount(minlength=len(case.totals)) > 0)
    if not measured.any():
        return -1.0
    return float(precision_curves(ranking, case.totals).mean(1)[measured].mean())


def tide(case: Case, pairs: Pairs, target: Tensor, truths: Truths, tf: float, tb: float) -> Tide:
    """The split of mistakes. `target` (D,) has the truth of each detection of `case`, -1 for none."""
    used = _filled(len(truths.label), False, target[target >= 0], True)
    kind, wanted = _kinds(pairs, ~case.hit, tf, tb)
    repaired = _repaired(wanted, used)
    unused = ~used & ~truths.ignore
    missed = unused & ~_filled(len(used), False, wanted[repaired], True)
    ap50 = average_precision(case)
    mended = {name: average_precision(_mend(case, kind == i, repaired, wanted, truths.label))
              for i, name in enumerate(KINDS[:-1])}
    mended["missed"] = average_precision(_forgive(case, truths.label[missed]))
    mended["false_positives"] = average_precision(replace(case, scores=case.hit.double()))
    mended["false_negatives"] = average_precision(_forgive(case, truths.label[unused]))
    gains = {name: _gain(ap50, ap) for name, ap in mended.items()}
    counts = kind[case.keep & ~case.hit].bincount(minlength=len(KINDS)).tolist()
    return Tide(ap50, gains, dict(zip(KINDS, [*counts[:-1], int(missed.sum())])))


def _gain(before: float, after: float) -> float:
    if after == -1:  # nothing false and nothing to be found is left
        return 1 - before if before != -1 else 0.0
    return max(after - before, 0.0)  # no mending lowers AP, but rounding may


def _kinds(pairs: Pairs, false: Tensor, tf: float, tb: float) -> tuple[Tensor, Tensor]:
    """Kind of mistake (D,), -1 for none, and the truth (D,) that the detection ought to have had, -1 for none."""
    own, own_iou = best_truth(pairs, pairs.same & ~pairs.ignored, len(false))
    other, other_iou = best_truth(pairs, ~pairs.same & ~pairs.ignored, len(false))
    kind = torch.full_like(own, BOTH)
    kind[torch.maximum(own_iou, other_iou) <= tb] = BACKGROUND
    kind[own_iou >= tf] = DUPLICATE
    kind[other_iou >= tf] = CLASSIFICATION
    kind[(own_iou >= tb) & (own_iou <= tf)] = LOCALIZATION
    kind[~false] = -1
    wanted = torch.where(kind == LOCALIZATION, own, torch.where(kind == CLASSIFICATION, other, -1))
    return kind, wanted


def best_truth(pairs: Pairs, candidates: Tensor, detections: int) -> tuple[Tensor, Tensor]:
    """Truth (D,) that each detection overlaps most, -1 for none, and its IoU, 0 for none."""
    d, g, iou = pairs.found[candidates], pairs.truth[candidates], pairs.iou[candidates]
    first = place_in_run(d) == 0
    values = torch.zeros(detections, dtype=iou.dtype, device=iou.device)
    values[d[first]] = iou[first]
    return _filled(detections, -1, d[first], g[first]), values


def _repaired(wanted: Tensor, used: Tensor) -> Tensor:
    """(D,) bool: the best-scored mistake at each truth that is still free."""
    rows = (wanted >= 0).nonzero()[:, 0]
    rows = rows[~used[wanted[rows]]]
    first = torch.full_like(used, len(wanted), dtype=torch.int64)
    first.scatter_reduce_(0, wanted[rows], rows, "amin")  # detections of an image are best first
    return _filled(len(wanted), False, rows[first[wanted[rows]] == rows], True)


def _mend(case: Case, mistakes: Tensor, repaired: Tensor, wanted: Tensor, truth_label: Tensor) -> Case:
    right = mistakes & repaired
    label = case.label.clone()
    label[right] = truth_label[wanted[right]]
    return replace(case, label=label, hit=case.hit | right, keep=(case.keep & ~mistakes) | right)


def _forgive(case: Case, labels: Tensor) -> Case:
    return replace(case, totals=case.totals - labels.bincount(minlength=len(case.totals)))
