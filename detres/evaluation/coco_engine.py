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

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from detres.evaluation.flat import Found, Truths, argsort, by_class, pairs_of, place_in_run, take
from detres.evaluation.overlaps import Overlaps
from detres.ops.greedy_match import LANES, greedy_match
from detres.structures import Movable


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
class Arrays(Movable):
    """What pycocotools calls `eval`, float64; -1 for a class without ground truth in the area range."""

    precision: Tensor  # (T, R, K, A, M), the best at each recall or beyond
    recall: Tensor  # (T, K, A, M), of all detections
    scores: Tensor  # (T, R, K, A, M), at which each recall is reached


def match(truths: Truths, found: Found, classes: int, overlaps: Overlaps, protocol: Protocol) -> Matches:
    """Assign detections to truths, greedily by score, at every IoU threshold and area range.

    `overlaps` is asked for pairs of one image and class only, image by image; below `protocol.lowest()` its value
    does not matter. For `protocol.lowest()` <= 0 every pair is a candidate.
    """
    by_label = by_class(found)
    grouped = take(by_label, argsort(take(found.image, by_label)))  # by image, label, score
    key = found.image * classes + found.label
    rank = torch.empty_like(grouped)
    rank[grouped] = place_in_run(take(key, grouped))
    last = protocol.max_detections[-1]
    grouped = grouped[take(rank, grouped) < last]
    d, g = pairs_of(take(key, grouped), truths.image * classes + truths.label)
    iou = overlaps(take(grouped, d), g)
    near = (iou >= protocol.lowest()).nonzero()[:, 0]
    near = near[_best_first(d[near], iou[near])]
    d, g, iou = grouped[d[near]], g[near], iou[near]
    ignored = tuple(_pack(_outside(truths, protocol), [a for _, a in word])[g] for word in words(protocol))
    lanes = tuple(_match_lanes(truths.crowd, key[d], d, g, _near(iou, protocol, word), out)
                  for word, out in zip(words(protocol), ignored))
    order = by_label[take(rank, by_label) < last]
    return Matches(d, g, lanes, ignored, order, take(rank, order), found, truths)


def _best_first(d: Tensor, iou: Tensor) -> Tensor:
    """Order of pairs by detection, then by IoU; of equal overlaps the later truth comes first."""
    order = torch.arange(len(d) - 1, -1, -1, device=d.device)
    order = order[argsort(-iou[order])]
    return order[argsort(d[order])]


Word = list[tuple[int, int]]  # up to LANES settings that share 64 bits: index of IoU threshold, of area range


def words(protocol: Protocol) -> list[Word]:
    lanes = [(t, a) for t in range(len(protocol.iou_thresholds)) for a in range(len(protocol.areas))]
    return [lanes[i:i + LANES] for i in range(0, len(lanes), LANES)]


def _near(iou: Tensor, protocol: Protocol, word: Word) -> Tensor:
    """Lanes (P,) whose IoU threshold each pair reaches."""
    return _pack(iou >= iou.new_tensor([[_reachable(t)] for t in protocol.iou_thresholds]), [t for t, _ in word])


def _outside(truths: Truths, protocol: Protocol) -> Tensor:
    """(A, G) bool: ignored in an area range, by its flag or for its area."""
    return truths.ignore | ~inside(truths.area, protocol)


def _match_lanes(crowd: Tensor, key: Tensor, d: Tensor, g: Tensor, near: Tensor, ignored: Tensor) -> Tensor:
    """Lanes (P,) in which each pair is a match, of pairs in `_best_first` order.

    A detection takes an ignored truth only where no other is left. So a pair of a detection that has several is
    offered twice: first in the lanes where its truth counts, then, after all those, in the lanes where it does not.
    """
    several = _has_equal_neighbour(d)
    again = several.nonzero()[:, 0]
    pair = torch.cat([torch.arange(len(d), device=d.device), again])
    allowed = torch.cat([near & torch.where(several, ~ignored, -1), (near & ignored)[again]])
    order = argsort(_run(d)[pair])  # both offers beside the others of the detection
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
    """(n,) -> (A, n) bool, bounds included."""
    low, high = area.new_tensor(protocol.areas).T[..., None]
    return (area >= low) & (area <= high)


def _pack(flags: Tensor, row: list[int]) -> Tensor:
    """Lanes (n,) of which each has the flags (X, n) of its row."""
    bits = torch.zeros_like(flags[0], dtype=torch.int64)
    for x, own in enumerate(flags):
        bits |= own * sum(1 << lane for lane, other in enumerate(row) if other == x)
    return bits


def _unpack(bits: Tensor, lanes: int) -> Tensor:
    """Lanes (n,) to (L, n) bool; by bytes, so that eight times less passes through memory."""
    octets = bits[:, None].view(torch.uint8)[..., None]  # (n, 8, 1), lowest first
    flags = (octets >> torch.arange(8, dtype=torch.uint8, device=bits.device)) & 1
    return flags.flatten(1)[:, :lanes].T.contiguous().bool()


# Averaging


def accumulate(matches: Matches, classes: int, protocol: Protocol) -> Arrays:
    """Precision, recall and scores, from matches made with the same protocol."""
    counted = _counted(matches, classes, protocol)
    t, r, a, m = map(len, (protocol.iou_thresholds, protocol.recall_thresholds, protocol.areas,
                           protocol.max_detections))
    precision, scores = (counted.scores.new_empty(m, t * a, classes, r) for _ in range(2))
    recall, first = counted.scores.new_empty(m, t * a, classes, 1), 0
    for word, lanes, ignored in zip(words(protocol), matches.pair_lanes, matches.pair_ignored):
        events = _events(matches, counted, word, lanes, ignored)
        area = torch.tensor([area for _, area in word], device=lanes.device)
        for i, bound in enumerate(protocol.max_detections):
            curves = _curves(counted, events, area, bound, protocol)
            for whole, part in ((precision, curves.precision), (recall, curves.recall), (scores, curves.scores)):
                whole[i, first:first + len(word)] = part
        first += len(word)
    absent = (counted.positives == 0).T[..., None]  # (A, K, 1)
    precision, recall, scores = (whole.view(m, t, a, classes, whole.shape[-1]).masked_fill_(absent, -1.0)
                                 for whole in (precision, recall, scores))
    return Arrays(precision.permute(1, 4, 3, 2, 0), recall[..., 0].permute(1, 3, 2, 0), scores.permute(1, 4, 3, 2, 0))


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
    within = inside(take(found.area, order), protocol)
    if found.excused is not None:
        within = within & ~found.excused[order]
    positives = torch.zeros(classes, len(protocol.areas), dtype=torch.int64, device=order.device)
    positives.index_add_(0, truths.label, (~_outside(truths, protocol)).long().T)
    starts = _starts(take(found.label, order), classes)
    return _Counted(take(found.scores, order), matches.rank, starts, within, positives)


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
    position = take(matched, matches.order).nonzero()[:, 0]
    rows = matches.order[position]
    label = matches.found.label[rows]
    area = torch.tensor([a for _, a in word], device=rows.device)
    spared = _unpack(matched[rows], count) & counted.inside[:, position][area]
    return _Events(position, label, _starts(label, len(counted.positives)), _unpack(true[rows], count), spared)


def _curves(counted: _Counted, events: _Events, area: Tensor, bound: int, protocol: Protocol) -> Arrays:
    """Arrays (L, K, R), (L, K, 1), (L, K, R) of lanes with area ranges (L,) and up to `bound` detections per image and
    class."""
    kept = counted.rank < bound
    true = events.true & take(kept, events.position)
    tp_sum, tp_base, total = _running(true, events.starts)
    spared_sum, spared_base, _ = _running(events.spared & take(kept, events.position), events.starts)
    seen_sum, seen_base, _ = _running(counted.inside & kept, counted.starts)

    at = true.flatten().nonzero()[:, 0]  # the n true positives, by lane, then class
    lane = torch.arange(len(area), device=at.device).repeat_interleave(true.sum(1))
    event = at - lane * true.shape[1]
    label, position, range_ = take(events.label, event), take(events.position, event), take(area, lane)
    segment = lane * total.shape[1] + label
    tp = take(tp_sum, at) - take(tp_base, segment)
    seen = take(seen_sum, range_ * len(kept) + position) - take(seen_base, range_ * total.shape[1] + label)
    fp = seen - (take(spared_sum, at) - take(spared_base, segment))
    precision = tp.double() / (fp.double() + tp.double() + np.spacing(1))

    thresholds = precision.new_tensor(protocol.recall_thresholds)
    needed = _needed(counted.positives, thresholds)  # (K, A, R)
    reached = _reached(needed, counted.positives, label * needed.shape[1] + range_, tp)
    best = _best_precision(segment, reached, precision, total.numel(), thresholds).view(*total.shape, len(thresholds))
    some = (counted.starts.diff() > 0) & (bound > 0)
    precision, scores = _read(best, needed.transpose(0, 1)[area], total, some, position, counted)
    return Arrays(precision, (total.double() / counted.positives.T[area])[..., None], scores)


def _read(best: Tensor, needed: Tensor, total: Tensor, some: Tensor, position: Tensor, counted: _Counted
          ) -> tuple[Tensor, Tensor]:
    """Precision and scores (L, K, R) at the recall thresholds, from the best precision there or beyond.

    needed: (L, K, R) true positives for each; total: (L, K) true positives; some: (K,) whether there are detections;
    position: (n,) of the true positives among the counted.
    """
    # pycocotools gives up at the first threshold out of reach, which matters where they do not ascend.
    reached = ((needed <= total[..., None]) & some[:, None]).cummin(2).values
    first = (total.flatten().cumsum(0) - total.flatten()).view_as(total)[..., None]  # of each lane and class among n
    # The score is that of the detection that reaches the threshold; with nothing to reach, the first detection's.
    padded = torch.cat([counted.scores, counted.scores.new_zeros(1)])
    ranked = torch.cat([take(padded, position), take(padded, counted.starts[:-1]), padded[-1:]])
    leader = len(position) + torch.arange(len(some), device=position.device)[:, None]
    at = torch.where(needed > 0, first + needed - 1, leader).masked_fill_(~reached, len(ranked) - 1)
    return best * reached, take(ranked, at.flatten()).view_as(best)


def _running(flags: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of flags (X, n): running sums (X * n,), what they had reached before each class (X * K,), its total (X, K)."""
    sums = flags.cumsum(1, dtype=torch.int32)
    bounds = torch.cat([sums.new_zeros(len(flags), 1), sums], 1)[:, starts]
    return sums.flatten(), bounds[:, :-1].flatten(), bounds.diff(dim=1)


def _best_precision(segment: Tensor, reached: Tensor, precision: Tensor, segments: int, thresholds: Tensor) -> Tensor:
    """The best precision (segments, R) of the true positives (n,) that reach each recall threshold; 0 without any.

    reached: (n,) how many thresholds each of them reaches.
    """
    best = precision.new_zeros(segments, len(thresholds) + 1)
    most_first = len(thresholds) - reached  # column 0 is for those that reach all, the last for those that reach none
    best.view(-1).scatter_reduce_(0, segment * best.shape[1] + most_first, precision, "amax")
    return best.cummax(1).values.index_select(1, len(thresholds) - 1 - thresholds.argsort().argsort())


def _reached(needed: Tensor, positives: Tensor, cell: Tensor, tp: Tensor) -> Tensor:
    """How many of the recall thresholds `tp` (n,) true positives reach, of cells (n,) of class and area range."""
    positives, needed = positives.flatten(), needed.flatten(0, 1)
    sizes = positives + 2  # a table for each cell: 0 to all positives, and what is beyond
    base = sizes.cumsum(0) - sizes
    slots = base[:, None] + needed.minimum(positives[:, None] + 1)
    table = torch.zeros(int(sizes.sum()), dtype=torch.int64, device=tp.device)
    table = table.index_add_(0, slots.flatten(), torch.ones_like(slots.flatten())).cumsum(0)
    return take(table, take(base, cell) + tp) - cell * needed.shape[1]


def _needed(positives: Tensor, thresholds: Tensor) -> Tensor:
    """True positives (K, A, R) from which on recall, as a quotient in float64, is at least the threshold."""
    sought = positives[..., None].double()
    count = ((sought * thresholds).floor() - 1).clamp(min=0)  # at most what is needed, and at most 2 less
    for _ in range(2):
        count += count / sought < thresholds
    return count.long()
