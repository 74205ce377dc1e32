"""Boundary IoU (Cheng et al., arXiv 2103.16562): overlaps of what lies within a few pixels of the masks' outlines.

The distance is a share of the image's diagonal, and pixels are near in the sense of squares (erosion by 3 x 3, again
and again), as in the authors' code (bowenc0221/boundary-iou-api). Boundary AP ranks a pair by the lesser of mask IoU
and boundary IoU; pairs with a crowd by mask IoU alone.

Legend: D detections, G truths, P pairs, (h, w) size of the image, C columns and H rows of a canvas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco_mask
from torch import Tensor

from detres.evaluation.mask_overlaps import Rle, Runs, bitmap_iou_pairs, decode_runs

PAIRS_AT_ONCE = 2**12
CANVAS_PIXELS = 2**20


def boundary(bitmaps: Tensor, dilation_ratio: float = 0.02) -> Tensor:
    """Pixels (n, h, w) bool of bitmaps (n, h, w) bool that are near to background or to the image's border.

    Near is up to `dilation_ratio` times the diagonal of h x w, rounded, at least 1.
    """
    height, width = bitmaps.shape[1:]
    return _boundary(bitmaps, int(_distance(np.array([height]), np.array([width]), dilation_ratio)[0]))


def bitmap_boundary_iou_pairs(dt_bitmaps: Tensor, gt_bitmaps: Tensor, crowd: Tensor, d: Tensor, g: Tensor,
                              dilation_ratio: float = 0.02) -> tuple[Tensor, Tensor]:
    """The lesser of mask and boundary IoU (P,), and the area of the detections' masks (D,); as `bitmap_iou_pairs`."""
    iou, area = bitmap_iou_pairs(dt_bitmaps, gt_bitmaps, crowd, d, g)
    outlines = (boundary(bitmaps, dilation_ratio) for bitmaps in (dt_bitmaps, gt_bitmaps))
    of_boundary, _ = bitmap_iou_pairs(*outlines, crowd, d, g)
    return torch.where(crowd[g], iou, torch.minimum(iou, of_boundary)), area


def rle_boundary_iou_pairs(dt_rles: Sequence[Rle], gt_rles: Sequence[Rle], crowd: Tensor, d: Tensor, g: Tensor,
                           mask_iou: Tensor, lowest: float, dilation_ratio: float = 0.02) -> Tensor:
    """The lesser of mask and boundary IoU (P,) float64 of masks in compressed run lengths, on the CPU.

    `mask_iou` (P,) is that of `rle_iou_pairs`; where it is below `lowest` it stays, since the lesser is, too.
    Raises ValueError for damaged run lengths.
    """
    result = mask_iou.clone()
    needed = ((mask_iou >= lowest) & (mask_iou > 0) & ~crowd[g]).nonzero()[:, 0]
    for pairs in needed.split(PAIRS_AT_ONCE) if len(needed) else ():
        found, truths = _used(dt_rles, d[pairs].numpy(), "detection"), _used(gt_rles, g[pairs].numpy(), "truth")
        result[pairs] = torch.minimum(result[pairs], torch.from_numpy(_boundary_iou(found, truths, dilation_ratio)))
    return result


def _distance(height: np.ndarray, width: np.ndarray, dilation_ratio: float) -> np.ndarray:
    return np.maximum(np.rint(dilation_ratio * np.sqrt(height**2 + width**2)), 1).astype(np.int64)


def _boundary(bitmaps: Tensor, distance: int) -> Tensor:
    """As `boundary`, of bitmaps (n, C, H), with the distance in pixels."""
    columns, rows = bitmaps.shape[1:]
    inner = _all_in_window(_all_in_window(bitmaps, 2, 2 * distance + 1), 1, 2 * distance + 1)
    result = bitmaps.clone()
    if inner.numel():
        result[:, distance:columns - distance, distance:rows - distance] ^= inner
    return result


def _all_in_window(bitmaps: Tensor, dim: int, window: int) -> Tensor:
    """Whether all of `window` consecutive entries along `dim` are set; shorter by window - 1. Its reach doubles."""
    covered = 1
    while covered < window and bitmaps.shape[dim]:
        step = min(covered, window - covered)
        length = max(0, bitmaps.shape[dim] - step)
        bitmaps = bitmaps.narrow(dim, 0, length) & bitmaps.narrow(dim, bitmaps.shape[dim] - length, length)
        covered += step
    return bitmaps


# From run lengths. Pairs lie side by side on two canvases, detections on one, truths on the other, each pair in columns
# of its own, cut to the box around both masks, with an empty line after it. That line, and the canvas's edges, take the
# place of what is outside: so one erosion of the canvas erodes every mask.


@dataclass(frozen=True)
class _Masks:
    """Masks of pairs, one for each pair."""

    runs: Runs  # of the masks that occur
    boxes: np.ndarray  # (n, 4) int64, x1, y1, x2, y2 around each of them
    row: np.ndarray  # (P,) which one


def _used(rles: Sequence[Rle], rows: np.ndarray, name: str) -> _Masks:
    used, row = np.unique(rows, return_inverse=True)
    chosen = [rles[i] for i in used]
    boxes = coco_mask.toBbox(chosen).astype(np.int64)
    boxes[:, 2:] += boxes[:, :2]
    return _Masks(decode_runs(chosen, name), boxes, row)


def _boundary_iou(found: _Masks, truths: _Masks, dilation_ratio: float) -> np.ndarray:
    """(P,) float64"""
    sizes = found.runs.sizes[found.row]
    assert (sizes == truths.runs.sizes[truths.row]).all(), "where sizes differ, mask IoU is 0 or -1"
    a, b = found.boxes[found.row], truths.boxes[truths.row]
    boxes = np.concatenate([np.minimum(a[:, :2], b[:, :2]), np.maximum(a[:, 2:], b[:, 2:])], 1)
    distance = _distance(*sizes.T, dilation_ratio)
    order = np.lexsort((boxes[:, 3] - boxes[:, 1], distance))
    strokes = [_strokes(masks.runs, masks.row[order]) for masks in (found, truths)]
    boxes, distance, iou = boxes[order], distance[order], np.zeros(len(boxes))
    for pairs in _chunks(boxes, distance):
        size = boxes[pairs, 2:] - boxes[pairs, :2] + 1  # with the empty line
        column = np.cumsum(size[:, 0]) - size[:, 0]
        shape = (int(size[:, 0].sum()), int(size[:, 1].max()))
        outlines = [_boundary(_draw(part, pairs, boxes[pairs, :2], column, shape), int(distance[pairs.start]))
                    for part in strokes]
        a, b, both = (np.add.reduceat(canvas[0].view(torch.uint8).sum(1, dtype=torch.int32).numpy(), column)
                      for canvas in (*outlines, outlines[0] & outlines[1]))
        iou[order[pairs]] = both / np.maximum(a + b - both, 1)
    return iou


def _chunks(boxes: np.ndarray, distance: np.ndarray) -> Iterator[slice]:
    """Consecutive pairs of equal distance and bounded area."""
    part = np.cumsum((boxes[:, 2:] - boxes[:, :2]).prod(1)) // CANVAS_PIXELS
    cuts = np.flatnonzero(np.diff(part) | np.diff(distance)) + 1
    yield from map(slice, [0, *cuts.tolist()], [*cuts.tolist(), len(boxes)])


def _draw(strokes: np.ndarray, pairs: slice, corner: np.ndarray, column: np.ndarray, shape: tuple[int, int]) -> Tensor:
    """Canvas (1, C, H) bool with the masks of `pairs`, from pixels corner (P, 2) of their images on, at column (P,)."""
    owner, x, begin, stop = strokes[:, slice(*np.searchsorted(strokes[0], (pairs.start, pairs.stop)))]
    owner = owner - pairs.start
    place = (column[owner] + x - corner[owner, 0]) * shape[1] - corner[owner, 1]
    toggles = np.zeros(shape[0] * shape[1], np.uint8)
    toggles[place + begin] ^= 1  # apart: runs of no length make one stroke begin where another ends
    toggles[place + stop] ^= 1
    inside = torch.from_numpy(toggles).cumsum(0, dtype=torch.uint8) & 1  # wraps at 256, which is even
    return inside.view(torch.bool).view(1, *shape)


def _strokes(runs: Runs, rows: np.ndarray) -> np.ndarray:
    """The foreground of masks `rows` in pieces of one column (4, S): which of `rows`, x, first y, y after the last."""
    number = runs.number[rows] // 2  # foreground runs
    owner = np.repeat(np.arange(len(rows)), number)
    first = (np.cumsum(runs.number) - runs.number)[rows]
    index = first[owner] + 1 + 2 * _count_up(number)
    before = np.append(0, np.cumsum(runs.lengths, dtype=np.int64))
    start = before[index] - before[first][owner]
    stop = start + runs.lengths[index]
    height = runs.sizes[rows, 0][owner]
    columns = np.where(stop > start, (stop - 1) // height - start // height + 1, 0)
    run = np.repeat(np.arange(len(owner)), columns)
    x = (start // height)[run] + _count_up(columns)
    top = x * height[run]
    return np.stack([owner[run], x, np.maximum(start[run] - top, 0), np.minimum(stop[run] - top, height[run])])


def _count_up(number: np.ndarray) -> np.ndarray:
    """0 .. number[0] - 1, 0 .. number[1] - 1, ..."""
    return np.arange(number.sum()) - np.repeat(np.cumsum(number) - number, number)
