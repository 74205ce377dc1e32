"""COCO's matching and averaging on flat tensors: pycocotools' arrays to the last bit, on the CPU and on CUDA.

The protocol is pycocotools' (cocoeval.py; Lin et al., arXiv 1405.0312). What makes it quick:

- Only pairs of one image and class that overlap by the lowest IoU threshold can match: of a million pairs, some ten
  thousand. The greedy assignment runs over those, for all thresholds and area ranges at once (`ops.greedy_match`).
- Precision and recall change only at true positives. The false positives before one of them are the detections so far
  whose area is in range, less those that are matched: one running sum serves all thresholds.
- The precision curve made monotonous and read at R recalls is a maximum per recall bin, then a running maximum from
  the right; maxima do not round.

Counts are integers and every division is the one pycocotools does, in float64; so the values are the same bits.

Legend: N images, K classes, G truths, D detections, P pairs, L lanes (an IoU threshold with an area range),
T IoU thresholds, R recall thresholds, A area ranges, M bounds on detections per image and class.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detres.ops.greedy_match import LANES, greedy_match


@dataclass(frozen=True)
class Truths:
    """Ground truth of a whole data set."""

    image: Tensor  # (G,) int64 0..N-1, in the order of image ids
    label: Tensor  # (G,) int64 0..K-1, in the order of category ids
    boxes_xywh: Tensor  # (G, 4) float64
    area: Tensor  # (G,) float64
    crowd: Tensor  # (G,) bool: any number of detections may match it
    ignore: Tensor  # (G,) bool: neither found nor missed; crowds are


@dataclass(frozen=True)
class Found:
    """Detections in a whole data set, those of an image in the order in which equal scores are to be ranked."""

    image: Tensor  # (D,) int64
    label: Tensor  # (D,) int64
    boxes_xywh: Tensor  # (D, 4) float64
    scores: Tensor  # (D,) float64
    area: Tensor  # (D,) float64
    excused: Tensor | None = None  # (D,) bool: no false positive if unmatched (LVIS: class not labelled everywhere)


@dataclass(frozen=True)
class Protocol:
    """Settings, by default those of boxes and masks in COCO."""

    iou_thresholds: tuple[float, ...] = tuple(np.linspace(0.5, 0.95, 10).tolist())
    recall_thresholds: tuple[float, ...] = tuple(np.linspace(0.0, 1.0, 101).tolist())
    areas: tuple[tuple[float, float], ...] = ((0, 1e10), (0, 32**2), (32**2, 96**2), (96**2, 1e10))
    area_names: tuple[str, ...] = ("all", "small", "medium", "large")
    max_detections: tuple[int, ...] = (1, 10, 100)  # ascending

    def lowest(self) -> float:
        """IoU below which no pair can match."""
        return min(map(_reachable, self.iou_thresholds))


def _reachable(threshold: float) -> float:
    return min(threshold, 1 - 1e-10)


@dataclass(frozen=True)
class Matches:
    """Who matched whom, and the detections in the order in which they are counted."""

    pair_found: Tensor  # (P,) int64, rows of the detections that overlap a truth enough
    pair_truth: Tensor  # (P,) int64
    pair_lanes: tuple[Tensor, ...]  # (P,) int64 for each word of lanes: where the pair is a match
    pair_ignored: tuple[Tensor, ...]  # (P,) int64 likewise: where its truth is ignored
    order: Tensor  # (D',) int64, rows of the detections that count, by class, then score
    rank: Tensor  # (D',) int64, place among the detections of its image and class
    found: Found
    truths: Truths


@dataclass(frozen=True)
class Arrays:
    """What pycocotools calls `eval`, float64; -1 for a class without ground truth in the area range."""

    precision: Tensor  # (T, R, K, A, M), the best at each recall or beyond
    recall: Tensor  # (T, K, A, M), of all detections
    scores: Tensor  # (T, R, K, A, M), at which each recall is reached


Overlaps = Callable[[Tensor, Tensor], Tensor]  # rows of detections (P,), rows of truths (P,) -> IoU (P,) float64


def match(truths: Truths, found: Found, classes: int, overlaps: Overlaps, protocol: Protocol) -> Matches:
    """Assign detections to truths, greedily by score, at every IoU threshold and area range.

    `overlaps` is asked for pairs of one image and class only, image by image; below `protocol.lowest()` its value
    does not matter. For `protocol.lowest()` <= 0 every pair is a candidate.
    """
    by_score = _by_score(found)
    key = found.image * classes + found.label
    grouped = by_score[_argsort(key[by_score])]
    rank = torch.empty_like(grouped)
    rank[grouped] = _place_in_group(key[grouped])
    grouped = grouped[rank[grouped] < protocol.max_detections[-1]]
    d, g = _pairs(key[grouped], truths.image * classes + truths.label)
    iou = overlaps(grouped[d], g)
    near = (iou >= protocol.lowest()).nonzero()[:, 0]
    near = near[_best_first(d[near], iou[near])]
    d, g, iou = grouped[d[near]], g[near], iou[near]
    ignored = tuple(_pack(_outside(truths, protocol)[:, [a for _, a in word]])[g] for word in words(protocol))
    lanes = tuple(_match_lanes(truths.crowd, key[d], d, g, _near(iou, protocol, word), out)
                  for word, out in zip(words(protocol), ignored))
    order = by_score[rank[by_score] < protocol.max_detections[-1]]
    order = order[_argsort(found.label[order])]
    return Matches(d, g, lanes, ignored, order, rank[order], found, truths)


def _by_score(found: Found) -> Tensor:
    """Rows by score, highest first; equal ones by image, then as they came."""
    by_image = torch.arange(len(found.image), device=found.image.device)
    if not bool((found.image[1:] >= found.image[:-1]).all()):
        by_image = _argsort(found.image)
    # Adding 0 makes -0.0 the 0.0 that it equals; a sort by bits would tell them apart.
    return by_image[_argsort(-(found.scores[by_image] + 0.0))]


def _argsort(values: Tensor) -> Tensor:
    """Stable, ascending."""
    if values.is_cuda:
        return values.argsort(stable=True)
    return torch.from_numpy(np.argsort(values.numpy(), kind="stable"))  # quicker than torch's on one core


def _place_in_group(key: Tensor) -> Tensor:
    """0, 1, 2 ... along each run of equal values."""
    _, counts = key.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(key), device=key.device) - starts.repeat_interleave(counts)


def _pairs(found_key: Tensor, truth_key: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs (P,), (P,) of detections and truths with the same key, ascending; `found_key` is ascending."""
    by_key = _argsort(truth_key)
    groups, members = found_key.unique_consecutive(return_counts=True)
    first = torch.searchsorted(truth_key[by_key], groups)
    count = torch.searchsorted(truth_key[by_key], groups, right=True) - first
    first, count = first.repeat_interleave(members), count.repeat_interleave(members)  # of each detection
    d = torch.arange(len(found_key), device=found_key.device).repeat_interleave(count)
    within = torch.arange(len(d), device=d.device) - (count.cumsum(0) - count)[d]
    return d, by_key[first[d] + within]


def _best_first(d: Tensor, iou: Tensor) -> Tensor:
    """Order of pairs by detection, then by IoU; of equal overlaps the later truth comes first."""
    order = torch.arange(len(d) - 1, -1, -1, device=d.device)
    order = order[_argsort(-iou[order])]
    return order[_argsort(d[order])]


Word = list[tuple[int, int]]  # up to LANES settings that share 64 bits: index of IoU threshold, of area range


def words(protocol: Protocol) -> list[Word]:
    lanes = [(t, a) for t in range(len(protocol.iou_thresholds)) for a in range(len(protocol.areas))]
    return [lanes[i:i + LANES] for i in range(0, len(lanes), LANES)]


def _near(iou: Tensor, protocol: Protocol, word: Word) -> Tensor:
    """Lanes (P,) whose IoU threshold each pair reaches."""
    return _pack(iou[:, None] >= iou.new_tensor([_reachable(protocol.iou_thresholds[t]) for t, _ in word]))


def _outside(truths: Truths, protocol: Protocol) -> Tensor:
    """(G, A) bool: ignored in an area range, by its flag or for its area."""
    return truths.ignore[:, None] | ~inside(truths.area, protocol)


def _match_lanes(crowd: Tensor, key: Tensor, d: Tensor, g: Tensor, near: Tensor, ignored: Tensor) -> Tensor:
    """Lanes (P,) in which each pair is a match, of pairs in `_best_first` order.

    A detection takes an ignored truth only where no other is left. So a pair of a detection that has several is
    offered twice: first in the lanes where its truth counts, then, after all those, in the lanes where it does not.
    """
    several = _has_equal_neighbour(d)
    again = several.nonzero()[:, 0]
    pair = torch.cat([torch.arange(len(d), device=d.device), again])
    allowed = torch.cat([near & torch.where(several, ~ignored, -1), (near & ignored)[again]])
    order = _argsort(_run(d)[pair])  # both offers beside the others of the detection
    pair = pair[order]
    won = greedy_match(key[pair], d[pair], g[pair], allowed[order], crowd)
    return torch.zeros_like(d).index_add_(0, pair, won)  # the two offers of a pair differ in their lanes


def _run(values: Tensor) -> Tensor:
    """0, 0, 1, 2, 2 ...: the number of each run of equal values."""
    change = torch.zeros_like(values, dtype=torch.bool)
    change[1:] = values[1:] != values[:-1]
    return change.cumsum(0)


def _has_equal_neighbour(values: Tensor) -> Tensor:
    same = values[1:] == values[:-1]
    result = torch.zeros_like(values, dtype=torch.bool)
    result[1:] |= same
    result[:-1] |= same
    return result


def inside(area: Tensor, protocol: Protocol) -> Tensor:
    """(n,) -> (n, A) bool, bounds included."""
    low, high = area.new_tensor(protocol.areas).T
    return (area[:, None] >= low) & (area[:, None] <= high)


def _pack(lanes: Tensor) -> Tensor:
    """(n, L) bool to bits (n,) int64."""
    return (lanes.long() << torch.arange(lanes.shape[1], device=lanes.device)).sum(1)


def _unpack(bits: Tensor, count: int) -> Tensor:
    """Bits (n,) int64 to (L, n) bool."""
    return ((bits >> torch.arange(count, device=bits.device)[:, None]) & 1).bool()


# Averaging


def accumulate(matches: Matches, classes: int, protocol: Protocol) -> Arrays:
    """Precision, recall and scores, from matches made with the same protocol."""
    counted = _counted(matches, classes, protocol)
    t, r, a, m = map(len, (protocol.iou_thresholds, protocol.recall_thresholds, protocol.areas,
                           protocol.max_detections))
    precision, scores = counted.scores.new_empty(2, t, r, classes, a, m)
    recall = counted.scores.new_empty(t, classes, a, m)
    for word, lanes, ignored in zip(words(protocol), matches.pair_lanes, matches.pair_ignored):
        events = _events(matches, counted, word, lanes, ignored)
        at = torch.tensor(word, device=recall.device).T  # (2, L)
        for i, bound in enumerate(protocol.max_detections):
            curves = _curves(counted, events, at[1], bound, protocol)
            precision[at[0], :, :, at[1], i] = curves.precision.transpose(1, 2)
            scores[at[0], :, :, at[1], i] = curves.scores.transpose(1, 2)
            recall[at[0], :, at[1], i] = curves.recall
    absent = (counted.positives == 0)[..., None]  # (K, A, 1)
    return Arrays(*(array.masked_fill_(absent, -1.0) for array in (precision, recall, scores)))


@dataclass(frozen=True)
class _Counted:
    """Detections in the order in which they are counted, by class, then score."""

    scores: Tensor  # (D',)
    rank: Tensor  # (D',)
    starts: Tensor  # (K + 1,) where each class begins
    inside: Tensor  # (A, D') bool, a false positive if unmatched
    positives: Tensor  # (K, A) truths to be found


def _counted(matches: Matches, classes: int, protocol: Protocol) -> _Counted:
    found, truths, order = matches.found, matches.truths, matches.order
    within = inside(found.area[order], protocol).T
    if found.excused is not None:
        within = within & ~found.excused[order]
    sought = ~_outside(truths, protocol)
    positives = torch.zeros(classes, len(protocol.areas), dtype=torch.int64, device=order.device)
    positives.index_add_(0, truths.label, sought.long())
    return _Counted(found.scores[order], matches.rank, _starts(found.label[order], classes), within, positives)


def _starts(label: Tensor, classes: int) -> Tensor:
    """(K + 1,) where each class begins in ascending labels."""
    return torch.searchsorted(label, torch.arange(classes + 1, device=label.device))


@dataclass(frozen=True)
class _Events:
    """The matched among the counted detections; E of them, in the same order."""

    position: Tensor  # (E,) in the counted
    label: Tensor  # (E,)
    starts: Tensor  # (K + 1,)
    true: Tensor  # (L, E) bool: matched with a truth that counts
    spared: Tensor  # (L, E) bool: matched, so that it is no false positive although its area is in range


def _events(matches: Matches, counted: _Counted, word: Word, lanes: Tensor, ignored: Tensor) -> _Events:
    count, d = len(word), matches.pair_found
    matched = torch.zeros_like(matches.found.label).index_add_(0, d, lanes)  # a detection's pairs share no lane
    true = torch.zeros_like(matched).index_add_(0, d, lanes & ~ignored)
    position = matched[matches.order].nonzero()[:, 0]
    rows = matches.order[position]
    label = matches.found.label[rows]
    area = torch.tensor([a for _, a in word], device=rows.device)
    spared = _unpack(matched[rows], count) & counted.inside[:, position][area]
    return _Events(position, label, _starts(label, len(counted.positives)), _unpack(true[rows], count), spared)


def _curves(counted: _Counted, events: _Events, area: Tensor, bound: int, protocol: Protocol) -> Arrays:
    """Arrays (L, K, R), (L, K), (L, K, R) of lanes with area ranges (L,) and `bound` detections per image and class."""
    kept = counted.rank < bound
    true = events.true & kept[events.position]
    true_so_far, total = _running(true, events.starts)
    spared_so_far, _ = _running(events.spared & kept[events.position], events.starts)
    seen_so_far, _ = _running(counted.inside & kept, counted.starts)
    lane, event = true.nonzero(as_tuple=True)  # n true positives, by lane, then class
    position, label = events.position[event], events.label[event]
    tp = true_so_far[lane, event].double()
    fp = (seen_so_far[area[lane], position] - spared_so_far[lane, event]).double()
    precision = tp / (fp + tp + np.spacing(1))
    recall = tp / counted.positives[label, area[lane]]

    thresholds = recall.new_tensor(protocol.recall_thresholds)
    needed = _needed(counted.positives, thresholds).transpose(0, 1)[area]  # (L, K, R)
    some = (counted.starts.diff() > 0)[:, None]
    # pycocotools gives up at the first threshold out of reach, which matters where they do not ascend.
    reached = ((needed <= total[..., None]) & some).cummin(2).values
    best = _best_precision(lane * total.shape[1] + label, recall, precision, total.numel(), thresholds)
    first = (total.flatten().cumsum(0) - total.flatten()).view_as(total)[..., None]  # of each lane and class among n
    # The score at which a threshold is reached; with none to reach, that of the first detection.
    ranked = torch.cat([position, counted.starts[:-1]])
    leader = len(position) + torch.arange(total.shape[1], device=area.device)[:, None]
    at = torch.where(needed > 0, first + needed - 1, leader)
    scores = torch.zeros_like(best)
    scores.view_as(at)[reached] = counted.scores[ranked[at[reached]]]
    return Arrays(best.view_as(at) * reached, total.double() / counted.positives.T[area], scores.view_as(at))


def _best_precision(segment: Tensor, recall: Tensor, precision: Tensor, segments: int, thresholds: Tensor) -> Tensor:
    """The best precision (segments, R) at recall of at least each threshold; 0 where there is none."""
    ascending, order = thresholds.sort()
    reached = torch.searchsorted(ascending, recall, right=True)  # how many thresholds
    best = precision.new_zeros(segments, len(thresholds) + 1)
    best.view(-1).scatter_reduce_(0, segment * best.shape[1] + reached, precision, "amax")
    return best[:, 1:].flip(1).cummax(1).values.flip(1)[:, order.argsort()]


def _running(flags: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Running sums of flags (X, n) within each class, int32 (X, n), and their totals (X, K)."""
    total = flags.cumsum(1, dtype=torch.int32)
    before = torch.cat([total.new_zeros(len(flags), 1), total], 1)[:, starts]
    return total - before[:, :-1].repeat_interleave(starts.diff(), dim=1), before.diff(dim=1)


def _needed(positives: Tensor, thresholds: Tensor) -> Tensor:
    """True positives (K, A, R) from which on recall, as a quotient in float64, is at least the threshold."""
    sought = positives[..., None].double()
    count = ((sought * thresholds).floor() - 1).clamp(min=0)  # at most what is needed, and at most 2 less
    for _ in range(2):
        count += count / sought < thresholds
    return count.long()
