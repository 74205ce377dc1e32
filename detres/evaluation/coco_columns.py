"""What COCO's and LVIS' files hold, as columns.

Legend: N images, K categories, G annotations, D detections, J keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from typing import Any, TypedDict, TypeVar

import numpy as np

Id = int | float | str  # some programs write 7 as 7.0; Pascal VOC's images are named


class Rle(TypedDict):
    size: tuple[int, int]  # height, width
    counts: str | list[int]


Segmentation = list[list[float]] | Rle  # polygons x1, y1, x2, y2 ..., or a mask's run lengths


@dataclass(frozen=True)
class Images:
    ids: np.ndarray  # (N,) int64, or strings
    height: np.ndarray  # (N,) int64, 0 where the file does not say
    width: np.ndarray  # (N,) int64
    neg_category_ids: list[list[Id]] | None  # LVIS: classes known to be absent
    not_exhaustive_category_ids: list[list[Id]] | None  # LVIS: classes of which not every object is annotated


@dataclass(frozen=True)
class Categories:
    ids: np.ndarray  # (K,) int64, or strings
    names: list[str]
    frequency: list[str] | None  # LVIS: r, c, f for rare, common, frequent


Columns = TypeVar("Columns", bound="_Columns")


class _Columns:
    def select(self: Columns, rows: np.ndarray) -> Columns:
        """The entries at `rows`, indices or bool of all entries."""
        indices = np.flatnonzero(rows) if rows.dtype == bool else rows
        chosen: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                chosen[field.name] = value[indices]
            elif isinstance(value, list):
                chosen[field.name] = [value[i] for i in indices]
        return replace(self, **chosen)


@dataclass(frozen=True)
class TruthFile(_Columns):
    """Annotations in the order of the file; NaN where a number is absent."""

    path: str
    images: Images
    categories: Categories
    ids: np.ndarray  # (G,) int64, or strings
    image_ids: np.ndarray  # (G,) int64, or strings
    category_ids: np.ndarray  # (G,) int64, or strings
    boxes_xywh: np.ndarray  # (G, 4) float64
    area: np.ndarray  # (G,) float64
    crowd: np.ndarray  # (G,) bool
    ignore: np.ndarray  # (G,) bool, the field of that name, which pycocotools overwrites with `crowd`
    num_keypoints: np.ndarray  # (G,) int64, -1 where neither it nor keypoints are read
    keypoints: np.ndarray | None  # (G, 3J) float64; None if not asked for, or if there are none
    segmentation: list[Segmentation | None] | None  # G; None if not asked for


@dataclass(frozen=True)
class ResultsFile(_Columns):
    """Detections in the order of the file, with boxes and areas as pycocotools' `loadRes` sets them.

    If the first entry has a box, all have, and areas are those of boxes, also where there are masks; else boxes and
    areas are those of masks; else those of the smallest box around all keypoints.
    """

    path: str
    image_ids: np.ndarray  # (D,) int64, or strings
    category_ids: np.ndarray  # (D,) int64, or strings
    boxes_xywh: np.ndarray  # (D, 4) float64
    area: np.ndarray  # (D,) float64
    scores: np.ndarray  # (D,) float64
    keypoints: np.ndarray | None  # (D, 3J) float64; None if not asked for, or if there are none
    segmentation: list[Segmentation | None] | None  # D; None if not asked for


def joined(parts: Sequence[ResultsFile]) -> ResultsFile:
    """One after the other. Raises ValueError if ids are numbers here and strings there, or some lack a column."""
    return ResultsFile(parts[0].path, *(_join([getattr(part, field.name) for part in parts])
                                        for field in fields(ResultsFile)[1:]))


def _join(values: list[Any]) -> Any:
    kinds = {value.dtype.kind if isinstance(value, np.ndarray) else type(value) for value in values}
    if len(kinds) > 1:
        raise ValueError(f"parts must have the same columns, got {kinds}")
    if values[0] is None:
        return None
    return list(chain.from_iterable(values)) if isinstance(values[0], list) else np.concatenate(values)
