"""Whether boxes, areas and masks of an annotation belong together; outlines that cross themselves.

What makes training impossible is found by the readers; this is what it would silently learn from, and takes longer.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from detres.data.dataset import Annotation, Dataset, ImageRecord
from detres.data.masks import compressed, mask_area
from detres.data.problems import Problem, Problems
from detres.progress import track

CHUNK = 2000  # images a process checks at a time
FEW = 20000  # annotations that are checked before other processes have started

# COCO's own files stay below these (153 images of train2017, 79 of val2017).
AREA_SHARE, AREA_PIXELS = 0.1, 10.0  # that an area may differ by
BOX_SHARE, BOX_PIXELS = 0.1, 3.0  # that a side of a box may differ by, as share of the box
FLAT = 1e-6  # square pixels: three points on a line, but for rounding


@dataclass(frozen=True)
class Finding:
    record: int
    annotation: int  # of the record
    field: str
    value: Any
    reason: str
    kind: str
    better: Any = None


def check_geometry(problems: Problems, workers: int | None = None) -> None:
    """Adds what is found in the data sets that were read into `problems`; in several processes if there is much."""
    for dataset, locate in problems.located:
        for finding in _findings(dataset, workers):
            record = dataset.records[finding.record]
            file, annotation_id, place = locate(record.annotations[finding.annotation])
            problems.found.append(Problem(file, record.id, annotation_id, finding.field, finding.value, finding.reason,
                                          finding.kind, place=place, better=finding.better))


_dataset: Dataset | None = None  # that forked processes look at, which need no copy


def _findings(dataset: Dataset, workers: int | None) -> Iterator[Finding]:
    global _dataset
    starts = range(0, len(dataset.records), CHUNK)
    total = len(dataset.records)
    workers = min(workers or len(os.sched_getaffinity(0)), len(starts))
    if workers < 2 or dataset.records.counts().sum() < FEW:
        for start in starts:
            yield from _check(dataset.records[start:start + CHUNK], start)
        return
    _dataset, left = dataset, iter(starts)

    def size(_: object) -> int:
        return min(CHUNK, total - next(left))

    try:
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            chunks = pool.imap(_check_from, starts)
            for found in track(chunks, total, f"Masks of {dataset.name}", size):
                yield from found
    finally:
        _dataset = None


def _check_from(start: int) -> list[Finding]:
    return _check(_dataset.records[start:start + CHUNK], start)


Item = tuple[int, int, ImageRecord, Annotation]  # place of the record and of the annotation in it


def _check(records: Sequence[ImageRecord], start: int) -> list[Finding]:
    items = [(i, j, record, item) for i, record in enumerate(records, start)
             for j, item in enumerate(record.annotations)]
    boxes = [row for row in items if row[3].segmentation is None and not row[3].crowd]
    drawn = [row for row in items if isinstance(row[3].segmentation, list)]
    coded = [row for row in items if isinstance(row[3].segmentation, dict) and not row[3].crowd]  # COCO's are loose
    return [*(_check_areas_of_boxes(boxes) if boxes else ()), *(_check_polygons(drawn) if drawn else ()),
            *(_check_codes(coded) if coded else ())]


def _check_areas_of_boxes(items: list[Item]) -> Iterator[Finding]:
    """Without a mask the area may be that of one, so it is only too large for its box, or zero."""
    boxes = np.array([row[3].box for row in items]).reshape(-1, 4)
    areas = np.array([row[3].area for row in items], float)
    own = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    for k in np.flatnonzero((areas > own * (1 + AREA_SHARE) + AREA_PIXELS) | (areas <= 0)).tolist():
        yield _finding(items[k], "area", items[k][3].area, f"must be at most that of the box, {own[k]:g} px",
                       "area_differs", round(float(own[k]), 2))


def _check_codes(items: list[Item]) -> Iterator[Finding]:
    codes = [compressed(row[3].segmentation, row[2].height, row[2].width) for row in items]
    extents = coco_mask.toBbox(codes).astype(float)
    extents[:, 2:] += extents[:, :2]
    areas = coco_mask.area(codes).astype(float)
    yield from _compare(items, areas, extents, lambda k: int(areas[k]))


def _check_polygons(items: list[Item]) -> Iterator[Finding]:
    polygons = [polygon for row in items for polygon in row[3].segmentation]
    counts = np.array([len(row[3].segmentation) for row in items])  # polygons of each item
    first = np.cumsum(counts) - counts
    points, lengths = np.frombuffer(b"".join(polygons)).reshape(-1, 2), np.fromiter(map(len, polygons), int) // 2
    starts = np.cumsum(lengths) - lengths
    areas = np.add.reduceat(_polygon_areas(points, starts, lengths), first)
    low, high = (function.reduceat(function.reduceat(points, starts), first) for function in (np.minimum, np.maximum))
    yield from _compare(items, areas, np.concatenate([low, high], 1), lambda k: mask_area(
        items[k][3].segmentation, items[k][2].height, items[k][2].width))
    owners = np.repeat(np.arange(len(items)), counts)
    for row in np.flatnonzero(_crossings(points, starts, lengths)).tolist():
        k = int(owners[row])
        yield _finding(items[k], f"segmentation[{row - first[k]}]", polygons[row], "must not cross itself",
                       "polygon_crosses")


def _compare(items: list[Item], areas: np.ndarray, extents: np.ndarray, exact) -> Iterator[Finding]:
    """Areas and boxes with those of the masks, of which `areas` (A,) and `extents` (A, 4) xyxy are close to what
    `exact(row)` counts in pixels."""
    stated = np.array([row[3].area for row in items], float)
    limits = np.array([(row[2].width, row[2].height) * 2 for row in items], float)
    boxes = np.clip([row[3].box for row in items], 0, limits)
    extents = np.clip(extents, 0, limits)
    sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
    off = (np.abs(boxes - extents) > BOX_SHARE * sides + BOX_PIXELS).any(1)
    apart = _differ(stated, areas)
    for k in np.flatnonzero(off | apart | (areas < 1)).tolist():
        pixels = exact(k)
        x1, y1, x2, y2 = extents[k].round(2).tolist()
        if pixels == 0:
            yield _finding(items[k], "segmentation", 0, "must have one pixel or more inside", "mask_empty")
            continue
        if off[k]:
            better = [x1, y1, round(x2 - x1, 2), round(y2 - y1, 2)]
            yield _finding(items[k], "bbox", items[k][3].bbox, f"must be the extent of the mask, {better}",
                           "box_mask_differs", better)
        if apart[k] and _differ(stated[k], pixels):
            yield _finding(items[k], "area", items[k][3].area, f"must be that of the mask, {pixels} px", "area_differs",
                           pixels)


def _differ(stated: np.ndarray, area: np.ndarray) -> np.ndarray:
    return np.abs(stated - area) > AREA_SHARE * np.maximum(stated, area) + AREA_PIXELS


def _finding(row: Item, *rest: Any) -> Finding:
    return Finding(row[0], row[1], *rest)


# Polygons: points (P, 2) of all, of which one begins at each of `starts` and has `lengths` points


def _polygon_areas(points: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """(Q,): Gauss's formula, about the first point of each, which keeps the rounding small."""
    local = points - np.repeat(points[starts], lengths, 0)
    x, y = local.T
    following = np.arange(1, len(points) + 1)
    following[starts + lengths - 1] = starts
    return np.abs(np.add.reduceat(x * y[following] - x[following] * y, starts)) / 2


def _crossings(points: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Whether the outline of each crosses itself, (Q,) bool. Groups of similar length are padded to the longest: with
    the last point, so that what is added are edges without length, which cross nothing."""
    crossed = np.zeros(len(starts), bool)
    order = np.argsort(lengths)
    order = order[lengths[order] > 3]
    while len(order):
        n = lengths[order[-1]]
        group = order[max(np.searchsorted(lengths[order], 0.8 * n), len(order) - int(2e6 / n**2) - 1):]
        index = starts[group, None] + np.minimum(np.arange(n), lengths[group, None] - 1)
        crossed[group] = _cross(points[index])
        order = order[:-len(group)]
    return crossed


def _cross(outlines: np.ndarray) -> np.ndarray:
    """(B, n, 2) -> (B,). Two edges cross if the ends of each are on different sides of the other."""
    origin = outlines - outlines[:, :1]
    edges = np.roll(origin, -1, 1) - origin
    x, y = origin[..., 0], origin[..., 1]
    lines = np.stack([edges[..., 0], -edges[..., 1], edges[..., 1] * x - edges[..., 0] * y], 2)  # (B, n, 3)
    side = lines @ np.stack([y, x, np.ones_like(x)], 1)  # (B, n, n): twice the area of edge and point
    left, right = side > FLAT, side < -FLAT
    apart = left & np.roll(right, -1, 2) | right & np.roll(left, -1, 2)
    return (apart & apart.transpose(0, 2, 1)).any((1, 2))
