"""What flows between the rooms: frozen dataclasses of padded tensors, batched over images.

Legend: N images, G padded ground-truth rows, M real instances in the batch, P proposals, D detections,
J keypoints, (H, W) the padded canvas shared by the batch.

Padding is always explicit: a row counts only where `valid` is True. Boxes are xyxy, absolute pixels of the
padded canvas, float32, continuous coordinates (a box over the first pixel is 0, 0, 1, 1). Sizes are
(height, width). Labels are 0..K-1.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor


class Movable:
    """Gives a dataclass of tensors `.to(device)`; everything that is not a tensor is kept as it is."""

    def to(self, device: torch.device | str, non_blocking: bool = False):
        return replace(self, **{name: _apply(value, lambda x: x.to(device, non_blocking=non_blocking))
                                for name, value in _items(self)})

    def pin_memory(self):
        return replace(self, **{name: _apply(value, lambda x: x.pin_memory()) for name, value in _items(self)})


def _items(data: Any):
    return ((field.name, getattr(data, field.name)) for field in fields(data))


def _apply(value: Any, function):
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, Movable):
        return replace(value, **{name: _apply(inner, function) for name, inner in _items(value)})
    if isinstance(value, tuple):
        return tuple(_apply(inner, function) for inner in value)
    return value


@dataclass(frozen=True)
class ImageBatch(Movable):
    """Images padded at the right and the bottom to one canvas."""

    pixels: Tensor  # (N, 3, H, W) uint8 RGB, 0 where padded; the model normalises on its own device
    sizes: Tensor  # (N, 2) int64, height and width of the content
    pyramid: tuple[ImageBatch, ...] = ()  # multi-scale testing: the same images at other sizes, smallest first


@dataclass(frozen=True)
class Targets(Movable):
    """Ground truth that trains; G is at least 1, padded if need be.

    Crowds are not in here (as in the references): they only count in evaluation.
    """

    boxes: Tensor  # (N, G, 4)
    labels: Tensor  # (N, G) int64
    valid: Tensor  # (N, G) bool
    seeds: Tensor  # (N,) int64: the image's own random seed, so that sampling never depends on the batch it is in
    masks: Tensor | None = None  # (M, H, W) uint8 bitmaps of the valid rows, in row-major (image, row) order
    keypoints: Tensor | None = None  # (N, G, J, 3) x, y, visibility
    proposals: Proposals | None = None  # of another model, to draw regions from (region classifiers)
    semantic: Tensor | None = None  # (N, H, W) uint8 channels of a panoptic model, 255 ignored and where padded


@dataclass(frozen=True)
class ClassTargets(Movable):
    """Ground truth of classification."""

    labels: Tensor  # (N,) int64


@dataclass(frozen=True)
class SemanticTargets(Movable):
    """Ground truth of semantic segmentation."""

    labels: Tensor  # (N, H, W) uint8, 255 ignored and where padded


@dataclass(frozen=True)
class Batch(Movable):
    """What a loader yields."""

    images: ImageBatch
    targets: Targets | ClassTargets | SemanticTargets | None
    image_ids: tuple[int | str, ...]  # ids of the data set
    paths: tuple[str, ...]  # image files, for messages
    original_sizes: Tensor  # (N, 2) int64, height and width of the image on disk (EXIF applied)


@dataclass(frozen=True)
class Proposals(Movable):
    """RPN output, best first. Of a per-class RPN (N, Q, P), for each of Q classes asked about."""

    boxes: Tensor  # (N, P, 4)
    scores: Tensor  # (N, P) probabilities
    valid: Tensor  # (N, P) bool


@dataclass(frozen=True)
class Detections(Movable):
    """What a detector found, best first."""

    boxes: Tensor  # (N, D, 4)
    scores: Tensor  # (N, D)
    labels: Tensor  # (N, D) int64
    valid: Tensor  # (N, D) bool
    masks: Tensor | None = None  # (N, D, S, S) probabilities inside the box; `ops.paste_masks` makes bitmaps
    keypoints: Tensor | None = None  # (N, D, J, 3) x, y, score
    paste: Literal["detectron2", "torchvision"] = "detectron2"  # how `masks` become bitmaps: `ops.paste_masks`
    semantic: Tensor | None = None  # (N, C, H, W) logits of a panoptic model, on the canvas

    def rescale(self, sizes: Tensor, original_sizes: Tensor) -> Detections:
        """Boxes and keypoints in pixels of the original images (N, 2), clipped to them.

        Each axis has its own ratio, as the resized side was rounded to whole pixels.
        """
        height_width = original_sizes.to(self.boxes)
        ratio = (height_width / sizes.to(self.boxes)).flip(-1)  # (N, 2) x, y
        limit = height_width.flip(-1).repeat(1, 2)[:, None]  # (N, 1, 4)
        boxes = (self.boxes * ratio.repeat(1, 2)[:, None]).clamp(min=0).minimum(limit)
        keypoints = self.keypoints
        if keypoints is not None:
            keypoints = torch.cat([keypoints[..., :2] * ratio[:, None, None], keypoints[..., 2:]], -1)
        return replace(self, boxes=boxes, keypoints=keypoints)
