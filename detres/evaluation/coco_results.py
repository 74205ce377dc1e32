"""Evaluation of a results file against an annotation file, of any model: `detres eval --gt G --results R`.

Legend: N images, K classes, G truths, D detections, J keypoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detres.data.masks import compressed
from detres.evaluation.base import EvalResult
from detres.evaluation.coco import coco_result
from detres.evaluation.coco_columns import ResultsFile, Segmentation, TruthFile
from detres.evaluation.coco_masks import code_overlaps
from detres.evaluation.coco_numbers import IouType, protocol_of
from detres.evaluation.flat import Found, Truths
from detres.evaluation.mask_overlaps import Rle, rle_areas
from detres.evaluation.overlaps import COCO_SIGMAS, Overlaps, box_overlaps, oks_pairs


@dataclass(frozen=True)
class Compared:
    """What `coco_engine` and `errors` work on; images and classes are numbered in the order of their ids."""

    truths: Truths
    found: Found
    classes: tuple[str, ...]
    overlaps: Overlaps


def evaluate_columns(truth: TruthFile, results: ResultsFile, iou_type: IouType,
                     sigmas: Sequence[float] = COCO_SIGMAS) -> EvalResult:
    """COCO's numbers of columns that `trust.check` has passed. `sigmas` (J,) are those of OKS.

    Masks count as small, medium or large by their own area: as in Detectron2, and as in pycocotools where the results
    have masks alone. Beside boxes, pycocotools takes the box's area.
    """
    pair = compare(truth, results, iou_type, sigmas)
    return coco_result(pair.truths, pair.found, pair.classes, pair.overlaps, iou_type)


def compare(truth: TruthFile, results: ResultsFile, iou_type: IouType, sigmas: Sequence[float] = COCO_SIGMAS,
            lowest: float | None = None) -> Compared:
    """See `evaluate_columns`. Overlaps of masks are exact from `lowest` on (None: the lowest IoU threshold of COCO)."""
    truths, found, classes = truth_tensors(truth), found_tensors(truth, results), class_names(truth)
    if iou_type == "bbox":
        return Compared(truths, found, classes, box_overlaps(truths, found))
    if iou_type == "keypoints":
        truths = replace(truths, ignore=truths.ignore | torch.from_numpy(truth.num_keypoints == 0))
        return Compared(truths, found, classes, _keypoint_overlaps(truth, results, truths, sigmas))
    lowest = protocol_of(iou_type).lowest() if lowest is None else lowest
    codes, truth_codes = mask_codes(truth, results)
    areas = torch.from_numpy(rle_areas(codes))
    overlaps = code_overlaps(iou_type, codes, areas, truth_codes, truths, len(classes), lowest)
    return Compared(truths, replace(found, area=areas.double()), classes, overlaps)


def truth_tensors(truth: TruthFile) -> Truths:
    """With images and classes numbered in the order of their ids."""
    crowd = torch.from_numpy(truth.crowd)
    return Truths(_place(truth.image_ids, truth.images.ids), _place(truth.category_ids, truth.categories.ids),
                  torch.from_numpy(truth.boxes_xywh), torch.from_numpy(truth.area), crowd, crowd)


def found_tensors(truth: TruthFile, results: ResultsFile) -> Found:
    """Numbered as the truths."""
    return Found(_place(results.image_ids, truth.images.ids), _place(results.category_ids, truth.categories.ids),
                 torch.from_numpy(results.boxes_xywh), torch.from_numpy(results.scores),
                 torch.from_numpy(results.area))


def class_names(truth: TruthFile) -> tuple[str, ...]:
    """In the order of ids; with the id where a name is that of several."""
    ids, first = np.unique(truth.categories.ids, return_index=True)
    names = [truth.categories.names[i] for i in first]
    return tuple(name if names.count(name) == 1 else f"{name} ({i})" for i, name in zip(ids.tolist(), names))


def _place(ids: np.ndarray, known: np.ndarray) -> Tensor:
    """Of each id in the order of the known ones."""
    ascending = np.unique(known)
    place = np.searchsorted(ascending, ids)
    assert (ascending[np.minimum(place, len(ascending) - 1)] == ids).all(), "unknown ids: see trust.check"
    return torch.from_numpy(place)


def mask_codes(truth: TruthFile, results: ResultsFile) -> tuple[list[Rle], list[Rle]]:
    """Compressed run lengths of the detections' masks and of the truths'.

    Raises ValueError for one without, or in an image whose size the annotation file does not say.
    """
    sizes = dict(zip(truth.images.ids.tolist(), zip(truth.images.height.tolist(), truth.images.width.tolist())))
    return (_codes(results.path, "detection", results.segmentation, results.image_ids, sizes),
            _codes(truth.path, "annotation", truth.segmentation, truth.image_ids, sizes))


def _codes(path: str, kind: str, masks: Sequence[Segmentation | None] | None, image_ids: np.ndarray,
           sizes: dict) -> list[Rle]:
    codes = []
    for number, (mask, image_id) in enumerate(zip(masks or [None] * len(image_ids), image_ids.tolist())):
        if not mask:
            raise ValueError(f"every {kind} must have a segmentation to evaluate masks, got none for entry {number}, "
                             f"image_id {image_id!r} ({path}). Evaluate with --iou-type bbox, or correct the file.")
        size = tuple(mask["size"]) if isinstance(mask, dict) else sizes[image_id]
        if 0 in size:
            raise ValueError(f"images must have height and width where masks are polygons, got none for image_id "
                             f"{image_id!r} ({path}). Add them to the annotation file.")
        codes.append(compressed(mask, *size))
    return codes


def _keypoint_overlaps(truth: TruthFile, results: ResultsFile, truths: Truths, sigmas: Sequence[float]) -> Overlaps:
    points = []
    for columns, rows in ((truth, len(truth.ids)), (results, len(results.scores))):
        if columns.keypoints is None and rows:
            raise ValueError(f"entries must have keypoints to evaluate them, got none ({columns.path}). "
                             "Evaluate with --iou-type bbox.")
        flat = np.zeros((0, 3 * len(sigmas))) if columns.keypoints is None else columns.keypoints
        if flat.shape[1] != 3 * len(sigmas):
            raise ValueError(f"keypoints must be {len(sigmas)}, one for each sigma of OKS, got {flat.shape[1] // 3} "
                             f"({columns.path}). Give their sigmas with --sigmas.")
        points.append(torch.from_numpy(flat).view(-1, len(sigmas), 3))
    gt, dt = points
    deviations = torch.tensor(sigmas, dtype=torch.float64)
    return lambda d, g: oks_pairs(dt, gt, truths.boxes_xywh, truths.area, deviations, d, g)
