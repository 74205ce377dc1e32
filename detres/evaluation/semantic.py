"""Semantic segmentation: IoU and accuracy from a confusion matrix that stays on the device.

With `m[p, t]` the number of pixels predicted p that are truly t, over all images and without ignored pixels:

    IoU_k = m[k, k] / (m[k, :] + m[:, k] - m[k, k])      ACC_k = m[k, k] / m[:, k]
    mIoU, mACC = their means over classes                fwIoU = sum_k IoU_k m[:, k] / sum(m)
    pACC = sum_k m[k, k] / sum(m)

Names and formulas are those of Detectron2's SemSegEvaluator (as fractions here). Which classes a mean counts: for ACC
those with ground truth; for IoU those with ground truth *or* predictions, so a class that is predicted but never there
has IoU 0 and counts, as in Cityscapes' scripts, MMSegmentation and earlier versions of Detectron2. Detectron2's main
branch now leaves such classes out of mIoU too: its mIoU is this one times (classes with either) / (classes with ground
truth). The other three numbers agree.

Legend: N images of H x W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detres.evaluation.base import EvalResult


class SemanticEvaluator:
    """Counts pixels batch by batch. Each image must be given once: unlike boxes, pixels are not kept per image."""

    metric_names = ("sem_seg/mIoU", "sem_seg/fwIoU", "sem_seg/mACC", "sem_seg/pACC")

    def __init__(self, classes: Sequence[str], ignore_label: int = 255):
        """`classes[k]` is the name of label k; pixels whose target is `ignore_label` are not looked at."""
        if not classes or len(set(classes)) != len(classes):
            raise ValueError(f"classes must be one or more distinct names, got {list(classes)} (SemanticEvaluator).")
        self.classes = tuple(classes)
        self.ignore_label = ignore_label
        self.reset()

    def reset(self) -> None:
        """Forget all pixels."""
        # The matrix (K * K), then pixels with a wrong prediction, with a wrong target, and ignored ones.
        self._counts = torch.zeros(len(self.classes) ** 2 + 3, dtype=torch.int64)

    def update(self, prediction: Tensor, target: Tensor) -> None:
        """Add labels (N, H, W), of any integer type, both on one device. Nothing is copied to the host.

        Raises ValueError for shapes that differ and for logits; labels out of range are reported by `compute`.
        """
        self._check(prediction, target)
        k = len(self.classes)
        prediction, target = prediction.flatten().long(), target.flatten().long()
        cell = prediction * k + target
        cell = torch.where((prediction < 0) | (prediction >= k), k * k, cell)
        cell = torch.where((target < 0) | (target >= k), k * k + 1, cell)
        cell = torch.where(target == self.ignore_label, k * k + 2, cell)
        self._counts = self._counts.to(cell.device)
        # Not bincount: on CUDA that reads its largest input back to the host.
        self._counts.index_add_(0, cell, torch.ones_like(cell[:1]).expand_as(cell))

    def _check(self, prediction: Tensor, target: Tensor) -> None:
        for name, labels in (("prediction", prediction), ("target", target)):
            if labels.is_floating_point() or labels.dtype == torch.bool:
                raise ValueError(f"{name} must be integer labels, got {labels.dtype} of shape {tuple(labels.shape)} "
                                 "(SemanticEvaluator.update). Give logits.argmax(1).")
        if prediction.shape != target.shape:
            raise ValueError(f"prediction must have the shape of the target, got {tuple(prediction.shape)} and "
                             f"{tuple(target.shape)} (SemanticEvaluator.update). Resize the logits to the target.")

    def state(self) -> Tensor:
        """The counts so far, on the host, to be sent to other ranks."""
        return self._counts.cpu().clone()

    def merge(self, states: Sequence[Tensor]) -> None:
        """Take over what all ranks counted: integers are summed, so their order does not matter."""
        self._counts = torch.stack(list(states)).sum(0)

    def matrix(self) -> Tensor:
        """The confusion matrix (K, K) int64, on the host: row predicted, column true.

        Raises ValueError if any label was out of range.
        """
        counts = self._counts.cpu()
        predicted, true, _ = counts[-3:].tolist()
        k = len(self.classes)
        if predicted or true:
            raise ValueError(f"labels must be 0 to {k - 1}, and in the target also {self.ignore_label} (ignored), got "
                             f"{predicted} pixels of predictions and {true} of targets outside (SemanticEvaluator). "
                             "Map category ids to 0..K-1, or set ignore_label.")
        return counts[:-3].view(k, k)

    def compute(self) -> EvalResult:
        """Metrics "sem_seg/mIoU" ..., and per class "sem_seg/IoU" and "sem_seg/ACC"; -1 where nothing was there.

        Raises ValueError if any label was out of range.
        """
        matrix = self.matrix().double()  # exact: counts below 2^53
        hits, predicted, true = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
        iou, accuracy = _ratio(hits, predicted + true - hits), _ratio(hits, true)
        total = true.sum()
        weighted = _ratio((iou * true).sum(), total)
        values = (_mean(iou), weighted.item(), _mean(accuracy), _ratio(hits.sum(), total).item())
        per_class = {name: {"sem_seg/IoU": iou[k].item(), "sem_seg/ACC": accuracy[k].item()}
                     for k, name in enumerate(self.classes)}
        return EvalResult(dict(zip(self.metric_names, values)), per_class)


def _ratio(part: Tensor, whole: Tensor) -> Tensor:
    """part / whole; -1 where the whole is nothing."""
    return torch.where(whole > 0, part / whole, -1.0)


def _mean(values: Tensor) -> float:
    measured = values[values >= 0]
    return measured.mean().item() if len(measured) else -1.0
