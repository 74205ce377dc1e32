"""COCO detection and segmentation metrics: the twelve numbers, overall and per class.

The numbers are pycocotools' (Lin et al., arXiv 1405.0312; cocodataset.org/#detection-eval), which does the matching
here. What it gets wrong silently is put right before it sees it: annotation ids are renumbered from 1 (it takes a
match with id 0 for none), image ids may be strings, and no detections at all are a result like any other.
"""

from __future__ import annotations

import contextlib
import io
from typing import Literal

import numpy as np
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from detres.data.dataset import Dataset
from detres.evaluation.base import EvalResult, Evaluator

IouType = Literal["bbox", "segm"]
Metrics = dict[str, float]
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


class CocoEvaluator(Evaluator):
    """COCO AP and AR of boxes ("bbox") and masks ("segm").

    Raises ValueError when masks are to be evaluated and an annotation has none.
    """

    def __init__(self, dataset: Dataset, iou_types: tuple[IouType, ...] = ("bbox", "segm")):
        super().__init__(dataset)
        self.iou_types = iou_types
        self.metric_names = tuple(f"{iou_type}/{name}" for iou_type in iou_types for name in NAMES)
        self.with_masks = "segm" in iou_types
        if self.with_masks:
            _require_masks(dataset)

    def compute(self) -> EvalResult:
        """Metrics named "bbox/AP", "bbox/AP50" ... "segm/ARl"; -1 where there is no ground truth."""
        ground_truth, results = coco_dict(self.dataset), self.results()
        names = dict(zip(self.dataset.category_ids, self.dataset.classes))
        metrics, per_class = {}, {name: {} for name in self.dataset.classes}
        for iou_type in self.iou_types:
            overall, by_category = coco_metrics(ground_truth, results, iou_type)
            metrics.update({f"{iou_type}/{key}": value for key, value in overall.items()})
            for category_id, numbers in by_category.items():
                per_class[names[category_id]].update({f"{iou_type}/{key}": value for key, value in numbers.items()})
        return EvalResult(metrics, per_class)


def _require_masks(dataset: Dataset) -> None:
    for record in dataset.records:
        for annotation in record.annotations:
            if not annotation.segmentation:
                raise ValueError(f"annotations must have a segmentation to evaluate masks, got none for annotation "
                                 f"{annotation.id} of {record.path}. Evaluate boxes only, or remove the annotation.")


def coco_dict(dataset: Dataset) -> dict:
    """The ground truth of a data set as the contents of a COCO annotation file."""
    annotations = []
    for record in dataset.records:
        for item in record.annotations:
            x1, y1, x2, y2 = item.box
            annotations.append({"id": item.id, "image_id": record.id, "category_id": dataset.category_ids[item.label],
                                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": item.area, "iscrowd": int(item.crowd),
                                "segmentation": item.segmentation})
    return {"images": [{"id": r.id, "height": r.height, "width": r.width} for r in dataset.records],
            "categories": [{"id": i, "name": name} for i, name in zip(dataset.category_ids, dataset.classes)],
            "annotations": annotations}


def coco_metrics(ground_truth: dict, results: list[dict], iou_type: IouType) -> tuple[Metrics, dict[int, Metrics]]:
    """The twelve numbers over all categories, and for each category id, of the contents of two COCO files.

    Detections count as small, medium or large by their mask's area for "segm", even when they have a box.
    Raises ValueError for a result whose image is not in the ground truth.
    """
    # Ranks instead of ids keep the order in which pycocotools visits images, which settles ties of scores.
    rank = {image_id: i for i, image_id in enumerate(sorted(image["id"] for image in ground_truth["images"]), 1)}
    images = [{**image, "id": rank[image["id"]]} for image in ground_truth["images"]]
    categories = ground_truth["categories"]
    truths = [{**item, "id": i, "image_id": rank[item["image_id"]], "iscrowd": item.get("iscrowd", 0)}
              for i, item in enumerate(ground_truth["annotations"], 1)]
    found = [_detection(item, i, rank, iou_type) for i, item in enumerate(results, 1)]
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(_indexed(images, categories, truths), _indexed(images, categories, found), iou_type)
        evaluation.evaluate()
        evaluation.accumulate()
    precision, recall = evaluation.eval["precision"], evaluation.eval["recall"]  # (T, R, K, A, M), (T, K, A, M)
    by_category = {int(category_id): _summary(precision[:, :, k:k + 1], recall[:, k:k + 1])
                   for k, category_id in enumerate(evaluation.params.catIds)}
    return _summary(precision, recall), by_category


def _detection(result: dict, number: int, rank: dict, iou_type: IouType) -> dict:
    if result["image_id"] not in rank:
        raise ValueError(f"results must be of images in the ground truth, got image_id {result['image_id']!r} "
                         f"(result {number}). Evaluate against the data set that was predicted on.")
    common = {"id": number, "image_id": rank[result["image_id"]], "category_id": result["category_id"],
              "score": result["score"], "iscrowd": 0}
    if iou_type == "segm":
        return {**common, "segmentation": result["segmentation"], "area": rle.area(result["segmentation"])}
    return {**common, "bbox": result["bbox"], "area": result["bbox"][2] * result["bbox"][3]}


def _indexed(images: list[dict], categories: list[dict], annotations: list[dict]) -> COCO:
    coco = COCO()
    coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
    coco.createIndex()
    return coco


def _summary(precision: np.ndarray, recall: np.ndarray) -> Metrics:
    """The twelve numbers from precision (T, R, K, A, M) and recall (T, K, A, M).

    T thresholds .5:.05:.95, R recalls 0:.01:1, A areas all, small, medium, large, M bounds 1, 10, 100 on detections.
    """
    parts = [precision[..., 0, 2], precision[0, ..., 0, 2], precision[5, ..., 0, 2],
             *(precision[..., area, 2] for area in (1, 2, 3)),
             *(recall[..., 0, bound] for bound in (0, 1, 2)), *(recall[..., area, 2] for area in (1, 2, 3))]
    return dict(zip(NAMES, map(_mean, parts)))


def _mean(values: np.ndarray) -> float:
    measured = values[values > -1]
    return float(np.mean(measured)) if len(measured) else -1.0
