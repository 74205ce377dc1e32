"""ILSVRC localization error and detection AP, as the development kit of the challenge computes them (eval_clsloc.m and
eval_detection.m; Russakovsky et al., arXiv 1409.0575, sections 4.2 and 4.3).

The kit's boxes are inclusive pixels, xmax - xmin + 1 wide: x2 - x1 in this project's continuous boxes, so plain IoU on
them is the kit's IoU. In both tasks a box with an IoU on the threshold is right, as in the kit.

Legend: N images of a batch, P guesses, G padded truths of an image (in detection: all truths), K classes,
D detections, E pairs of a detection and a truth that overlap enough, B images and classes left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from detres.data.dataset import Dataset
from detres.evaluation.base import EvalResult, Evaluator, truths_of
from detres.evaluation.classification import ClassCounts, CountsState, ratio
from detres.evaluation.flat import Found, Truths, by_class
from detres.evaluation.voc import Verdicts, area, mean_of_measured, pairs, verdicts_of
from detres.geometry.boxes import pairwise_iou
from detres.ops.greedy_match import greedy_match

# Localization


class LocalizationEvaluator:
    """Classification with localization (CLS-LOC): an image is right if one of its guesses has the image's class and a
    box with IoU >= 0.5 with any object of that class.

    Counted on the device of the data; nothing waits for it before `compute`. Every image must be added once.
    """

    metric_names = ("loc/top1_error", "loc/top5_error", "loc/gt_class_error", "loc/cls_top1_error",
                    "loc/cls_top5_error")

    def __init__(self, classes: Sequence[str]):
        self.classes = tuple(classes)
        self._counts = ClassCounts(len(self.classes), 9)

    def reset(self) -> None:
        """Forget all images."""
        self._counts.reset()

    def update(self, labels: Tensor, boxes: Tensor, gt_labels: Tensor, gt_boxes: Tensor, gt_valid: Tensor, *,
               valid: Tensor | None = None, gt_class_boxes: Tensor | None = None,
               counted: Tensor | None = None) -> None:
        """Add N images; all tensors on one device, boxes xyxy in one frame of pixels.

        Args:
            labels, boxes: (N, P) int64 and (N, P, 4), the guesses, best first; those past the fifth are ignored.
            gt_labels: (N,) int64, the class of each image.
            gt_boxes, gt_valid: (N, G, 4) and (N, G) bool, the objects of that class in the image.
            valid: (N, P) bool, guesses that were made; all by default.
            gt_class_boxes: (N, 4), the box predicted for the true class, for "loc/gt_class_error".
            counted: (N,) bool; False for the images on the challenge's blacklist, whose boxes are unusable: they are
                left out of localization, not of classification. All are counted by default.

        Raises ValueError for shapes that do not fit; `compute` raises it for values that do not.
        """
        valid = torch.ones_like(labels, dtype=torch.bool) if valid is None else valid
        counted = torch.ones_like(gt_labels, dtype=torch.bool) if counted is None else counted
        _require_shapes(labels, boxes, valid, gt_labels, gt_boxes, gt_valid)
        labels, boxes, valid = labels[:, :5], boxes[:, :5], valid[:, :5]
        named = (labels == gt_labels[:, None]) & valid
        right = named & localized(boxes, gt_boxes, gt_valid) & counted[:, None]
        has_known = counted if gt_class_boxes is not None else torch.zeros_like(counted)
        known = boxes.new_zeros(len(boxes), 1, 4) if gt_class_boxes is None else gt_class_boxes[:, None]
        known_right = has_known & localized(known, gt_boxes, gt_valid)[:, 0]
        flags = [torch.ones_like(counted), named[:, :1].any(1), named.any(1), counted, right[:, :1].any(1),
                 right.any(1), has_known, known_right, counted & ~gt_valid.any(1)]
        usable = (boxes.isfinite().all(2) | ~valid).all(1) & known.isfinite().all(2)[:, 0]
        self._counts.add(gt_labels, torch.stack(flags, 1), usable)

    def state(self) -> CountsState:
        """What was counted so far, to be sent to other ranks."""
        return self._counts.state()

    def merge(self, states: Sequence[CountsState]) -> None:
        """Take over what all ranks counted; their order does not matter."""
        self._counts.merge(states)

    def compute(self) -> EvalResult:
        """Errors over all images and for each true class; -1 where there is none.

        - "loc/top1_error", "loc/top5_error": no guess of the first, or first five, has the class and a right box.
        - "loc/gt_class_error": the box predicted for the true class is wrong ("LOC error on GT CLS" in
          arXiv 1512.03385, table 13).
        - "loc/cls_top1_error", "loc/cls_top5_error": no guess has the class, whatever its box.

        Raises ValueError for labels out of range, boxes that are not finite, and counted images without any object.
        """
        counts = self._counts.total()
        without = int(counts[:, -1].sum())
        if without:
            raise ValueError(f"images must have an object of their class, got {without} images without any. "
                             "Leave those on the challenge's blacklist out with `counted`.")
        rows = zip(self.classes, counts.tolist())
        return EvalResult(self._metrics(counts.sum(0).tolist()), {name: self._metrics(row) for name, row in rows})

    def _metrics(self, counts: list[int]) -> dict[str, float]:
        images, cls1, cls5, counted, top1, top5, has_known, known, _ = counts
        errors = (ratio(counted - top1, counted), ratio(counted - top5, counted), ratio(has_known - known, has_known),
                  ratio(images - cls1, images), ratio(images - cls5, images))
        return dict(zip(self.metric_names, errors))


def localized(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor) -> Tensor:
    """(N, P) bool: which boxes (N, P, 4) overlap any valid object (N, G, 4) with IoU >= 0.5."""
    overlap = pairwise_iou(boxes.double(), gt_boxes.double())
    return ((overlap >= 0.5) & gt_valid[:, None]).any(2)


def _require_shapes(labels: Tensor, boxes: Tensor, valid: Tensor, gt_labels: Tensor, gt_boxes: Tensor,
                    gt_valid: Tensor) -> None:
    guesses, objects, images = labels.shape, gt_valid.shape, gt_labels.shape
    wanted = ((*images, *guesses[1:]), (*guesses, 4), guesses, (*objects, 4), (*images, *objects[1:]))
    got = tuple(tuple(x.shape) for x in (labels, boxes, valid, gt_boxes, gt_valid))
    if got != wanted or (len(guesses), len(objects), len(images)) != (2, 2, 1):
        raise ValueError("labels, boxes, valid, gt_boxes and gt_valid must be (N, P), (N, P, 4), (N, P), (N, G, 4) and "
                         f"(N, G) with gt_labels (N,), got {', '.join(map(str, got))} with {tuple(images)}. "
                         "Pad guesses and objects to one number.")


# Detection


class IlsvrcDetectionEvaluator(Evaluator):
    """AP of ILSVRC's object detection task (DET; the same in VID).

    `blacklist` names images and classes that are left out together: their detections are neither right nor wrong and
    their objects need not be found (the kit's ILSVRC2015_det_validation_blacklist.txt).
    """

    metric_names = ("ilsvrc/AP",)

    def __init__(self, dataset: Dataset, blacklist: Iterable[tuple[int | str, str]] = ()):
        super().__init__(dataset)
        labels = {name: label for label, name in enumerate(dataset.classes)}
        blacklist = list(blacklist)
        for image_id, name in blacklist:
            if image_id not in self._place or name not in labels:
                raise ValueError(f"a blacklist must name images and classes of '{dataset.name}', got {image_id!r} with "
                                 f"class {name!r}. Write ids and classes as the data set does.")
        self._skipped = torch.tensor([(self._place[image_id], labels[name]) for image_id, name in blacklist],
                                     dtype=torch.int64).reshape(-1, 2)

    def compute(self) -> EvalResult:
        """Metric "ilsvrc/AP": area under the curve, for each class and their mean; -1 without ground truth.

        All objects must be found; the kit does not know difficult ones.
        """
        found = self.found()
        truths = truths_of(self.records, found.scores.device)
        values = ilsvrc_ap(truths, found, len(self.dataset.classes), self._skipped)
        name = self.metric_names[0]
        return EvalResult({name: mean_of_measured(values)},
                          {label: {name: value} for label, value in zip(self.dataset.classes, values)})


def ilsvrc_ap(truths: Truths, found: Found, classes: int, skipped: Tensor | None = None) -> list[float]:
    """AP (K,) of each class in the detection task; -1 for a class without objects.

    `skipped` (B, 2) int64 are pairs of an image and a class that do not count. `truths.ignore`, crowds and areas play
    no part. Raises ValueError for labels out of range and for boxes or scores that are not finite.
    """
    return judge(truths, found, classes, skipped).average_precision(area)


def judge(truths: Truths, found: Found, classes: int, skipped: Tensor | None = None) -> Verdicts:
    """What is right and wrong. Other than in VOC, a detection takes the best of the objects that are still free."""
    rows = by_class(found)
    d, g, overlap = pairs(truths, found, rows, classes, border=0.0)
    near = ((overlap >= relaxed_threshold(truths.boxes_xywh)[g]) & (overlap > 0)).nonzero()[:, 0]
    order = near[(-overlap[near]).argsort(stable=True)]  # of equal overlaps the earlier truth comes first
    order = order[d[order].argsort(stable=True)]
    key = found.image[rows] * classes + found.label[rows]
    order = order[key[d[order]].argsort(stable=True)]
    d, g = d[order], g[order]
    won = greedy_match(key[d], d, g, torch.ones_like(d), torch.zeros_like(truths.crowd))
    right = torch.zeros_like(rows).index_add_(0, d, won).bool()

    left_out = torch.empty(0, 2, dtype=torch.int64) if skipped is None else skipped
    left_out = (left_out[:, 0] * classes + left_out[:, 1]).to(key.device)
    counts = ~torch.isin(key, left_out)
    sought = ~torch.isin(truths.image * classes + truths.label, left_out)
    return verdicts_of(found.label[rows], right & counts, ~right & counts, truths.label[sought], classes)


def relaxed_threshold(boxes_xywh: Tensor) -> Tensor:
    """IoU (G,) that a detection of each object must reach: min(0.5, w h / ((w + 10) (h + 10))), in pixels.

    It allows for 5 pixels of error on each side, which matters for objects smaller than about 25 x 25.
    """
    width, height = boxes_xywh[:, 2], boxes_xywh[:, 3]
    return (width * height / ((width + 10) * (height + 10))).clamp(max=0.5)
