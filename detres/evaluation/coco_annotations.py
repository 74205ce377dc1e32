"""Lists of annotations, as pycocotools holds them, to the columns that the engine takes.

Legend: n annotations, G truths, D detections, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain, repeat
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import Params
from torch import Tensor

from detres.evaluation.flat import Found, Truths
from detres.evaluation.overlaps import Overlaps, box_overlaps, oks_pairs

Annotation = dict[str, Any]


@dataclass(frozen=True)
class Rows:
    """Annotations (n) of the chosen images and classes, image by image, each image's as pycocotools sees them."""

    annotations: list[Annotation]
    image: Tensor  # (n,) int64
    label: Tensor  # (n,) int64, 0 without categories

    def column(self, name: str) -> list[Any]:
        """Raises ValueError if an annotation lacks it."""
        try:
            return list(map(itemgetter(name), self.annotations))
        except KeyError:
            lacking = next(item for item in self.annotations if name not in item)
            raise ValueError(f"annotations must have `{name}`, got only {', '.join(lacking)} "
                             f"({_place(lacking)}). {_FIXES.get(name, 'Add it.')}") from None

    def numbers(self, name: str, each: int | None = None) -> Tensor:
        """Column (n,) float64; for a column of lists, with `each` as their common length, (n, each)."""
        values = self.column(name)
        lengths = list(map(len, values)) if each else []
        if lengths.count(each) < len(lengths):
            item = next(item for item in self.annotations if len(item[name]) != each)
            raise ValueError(f"`{name}` must be {each} numbers, got {item[name]} ({_place(item)}). Correct the file.")
        width = each or 1
        flat = chain.from_iterable(values) if each else values
        result = np.fromiter(flat, np.float64, len(values) * width).reshape(len(values), width)
        finite = np.isfinite(result).all(1)
        if not finite.all():
            item = self.annotations[int(finite.argmin())]
            raise ValueError(f"`{name}` must be finite, got {item[name]} ({_place(item)}). Did training diverge?")
        return torch.from_numpy(result if each else result[:, 0])


_FIXES = {"score": "Is this the ground truth instead of results?", "area": "Results get it from loadRes().",
          "iscrowd": "Add 0 for single objects."}


def _place(item: Annotation) -> str:
    return f"annotation {item.get('id')} of image {item.get('image_id')}"


def rows_of(coco: COCO, p: Params) -> Rows:
    lists = [coco.imgToAnns.get(image, ()) for image in p.imgIds]
    annotations = list(chain.from_iterable(lists))
    image = np.repeat(np.arange(len(lists)), [len(part) for part in lists])
    number = {category: i for i, category in enumerate(p.catIds)}
    category = map(itemgetter("category_id"), annotations)
    label = np.fromiter(map(number.get, category, repeat(-1)), np.int64, len(annotations))
    chosen = np.flatnonzero(label >= 0)
    if not p.useCats:
        chosen = chosen[np.lexsort((label[chosen], image[chosen]))]  # pycocotools goes through the classes
        label = np.zeros_like(label)
    if len(chosen) < len(annotations) or not p.useCats:
        annotations = [annotations[i] for i in chosen]
    return Rows(annotations, torch.from_numpy(image[chosen]), torch.from_numpy(label[chosen]))


def truths_of(rows: Rows, iou_type: str) -> Truths:
    crowd = torch.tensor([bool(value) for value in rows.column("iscrowd")], dtype=torch.bool)
    ignore = crowd
    if iou_type == "keypoints":
        ignore = crowd | (rows.numbers("num_keypoints") == 0)
    return Truths(rows.image, rows.label, _boxes(rows, iou_type), rows.numbers("area"), crowd, ignore)


def found_of(rows: Rows, iou_type: str) -> Found:
    return Found(rows.image, rows.label, _boxes(rows, iou_type), rows.numbers("score"), rows.numbers("area"))


def _boxes(rows: Rows, iou_type: str) -> Tensor:
    """(n, 4) float64; zeros where masks or keypoints are compared."""
    if iou_type == "bbox":
        return rows.numbers("bbox", 4)
    return torch.zeros(len(rows.image), 4, dtype=torch.float64)


def box_or_keypoint_overlaps(found_rows: Rows, truth_rows: Rows, found: Found, truths: Truths, p: Params) -> Overlaps:
    if p.iouType == "bbox":
        return box_overlaps(truths, found)
    sigmas = torch.from_numpy(np.asarray(p.kpt_oks_sigmas, np.float64))
    points = [rows.numbers("keypoints", 3 * len(sigmas)).view(-1, len(sigmas), 3) for rows in (found_rows, truth_rows)]
    boxes = truth_rows.numbers("bbox", 4)
    return lambda d, g: oks_pairs(*points, boxes, truths.area, sigmas, d, g)
