"""Ground truth and detections of a whole data set as flat tensors, and how they are sorted and paired.

Legend: N images, K classes, G truths, D detections, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from detres.structures import Movable


@dataclass(frozen=True)
class Truths(Movable):
    """Ground truth of a whole data set."""

    image: Tensor  # (G,) int64 0..N-1, in the order of image ids
    label: Tensor  # (G,) int64 0..K-1, in the order of category ids
    boxes_xywh: Tensor  # (G, 4) float64
    area: Tensor  # (G,) float64
    crowd: Tensor  # (G,) bool: any number of detections may match it
    ignore: Tensor  # (G,) bool: neither found nor missed; crowds are


@dataclass(frozen=True)
class Found(Movable):
    """Detections in a whole data set, those of an image in the order in which equal scores are to be ranked."""

    image: Tensor  # (D,) int64
    label: Tensor  # (D,) int64
    boxes_xywh: Tensor  # (D, 4) float64
    scores: Tensor  # (D,) float64
    area: Tensor  # (D,) float64
    excused: Tensor | None = None  # (D,) bool: no false positive if unmatched (LVIS: class not labelled everywhere)


def take(values: Tensor, index: Tensor) -> Tensor:
    """values[index]; on the CPU several times faster."""
    return values.index_select(0, index)


def argsort(values: Tensor) -> Tensor:
    """Stable, ascending. Float64 goes by its bits, as torch sorts integers by radix: on the CPU three times faster."""
    if values.is_floating_point():
        bits = (values + 0.0).view(torch.int64)  # -0.0 becomes 0.0
        values = bits ^ ((bits >> 63) & 0x7FFF_FFFF_FFFF_FFFF)  # below zero, larger bits are smaller numbers
    return values.argsort(stable=True)


def by_score(found: Found) -> Tensor:
    """Rows (D,) by score, highest first; equal ones by image, then as they came."""
    by_image = torch.arange(len(found.image), device=found.image.device)
    if not bool((found.image[1:] >= found.image[:-1]).all()):
        by_image = argsort(found.image)
    return take(by_image, argsort(-take(found.scores, by_image)))


def by_class(found: Found) -> Tensor:
    """Rows (D,) by class, then as `by_score`."""
    rows = by_score(found)
    return take(rows, argsort(take(found.label, rows)))


def place_in_run(values: Tensor) -> Tensor:
    """0, 1, 2 ... along each run of equal values."""
    _, counts = values.unique_consecutive(return_counts=True)
    starts = counts.cumsum(0) - counts
    return torch.arange(len(values), device=values.device) - starts.repeat_interleave(counts)


def pairs_of(found_key: Tensor, truth_key: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of detections and truths with the same key: places in `found_key` (P,), ascending, and rows of truths
    (P,), ascending for each detection. Quickest where equal keys of `found_key` are neighbours."""
    by_key = argsort(truth_key)
    truth_key = truth_key[by_key]
    groups, members = found_key.unique_consecutive(return_counts=True)
    first = torch.searchsorted(truth_key, groups)
    count = torch.searchsorted(truth_key, groups, right=True) - first
    first, count = first.repeat_interleave(members), count.repeat_interleave(members)  # of each detection
    d = torch.arange(len(found_key), device=found_key.device).repeat_interleave(count)
    shift = first - (count.cumsum(0) - count)  # from the number of a pair to the place of its truth
    return d, take(by_key, torch.arange(len(d), device=d.device) + take(shift, d))
