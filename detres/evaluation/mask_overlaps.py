"""Overlaps of pairs of masks: from run lengths on the CPU, from bitmaps on any device; both with pycocotools' bits.

An IoU of masks is a quotient of two pixel counts. Counts are integers, so any exact way to get them gives the same
float64. From run lengths, pairs whose areas are too different to reach the lowest threshold are left out (some three in
four), the others go through pycocotools' C. From bitmaps, the intersections of all detections and truths of an image
are one matrix product.

Legend: D detections, G truths, P pairs, n masks, R runs of all masks, (h, w) size of the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

Rle = dict[str, Any]  # {"size": [h, w], "counts": compressed run lengths, str or bytes}

AREAS_AT_ONCE = 255  # pycocotools 2.0.11 puts the number of masks into a uint8, which numpy 2 refuses above 255
WIDTH_AT_ONCE = 2048  # float16 and TF32 have every integer up to 2048
PIXELS_AT_ONCE = 2**25  # bounds the float temporaries to about 128 MB


def rle_areas(rles: Sequence[Rle]) -> np.ndarray:
    """Pixels (n,) int64 of each mask."""
    areas = [coco_mask.area(list(rles[i:i + AREAS_AT_ONCE])) for i in range(0, len(rles), AREAS_AT_ONCE)]
    return np.concatenate([np.zeros(0, np.int64), *areas]).astype(np.int64)


def rle_iou_pairs(dt_rles: Sequence[Rle], gt_rles: Sequence[Rle], dt_area: Tensor, gt_area: Tensor, crowd: Tensor,
                  group: Tensor, d: Tensor, g: Tensor, lowest: float) -> Tensor:
    """IoU (P,) float64 of masks d (P,) and g (P,) int64, as `maskUtils.iou`; 0 for some pairs below `lowest`.

    `dt_area` (D,) and `gt_area` (G,) are `rle_areas`, not the areas that a file states; `crowd` (G,) bool. `group`
    (G,) int64 is one number for each image and class; pairs of a group should be consecutive, which is quicker. All on
    the CPU. Where the sizes of masks differ the value is -1, or 0, as there.

    The strings must be sound (`decode_runs` tells): pycocotools reads beyond those that are not, or never returns.
    """
    d, g, crowd = d.numpy(), g.numpy(), crowd.numpy()
    iou = np.zeros(len(d))
    kept = np.flatnonzero(_may_reach(dt_area.numpy()[d], gt_area.numpy()[g], crowd[g], lowest))
    part = np.cumsum(np.diff(group.numpy()[g[kept]], prepend=-1) != 0) - 1  # which run of one group
    rows, row = _distinct(part, d[kept])
    columns, column = _distinct(part, g[kept])
    tables = [coco_mask.iou([dt_rles[i] for i in found], [gt_rles[i] for i in truths], crowd[truths])
              for found, truths in zip(rows, columns)]  # (found, truths), column by column
    start = np.cumsum([0, *(table.size for table in tables)])
    height = np.array([len(found) for found in rows], np.int64)
    if len(kept):
        iou[kept] = np.concatenate([table.ravel("F") for table in tables])[start[part] + column * height[part] + row]
    return torch.from_numpy(iou)


def _distinct(part: np.ndarray, index: np.ndarray) -> tuple[list[list[int]], np.ndarray]:
    """The distinct values of `index` (P,) in each part, and where in them each entry is (P,)."""
    base = index.max(initial=0) + 1
    distinct, place = np.unique(part * base + index, return_inverse=True)
    starts = np.searchsorted(distinct, np.arange(part.max(initial=-1) + 1) * base)
    values = (distinct % base).tolist()
    return list(map(values.__getitem__, map(slice, starts, [*starts[1:], None]))), place - starts[part]


def _may_reach(dt_area: np.ndarray, gt_area: np.ndarray, crowd: np.ndarray, lowest: float) -> np.ndarray:
    """(P,) bool: whether the smaller mask inside the larger one has an IoU of at least `lowest`.

    Division rounds monotonously, so a quotient that is below `lowest` here is below it with the true counts, too.
    """
    union = np.where(crowd, dt_area, np.maximum(dt_area, gt_area))
    return np.minimum(dt_area, gt_area) / np.maximum(union, 1) >= lowest


@dataclass(frozen=True)
class Runs:
    """Run lengths of n masks, one after the other: background, foreground, background ... down the columns."""

    lengths: np.ndarray  # (R,) int32
    number: np.ndarray  # (n,) int64, runs of each mask
    sizes: np.ndarray  # (n, 2) int64, height and width


def decode_runs(rles: Sequence[Rle], name: str = "mask") -> Runs:
    """Run lengths from compressed ones; `detres.data.masks.run_lengths` tells how these are made.

    Raises ValueError for the first that is damaged, called `name` and its place in `rles`.
    """
    strings = [code["counts"].encode() if isinstance(code["counts"], str) else code["counts"] for code in rles]
    sizes = np.array([code["size"] for code in rles], np.int64).reshape(-1, 2)
    groups = np.frombuffer(b"0" + b"".join(strings), np.uint8) - np.uint8(ord("0"))  # of 5 bits, and 32 if more follow
    ends = np.flatnonzero((groups & 32) == 0)[1:]
    stops = np.cumsum([len(string) for string in strings], dtype=np.int64)  # places of last characters
    number = np.diff(np.searchsorted(ends, stops, side="right"), prepend=0)
    damaged = (number == 0) | ((groups[stops] & 32) > 0)
    damaged[np.searchsorted(stops, np.flatnonzero(groups > 63))] = True  # characters outside '0'..'o'
    _require(~damaged, rles, sizes, name)
    lengths = _undo_differences(_join_groups(groups, ends), number)
    _require((_sums(lengths < 0, number) == 0) & (_sums(lengths, number) == sizes.prod(1)), rles, sizes, name)
    return Runs(lengths, number, sizes)


def _require(sound: np.ndarray, rles: Sequence[Rle], sizes: np.ndarray, name: str) -> None:
    if not sound.all():
        i = int(sound.argmin())
        raise ValueError(f"run lengths must add up to the {sizes[i, 0]} x {sizes[i, 1]} pixels of the mask, got "
                         f"{rles[i]['counts'][:40]!r} ({name} {i}). The string was cut or changed: encode it again.")


def _join_groups(groups: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The signed numbers (R,) int32 whose last groups of bits, the high ones, are at `ends`."""
    values = groups[ends].astype(np.int32)
    values -= (values & 16) << 1  # the sign
    rows, back = np.flatnonzero(groups[ends - 1] & 32), 1
    while len(rows):
        values[rows] = values[rows] << 5 | groups[ends[rows] - back] & 31
        back += 1
        rows = rows[(groups[ends[rows] - back] & 32) > 0]
    return values


def _undo_differences(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Run lengths: from the fourth on, a value is the difference from the last but one of its mask.

    In two columns, each mask beginning a row, that is a running sum down each column, but for the very first value.
    """
    rows = (number + 1) // 2
    first = np.cumsum(rows) - rows
    place = np.arange(len(values)) + np.repeat(2 * first - (np.cumsum(number) - number), number)
    table = np.zeros((rows.sum(), 2), np.int32)
    table.reshape(-1)[place] = values
    very_first = table[first, 0]
    table[first, 0] = 0
    sums = np.cumsum(table, 0, dtype=np.int32)  # may wrap; differences do not mind
    sums -= np.repeat(sums[first] - table[first], rows, axis=0)
    sums[first, 0] = very_first
    return sums.reshape(-1)[place]


def _sums(values: np.ndarray, number: np.ndarray) -> np.ndarray:
    """Sum (n,) int64 of each mask's values (R,)."""
    running = np.append(0, np.cumsum(values, dtype=np.int64))
    stop = np.cumsum(number)
    return running[stop] - running[stop - number]


def runs_to_bitmaps(lengths: Tensor, number: Tensor, size: tuple[int, int]) -> Tensor:
    """Bitmaps (n, h, w) bool from the run lengths (R,) and number of runs (n,) of `Runs`, on their device.

    Only runs need to travel to a GPU: those of the 37 thousand truths of COCO val are some 20 MB, their bitmaps 11 GB.
    """
    height, width = size
    stop = lengths.cumsum(0)  # masks have as many pixels each, so this runs on from one to the next
    begin = number.cumsum(0) - number
    of_mask = begin.repeat_interleave(number, output_size=len(lengths))
    foreground = ((torch.arange(len(lengths), device=lengths.device) - of_mask) % 2).to(torch.uint8)
    toggles = foreground.new_zeros(len(number) * height * width + 1)
    toggles.index_add_(0, stop - lengths, foreground).index_add_(0, stop, foreground)
    inside = toggles.cumsum(0, dtype=torch.uint8)[:-1] & 1  # wraps at 256, which is even
    return inside.bool().view(len(number), width, height).transpose(1, 2).contiguous()


def bitmap_iou_pairs(dt_bitmaps: Tensor, gt_bitmaps: Tensor, crowd: Tensor, d: Tensor,
                     g: Tensor) -> tuple[Tensor, Tensor]:
    """IoU (P,) float64 of bitmaps (D, h, w) and (G, h, w) bool of one image; and the area (D,) int64 of detections.

    `crowd` is (G,) bool, d and g (P,) int64, all on one device. What it adds on a GPU is memory traffic: an image of
    COCO has 0.3 million pixels and 100 detections, 31 MB of bitmaps, which are read twice, written as float16 (61 MB)
    and read by the product: 185 MB or some 70 us of an H100's 3.3 TB/s at 80 %, 0.35 s for 5,000 images.
    """
    dt_area, gt_area = (bitmaps.flatten(1).sum(1) for bitmaps in (dt_bitmaps, gt_bitmaps))
    chunk = max(1, PIXELS_AT_ONCE // dt_bitmaps[0:1].numel() if len(dt_bitmaps) else 1)
    counts = torch.cat([torch.cat([_intersections(a, b) for b in gt_bitmaps.split(chunk)], 1)
                        for a in dt_bitmaps.split(chunk)])  # (D, G)
    intersection = counts[d, g]
    union = torch.where(crowd[g], dt_area[d], dt_area[d] + gt_area[g] - intersection)
    return intersection.double() / union.clamp(min=1).double(), dt_area


def _intersections(a: Tensor, b: Tensor) -> Tensor:
    """Common pixels (A, B) int64 of bitmaps (A, h, w) and (B, h, w).

    A product for each row of the image, so that no sum exceeds the width. Up to 2048, any order of adding and any
    precision that torch.backends may allow (TF32, float16 reductions) is exact; autocast is not, to bfloat16.
    """
    kind = torch.float16 if a.is_cuda else torch.float32  # half the traffic there, no fast product here
    counts = torch.zeros(len(a), len(b), dtype=torch.int64, device=a.device)
    with torch.autocast(a.device.type, enabled=False):
        for x, y in zip(a.split(WIDTH_AT_ONCE, 2), b.split(WIDTH_AT_ONCE, 2)):
            counts += (x.to(kind).transpose(0, 1) @ y.to(kind).permute(1, 2, 0)).sum(0, dtype=torch.int64)
    return counts
