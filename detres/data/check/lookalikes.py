"""Pictures that look the same: resized, compressed again, brightened, or the next frame of a video.

A picture is a thumbnail, 16 x 16 grey. Two look the same if (1) the signs of the differences between neighbours in the
thumbnail at 8 x 8 differ in few of 112 places (a difference hash, found for all pairs by XOR and counting bits), and
(2) the thumbnails correlate. Either alone takes a plane in the sky for another; docs/decisions.md has the measurements.

Legend: N pictures.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 16  # of a thumbnail
BITS = 12  # that hashes may differ in
CORRELATION = 0.95
CONTRAST = 8  # levels between darkest and brightest, under which nothing tells pictures apart
ROWS, COLUMNS = 64, 8192  # a block of pairs: 4 MB of hashes


def thumbnail(pixels: np.ndarray) -> np.ndarray:
    """Of an image (H, W, 3) uint8: (SIDE, SIDE) uint8."""
    return np.asarray(Image.fromarray(pixels).convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def find_lookalikes(thumbnails: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each picture the first before it that looks the same, (N,) int64, -1 for none: in its group, and in another.

    thumbnails: (N, SIDE, SIDE) uint8; groups: (N,), such as the numbers of their splits.
    """
    usable = np.flatnonzero(np.ptp(thumbnails, axis=(1, 2)) >= CONTRAST)
    found = np.full((2, len(thumbnails)), -1)
    found[:, usable] = _first(thumbnails[usable], groups[usable])
    found[found >= 0] = usable[found[found >= 0]]
    return found[0], found[1]


def _first(thumbnails: np.ndarray, groups: np.ndarray) -> np.ndarray:
    count = len(thumbnails)
    hashes, found = _hashes(thumbnails), np.full((2, count), -1)
    changes = np.flatnonzero(groups != groups[:1])
    other = np.where(groups == groups[:1], changes[0] if len(changes) else count, 0)  # first place of another group
    wanted = np.stack([np.ones(count, bool), other < np.arange(count)])
    for top in range(0, count, ROWS):
        rows = np.arange(top, min(top + ROWS, count))
        for left in range(0, rows[-1], COLUMNS):
            later, earlier, alike = _alike(thumbnails, hashes, rows, np.arange(left, min(left + COLUMNS, rows[-1])))
            own = groups[later, None] == groups[earlier]
            for place, pairs in enumerate((alike & own, alike & ~own)):
                row, column = np.nonzero(pairs & wanted[place, later, None])
                row, first = np.unique(row, return_index=True)
                found[place, later[row]] = earlier[column[first]]
                wanted[place, later[row]] = False
            rows = rows[wanted[:, rows].any(0)]
            if not len(rows):
                break
    return found


def _hashes(thumbnails: np.ndarray) -> np.ndarray:
    """(2, N) uint64."""
    small = thumbnails.reshape(-1, SIDE // 2, 2, SIDE // 2, 2).sum((2, 4), dtype=np.int32)
    bits = np.zeros((len(small), 128), bool)
    bits[:, :56] = (small[:, :, 1:] > small[:, :, :-1]).reshape(-1, 56)
    bits[:, 64:120] = (small[:, 1:] > small[:, :-1]).reshape(-1, 56)
    return np.packbits(bits, axis=1).view(np.uint64).T.copy()


def _alike(thumbnails: np.ndarray, hashes: np.ndarray, rows: np.ndarray, columns: np.ndarray
           ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Those of the rows (R,) and columns (C,) that may be in a pair, and which are, (R, C)."""
    near = np.bitwise_count(hashes[0, rows, None] ^ hashes[0, columns]) <= BITS
    rows, columns = rows[near.any(1)], columns[near.any(0)]
    differ = np.bitwise_count(hashes[:, rows, None] ^ hashes[:, None, columns]).sum(0)
    correlation = _normalized(thumbnails[rows]) @ _normalized(thumbnails[columns]).T
    return rows, columns, (differ <= BITS) & (correlation >= CORRELATION) & (columns < rows[:, None])


def _normalized(thumbnails: np.ndarray) -> np.ndarray:
    flat = thumbnails.reshape(-1, SIDE * SIDE).astype(np.float32)
    flat -= flat.mean(1, keepdims=True)
    return flat / np.linalg.norm(flat, axis=1, keepdims=True)
