"""COCO segmentations to bitmaps, by pycocotools' own rasteriser."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as coco_mask


def rasterize(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> np.ndarray:
    """(H, W) uint8, 1 inside; of several polygons the union. Raises ValueError for an RLE that is damaged."""
    try:
        return coco_mask.decode(_rle(segmentation, height, width))
    except Exception as error:
        raise ValueError(f"segmentation must be a mask of {height} x {width} pixels, got {error}. Correct it.") from None


def mask_area(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> int:
    """Pixels inside."""
    return int(coco_mask.area(_rle(segmentation, height, width)))


def _rle(segmentation: list[Any] | dict[str, Any], height: int, width: int) -> dict[str, Any]:
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation
