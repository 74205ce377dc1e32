"""LVIS AP and AR of a results file (Gupta et al., arXiv 1908.03195): COCO's, where not every class is labelled.

- An image is labelled for some classes only: those it has objects of, and those it is known not to have. Detections of
  other classes are left out: nobody knows whether they are right.
- Of some classes it has objects that are not labelled. A detection of these that matches none is no mistake.
- Its 300 detections of highest score count, whatever their classes.
- Nothing is a crowd, and what a file marks `ignore` is neither found nor missed.

The numbers are those of the package `lvis` 0.5.3 to the last bit ("boundary" is not in it). So a class whose only
object is found has 1 - 2**-52, not 1: precision is TP / (TP + FP + 2**-52) there.

Legend: N images, K classes, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from detres.evaluation.base import EvalResult
from detres.evaluation.coco import MASK_TYPES, coco_arrays
from detres.evaluation.coco_columns import Id, ResultsFile, TruthFile
from detres.evaluation.coco_engine import Arrays
from detres.evaluation.coco_masks import code_overlaps
from detres.evaluation.coco_numbers import LVIS, LVIS_ROWS, IouType, Row
from detres.evaluation.coco_results import class_names, found_tensors, mask_codes, truth_tensors
from detres.evaluation.flat import Found, Truths
from detres.evaluation.mask_overlaps import rle_areas
from detres.evaluation.overlaps import box_overlaps

FREQUENCIES = ("r", "c", "f")  # classes that are rare, common, frequent: in up to 10, 100 and more training images
PRECISION_ROWS = tuple(row for row in LVIS_ROWS if row.kind == "AP")
RECALL_ROWS = tuple(row for row in LVIS_ROWS if row.kind == "AR")


def is_lvis(truth: TruthFile) -> bool:
    """Whether an annotation file says how frequent classes are, and which an image is known not to have."""
    return truth.categories.frequency is not None and truth.images.neg_category_ids is not None


def evaluate_lvis(truth: TruthFile, results: ResultsFile, iou_type: IouType = "bbox") -> EvalResult:
    """Metrics named "bbox/AP" ... "bbox/APr" ... "bbox/AR300", of columns that `trust.check` has passed.

    For "segm" and "boundary" a detection's area is its mask's: as in Detectron2, and as in `lvis` where the results
    have masks alone. Objects and detections of area 0 are left out, as there. A class's own "APr" is -1 unless it is
    rare; so with "APc" and "APf".

    Raises ValueError for annotations that are not LVIS', or without masks where they are needed.
    """
    _require(truth, iou_type)
    if iou_type in MASK_TYPES:
        found_codes, truth_codes = mask_codes(truth, results)
        truth, results = replace(truth, segmentation=truth_codes), replace(results, segmentation=found_codes)
    truth = truth.select(_sized(truth.area))
    results = _judged(truth, _limited(results))
    if iou_type in MASK_TYPES:
        results = replace(results, area=rle_areas(results.segmentation).astype(np.float64))
    return _result(truth, results.select(_sized(results.area)), iou_type)


def _require(truth: TruthFile, iou_type: IouType) -> None:
    if iou_type not in ("bbox", *MASK_TYPES):
        raise ValueError(f"iou_type of LVIS must be bbox, segm or boundary, got {iou_type!r}. LVIS has no keypoints.")
    if not is_lvis(truth):
        raise ValueError(f"LVIS' annotations must have `frequency` in categories and `neg_category_ids` in images, got "
                         f"none ({truth.path}). Evaluate them by COCO's protocol.")
    for id_, frequency in zip(truth.categories.ids.tolist(), truth.categories.frequency):
        if frequency not in FREQUENCIES:
            raise ValueError(f"`frequency` must be r, c or f, got {frequency!r} ({truth.path}, category {id_!r}). "
                             "Take the categories of LVIS' own file.")


# Which entries count.


def _sized(area: np.ndarray) -> np.ndarray:
    return (area > 0) & (area < np.inf)


def _limited(results: ResultsFile) -> ResultsFile:
    """The detections of each image with the highest scores; of equal ones the first."""
    _, image, number = np.unique(results.image_ids, return_inverse=True, return_counts=True)
    limit = LVIS.max_detections[-1]
    if number.max(initial=0) <= limit:
        return results
    order = np.lexsort((-results.scores, image))
    rank = np.arange(len(image)) - np.repeat(np.cumsum(number) - number, number)
    return results.select(order[rank < limit])


def _judged(truth: TruthFile, results: ResultsFile) -> ResultsFile:
    """The detections of classes that their image has or is known not to have."""
    positive = _keys(truth, truth_tensors(truth))
    negative = _listed(truth, truth.images.neg_category_ids)
    return results.select(np.isin(_keys(truth, found_tensors(truth, results)), np.concatenate([positive, negative])))


def _keys(truth: TruthFile, entries: Truths | Found) -> np.ndarray:
    """(n,) int64, a number for the image and class of each entry."""
    return (entries.image * len(class_names(truth)) + entries.label).numpy()


def _listed(truth: TruthFile, lists: Sequence[Sequence[Id]]) -> np.ndarray:
    """`_keys` of the classes listed for each image; those that are not among the categories have no detections."""
    label = {id_: k for k, id_ in enumerate(np.unique(truth.categories.ids).tolist())}
    _, image = np.unique(truth.images.ids, return_inverse=True)
    return np.array([i * len(label) + label[id_] for i, ids in zip(image.tolist(), lists) for id_ in ids
                     if id_ in label], np.int64)


# What they give.


def _result(truth: TruthFile, results: ResultsFile, iou_type: IouType) -> EvalResult:
    truths, found, names = truth_tensors(truth), found_tensors(truth, results), class_names(truth)
    truths = replace(truths, crowd=torch.zeros_like(truths.crowd), ignore=torch.from_numpy(truth.ignore))
    partial = np.isin(_keys(truth, found), _listed(truth, truth.images.not_exhaustive_category_ids))
    found = replace(found, excused=torch.from_numpy(partial))
    overlaps = box_overlaps(truths, found) if iou_type == "bbox" else code_overlaps(
        iou_type, results.segmentation, found.area.long(), truth.segmentation, truths, len(names), LVIS.lowest())
    arrays = coco_arrays(truths, found, len(names), overlaps, LVIS)
    frequency = _frequency(truth)
    per_class = {name: _numbers(_of_class(arrays, k), frequency[[k]], iou_type) for k, name in enumerate(names)}
    return EvalResult(_numbers(arrays, frequency, iou_type), per_class, {iou_type: arrays})


def _frequency(truth: TruthFile) -> np.ndarray:
    """(K,) str"""
    _, first = np.unique(truth.categories.ids, return_index=True)
    return np.array(truth.categories.frequency)[first]


def _of_class(arrays: Arrays, k: int) -> Arrays:
    return Arrays(arrays.precision[:, :, k:k + 1], arrays.recall[:, k:k + 1], arrays.scores[:, :, k:k + 1])


def _numbers(arrays: Arrays, frequency: np.ndarray, iou_type: IouType) -> dict[str, float]:
    """Means over classes, of which `frequency` (K,) tells the letter."""
    values = {row.name: row.of(arrays, LVIS) for row in PRECISION_ROWS}
    values |= {f"AP{letter}": Row("AP", "AP").of(arrays, LVIS, np.flatnonzero(frequency == letter))
               for letter in FREQUENCIES}
    values |= {row.name: row.of(arrays, LVIS) for row in RECALL_ROWS}
    return {f"{iou_type}/{name}": value for name, value in values.items()}


def printout(result: EvalResult, iou_type: IouType = "bbox") -> str:
    """The numbers as `lvis` prints them."""
    return "\n".join(_line(name.removeprefix(f"{iou_type}/"), value) for name, value in result.metrics.items()
                     if name.startswith(f"{iou_type}/"))


def _line(name: str, value: float) -> str:
    kind, of = name[:2], name[2:]
    title = {"AP": "Average Precision", "AR": "Average Recall"}[kind]
    iou = f"0.{of}" if of in ("50", "75") else f"{LVIS.iou_thresholds[0]:0.2f}:{LVIS.iou_thresholds[-1]:0.2f}"
    area, classes = (of if of in letters else "all" for letters in (("s", "m", "l"), FREQUENCIES))
    return (f" {title:<18} ({kind}) @[ IoU={iou:<9} | area={area:>6s} | maxDets={LVIS.max_detections[-1]:>3d} "
            f"catIds={classes:>3s}] = {value:0.3f}")
