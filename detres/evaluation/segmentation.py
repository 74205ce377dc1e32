"""Semantic and panoptic evaluation of a model's answers as they come, at the original size of each image.

Legend: N images, (H, W) the original size, which differs between images: so the work is image by image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detres.data.dataset import Dataset
from detres.data.label_maps import SegmentImage
from detres.evaluation.base import EvalResult
from detres.evaluation.panoptic import PanopticEvaluator, Segments
from detres.evaluation.semantic import SemanticEvaluator
from detres.inference.segment import Merge, original_labels
from detres.ops.paste_masks import paste_masks
from detres.structures import Batch, Detections


class SemanticTest:
    """`SemanticEvaluator` of logits (N, C, H, W) on the canvas; an evaluator for `evaluation.run.evaluate`."""

    def __init__(self, dataset: Dataset, classes: Sequence[str] | None = None):
        self.dataset, self.semantic = dataset, SemanticEvaluator(classes or dataset.classes)
        self.metric_names = self.semantic.metric_names

    def reset(self) -> None:
        self.semantic.reset()

    @torch.no_grad()
    def update(self, logits: Tensor, batch: Batch) -> list[Tensor]:
        """Adds a batch; returns the labels (H, W) of each image."""
        truths, contents = batch.pixel_truths.semantic, batch.images.sizes.tolist()
        labels = [original_labels(own, content, truth.shape) for own, content, truth in zip(logits, contents, truths)]
        for own, truth in zip(labels, truths):
            self.semantic.update(own, truth)
        return labels

    def state(self) -> Any:
        return self.semantic.state()

    def merge(self, states: Sequence[Any]) -> None:
        self.semantic.merge(states)

    def compute(self) -> EvalResult:
        return self.semantic.compute()


class PanopticTest:
    """`PanopticEvaluator` of detections with masks and semantic logits, and `SemanticEvaluator` of these.

    merge: of the instances and semantic labels of an image (`build.build_merge`).
    """

    def __init__(self, dataset: Dataset, merge: Merge):
        self.dataset, self._merge = dataset, merge
        self._semantic = SemanticTest(dataset, dataset.semantic_classes)
        things, stuff = dataset.classes, dataset.semantic_classes[1:]
        self._panoptic = PanopticEvaluator((*things, *stuff), [True] * len(things) + [False] * len(stuff))
        self._maps = {record.id: record.label_map for record in dataset.records}
        self.metric_names = (*PanopticEvaluator.metric_names, *SemanticEvaluator.metric_names)

    def reset(self) -> None:
        self._semantic.reset()
        self._panoptic.reset()

    @torch.no_grad()
    def update(self, found: Detections, batch: Batch) -> None:
        """Adds a batch. `found` is in pixels of the canvas."""
        labels = self._semantic.update(found.semantic, batch)
        found = found.rescale(batch.images.sizes, batch.original_sizes)
        for i, (image_id, own, truth) in enumerate(zip(batch.image_ids, labels, batch.pixel_truths.segments)):
            keep = found.valid[i].nonzero()[:, 0]
            masks = paste_masks(found.masks[i, keep], found.boxes[i, keep].float(), own.shape, convention=found.paste)
            pred_map, segments = self._merge(found.scores[i, keep].float(), found.labels[i, keep], masks, own)
            channel = torch.where(segments.is_thing, segments.labels, segments.labels + len(self.dataset.classes) - 1)
            pred = Segments(segments.ids, channel, torch.zeros_like(segments.is_thing))
            label_map = self._maps[image_id]
            self._panoptic.update(image_id, pred_map, pred, truth, true_segments(label_map, truth.device),
                                  f"image {image_id!r}, {label_map.path}")

    def state(self) -> Any:
        return self._semantic.state(), self._panoptic.state()

    def merge(self, states: Sequence[Any]) -> None:
        semantic, panoptic = zip(*states)
        self._semantic.merge(semantic)
        self._panoptic.merge(panoptic)

    def compute(self) -> EvalResult:
        return self._panoptic.compute().merged(self._semantic.compute())


def true_segments(label_map: SegmentImage, device: torch.device | str) -> Segments:
    """Labels of things, then of stuff."""
    ids, labels, crowd = torch.from_numpy(np.ascontiguousarray(label_map.columns())).to(device)
    return Segments(ids, labels, crowd == 1)
