"""COCO segmentations to bitmaps, by pycocotools' own rasteriser."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
from pycocotools import mask as coco_mask

_COMPRESSED = re.compile("(?:[P-o]{0,7}[0-O])+")


def rasterize(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> np.ndarray:
    """(H, W) uint8, 1 inside; of several polygons the union. An RLE must be sound, as `run_lengths` tells."""
    return coco_mask.decode(compressed(segmentation, height, width))


def mask_area(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> int:
    """Pixels inside."""
    return int(coco_mask.area(compressed(segmentation, height, width)))


def compressed(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    """As compressed run lengths, {"size": [height, width], "counts": ...}."""
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
