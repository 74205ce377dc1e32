"""What is done to an image and its objects before they are batched.

Training: albumentations (on the image as it is on disk), then a resize of the short side, and a random crop if asked,
or large-scale jitter, then the flip. Evaluation: the resize only. Normalisation is the model's, on its device.

A label map follows the image as masks do. Legend: H, W the image; G objects; J keypoints. Coordinates are continuous:
the image spans 0..W and 0..H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from detres.config import AugmentConfig, EvalConfig, InputConfig
from detres.data.dataset import Dataset

SMALLEST = 1.0  # pixels: objects that a crop leaves narrower or lower than this are gone


@dataclass(frozen=True)
class Sample:
    """One image with its objects."""

    image: np.ndarray  # (H, W, 3) RGB, uint8; float32 in 0-255 after a resize without antialiasing
    boxes: np.ndarray  # (G, 4) float32 xyxy, inside the image
    labels: np.ndarray  # (G,) int64
    masks: np.ndarray | None = None  # (G, H, W) uint8, 1 inside
    keypoints: np.ndarray | None = None  # (G, J, 3) float32 x, y, visibility (0: not labelled, all zero)
    semantic: np.ndarray | None = None  # (H, W) uint8 labels of pixels, 255 ignored

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[:2]

    def take(self, rows: np.ndarray) -> Sample:
        """The objects `rows` (indices or bool) only."""
        return replace(self, boxes=self.boxes[rows], labels=self.labels[rows],
                       masks=None if self.masks is None else self.masks[rows],
                       keypoints=None if self.keypoints is None else self.keypoints[rows])


Transform = Callable[[Sample, np.random.Generator], Sample]


def build_train_transforms(augment: AugmentConfig, model_input: InputConfig, dataset: Dataset) -> Transform:
    """The training pipeline: a function of a sample and a generator, all of whose chance comes from that generator."""
    steps: list[Transform] = []
    if augment.albumentations:
        from detres.data.augment import Albumentations  # slow to import, and few need it

        steps.append(Albumentations(augment.albumentations, dataset.flip_pairs))
    if augment.jitter is not None:
        steps.append(LargeScaleJitter(augment.jitter, augment.crop_size, model_input.antialias))
    else:
        low, high = (max(1, round(scale * model_input.min_size)) for scale in augment.scales)
        min_sizes = augment.min_sizes or range(low, high + 1)
        steps.append(ResizeShortSide(min_sizes, model_input.max_size, model_input.antialias, model_input.round_down))
        if augment.crop_size is not None:
            steps.append(RandomCrop(augment.crop_size))
    steps.append(RandomFlip(augment.flip, dataset.flip_pairs))

    def apply(sample: Sample, rng: np.random.Generator) -> Sample:
        for step in steps:
            sample = step(sample, rng)
        return sample

    return apply


def resize_for_eval(image: np.ndarray, model_input: InputConfig) -> np.ndarray:
    """An image (H, W, 3) uint8 at the size that the model is evaluated at; float32 if not antialiased."""
    size = resized_size(*image.shape[:2], model_input.min_size, model_input.max_size, model_input.antialias,
                        model_input.round_down)
    return resize_image(image, size, model_input.antialias)


def scale_pyramid(model_input: InputConfig, options: EvalConfig) -> tuple[InputConfig, ...]:
    """The preprocessing of each scale of multi-scale testing, smallest first; none if it is off."""
    sides, bound = options.test_scales or (), options.test_max_size
    return tuple(model_input.model_copy(update={"min_size": side, "max_size": bound}) for side in sides)


@dataclass(frozen=True)
class ResizeShortSide:
    """The short side becomes one of `min_sizes`, or less where the long side would pass `max_size`."""

    min_sizes: Sequence[int]
    max_size: int
    antialias: bool
    round_down: bool = False

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        min_size = self.min_sizes[rng.integers(len(self.min_sizes))]
        size = resized_size(*sample.size, min_size, self.max_size, self.antialias, self.round_down)
        return resize(sample, size, self.antialias)


@dataclass(frozen=True)
class RandomFlip:
    probability: float
    flip_pairs: Sequence[tuple[int, int]] = ()

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        return flip(sample, self.flip_pairs) if rng.random() < self.probability else sample


@dataclass(frozen=True)
class LargeScaleJitter:
    """Simple Copy-Paste (arXiv 2012.07177) section 3: fit the image into a square of `crop_size` times a random scale,
    then take a random crop of at most `crop_size` a side. What is missing to the square, the loader pads.
    """

    scales: tuple[float, float]
    crop_size: int
    antialias: bool

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        scale = rng.uniform(*self.scales) * self.crop_size / max(sample.size)
        size = tuple(max(1, int(side * scale + 0.5)) for side in sample.size)
        crop = tuple(min(side, self.crop_size) for side in size)
        y, x = (int(rng.integers(side - kept + 1)) for side, kept in zip(size, crop))
        return crop_sample(resize(sample, size, self.antialias), y, x, *crop)


@dataclass(frozen=True)
class RandomCrop:
    """A window of at most `side` pixels a side that holds the middle of an object, drawn among those that do; anywhere
    if there is none. Objects are clipped to it, and those that leave it are dropped."""

    side: int

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        kept = tuple(min(length, self.side) for length in sample.size)
        last = np.array(sample.size) - kept  # the largest y and x
        low, high = np.zeros_like(last), last
        if len(sample.boxes):
            x1, y1, x2, y2 = sample.boxes[rng.integers(len(sample.boxes))]
            middle = np.array([y1 + y2, x1 + x2]) / 2
            low, high = np.clip(np.ceil(middle - kept), 0, last), np.clip(np.floor(middle), 0, last)
            low, high = low.astype(int), high.astype(int)
        y, x = rng.integers(low, high, endpoint=True).tolist()
        return crop_sample(sample, y, x, *kept)


# Pure functions


def resized_size(height: int, width: int, min_size: int, max_size: int, antialias: bool,
                 round_down: bool = False) -> tuple[int, int]:
    """Height and width after a resize of the short side, bounded on the long side.

    With antialiasing rounded as Detectron2's ResizeShortestEdge does, or cut as torchvision's `resize`; without, cut as
    its GeneralizedRCNNTransform.
    """
    short, long = min(height, width), max(height, width)
    if antialias and round_down:
        bound = min(min_size, max_size * short // long)  # of the short side
        return max(1, height * bound // short), max(1, width * bound // short)
    if antialias:
        scale = min_size / short
        sides = [float(min_size) if side == short else scale * side for side in (height, width)]
        if max(sides) > max_size:
            shrink = max_size / max(sides)
            sides = [side * shrink for side in sides]
        return max(1, int(sides[0] + 0.5)), max(1, int(sides[1] + 0.5))
    scale = min(min_size / short, max_size / long)
    return max(1, math.floor(height * scale)), max(1, math.floor(width * scale))


def resize_image(image: np.ndarray, size: tuple[int, int], antialias: bool) -> np.ndarray:
    """(H, W, 3) uint8 at a size (height, width): by Pillow's antialiased bilinear filter, uint8; or float32 by plain
    bilinear interpolation, which is torchvision's for detection."""
    if antialias:
        if image.shape[:2] == size:
            return image
        return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    return F.interpolate(pixels, size, mode="bilinear", align_corners=False)[0].permute(1, 2, 0).numpy()


def resize(sample: Sample, size: tuple[int, int], antialias: bool) -> Sample:
    """The sample at a size (height, width); masks and label map by the nearest pixel centre."""
    height, width = sample.size
    ratio = np.array([size[1] / width, size[0] / height], np.float32)
    masks, keypoints = sample.masks, sample.keypoints
    if masks is not None:
        masks = np.zeros((len(masks), *size), np.uint8)
        for row, mask in enumerate(sample.masks):
            cv2.resize(mask, size[::-1], dst=masks[row], interpolation=cv2.INTER_NEAREST_EXACT)
    if keypoints is not None:
        keypoints = keypoints * np.append(ratio, 1)
    semantic = sample.semantic
    if semantic is not None:
        semantic = cv2.resize(semantic, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    return Sample(resize_image(sample.image, size, antialias), sample.boxes * np.tile(ratio, 2), sample.labels, masks,
                  keypoints, semantic)


def flip(sample: Sample, flip_pairs: Sequence[tuple[int, int]] = ()) -> Sample:
    """Mirrored left to right; `flip_pairs` of keypoints change places."""
    width = sample.size[1]
    x1, y1, x2, y2 = sample.boxes.T
    boxes = np.stack([width - x2, y1, width - x1, y2], -1).astype(np.float32)
    masks, keypoints = sample.masks, sample.keypoints
    if masks is not None:
        masks = np.empty_like(masks)
        for row, mask in enumerate(sample.masks):
            cv2.flip(mask, 1, dst=masks[row])  # several times faster than copying a reversed view
    if keypoints is not None:
        keypoints = swap_pairs(keypoints, flip_pairs)
        keypoints[..., 0] = np.where(keypoints[..., 2] > 0, width - keypoints[..., 0], 0)
    semantic = None if sample.semantic is None else cv2.flip(sample.semantic, 1)
    return Sample(cv2.flip(sample.image, 1), boxes, sample.labels, masks, keypoints, semantic)


def swap_pairs(keypoints: np.ndarray, flip_pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """A copy of keypoints (G, J, 3) with the pairs exchanged."""
    order = np.arange(keypoints.shape[1])
    for left, right in flip_pairs:
        order[[left, right]] = right, left
    return keypoints[:, order].copy()


def crop_sample(sample: Sample, y: int, x: int, height: int, width: int) -> Sample:
    """The window of (height, width) at (y, x); what leaves it, or all but leaves it, is dropped."""
    image = sample.image[y:y + height, x:x + width]
    boxes = (sample.boxes - np.array([x, y, x, y], np.float32)).clip(0, np.array([width, height] * 2, np.float32))
    masks, keypoints = sample.masks, sample.keypoints
    if masks is not None:
        masks = masks[:, y:y + height, x:x + width]
    if keypoints is not None:
        keypoints = hide_outside(keypoints - np.array([x, y, 0], np.float32), height, width)
    semantic = None if sample.semantic is None else sample.semantic[y:y + height, x:x + width]
    cropped = Sample(image, boxes, sample.labels, masks, keypoints, semantic)
    return settle(cropped, had_mask=None if masks is None else sample.masks.any((1, 2)))


def hide_outside(keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    """Keypoints (G, J, 3) with those outside the image, or not labelled, all zero."""
    x, y, visible = np.moveaxis(keypoints, -1, 0)
    inside = (visible > 0) & (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    return np.where(inside[..., None], keypoints, 0).astype(np.float32)


def settle(sample: Sample, had_mask: np.ndarray | None, moved: np.ndarray | None = None) -> Sample:
    """After a crop or a warp: boxes fit their masks again, and objects that are gone are dropped.

    `had_mask` (G,): the mask had pixels before. Where it had none (thinner than a pixel), the box alone counts.
    `moved` (G,): objects this concerns; None: all.
    """
    moved = np.ones(len(sample.boxes), bool) if moved is None else moved
    boxes, gone = sample.boxes.copy(), np.zeros(len(moved), bool)
    if sample.masks is not None:
        has_mask = sample.masks.any((1, 2))
        for row in np.flatnonzero(moved & has_mask):
            boxes[row] = tight_box(sample.masks[row])
        gone = had_mask & ~has_mask
    gone |= moved & ((boxes[:, 2:] - boxes[:, :2]) < SMALLEST).any(1)
    return replace(sample, boxes=boxes).take(~gone)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """xyxy of the pixels of a mask (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
