"""COCO AP and AR of boxes, masks, boundaries and keypoints: of a model's detections as they come.

The numbers are pycocotools' to the last bit (`coco_engine`), on the results file that `results` gives. What it gets
wrong silently is no matter here: annotation ids may be 0 and image ids strings, and no detections at all are a result
like any other. Detections count as small, medium or large by their masks for "segm" and "boundary".

Legend: N images, K classes, G truths, D detections.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch

from detres.data.dataset import Dataset, ImageRecord
from detres.evaluation.base import EvalResult, Evaluator, Part, Rows, Values, truths_of
from detres.evaluation.coco_engine import Arrays, Protocol, accumulate, match
from detres.evaluation.coco_masks import BitmapComparer, PairOverlaps, RunLengths, code_overlaps, encode, truth_codes
from detres.evaluation.coco_numbers import IouType, protocol_of, rows_of
from detres.evaluation.flat import Found, Truths
from detres.evaluation.mask_overlaps import Rle, rle_areas
from detres.evaluation.overlaps import COCO_SIGMAS, Overlaps, box_overlaps, oks_pairs
from detres.structures import Detections

MASK_TYPES = ("segm", "boundary")


class CocoEvaluator(Evaluator):
    """COCO AP and AR of boxes ("bbox"), masks ("segm"), their outlines ("boundary", Cheng et al. 2021) and keypoints.

    `keep_masks` makes `results` have the masks also where they are evaluated on a GPU. `sigmas` are those of OKS, one
    for each of the data set's keypoints.
    Raises ValueError when masks are to be evaluated and an annotation has none, or if the number of sigmas is wrong.
    """

    def __init__(self, dataset: Dataset, iou_types: tuple[IouType, ...] = ("bbox", "segm"), keep_masks: bool = False,
                 sigmas: Sequence[float] = COCO_SIGMAS):
        super().__init__(dataset)
        self.iou_types = iou_types
        self.mask_types = [name for name in iou_types if name in MASK_TYPES]
        self.keep_masks = keep_masks
        self.metric_names = tuple(f"{iou_type}/{row.name}" for iou_type in iou_types for row in rows_of(iou_type))
        truths = truths_of(self.records)
        self._truths = replace(truths, ignore=truths.crowd)  # COCO knows no difficult objects
        if "keypoints" in iou_types:
            if len(sigmas) != len(dataset.keypoint_names):
                raise ValueError(f"sigmas must be one for each of the {len(dataset.keypoint_names)} keypoints of the "
                                 f"data set '{dataset.name}', got {len(sigmas)}. Give them as sigmas.")
            self._sigmas = torch.tensor(sigmas, dtype=torch.float64)
            self._offset = torch.tensor([dataset.keypoint_offset] * 2 + [0.0], dtype=torch.float64)
            points = _keypoints(self.records, len(sigmas))
            self._points = points - self._offset * (points[..., 2:] > 0)  # as in the file
        if self.mask_types:
            _require_masks(dataset)

    @cached_property
    def _codes(self) -> list[Rle]:
        """Of the truths: made when they are needed, as masks may be in files."""
        return truth_codes(self.records)

    @cached_property
    def _comparer(self) -> BitmapComparer:
        return BitmapComparer(self.records, self._codes, self.mask_types)

    def _extras(self, detections: Detections, images: list[int]) -> dict[str, Rows]:
        extras: dict[str, Rows] = {}
        if "keypoints" in self.iou_types:
            if detections.keypoints is None:
                raise ValueError("detections must have keypoints, got none. Evaluate with iou_types=('bbox',).")
            extras["keypoints"] = Values(detections.keypoints.float().flatten(0, 1))
        if not self.mask_types:
            return extras
        if detections.masks is None:
            raise ValueError("detections must have masks for segm, got none. Evaluate with iou_types=('bbox',).")
        labels = detections.labels.masked_fill(~detections.valid, -1)
        at_once = self._compares_at_once(detections.boxes.device)
        if at_once:
            first, *others = [self._comparer.compare(image, *tensors, detections.paste) for image, *tensors in zip(
                images, detections.masks, detections.boxes, labels)]
            extras["overlaps"] = first.joined(others)
        if self.keep_masks or not at_once:
            codes = [encode(*tensors, self.records[image], detections.paste) for image, *tensors in zip(
                images, detections.masks, detections.boxes, detections.valid)]
            extras["codes"] = RunLengths([code for part in codes for code in part])
        return extras

    @staticmethod
    def _compares_at_once(device: torch.device) -> bool:
        """Whether masks are compared as bitmaps when they come, rather than as run lengths at the end."""
        return device.type != "cpu"

    def compute(self) -> EvalResult:
        """Metrics named "bbox/AP", "bbox/AP50" ... "segm/ARl"; -1 where there is no ground truth."""
        part = self.collected()
        found = part.found()
        result = EvalResult({})
        for iou_type in self.iou_types:
            truths, sized, overlaps = self._compared(part, found, iou_type)
            result = result.merged(coco_result(truths, sized, self.dataset.classes, overlaps, iou_type))
        return result

    def _compared(self, part: Part, found: Found, iou_type: IouType) -> tuple[Truths, Found, Overlaps]:
        """Truths on the device of the detections, detections with the areas of what is evaluated, and overlaps."""
        truths = self._truths.to(found.scores.device)
        if iou_type == "bbox":
            return truths, found, box_overlaps(truths, found)
        if iou_type == "keypoints":
            return self._compared_keypoints(part, found, truths)
        if (pairs := part.extras.get("overlaps")) is not None:
            assert isinstance(pairs, PairOverlaps)
            return truths, replace(found, area=pairs.area.double()), pairs.lookup(iou_type, len(truths.label))
        codes = part.extras["codes"].codes if part.extras else []  # none where nothing was added
        areas = torch.from_numpy(rle_areas(codes))
        lowest = protocol_of(iou_type).lowest()
        overlaps = code_overlaps(iou_type, codes, areas, self._codes, truths, len(self.dataset.classes), lowest)
        return truths, replace(found, area=areas.double()), overlaps

    def _compared_keypoints(self, part: Part, found: Found, truths: Truths) -> tuple[Truths, Found, Overlaps]:
        gt, sigmas, offset = (values.to(found.scores.device) for values in (self._points, self._sigmas, self._offset))
        dt = part.extras["keypoints"].values.double() - offset if part.extras else gt[:0]
        unlabelled = ~(gt[..., 2] > 0).any(1)
        return replace(truths, ignore=truths.ignore | unlabelled), found, lambda d, g: oks_pairs(
            dt, gt, truths.boxes_xywh, truths.area, sigmas, d, g)

    def _results(self, part: Part) -> list[dict[str, Any]]:
        results = super()._results(part)
        if (points := part.extras.get("keypoints")) is not None:
            for result, own in zip(results, (points.values.double().cpu() - self._offset).flatten(1).tolist()):
                result["keypoints"] = own
        if (codes := part.extras.get("codes")) is not None:
            for result, code in zip(results, codes.codes):
                result["segmentation"] = code
        return results


def _keypoints(records: Sequence[ImageRecord], count: int) -> torch.Tensor:
    """(G, J, 3) float64 of all annotations; zeros, that is unlabelled, where there are none."""
    nothing = (0.0,) * (3 * count)
    rows = [item.keypoints or nothing for record in records for item in record.annotations]
    return torch.tensor(rows, dtype=torch.float64).view(-1, count, 3)


def _require_masks(dataset: Dataset) -> None:
    if bare := dataset.records.without_masks():
        raise ValueError(f"annotations must have a segmentation to evaluate masks, got {bare}. Evaluate boxes only, or "
                         "remove the annotations.")


def coco_result(truths: Truths, found: Found, classes: Sequence[str], overlaps: Overlaps, iou_type: IouType
                ) -> EvalResult:
    """COCO's named numbers, overall and per class, and the arrays behind them.

    `classes` are the names, label by label; `overlaps` see `coco_engine.match`.
    """
    protocol, rows = protocol_of(iou_type), rows_of(iou_type)
    arrays = coco_arrays(truths, found, len(classes), overlaps, protocol)
    metrics = {f"{iou_type}/{row.name}": row.of(arrays, protocol) for row in rows}
    columns = {f"{iou_type}/{row.name}": row.of_each_class(arrays, protocol) for row in rows}
    per_class = {name: {key: column[k] for key, column in columns.items()} for k, name in enumerate(classes)}
    return EvalResult(metrics, per_class, {iou_type: arrays})


def coco_arrays(truths: Truths, found: Found, classes: int, overlaps: Overlaps, protocol: Protocol) -> Arrays:
    """Precision, recall and scores on the host, computed on the device of the detections."""
    return accumulate(match(truths, found, classes, overlaps, protocol), classes, protocol).to("cpu")
