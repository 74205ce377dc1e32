"""COCO segmentations to bitmaps, by pycocotools' own rasteriser.

Legend: G objects; (H, W) the image; (h, w) the part of it that an object reaches.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

from detres.data.frame import Frame, Framed
from detres.data.images import read_image

_COMPRESSED = re.compile("(?:[P-o]{0,7}[0-O])+")


@dataclass(frozen=True, slots=True)
class PNGSegment:
    """A segmentation that is a segment of a PNG in COCO's panoptic format; the file is read when it is asked for."""

    path: Path
    id: int


_last = threading.local()


def read_segment_ids(path: Path) -> np.ndarray:
    """Segment ids (H, W) int32 of a PNG in COCO's panoptic format, R + 256 G + 65536 B. Raises ImageError."""
    red, green, blue = np.moveaxis(read_image(path), 2, 0).astype(np.int32)
    return red + (green << 8) + (blue << 16)


def last_segment_ids(path: Path) -> np.ndarray:
    """As `read_segment_ids`, not to be written to: each thread keeps the last, as the segments of an image are asked
    for one after another."""
    if getattr(_last, "path", None) != path:
        _last.ids = read_segment_ids(path)
        _last.path = path
    return _last.ids


def rasterize(segmentation: list[Any] | dict[str, Any] | PNGSegment, height: int, width: int) -> np.ndarray:
    """(H, W) uint8, 1 inside; of several polygons the union. An RLE must be sound, as `run_lengths` tells."""
    if isinstance(segmentation, PNGSegment):
        return (last_segment_ids(segmentation.path) == segmentation.id).view(np.uint8)
    return coco_mask.decode(compressed(segmentation, height, width))


def rasterize_part(segmentation: list[Any] | dict[str, Any] | PNGSegment | None, height: int, width: int,
                   ) -> tuple[np.ndarray, int]:
    """`rasterize`, but only the rows and columns that the object reaches, (h, w), and the first column; the first row
    is 0. None has no pixels.

    A bitmap of the whole image takes ten times as long as the run lengths of a polygon. Moved to the origin, a polygon
    would get other pixels: pycocotools rounds points on its edges, in floating point, where they are.
    """
    if isinstance(segmentation, PNGSegment):
        return rasterize(segmentation, height, width), 0
    if segmentation is None:
        return np.zeros((height, 0), np.uint8), width
    if isinstance(segmentation, list):
        height, width = (max(1, min(int(max(max(polygon[axis::2]) for polygon in segmentation)) + 2, length))
                         for axis, length in ((1, height), (0, width)))
    code = compressed(segmentation, height, width)
    column, counts = _without_empty_columns(code["counts"], height)
    if column == width:
        return np.zeros((height, 0), np.uint8), column
    return coco_mask.decode({"size": [height, width - column], "counts": counts}), column


def _without_empty_columns(counts: str | bytes, height: int) -> tuple[int, bytes]:
    """How many columns there are before the object, and the compressed run lengths without them.

    The first run (background) is a number in groups of 5 bits, as `run_lengths` tells; no other depends on it.
    """
    counts = counts.encode() if isinstance(counts, str) else counts
    length = next(place for place, character in enumerate(counts) if character - 48 < 32) + 1
    run = sum((character - 48 & 31) << 5 * place for place, character in enumerate(counts[:length]))
    column, run = divmod(run, height)
    first = bytearray()
    while run > 15:
        first.append(48 + 32 + (run & 31))
        run >>= 5
    return column, bytes([*first, 48 + run]) + counts[length:]


@dataclass(frozen=True)
class MaskViews(Framed):
    """Masks that are drawn when they are wanted, at once in their last frame; a sequence of bitmaps (H, W) uint8."""

    segmentations: tuple[Any, ...]  # G
    frame: Frame

    @property
    def shape(self) -> tuple[int, int, int]:
        return len(self.segmentations), *self.frame.size

    def __len__(self) -> int:
        return len(self.segmentations)

    def __getitem__(self, rows: Any) -> Any:
        """The bitmap of one row; of several (slice, numbers or bool) views."""
        if isinstance(rows, (int, np.integer)):
            return replace(self, segmentations=(self.segmentations[rows],)).bitmaps()[0]
        chosen = np.arange(len(self))[rows]
        return replace(self, segmentations=tuple(self.segmentations[row] for row in chosen))

    def any(self, axes: tuple[int, int]) -> np.ndarray:
        """(G,) bool: has pixels."""
        assert axes == (1, 2)
        return np.array([pixels.any() for *_, pixels in self._drawn()], bool)

    def draw(self, out: np.ndarray) -> None:
        """Into zeros (G, H or more, W or more) uint8."""
        for canvas, (rows, columns, pixels) in zip(out, self._drawn()):
            canvas[rows, columns] = pixels

    def bitmaps(self) -> np.ndarray:
        """(G, H, W) uint8."""
        out = np.zeros(self.shape, np.uint8)
        self.draw(out)
        return out

    def _drawn(self) -> Iterator[tuple[slice, slice, np.ndarray]]:
        """Of each mask the rows and columns that it may reach, and the pixels there."""
        rows, columns = self.frame.nearest()
        for segmentation in self.segmentations:
            part, first = rasterize_part(segmentation, *self.frame.source)
            y, x = _inside(rows, part.shape[0]), _inside(columns - first, part.shape[1])
            # pycocotools' bitmaps have columns one after another: these are gathered first, then the rows.
            yield y, x, part.T[columns[x] - first].T[rows[y]]


def whole_masks(segmentations: Sequence[Any], height: int, width: int) -> MaskViews:
    return MaskViews(tuple(segmentations), Frame.whole((height, width)))


def _inside(places: np.ndarray, length: int) -> slice:
    """Where places, which go up or down, are in 0..length - 1."""
    found = np.flatnonzero((places >= 0) & (places < length))
    return slice(found[0], found[-1] + 1) if len(found) else slice(0, 0)


def mask_area(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> int:
    """Pixels inside."""
    return int(coco_mask.area(compressed(segmentation, height, width)))


def compressed(segmentation: list[Any] | dict[str, Any] | PNGSegment, height: int, width: int) -> dict[str, Any]:
    """As compressed run lengths, {"size": [height, width], "counts": ...}."""
    if isinstance(segmentation, PNGSegment):
        return coco_mask.encode(np.asfortranarray(rasterize(segmentation, height, width)))
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def encode_masks(masks: torch.Tensor) -> list[dict[str, Any]]:
    """Bitmaps (D, h, w) bool, on any device, as compressed run lengths."""
    # pycocotools reads (h, w, D) in Fortran order, which in memory is (D, w, h): transpose where the masks are.
    columns = masks.transpose(1, 2).contiguous().view(torch.uint8).cpu().numpy()
    return [{"size": code["size"], "counts": code["counts"].decode()} for code in
            coco_mask.encode(columns.transpose(2, 1, 0))]


def run_lengths(compressed: str) -> list[int] | None:
    """The counts of a compressed RLE; None if it is none.

    Each is a signed number in groups of 5 bits, low ones first, as characters from '0' on, the upper 32 of which say
    that more follows; from the fourth on it is the difference from the last but one. pycocotools does not check:
    of a damaged string it reads and writes beyond its memory, and what too few counts leave open is not even zero.
    """
    if not _COMPRESSED.fullmatch(compressed):
        return None
    counts: list[int] = []
    value = shift = 0
    for character in compressed.encode("ascii"):
        bits = character - 48
        value |= (bits & 31) << shift
        shift += 5
        if bits < 32:
            value -= (bits & 16) << (shift - 4)  # the sign
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    return counts


def box_of(segmentation: list[Any] | dict[str, Any]) -> tuple[float, float, float, float]:
    """xyxy that encloses polygons, or the pixels of an RLE."""
    if isinstance(segmentation, list):
        xs, ys = ([value for polygon in segmentation for value in polygon[start::2]] for start in (0, 1))
        return min(xs), min(ys), max(xs), max(ys)
    x, y, w, h = coco_mask.toBbox(compressed(segmentation, *segmentation["size"])).tolist()
    return x, y, x + w, y + h


def run_code(inside: np.ndarray, top: int, left: int, height: int, width: int) -> dict[str, Any]:
    """The RLE, with `counts` a string, of an image of that size whose pixels are set where a window (h, w) bool, of
    which the first pixel is at (top, left), says so."""
    steps = np.diff(np.pad(inside.T, ((0, 0), (1, 1))).view(np.int8), axis=1)  # where a run of a column begins and ends
    column, row = np.nonzero(steps)
    edges = (column + left) * height + row + top  # places in the order of the columns: rising
    meet = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1  # runs that go on in the next column
    edges = np.delete(edges, np.concatenate([meet, meet + 1]))
    counts = np.diff(edges, prepend=0, append=height * width).tolist()
    counts = counts if counts[-1] else counts[:-1]  # as pycocotools encodes a mask that ends with the image
    code = coco_mask.frPyObjects({"size": [height, width], "counts": counts}, height, width)
    return {"size": [height, width], "counts": code["counts"].decode()}
