"""Photometric distortion, as SSD trains with."""

from __future__ import annotations

from dataclasses import dataclass, replace

import cv2
import numpy as np

from detres.data.frame import Framed
from detres.data.transforms import Sample

LEVELS = np.arange(256, dtype=np.float32)


@dataclass(frozen=True)
class Photometric:
    """Brightness, contrast, saturation, hue (arXiv 1512.02325, section 2.2, after Howard, arXiv 1312.5402), each with
    `probability`, contrast before or after saturation and hue; then, by chance, the channels in another order.

    On bytes, through tables of 256 values: about ten times as fast as on floats, and at most rounding apart. Hue has
    256 steps here.
    """

    probability: float
    brightness: float  # of 255
    contrast: tuple[float, float]
    saturation: tuple[float, float]
    hue: float  # degrees
    channel_order: float

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        colours = self.draw(rng)
        if isinstance(sample.image, Framed):
            return replace(sample, image=replace(sample.image, colours=colours))
        return replace(sample, image=colours.apply(sample.image))

    def draw(self, rng: np.random.Generator) -> Colours:
        brightness, contrast, saturation, hue = rng.random(4) < self.probability
        shift = rng.uniform(-1, 1) * self.brightness if brightness else 0.0
        factor = rng.uniform(*self.contrast) if contrast else 1.0
        stretch = rng.uniform(*self.saturation) if saturation else 1.0
        turn = rng.uniform(-1, 1) * self.hue / 360 * 256 if hue else 0.0
        early, late = (factor, 1.0) if rng.random() < 0.5 else (1.0, factor)
        order = tuple(rng.permutation(3).tolist()) if rng.random() < self.channel_order else (0, 1, 2)
        return Colours(shift, early, stretch, turn, late, order)


@dataclass(frozen=True)
class Colours:
    """What one image gets, in this order."""

    shift: float
    early: float  # contrast
    stretch: float
    turn: float
    late: float  # contrast
    order: tuple[int, int, int]  # of the channels

    def apply(self, image: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8; `device.recolour` is the same on a device."""
        image = apply_table(image, to_bytes(to_bytes(LEVELS + self.shift) * np.float32(self.early)))
        image = turn_colours(image, self.stretch, self.turn)
        image = apply_table(image, to_bytes(LEVELS * np.float32(self.late)))
        return image if self.order == (0, 1, 2) else np.ascontiguousarray(image[..., list(self.order)])


def to_bytes(values: np.ndarray) -> np.ndarray:
    return np.rint(values).clip(0, 255).astype(np.uint8)


def apply_table(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """(H, W, C) uint8 through a table (256,) uint8."""
    return image if (table == LEVELS).all() else cv2.LUT(image, table)


def turn_colours(image: np.ndarray, stretch: float, turn: float) -> np.ndarray:
    """Saturation times `stretch`, and hue plus `turn` (of 256)."""
    if stretch == 1 and turn == 0:
        return image
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV_FULL)
    tables = np.stack([np.rint(LEVELS + turn) % 256, to_bytes(LEVELS * np.float32(stretch)), LEVELS], -1)
    return cv2.cvtColor(cv2.LUT(hsv, tables[None].astype(np.uint8)), cv2.COLOR_HSV2RGB_FULL)
