"""One image or many, in batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

ImageLike = str | Path | Image.Image | np.ndarray
T = TypeVar("T")


def in_batches(predict: Callable[[list[ImageLike], Sequence[str | None]], list[T]],
               images: ImageLike | Sequence[ImageLike], paths: Sequence[str] | None, batch_size: int) -> T | list[T]:
    """What `predict` gives for the images and the paths they came from: of one image one, of a list a list."""
    one = not isinstance(images, (list, tuple))
    items = [images] if one else list(images)
    paths = paths or [str(item) if isinstance(item, (str, Path)) else None for item in items]
    parts = [slice(start, start + batch_size) for start in range(0, len(items), batch_size)]
    found = [each for part in parts for each in predict(items[part], paths[part])]
    return found[0] if one else found
