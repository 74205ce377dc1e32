"""ImageNet classification: top-1 and top-5, overall and per class (Russakovsky et al., arXiv 1409.0575, section 4.1).

Everything is counted on the device of the logits; nothing waits for it before `compute`. Counts are integers, so the
result is the same in any order of batches and on any number of processes.

Legend: N images of a batch, K classes, C columns of counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from detres.evaluation.base import EvalResult

CountsState = tuple[Tensor, Tensor]


class ClassCounts:
    """Numbers of images by true class, in columns.

    What cannot be counted, because the label is none of the classes or a prediction no number, is told in `total`:
    telling it at once would make the host wait for the device in every batch.
    """

    def __init__(self, classes: int, columns: int):
        self.classes, self.columns = classes, columns
        self.reset()

    def reset(self) -> None:
        self._counts = torch.zeros(self.classes + 1, self.columns, dtype=torch.int64)  # last row: unusable
        self._range = torch.zeros(2, dtype=torch.int64)  # lowest and highest label, or 0

    def add(self, labels: Tensor, flags: Tensor, usable: Tensor) -> None:
        """Count images of true class `labels` (N,) by flags (N, C) bool. `usable` (N,) is False where predictions are
        not numbers."""
        self._counts, self._range = self._counts.to(labels.device), self._range.to(labels.device)
        self._range = torch.stack(torch.cat([labels, self._range]).aminmax())
        row = torch.where(usable, labels.clamp(0, self.classes - 1), self.classes)
        self._counts.index_add_(0, row, torch.where(usable[:, None], flags, True).long())

    def state(self) -> CountsState:
        return self._counts.cpu(), self._range.cpu()

    def merge(self, states: Sequence[CountsState]) -> None:
        """Take over the sum of what all ranks counted."""
        self._counts = torch.stack([counts for counts, _ in states]).sum(0)
        self._range = torch.stack(torch.cat([limits for _, limits in states]).aminmax())

    def total(self) -> Tensor:
        """(K, C) int64 on the host. Raises ValueError for labels out of range and predictions that are nan."""
        counts, (lowest, highest) = self._counts.cpu(), self._range.tolist()
        if lowest < 0 or highest >= self.classes:
            raise ValueError(f"labels must be 0..{self.classes - 1}, got {lowest if lowest < 0 else highest}. "
                             "Evaluate with the classes of the data set, numbered from 0.")
        if counts[-1].any():
            raise ValueError(f"predictions must be numbers, got nan or inf in {int(counts[-1].max())} images. "
                             "The training has probably diverged: lower train.lr.")
        return counts[:-1]


class ClassificationEvaluator:
    """Top-1 and top-5 accuracy and error.

    Averages over crops or models are taken before, of the probabilities. Every image must be added once: the loader of
    a distributed evaluation must not repeat images to fill its last batch.
    """

    metric_names = ("cls/top1", "cls/top5", "cls/top1_error", "cls/top5_error")

    def __init__(self, classes: Sequence[str]):
        self.classes = tuple(classes)
        self._counts = ClassCounts(len(self.classes), 3)  # images, of these right with one guess, with five

    def reset(self) -> None:
        """Forget all images."""
        self._counts.reset()

    def update(self, scores: Tensor, labels: Tensor) -> None:
        """Add scores (N, K), logits or probabilities, of images of true class `labels` (N,) int64, on one device.

        Raises ValueError for shapes that do not fit; `compute` raises it for labels that are not 0..K-1 and for nan.
        """
        if scores.ndim != 2 or scores.shape[1] != len(self.classes) or labels.shape != scores.shape[:1]:
            raise ValueError(f"scores must be (N, {len(self.classes)}) and labels (N,), got {tuple(scores.shape)} and "
                             f"{tuple(labels.shape)}. Evaluate with the classes that the model was built for.")
        rank = rank_of(scores, labels.clamp(0, len(self.classes) - 1))
        flags = torch.stack([rank >= 0, rank < 1, rank < 5], 1)
        self._counts.add(labels, flags, ~scores.isnan().any(1))

    def state(self) -> CountsState:
        """What was counted so far, to be sent to other ranks."""
        return self._counts.state()

    def merge(self, states: Sequence[CountsState]) -> None:
        """Take over what all ranks counted; their order does not matter."""
        self._counts.merge(states)

    def compute(self) -> EvalResult:
        """Accuracies "cls/top1" and "cls/top5" and errors "cls/top1_error" and "cls/top5_error", over all images and
        for each true class; -1 without images. With five classes or fewer, five guesses are always right.

        Raises ValueError for labels out of range and for scores that are nan.
        """
        counts = self._counts.total()
        rows = zip(self.classes, counts.tolist())
        return EvalResult(self._metrics(counts.sum(0).tolist()), {name: self._metrics(row) for name, row in rows})

    def _metrics(self, counts: list[int]) -> dict[str, float]:
        images, top1, top5 = counts
        parts = (top1, top5, images - top1, images - top5)
        return {name: ratio(part, images) for name, part in zip(self.metric_names, parts)}


def rank_of(scores: Tensor, labels: Tensor) -> Tensor:
    """Place (N,) of the class `labels` (N,) among scores (N, K), best 0; of equal scores the lower class is first.

    `torch.topk` leaves the order of equal scores, frequent in half precision, to the device.
    """
    own = scores.gather(1, labels[:, None])
    before = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
    return ((scores > own) | ((scores == own) & before)).sum(1)


def ratio(part: int, whole: int) -> float:
    """A fraction; -1 of nothing."""
    return part / whole if whole else -1.0
