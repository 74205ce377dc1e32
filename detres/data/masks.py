"""COCO segmentations to bitmaps, by pycocotools' own rasteriser."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

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
