"""`detres eval --gt G --results R`: the numbers of any model's results file, with what is doubtful about them."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from detres.engine.checkpoint import atomic_write
from detres.evaluation import lvis
from detres.evaluation.base import EvalResult
from detres.evaluation.coco import MASK_TYPES
from detres.evaluation.coco_columns import ResultsFile, TruthFile
from detres.evaluation.coco_files import read_results, read_truth
from detres.evaluation.coco_numbers import IouType, protocol_of, rows_of
from detres.evaluation.coco_results import Compared, compare, evaluate_columns
from detres.evaluation.diagnosis import diagnose
from detres.evaluation.errors import analyse_errors
from detres.evaluation.overlaps import COCO_SIGMAS
from detres.evaluation.trust import area_report, check

log = logging.getLogger(__name__)
NEAR_ZERO = 0.01  # AP below which the usual mistakes are looked for
BACKGROUND = 0.1  # IoU up to which a detection has hit nothing, in the analysis of errors


def evaluate_files(truth: str | Path, results: str | Path, iou_types: Sequence[IouType] = ("bbox",), *,
                   lenient: bool = False, sigmas: Sequence[float] = COCO_SIGMAS, numbers: str | Path | None = None,
                   errors: str | Path | None = None) -> EvalResult:
    """Evaluate a COCO results file against an annotation file (LVIS' protocol for LVIS' files), and print the numbers.

    Warnings go to the log: what was left out (`lenient`), areas that disagree with masks, and why AP is near zero.

    Args:
        sigmas: of OKS, one for each keypoint.
        numbers: JSON file for the named numbers.
        errors: folder for the analysis of errors of the first of `iou_types`; its table is printed, too.

    Raises ValueError for files that are malformed or, if not `lenient`, have entries that cannot be evaluated.
    """
    if errors is not None and "keypoints" in iou_types[:1]:
        raise ValueError("errors must be those of boxes or masks, got keypoints. Put bbox, segm or boundary first in "
                         "--iou-type.")
    masks, keypoints = any(kind in MASK_TYPES for kind in iou_types), "keypoints" in iou_types
    gt, dt = read_truth(truth, masks, keypoints), read_results(results, masks, keypoints)
    if errors is not None and lvis.is_lvis(gt):
        raise ValueError(f"errors must be of files in which all classes are labelled, got LVIS annotations ({truth}). "
                         "Leave out --errors.")
    sized_type = next((kind for kind in iou_types if kind in MASK_TYPES), None)
    if sized_type is not None:
        sized = check(gt, dt, sized_type, lenient)
        areas = area_report(sized.truth)
        for line in areas.lines:
            log.warning("%s", line)
    total = EvalResult({})
    for iou_type in iou_types:
        checked = sized if iou_type == sized_type else check(gt, dt, iou_type, lenient)
        for warning in checked.warnings:
            log.warning("%s", warning)
        result = _evaluate(checked.truth, checked.results, iou_type, sigmas)
        print(_printout(result, iou_type, lvis.is_lvis(gt)))
        if sized_type is not None and areas.lines:
            stated = result if checked is sized else _evaluate(sized.truth, sized.results, iou_type, sigmas)
            masks_own = _evaluate(replace(sized.truth, area=areas.area), sized.results, iou_type, sigmas)
            log.warning("%s", _changes(stated, masks_own))
        if 0 <= result.metrics[f"{iou_type}/AP"] < NEAR_ZERO:
            for cause in diagnose(gt, dt):  # with entries that were left out, whose ids may be the cause
                log.warning("%s/AP is near zero. %s", iou_type, cause)
        if errors is not None and iou_type == iou_types[0]:
            save_errors(compare(checked.truth, checked.results, iou_type, sigmas, BACKGROUND), errors)
        total = total.merged(result)
    if numbers is not None:
        save_numbers(total.metrics, numbers)
    return total


def _evaluate(truth: TruthFile, results: ResultsFile, iou_type: IouType, sigmas: Sequence[float]) -> EvalResult:
    if lvis.is_lvis(truth):
        return lvis.evaluate_lvis(truth, results, iou_type)
    return evaluate_columns(truth, results, iou_type, sigmas)


def _printout(result: EvalResult, iou_type: IouType, is_lvis: bool) -> str:
    if is_lvis:
        return f"{iou_type} (LVIS)\n{lvis.printout(result, iou_type)}"
    protocol = protocol_of(iou_type)
    return "\n".join([iou_type, *(row.line(result.metrics[f"{iou_type}/{row.name}"], protocol)
                                  for row in rows_of(iou_type))])


def save_numbers(metrics: dict[str, float], path: str | Path) -> None:
    """As JSON, in full precision; folders are created."""
    with atomic_write(Path(path)) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")


def save_errors(pair: Compared, folder: str | Path) -> None:
    """Print the table of an analysis of errors, and write it and its pictures into a folder."""
    analysis = analyse_errors(pair.truths, pair.found, pair.classes, pair.overlaps, background_threshold=BACKGROUND)
    analysis.save(folder)
    print(f"\n{analysis.table()}\n\nPictures of this are in {folder}.")


def _changes(result: EvalResult, corrected: EvalResult) -> str:
    """What areas that disagree with their masks do to the numbers of small, medium and large objects."""
    changed = [f"{name} {value:.4f} -> {corrected.metrics[name]:.4f}" for name, value in result.metrics.items()
               if value != corrected.metrics[name]]
    return f"With the areas of the masks: {', '.join(changed) or 'the same numbers'}."
