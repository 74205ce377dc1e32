"""What is done to an image and its objects before they are batched.

Training, in this order: on the image as it is on disk, albumentations, photometric distortion, a policy, RandAugment,
the affine warp and the IoU crop (`augment*.py`); then a resize of the short side, and a random crop if asked, or
large-scale jitter; then the flip; then, with other images that went through the same, copy-paste, mosaic and mixup
(`augment_mix.py`). Evaluation: the resize only. Normalisation is the model's, on its device.

Which objects are dropped is told by `settle` alone.

A label map follows the image as masks do. Legend: H, W the image; G objects; J keypoints. Coordinates are continuous:
the image spans 0..W and 0..H.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import cv2
import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from detres.config import AugmentConfig, EvalConfig, InputConfig
from detres.data.dataset import Dataset
from detres.data.frame import Framed
from detres.data.images import EncodedImage
from detres.data.masks import MaskViews

Resizer = Literal["pillow", "torch"]
SMALLEST = 1.0  # pixels: objects that are left narrower or lower than this are gone


@dataclass(frozen=True)
class Sample:
    """One image with its objects."""

    image: np.ndarray | EncodedImage  # (H, W, 3) RGB, uint8; float32 in 0-255 after a resize without antialiasing
    boxes: np.ndarray  # (G, 4) float32 xyxy, inside the image
    labels: np.ndarray  # (G,) int64
    masks: np.ndarray | MaskViews | None = None  # (G, H, W) uint8, 1 inside; views where `Pipeline.views_masks`
    keypoints: np.ndarray | None = None  # (G, J, 3) float32 x, y, visibility (0: not labelled, all zero)
    semantic: np.ndarray | None = None  # (H, W) uint8 labels of pixels, 255 ignored
    crowd: np.ndarray | None = None  # (G,) bool; None is made: no object
    difficult: np.ndarray | None = None  # (G,) bool, likewise

    def __post_init__(self) -> None:
        for name in ("crowd", "difficult"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, np.zeros(len(self.boxes), bool))

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[:2]

    @property
    def ignored(self) -> np.ndarray:
        """(G,) bool: crowds and difficult objects, which do not train."""
        return self.crowd | self.difficult

    def take(self, rows: np.ndarray) -> Sample:
        """The objects `rows` (indices or bool) only."""
        return replace(self, **{name: None if (array := getattr(self, name)) is None else array[rows]
                                for name in OF_OBJECTS})


OF_OBJECTS = ("boxes", "labels", "masks", "keypoints", "crowd", "difficult")  # fields with a row for each object


Transform = Callable[[Sample, np.random.Generator], Sample]


@dataclass(frozen=True)
class Pipeline:
    """Transforms one after another."""

    steps: tuple[Transform, ...]

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for step in self.steps:
            sample = step(sample, rng)
        return sample

    @property
    def resizes_first(self) -> bool:
        """Then a JPEG can be decoded at a reduced size."""
        return isinstance(self.steps[0], (ResizeShortSide, LargeScaleJitter))

    @property
    def views_masks(self) -> bool:
        """All steps only move pixels: masks can be drawn at the end."""
        return all(isinstance(step, MOVES) for step in self.steps)


def build_train_transforms(augment: AugmentConfig, model_input: InputConfig, dataset: Dataset) -> Pipeline:
    """The training pipeline: a function of a sample and a generator, all of whose chance comes from that generator."""
    steps = _on_disk_size(augment, model_input, dataset)
    if augment.jitter is not None:
        steps.append(LargeScaleJitter(augment.jitter, augment.crop_size, model_input.antialias, augment.min_visible,
                                      augment.resize))
    else:
        low, high = (max(1, round(scale * model_input.min_size)) for scale in augment.scales)
        min_sizes = augment.min_sizes or range(low, high + 1)
        steps.append(ResizeShortSide(min_sizes, model_input.max_size, model_input.antialias, model_input.round_down,
                                     augment.resize))
        if augment.crop_size is not None:
            steps.append(RandomCrop(augment.crop_size, augment.min_visible))
    steps.append(RandomFlip(augment.flip, dataset.flip_pairs))
    return Pipeline(tuple(steps))


def _on_disk_size(augment: AugmentConfig, model_input: InputConfig, dataset: Dataset) -> list[Transform]:
    """What comes before the resize; imported where asked for, as few need it."""
    steps: list[Transform] = []
    fill = mean_colour(model_input)
    if augment.albumentations:
        from detres.data.augment import Albumentations

        steps.append(Albumentations(augment.albumentations, dataset.flip_pairs, augment.min_visible))
    if augment.photometric is not None:
        from detres.data.augment_colour import Photometric

        steps.append(Photometric(**augment.photometric.model_dump()))
    if augment.policy or augment.rand_augment is not None:
        from detres.data.augment_policy import build_policies

        steps += build_policies(augment, fill)
    if augment.affine is not None or augment.iou_crop is not None:
        from detres.data.augment_geometry import build_geometry

        steps += build_geometry(augment, fill)
    return steps


def mean_colour(model_input: InputConfig) -> tuple[float, float, float]:
    """RGB of what the model normalises to zero, with which it fills what is missing of an image."""
    return model_input.mean[::-1] if model_input.channel_order == "bgr" else model_input.mean


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
    backend: Resizer = "pillow"

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        min_size = self.min_sizes[rng.integers(len(self.min_sizes))]
        size = resized_size(*sample.size, min_size, self.max_size, self.antialias, self.round_down)
        return resize(sample, size, self.antialias, self.backend)


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
    min_visible: float = 0.0
    backend: Resizer = "pillow"

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        scale = rng.uniform(*self.scales) * self.crop_size / max(sample.size)
        size = tuple(max(1, int(side * scale + 0.5)) for side in sample.size)
        crop = tuple(min(side, self.crop_size) for side in size)
        y, x = (int(rng.integers(side - kept + 1)) for side, kept in zip(size, crop))
        resized = resize(sample, size, self.antialias, self.backend)
        return crop_sample(resized, y, x, *crop, self.min_visible)


@dataclass(frozen=True)
class RandomCrop:
    """A window of at most `side` pixels a side that holds the middle of an object, drawn among those that do; anywhere
    if there is none. Objects are clipped to it, and those that leave it are dropped."""

    side: int
    min_visible: float = 0.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        kept = tuple(min(length, self.side) for length in sample.size)
        last = np.array(sample.size) - kept  # the largest y and x
        low, high = np.zeros_like(last), last
        if len(boxes := sample.boxes[~sample.ignored]):
            x1, y1, x2, y2 = boxes[rng.integers(len(boxes))]
            middle = np.array([y1 + y2, x1 + x2]) / 2
            low, high = np.clip(np.ceil(middle - kept), 0, last), np.clip(np.floor(middle), 0, last)
            low, high = low.astype(int), high.astype(int)
        y, x = rng.integers(low, high, endpoint=True).tolist()
        return crop_sample(sample, y, x, *kept, self.min_visible)


MOVES = (ResizeShortSide, LargeScaleJitter, RandomCrop, RandomFlip)  # resize, crop or mirror, and are no other step


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


def resize_image(image: np.ndarray | EncodedImage, size: tuple[int, int], antialias: bool,
                 backend: Resizer = "pillow") -> np.ndarray:
    """(H, W, 3) uint8 at a size (height, width): by an antialiased bilinear filter, uint8; or float32 by plain bilinear
    interpolation, which is torchvision's for detection. What is not decoded yet is at a size that suffices."""
    if isinstance(image, EncodedImage):
        image = image.pixels(size)
    if antialias:
        if image.shape[:2] == size:
            return image
        if backend == "pillow":
            return np.array(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    pixels = pixels if antialias else pixels.float()
    resized = F.interpolate(pixels, size, mode="bilinear", align_corners=False, antialias=antialias)
    return resized[0].permute(1, 2, 0).numpy()  # planes in memory


def resize(sample: Sample, size: tuple[int, int], antialias: bool, backend: Resizer = "pillow") -> Sample:
    """The sample at a size (height, width); masks and label map by the nearest pixel centre."""
    height, width = sample.size
    ratio = np.array([size[1] / width, size[0] / height], np.float32)
    masks, keypoints = sample.masks, sample.keypoints
    if masks is not None:
        masks = masks.resized(size) if isinstance(masks, Framed) else resize_masks(masks, size)
    if keypoints is not None:
        keypoints = keypoints * np.append(ratio, 1)
    semantic = sample.semantic
    if semantic is not None:
        semantic = cv2.resize(semantic, size[::-1], interpolation=cv2.INTER_NEAREST_EXACT)
    image = sample.image
    image = image.resized(size) if isinstance(image, Framed) else resize_image(image, size, antialias, backend)
    return replace(sample, image=image, boxes=sample.boxes * np.tile(ratio, 2), masks=masks, keypoints=keypoints,
                   semantic=semantic)


def resize_masks(masks: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    out = np.zeros((len(masks), *size), np.uint8)
    for resized, mask in zip(out, masks):
        cv2.resize(mask, size[::-1], dst=resized, interpolation=cv2.INTER_NEAREST_EXACT)
    return out


def mirror_image(image: np.ndarray) -> np.ndarray:
    """(H, W, 3), interleaved or in planes, as it stays."""
    if image.strides[1] != image.itemsize:
        return cv2.flip(image, 1)
    planes = np.ascontiguousarray(image.transpose(2, 0, 1))
    return cv2.flip(planes.reshape(-1, planes.shape[2]), 1).reshape(planes.shape).transpose(1, 2, 0)


def mirror_masks(masks: np.ndarray) -> np.ndarray:
    out = np.empty_like(masks)
    for mirrored, mask in zip(out, masks):
        cv2.flip(mask, 1, dst=mirrored)  # several times faster than copying a reversed view
    return out


def flip(sample: Sample, flip_pairs: Sequence[tuple[int, int]] = ()) -> Sample:
    """Mirrored left to right; `flip_pairs` of keypoints change places."""
    width = sample.size[1]
    x1, y1, x2, y2 = sample.boxes.T
    boxes = np.stack([width - x2, y1, width - x1, y2], -1).astype(np.float32)
    masks, keypoints = sample.masks, sample.keypoints
    if masks is not None:
        masks = masks.mirrored() if isinstance(masks, Framed) else mirror_masks(masks)
    if keypoints is not None:
        keypoints = swap_pairs(keypoints, flip_pairs)
        keypoints[..., 0] = np.where(keypoints[..., 2] > 0, width - keypoints[..., 0], 0)
    semantic = None if sample.semantic is None else cv2.flip(sample.semantic, 1)
    image = sample.image.mirrored() if isinstance(sample.image, Framed) else mirror_image(sample.image)
    return replace(sample, image=image, boxes=boxes, masks=masks, keypoints=keypoints, semantic=semantic)


def swap_pairs(keypoints: np.ndarray, flip_pairs: Sequence[tuple[int, int]]) -> np.ndarray:
    """A copy of keypoints (G, J, 3) with the pairs exchanged."""
    order = np.arange(keypoints.shape[1])
    for left, right in flip_pairs:
        order[[left, right]] = right, left
    return keypoints[:, order].copy()


def crop_sample(sample: Sample, y: int, x: int, height: int, width: int, min_visible: float = 0.0) -> Sample:
    """The window of (height, width) at (y, x); what leaves it is dropped as `settle` tells."""
    image, masks, keypoints = sample.image, sample.masks, sample.keypoints
    image = image.window(y, x, height, width) if isinstance(image, Framed) else image[y:y + height, x:x + width]
    boxes = sample.boxes - np.array([x, y, x, y], np.float32)
    if masks is not None:
        masks = (masks.window(y, x, height, width) if isinstance(masks, Framed) else
                 masks[:, y:y + height, x:x + width])
    if keypoints is not None:
        keypoints = hide_outside(keypoints - np.array([x, y, 0], np.float32), height, width)
    semantic = None if sample.semantic is None else sample.semantic[y:y + height, x:x + width]
    cropped = replace(sample, image=image, boxes=clip_boxes(boxes, height, width), masks=masks, keypoints=keypoints,
                      semantic=semantic)
    return settle(cropped, replace(sample, boxes=boxes), min_visible)


def clip_boxes(boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    return boxes.clip(0, np.array([width, height] * 2, np.float32))


def hide_outside(keypoints: np.ndarray, height: int, width: int) -> np.ndarray:
    """Keypoints (G, J, 3) with those outside the image, or not labelled, all zero."""
    x, y, visible = np.moveaxis(keypoints, -1, 0)
    inside = (visible > 0) & (x >= 0) & (x <= width) & (y >= 0) & (y <= height)
    return np.where(inside[..., None], keypoints, 0).astype(np.float32)


def settle(sample: Sample, before: Sample, min_visible: float = 0.0, moved: np.ndarray | None = None,
           scale: float = 1.0) -> Sample:
    """After objects were cut or covered: boxes fit their masks again, and those that are gone are dropped.

    Gone is an object whose mask lost its last pixel, whose box has a side under `SMALLEST`, or of which less than
    `min_visible` is left: of its mask's area, or, without a mask, of its box's. This is the one rule of all transforms.

    `before`: the same objects uncut, with boxes in the new frame, and masks in the old one, of which a pixel makes
    `scale` new ones. Where a mask had no pixel (thinner than one), the box alone counts. `moved` (G,): objects this
    concerns; None: all.
    """
    moved = np.ones(len(sample.boxes), bool) if moved is None else moved
    boxes, gone = sample.boxes.copy(), np.zeros(len(moved), bool)
    if sample.masks is not None:
        has_mask = sample.masks.any((1, 2))
        for row in np.flatnonzero(moved & has_mask):
            boxes[row] = tight_box(sample.masks[row])
        gone = before.masks.any((1, 2)) & ~has_mask
    gone |= moved & ((boxes[:, 2:] - boxes[:, :2]) < SMALLEST).any(1)
    if min_visible:
        gone |= moved & (areas(sample) < min_visible * areas(before, scale))
    return replace(sample, boxes=boxes).take(~gone)


def areas(sample: Sample, scale: float = 1.0) -> np.ndarray:
    """(G,) pixels of the masks, times `scale`; of objects without any, the area of the box."""
    found = (sample.boxes[:, 2:] - sample.boxes[:, :2]).prod(1)
    if sample.masks is None:
        return found
    pixels = np.array([cv2.countNonZero(mask) for mask in sample.masks])
    return np.where(pixels > 0, pixels * scale, found)


def tight_box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """xyxy of the pixels of a mask (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
