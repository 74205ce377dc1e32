"""Which pixels of a stored image an augmented one shows, told without touching any.

Resizing, cropping and mirroring are maps of rows and of columns. What is `Framed` only notes them, and takes the place
of an array in a sample until its pixels are wanted: masks are then drawn once, where they end up, and images are
resized on another device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeVar

import cv2
import numpy as np

Size = tuple[int, int]  # height, width
F = TypeVar("F", bound="Framed")


@dataclass(frozen=True)
class Frame:
    """A window of `size` at (y, x) of an image of `source` size that was `resized`; it may then be mirrored."""

    source: Size
    resized: Size
    y: int
    x: int
    size: Size
    mirrored: bool = False

    @classmethod
    def whole(cls, source: Size) -> Frame:
        return cls(source, source, 0, 0, source)

    def resize(self, size: Size) -> Frame:
        assert self == Frame.whole(self.source), "an image is resized first, and once"
        return replace(self, resized=size, size=size)

    def window(self, y: int, x: int, height: int, width: int) -> Frame:
        x = self.size[1] - x - width if self.mirrored else x
        return replace(self, y=self.y + y, x=self.x + x, size=(height, width))

    def mirror(self) -> Frame:
        return replace(self, mirrored=not self.mirrored)

    def nearest(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows (H,) and columns (W,) of the source whose centres are nearest, as `cv2.INTER_NEAREST_EXACT` has them."""
        rows, columns = (_nearest(*lengths) for lengths in zip(self.source, self.resized))
        rows, columns = rows[self.y:self.y + self.size[0]], columns[self.x:self.x + self.size[1]]
        return rows, columns[::-1] if self.mirrored else columns


def _nearest(source: int, resized: int) -> np.ndarray:
    ramp = np.arange(source, dtype=np.float32)[:, None]
    return cv2.resize(ramp, (1, resized), interpolation=cv2.INTER_NEAREST_EXACT)[:, 0].astype(int)


class Framed:
    """Base of dataclasses with a `frame`."""

    frame: Frame

    def resized(self: F, size: Size) -> F:
        return replace(self, frame=self.frame.resize(size))

    def window(self: F, y: int, x: int, height: int, width: int) -> F:
        return replace(self, frame=self.frame.window(y, x, height, width))

    def mirrored(self: F) -> F:
        return replace(self, frame=self.frame.mirror())
