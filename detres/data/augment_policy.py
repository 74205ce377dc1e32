"""RandAugment (arXiv 1909.13719), and policies as AutoAugment's (arXiv 1805.09501; for detection arXiv 1906.11172).

The operations are those of AutoAugment's table 6 which RandAugment has, too, on the same scale of 0 to 10; pixels are
Pillow's to change, as they were the papers'. Geometric ones move the objects along, about the middle of the image.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from detres.config import AugmentConfig, PolicyOpConfig
from detres.data.augment_geometry import about_middle, rotation, shearing, warp
from detres.data.transforms import Sample, Transform

# Of an image; `level` is the magnitude as a fraction, with a random sign where the operation has two directions.
PIXELS: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, level: image,
    "auto_contrast": lambda image, level: ImageOps.autocontrast(image),
    "equalize": lambda image, level: ImageOps.equalize(image),
    "solarize": lambda image, level: ImageOps.solarize(image, round(256 * (1 - abs(level)))),
    "posterize": lambda image, level: ImageOps.posterize(image, 8 - round(4 * abs(level))),
    "brightness": lambda image, level: ImageEnhance.Brightness(image).enhance(1 + 0.9 * level),
    "colour": lambda image, level: ImageEnhance.Color(image).enhance(1 + 0.9 * level),
    "contrast": lambda image, level: ImageEnhance.Contrast(image).enhance(1 + 0.9 * level),
    "sharpness": lambda image, level: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * level)}
# A linear map, and a shift as a fraction of width and height.
STILL = np.eye(2)
MOVES: dict[str, Callable[[float], tuple[np.ndarray, tuple[float, float]]]] = {
    "rotate": lambda level: (rotation(math.radians(30 * level)), (0, 0)),
    "shear_x": lambda level: (shearing(math.atan(0.3 * level), 0), (0, 0)),
    "shear_y": lambda level: (shearing(0, math.atan(0.3 * level)), (0, 0)),
    "translate_x": lambda level: (STILL, (150 / 331 * level, 0)),  # 150 of 331 pixels in the papers
    "translate_y": lambda level: (STILL, (0, 150 / 331 * level))}
OPS = (*PIXELS, *MOVES)


def build_policies(augment: AugmentConfig, fill: Sequence[float]) -> list[Transform]:
    steps: list[Transform] = []
    if augment.policy:
        steps.append(Policy(augment.policy, fill, augment.min_visible))
    if augment.rand_augment is not None:
        steps.append(RandAugment(**augment.rand_augment.model_dump(), fill=fill, min_visible=augment.min_visible))
    return steps


@dataclass(frozen=True)
class RandAugment:
    """`ops` operations drawn from all fourteen, each at `magnitude` of 10."""

    ops: int
    magnitude: float
    fill: Sequence[float]
    min_visible: float = 0.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for number in rng.integers(len(OPS), size=self.ops):
            sample = apply_op(sample, OPS[number], self.magnitude, rng, self.fill, self.min_visible)
        return sample


@dataclass(frozen=True)
class Policy:
    """One of the lists of operations, drawn uniformly; each operation with its own probability and magnitude."""

    policies: Sequence[Sequence[PolicyOpConfig]]
    fill: Sequence[float]
    min_visible: float = 0.0

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        for step in self.policies[rng.integers(len(self.policies))]:
            if rng.random() < step.probability:
                sample = apply_op(sample, step.op, step.magnitude, rng, self.fill, self.min_visible)
        return sample


def apply_op(sample: Sample, name: str, magnitude: float, rng: np.random.Generator, fill: Sequence[float],
             min_visible: float = 0.0) -> Sample:
    """One operation at `magnitude` of 10, its direction drawn."""
    level = magnitude / 10 * rng.choice([-1, 1])
    if name in PIXELS:
        return replace(sample, image=np.array(PIXELS[name](Image.fromarray(sample.image), level)))
    linear, (right, down) = MOVES[name](level)
    height, width = sample.size
    return warp(sample, about_middle(linear, sample.size, (right * width, down * height)), fill, min_visible)
