"""Whether a data set's boxes are in another layout than its format has: seen of all boxes together."""

from __future__ import annotations

from typing import Literal

import numpy as np

Layout = Literal["xywh", "xyxy", "cxcywh"]  # COCO; VOC; YOLO, where the image is 1 by 1

NEARLY = 0.99  # of the boxes must fit the other layout
MANY = 0.2  # of them must not fit their own: corners read as sizes reach past the image for most of them
FEW = 3  # that make a pattern


def wrong_layout(boxes: np.ndarray, sizes: np.ndarray, stated: Layout) -> str | None:
    """The kind of problem if boxes (A, 4), on images of `sizes` (A, 2) height and width, are evidently not `stated`."""
    known = np.isfinite(boxes).all(1) & np.isfinite(sizes).all(1)
    first, second, limits = boxes[known, :2], boxes[known, 2:], sizes[known, ::-1]
    if not len(first):
        return None
    inside_one = ((first >= 0) & (second > 0) & (np.maximum(first, second) <= 1)).all(1).mean() >= NEARLY
    if stated != "cxcywh" and inside_one and limits.min() > 2:
        return "boxes_normalised"
    if stated == "cxcywh" and (np.maximum(first, second).max(1) > 2).mean() > 0.5:
        return "boxes_in_pixels"
    slack = 0.01 if stated == "cxcywh" else 1.0
    corners = ((second > first) & (first >= -slack) & (second <= limits + slack)).all(1)
    start = first - second / 2 if stated == "cxcywh" else first
    sides = ((second > 0) & (start >= -slack) & (start + second <= limits + slack)).all(1)
    misfits, other = ((second < first).any(1), sides) if stated == "xyxy" else (~sides, corners)
    if other.mean() < NEARLY or misfits.mean() < MANY or misfits.sum() < FEW:
        return None
    return "boxes_xywh" if stated == "xyxy" else "boxes_xyxy"


REASONS = {
    "boxes_xyxy": "must be {layout} (the values are corners, x1, y1, x2, y2, of {count} boxes)",
    "boxes_xywh": "must be {layout} (the values are x, y, width, height, of {count} boxes)",
    "boxes_normalised": "must be in pixels (the values are fractions of the image, of {count} boxes)",
    "boxes_in_pixels": "must be fractions of the image (the values are pixels, of {count} boxes)",
}
NAMES = {"xywh": "x, y, width, height", "xyxy": "corners, x1, y1, x2, y2", "cxcywh": "centre x, y, width, height"}
