"""What combines an image with others: copy-paste, mosaic, mixup, in this order.

The others come from a function that the loader gives: images drawn from those that train, by the generator of this
sample, which went through the same pipeline of single images with it. The size of this image stays. Crowds and
difficult objects come along in mosaic and mixup, and are never pasted.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from detres.config import AugmentConfig, InputConfig
from detres.data.label_maps import IGNORED
from detres.data.transforms import OF_OBJECTS, Sample, crop_sample, mean_colour, resize, settle

Fetch = Callable[[], Sample]
Mix = Callable[[Sample, np.random.Generator, Fetch], Sample]


def build_mixes(augment: AugmentConfig, model_input: InputConfig, *, with_masks: bool,
                with_semantic: bool) -> list[Mix]:
    """Raises ValueError for what the model's targets do not allow."""
    if augment.copy_paste is not None and not with_masks:
        raise ValueError("data.augment.copy_paste must be null for a model without masks, got copy_paste. Masks are "
                         "what it cuts out: train a mask_rcnn, or take it out.")
    if augment.mixup is not None and with_semantic:
        raise ValueError("data.augment.mixup must be null for a model with label maps, got mixup. A blended pixel has "
                         "two labels: take it out, or use mosaic.")
    common, mixes = {"fill": mean_colour(model_input), "min_visible": augment.min_visible}, []
    for kind, options in ((CopyPaste, augment.copy_paste), (Mosaic, augment.mosaic), (MixUp, augment.mixup)):
        if options is not None:
            mixes.append(kind(**options.model_dump(), **common))
    return mixes


@dataclass(frozen=True)
class CopyPaste:
    """Simple Copy-Paste (arXiv 2012.07177): a random subset of the objects of another image, over this one. Masks of
    what they cover lose those pixels. The edge is not blended, which in the paper makes no difference."""

    probability: float
    max_objects: int
    fill: Sequence[float]
    min_visible: float = 0.0

    def __call__(self, sample: Sample, rng: np.random.Generator, fetch: Fetch) -> Sample:
        if rng.random() >= self.probability:
            return sample
        other = fit(fetch(), sample.size, rng, self.fill, self.min_visible)
        fitting = np.flatnonzero(~other.ignored & other.masks.any((1, 2)))
        if not len(fitting):
            return sample
        count = rng.integers(1, min(len(fitting), self.max_objects), endpoint=True)
        return paste(sample, other.take(np.sort(rng.choice(fitting, count, replace=False))), self.min_visible)


@dataclass(frozen=True)
class Mosaic:
    """Four images around a point (YOLOv4, arXiv 2004.10934): each is resized by a factor, a random window of it fills
    its quarter, and where it is smaller it lies at the point. This one is at the upper left."""

    probability: float
    scales: tuple[float, float]
    centre: tuple[float, float]
    fill: Sequence[float]
    min_visible: float = 0.0

    def __call__(self, sample: Sample, rng: np.random.Generator, fetch: Fetch) -> Sample:
        height, width = sample.size
        if rng.random() >= self.probability or min(sample.size) < 2:
            return sample
        y, x = (min(max(1, int(rng.uniform(*self.centre) * side)), side - 1) for side in sample.size)
        quarters = ((0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width))
        parts = [self._quarter(part, quarter, (y, x), sample.size, rng)
                 for part, quarter in zip((sample, fetch(), fetch(), fetch()), quarters)]
        whole = join(parts)
        for part, (top, left, bottom, right) in zip(parts[1:], quarters[1:]):
            whole.image[top:bottom, left:right] = part.image[top:bottom, left:right]
            if whole.semantic is not None:
                whole.semantic[top:bottom, left:right] = part.semantic[top:bottom, left:right]
        return whole

    def _quarter(self, sample: Sample, quarter: tuple[int, ...], centre: tuple[int, int], size: tuple[int, int],
                 rng: np.random.Generator) -> Sample:
        """On a canvas of `size`, all of it within the quarter (y1, x1, y2, x2)."""
        factor = rng.uniform(*self.scales)
        scaled = resize(sample, tuple(max(1, round(side * factor)) for side in sample.size),
                        antialias=sample.image.dtype == np.uint8)
        window = random_window(scaled, (quarter[2] - quarter[0], quarter[3] - quarter[1]), rng, self.min_visible)
        y, x = (middle - side if start == 0 else middle
                for start, middle, side in zip(quarter[:2], centre, window.size))
        return on_canvas(window, y, x, size, self.fill)


@dataclass(frozen=True)
class MixUp:
    """This image times a share from Beta(alpha, alpha), another one times the rest (arXiv 1710.09412, 1902.04103), with
    the objects of both, each counted in full. Objects whose image has a share under `min_visible` are dropped. The
    other is cut, or filled up, to the size of this one."""

    probability: float
    alpha: float
    fill: Sequence[float]
    min_visible: float = 0.0

    def __call__(self, sample: Sample, rng: np.random.Generator, fetch: Fetch) -> Sample:
        if rng.random() >= self.probability:
            return sample
        share = rng.beta(self.alpha, self.alpha)
        other = fit(fetch(), sample.size, rng, self.fill, self.min_visible)
        image = cv2.addWeighted(np.ascontiguousarray(sample.image), share, other.image, 1 - share, 0)
        seen = [part.take(np.full(len(part.boxes), part_share >= self.min_visible))
                for part, part_share in ((sample, share), (other, 1 - share))]
        return replace(join(seen), image=image)


# Pure functions


def random_window(sample: Sample, size: tuple[int, int], rng: np.random.Generator, min_visible: float = 0.0) -> Sample:
    """A window of at most `size`. The rule for objects holds for an image that is smaller, too: resizing it may have
    left some under a pixel."""
    kept = tuple(map(min, sample.size, size))
    y, x = (int(rng.integers(side - part + 1)) for side, part in zip(sample.size, kept))
    return crop_sample(sample, y, x, *kept, min_visible)


def fit(sample: Sample, size: tuple[int, int], rng: np.random.Generator, fill: Sequence[float],
        min_visible: float = 0.0) -> Sample:
    """A random window at a random place of a canvas of `size`."""
    window = random_window(sample, size, rng, min_visible)
    y, x = (int(rng.integers(side - part + 1)) for side, part in zip(size, window.size))
    return on_canvas(window, y, x, size, fill)


def on_canvas(sample: Sample, y: int, x: int, size: tuple[int, int], fill: Sequence[float]) -> Sample:
    """The sample at (y, x) of a larger image of `size`."""
    def placed(array: np.ndarray | None, value: Sequence[float] | int) -> np.ndarray | None:
        if array is None or array.shape[-2:] == size:
            return array
        canvas = np.full((*array.shape[:-2], *size), value, array.dtype)
        canvas[..., y:y + array.shape[-2], x:x + array.shape[-1]] = array
        return canvas

    image = sample.image
    if image.shape[:2] != size:
        colour = np.rint(fill) if image.dtype == np.uint8 else fill
        image = cv2.copyMakeBorder(image, y, size[0] - y - image.shape[0], x, size[1] - x - image.shape[1],
                                   cv2.BORDER_CONSTANT, value=tuple(map(float, colour)))
    keypoints = sample.keypoints
    if keypoints is not None:
        keypoints = np.where(keypoints[..., 2:] > 0, keypoints + np.array([x, y, 0], np.float32), 0)
    return replace(sample, image=image, boxes=sample.boxes + np.array([x, y, x, y], np.float32),
                   masks=placed(sample.masks, 0), keypoints=keypoints, semantic=placed(sample.semantic, IGNORED))


def join(samples: Sequence[Sample]) -> Sample:
    """The first, as a copy, with the objects of all; they have one size."""
    rows = {name: None if getattr(samples[0], name) is None
            else np.concatenate([getattr(sample, name) for sample in samples]) for name in OF_OBJECTS}
    first = samples[0]
    return replace(first, image=first.image.copy(), semantic=None if first.semantic is None else first.semantic.copy(),
                   **rows)


def paste(sample: Sample, other: Sample, min_visible: float = 0.0) -> Sample:
    """The objects of the other, which has the same size, over those of this one."""
    over = other.masks.any(0)
    keypoints = sample.keypoints
    if keypoints is not None:
        keypoints = hide_under(keypoints, over)
    covered = np.logical_and(sample.masks, over).any((1, 2))
    masks = sample.masks.copy()
    masks[covered] &= ~over
    below = settle(replace(sample, masks=masks, keypoints=keypoints), sample, min_visible, moved=covered)
    whole = join([below, other])
    cv2.copyTo(np.ascontiguousarray(other.image), over.view(np.uint8), whole.image)
    if whole.semantic is not None:
        np.copyto(whole.semantic, other.semantic, where=over)
    return whole


def hide_under(keypoints: np.ndarray, over: np.ndarray) -> np.ndarray:
    """Keypoints (G, J, 3) with those on pixels of `over` (H, W) bool all zero."""
    height, width = over.shape
    x, y = (np.clip(keypoints[..., axis].astype(int), 0, side - 1) for axis, side in ((0, width), (1, height)))
    hidden = over[y, x] & (keypoints[..., 2] > 0)
    return np.where(hidden[..., None], 0, keypoints)
