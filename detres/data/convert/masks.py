"""Masks between polygons, run lengths and pixels.

Run lengths become polygons along the edges of pixels, which pycocotools rasterises to the same pixels again. A polygon
list is a union, so a hole is no polygon of its own: it is joined to its outline by a line there and back, which bounds
nothing.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

import cv2
import numpy as np

from detres.data.masks import PNGSegment, compressed, rasterize

Segmentation = list[Any] | dict[str, Any] | PNGSegment


def to_rle(segmentation: Segmentation, height: int, width: int) -> dict[str, Any]:
    """As {"size": [height, width], "counts": a string}."""
    if isinstance(segmentation, dict) and isinstance(segmentation["counts"], str):
        return segmentation
    code = compressed(segmentation, height, width)
    counts = code["counts"]
    return {"size": [height, width], "counts": counts.decode() if isinstance(counts, bytes) else counts}


def to_polygons(segmentation: Segmentation, height: int, width: int) -> list[array]:
    """Polygons stay as they are; none of an empty mask."""
    if isinstance(segmentation, list):
        return segmentation
    inside = rasterize(segmentation, height, width)
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    if not len(rows):
        return []
    top, left = rows[0], columns[0]
    loops = outlines(inside[top:rows[-1] + 1, left:columns[-1] + 1])
    return [array("d", (loop + (left, top)).astype(float).ravel()) for loop in loops]


def outlines(inside: np.ndarray) -> list[np.ndarray]:
    """Polygons (P, 2), x and y, along the edges of the pixels that are set in (H, W)."""
    loops = _loops(inside)
    _, component = cv2.connectedComponents(inside, connectivity=8)
    whole: dict[int, list[np.ndarray]] = {}
    has_hole: set[int] = set()
    for loop in loops:
        x, y = loop[np.lexsort((loop[:, 0], loop[:, 1]))[0]]  # its upper left corner: below and right of it is inside
        hole = not inside[y, x]
        number = int(component[y - 1, x] if hole else component[y, x])
        whole.setdefault(number, []).append(loop)
        has_hole |= {number} if hole else set()
    return [polygon for number, own in whole.items() for polygon in ([joined(own)] if number in has_hole else own)]


def _loops(inside: np.ndarray) -> list[np.ndarray]:
    """Closed lines between pixels that are set and others, as corners (P, 2): all of them, each once.

    Corners in a row pair up to edges, as do those in a column; each is on one edge of either kind, so following them in
    turn leads round. Where two pixels touch at a corner alone, it counts twice.
    """
    padded = np.pad(inside.astype(np.int8), 1)
    steps = np.diff(np.diff(padded, axis=0), axis=1)  # not 0 at corners, 2 or -2 where pixels touch
    y, x = np.nonzero(steps)
    twice = np.abs(steps[y, x])
    y, x = np.repeat(y, twice), np.repeat(x, twice)  # in order of rows: neighbours pair up
    by_column = np.lexsort((y, x))
    mate = np.empty(len(x), np.int64)
    mate[by_column[::2]], mate[by_column[1::2]] = by_column[1::2], by_column[::2]
    mates, left, loops = mate.tolist(), [True] * len(x), []
    for start in range(0, len(x), 2):
        corner, loop = start, []
        while left[corner]:
            other = corner ^ 1  # of the same row
            left[corner] = left[other] = False
            loop += (corner, other)
            corner = mates[other]
        if loop:
            loops.append(np.stack([x[loop], y[loop]], 1))
    return loops


def joined(loops: Sequence[np.ndarray]) -> np.ndarray:
    """One polygon (P, 2) of several, by lines from the first corner of each to that of the first, and back. Where it is
    filled, pixels in an even number of them are outside."""
    if len(loops) == 1:
        return loops[0]
    first = loops[0][:1]
    return np.concatenate([loops[0], *(part for loop in loops[1:] for part in (first, loop, loop[:1]))])
