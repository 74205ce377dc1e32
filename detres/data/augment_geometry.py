"""Affine warps, and the IoU-constrained crop of SSD.

A warp is a matrix (2, 3) on continuous coordinates, in which pixel i covers i to i + 1; OpenCV counts from the centre
of a pixel, hence the half pixels in `warp`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from detres.config import AugmentConfig
from detres.data.label_maps import IGNORED
from detres.data.transforms import Sample, Transform, clip_boxes, crop_sample, hide_outside, settle

TRIALS = 50  # windows tried for a crop, as in SSD


def build_geometry(augment: AugmentConfig, fill: Sequence[float]) -> list[Transform]:
    steps: list[Transform] = []
    if augment.affine is not None:
        steps.append(RandomAffine(**augment.affine.model_dump(), fill=fill, min_visible=augment.min_visible))
    if augment.iou_crop is not None:
        steps.append(IoUCrop(**augment.iou_crop.model_dump(), min_visible=augment.min_visible))
    return steps


@dataclass(frozen=True)
class RandomAffine:
    """Angles in degrees, `translate` as a fraction of the sides."""

    probability: float
    rotate: float
    shear: float
    scale: tuple[float, float]
    translate: float
    fill: Sequence[float]
    min_visible: float = 0.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        if rng.random() >= self.probability:
            return sample
        angle, *shear = np.radians(rng.uniform(-1, 1, 3) * [self.rotate, self.shear, self.shear])
        shift = rng.uniform(-1, 1, 2) * self.translate * sample.size[::-1]
        linear = rng.uniform(*self.scale) * rotation(angle) @ shearing(*shear)
        return warp(sample, about_middle(linear, sample.size, shift), self.fill, self.min_visible)


@dataclass(frozen=True)
class IoUCrop:
    """SSD (arXiv 1512.02325) section 2.2: the image as it is, or a window that an object overlaps by at least a drawn
    IoU, or any window. In each lies the centre of an object. Where none of 50 fits, the image stays as it is.

    SSD keeps the objects whose centre is inside; here the rule of `settle` holds, as for every crop.
    """

    min_overlaps: Sequence[float]
    scale: tuple[float, float]
    aspect: tuple[float, float]
    min_visible: float = 0.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        bound = (None, 0.0, *self.min_overlaps)[rng.integers(2 + len(self.min_overlaps))]
        boxes = sample.boxes[~sample.ignored]
        if bound is None or not len(boxes):
            return sample
        windows = self._windows(sample.size, rng)
        centres = (boxes[:, :2] + boxes[:, 2:]) / 2
        inside = ((windows[:, None, :2] < centres) & (centres < windows[:, None, 2:])).all(-1).any(1)
        fits = inside & (overlaps(windows, boxes).max(1) >= bound)
        if not fits.any():
            return sample
        x1, y1, x2, y2 = windows[fits.argmax()].tolist()
        return crop_sample(sample, y1, x1, y2 - y1, x2 - x1, self.min_visible)

    def _windows(self, size: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
        """(W, 4) int xyxy; those of a shape that is not allowed are left out, but the last, which is all."""
        whole = np.array(size[::-1])  # width, height
        sides = np.maximum(1, (rng.uniform(*self.scale, (TRIALS, 2)) * whole).astype(int))
        corner = (rng.random((TRIALS, 2)) * (whole - sides + 1)).astype(int)
        aspect = sides[:, 0] / sides[:, 1]
        allowed = (self.aspect[0] <= aspect) & (aspect <= self.aspect[1])
        return np.vstack([np.hstack([corner, corner + sides])[allowed], [0, 0, *whole]])


# Pure functions


def rotation(angle: float) -> np.ndarray:
    """(2, 2), clockwise as seen, in radians."""
    return np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])


def shearing(x: float, y: float) -> np.ndarray:
    """(2, 2), by angles in radians."""
    return np.array([[1, math.tan(x)], [math.tan(y), 1]])


def about_middle(linear: np.ndarray, size: tuple[int, int], shift: Sequence[float] = (0, 0)) -> np.ndarray:
    """(2, 3): the linear map (2, 2) about the middle of an image, then a shift (x, y) in pixels."""
    middle = np.array(size[::-1]) / 2
    return np.hstack([linear, (middle - linear @ middle + shift)[:, None]])


def warp(sample: Sample, matrix: np.ndarray, fill: Sequence[float], min_visible: float = 0.0) -> Sample:
    """The sample under a map (2, 3) that does not mirror, at the same size; `fill` (RGB) is what comes from beyond.

    Image by bilinear interpolation, masks and label map by the nearest pixel centre. Boxes fit their masks; without
    one, they hold the ellipse that their box holds, turned as well: the corners of a turned box lie outside of most
    objects (Kalra et al., Towards Rotation Invariance in Object Detection, ICCV 2021).
    """
    height, width = sample.size
    centred = matrix + np.hstack([np.zeros((2, 2)), matrix[:, :2] @ [[0.5], [0.5]] - 0.5])

    def move(array: np.ndarray, interpolation: int, border: Sequence[float] | float) -> np.ndarray:
        return cv2.warpAffine(array, centred, (width, height), flags=interpolation, borderValue=border)

    boxes = warp_boxes(sample.boxes, matrix)
    masks, keypoints, semantic = sample.masks, sample.keypoints, sample.semantic
    if masks is not None:
        masks = np.zeros_like(masks)
        for row, mask in enumerate(sample.masks):
            masks[row] = move(mask, cv2.INTER_NEAREST, 0)
    if keypoints is not None:
        points = keypoints[..., :2] @ matrix[:, :2].T + matrix[:, 2]
        keypoints = hide_outside(np.dstack([points, keypoints[..., 2]]), height, width)
    if semantic is not None:
        semantic = move(semantic, cv2.INTER_NEAREST, IGNORED)
    warped = replace(sample, image=move(sample.image, cv2.INTER_LINEAR, fill), boxes=clip_boxes(boxes, height, width),
                     masks=masks, keypoints=keypoints, semantic=semantic)
    return settle(warped, replace(sample, boxes=boxes), min_visible, scale=np.linalg.det(matrix[:, :2]))


def warp_boxes(boxes: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """(G, 4) xyxy that hold the ellipses in `boxes` after a map (2, 3)."""
    low, high = boxes[:, :2], boxes[:, 2:]
    centre = (low + high) / 2 @ matrix[:, :2].T + matrix[:, 2]
    half = np.sqrt(((high - low) / 2) ** 2 @ (matrix[:, :2] ** 2).T)
    return np.hstack([centre - half, centre + half]).astype(np.float32)


def overlaps(windows: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """IoU (W, G)."""
    low, high = np.maximum(windows[:, None, :2], boxes[:, :2]), np.minimum(windows[:, None, 2:], boxes[:, 2:])
    shared = (high - low).clip(0).prod(-1)
    one, other = ((array[:, 2:] - array[:, :2]).prod(1) for array in (windows, boxes))
    return shared / (one[:, None] + other - shared)
