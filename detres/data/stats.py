"""What is in a data set, in numbers: counts, sizes, shapes, places, balance of classes. No image is opened.

Boxes are clipped to their image, as training does. Sizes, shapes and places are of objects, that is of annotations but
crowds, whose boxes are those of groups. Legend: I images, A annotations, O objects, K classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from detres.config import AnchorConfig, InputConfig
from detres.data.dataset import Dataset

QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
SMALL, MEDIUM = 32**2, 96**2  # pixels of area, at which COCO's evaluation parts small, medium and large
GRID = 24  # cells a side of the map of centres
POOR_IOU = 0.5  # an anchor that overlaps an object less is a bad start for it
POOR_SHARE = 0.05  # of objects without a good anchor: less is not worth a word


@dataclass(frozen=True)
class Columns:
    """The annotations of a split, a column for each property."""

    name: str
    classes: tuple[str, ...]
    sizes: np.ndarray  # (I, 2) float64 height, width
    image: np.ndarray  # (A,) int64 row of the image
    label: np.ndarray  # (A,) int64
    boxes: np.ndarray  # (A, 4) float64 xyxy, inside the image
    area: np.ndarray  # (A,) float64 pixels as annotated: of the mask, where there is one
    crowd: np.ndarray  # (A,) bool, as are the following
    difficult: np.ndarray
    masks: np.ndarray
    keypoints: np.ndarray

    @property
    def object_sides(self) -> np.ndarray:
        """(O, 2) height and width in pixels."""
        boxes = self.boxes[~self.crowd]
        return (boxes[:, 2:] - boxes[:, :2])[:, ::-1]

    @property
    def image_sides(self) -> np.ndarray:
        """(O, 2) height and width of each object's image."""
        return self.sizes[self.image[~self.crowd]]

    @property
    def objects_per_image(self) -> np.ndarray:
        """(I,)"""
        return np.bincount(self.image[~self.crowd], minlength=len(self.sizes))

    @property
    def classes_per_image(self) -> np.ndarray:
        """(I,)"""
        pairs = np.unique(self.image * len(self.classes) + self.label)
        return np.bincount(pairs // max(1, len(self.classes)), minlength=len(self.sizes))

    @property
    def centers(self) -> np.ndarray:
        """(GRID, GRID) objects whose middle is in each cell, rows from the top."""
        boxes = self.boxes[~self.crowd]
        middles = (boxes[:, :2] + boxes[:, 2:]) / 2 / self.image_sides[:, ::-1]
        x, y = np.clip((middles * GRID).astype(int), 0, GRID - 1).T
        return np.bincount(y * GRID + x, minlength=GRID**2).reshape(GRID, GRID)


def columns_of(name: str, dataset: Dataset) -> Columns:
    """Of a split of this name."""
    records, table, image = dataset.records, dataset.records.table(), dataset.records.image_of()
    sizes = np.stack([records.images["height"], records.images["width"]], 1).astype(float)
    boxes = table["box"].clip(0, np.tile(sizes[image][:, ::-1], 2))
    return Columns(name, dataset.classes, sizes, image, table["label"], boxes,
                   *(table[field] for field in ("area", "crowd", "difficult", "masked", "posed")))


class ClassCount(NamedTuple):
    """Annotations of a class, crowds with them, as published counts have it."""

    name: str
    instances: int
    images: int
    share: float  # of all annotations


@dataclass(frozen=True)
class SplitStats:
    """Numbers of one split. `quantiles` are at QUANTILES; sides are square roots of the areas of boxes."""

    name: str
    images: int
    empty_images: int
    annotations: int
    crowds: int
    difficult: int
    masks: int
    keypoints: int
    classes: tuple[ClassCount, ...]
    small: int  # objects by COCO's areas
    medium: int
    large: int
    quantiles: dict[str, tuple[float, ...]]


def split_stats(columns: Columns) -> SplitStats:
    area = columns.area[~columns.crowd]
    small, medium = int((area < SMALL).sum()), int(((area >= SMALL) & (area < MEDIUM)).sum())
    height, width = columns.object_sides.T
    quantities = {
        "image width, px": columns.sizes[:, 1], "image height, px": columns.sizes[:, 0],
        "box side, px": np.sqrt(height * width),
        "box side, % of image side": 100 * np.sqrt(height * width / columns.image_sides.prod(1)),
        "box height / width": height / width,
        "objects an image": columns.objects_per_image, "classes an image": columns.classes_per_image}
    return SplitStats(
        columns.name, len(columns.sizes), int((np.bincount(columns.image, minlength=len(columns.sizes)) == 0).sum()),
        len(columns.label), *(int(flag.sum()) for flag in (columns.crowd, columns.difficult, columns.masks,
                                                           columns.keypoints)),
        class_counts(columns), small, medium, len(area) - small - medium,
        {name: tuple(np.quantile(values, QUANTILES).tolist()) for name, values in quantities.items() if len(values)})


def class_counts(columns: Columns) -> tuple[ClassCount, ...]:
    """In the order of the labels."""
    count = len(columns.classes)
    instances = np.bincount(columns.label, minlength=count)
    images = np.bincount(np.unique(columns.image * count + columns.label) % max(1, count), minlength=count)
    shares = instances / max(1, len(columns.label))
    return tuple(map(ClassCount, columns.classes, instances.tolist(), images.tolist(), shares.tolist()))


# Anchors


class AnchorFit(NamedTuple):
    """How many objects have no good anchor with these settings."""

    overrides: str  # of the config, as `key=value`; "" for the defaults
    poor: float  # share of objects that no anchor, centred on them, overlaps by POOR_IOU


def anchor_fits(columns: Columns) -> tuple[AnchorFit, ...]:
    """The default config's fit, and those settings that are better by a third of it or more, best first; nothing where
    the defaults fit all but POOR_SHARE of the objects."""
    size, anchors = InputConfig(), AnchorConfig()
    plain = poor_share(columns, size, anchors)
    if plain < POOR_SHARE:
        return ()
    sides = {"min_size": size.min_size * 3 // 2, "max_size": size.max_size * 3 // 2}
    finer = {"sizes": tuple(tuple(side / 2 for side in level) for level in anchors.sizes)}
    slim = {"aspect_ratios": (0.25, *anchors.aspect_ratios, 4.0)}
    tried = [AnchorFit(_overrides("model.input", sides), poor_share(columns, size.model_copy(update=sides), anchors))]
    tried += [AnchorFit(_overrides("model.anchors", change),
                        poor_share(columns, size, anchors.model_copy(update=change))) for change in (finer, slim)]
    better = sorted((fit for fit in tried if fit.poor < plain * 2 / 3), key=lambda fit: fit.poor)
    return AnchorFit("", plain), *better


def _overrides(section: str, values: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        return f"[{','.join(map(text, value))}]" if isinstance(value, Sequence) else f"{value:g}"

    return " ".join(f"{section}.{name}={text(value)}" for name, value in values.items())


def poor_share(columns: Columns, size: InputConfig, anchors: AnchorConfig) -> float:
    """The share of objects, resized as training does, whose best anchor overlaps them by less than POOR_IOU. Each is
    taken as centred on them: it tells of shapes, and not of how far apart anchors lie."""
    if not len(columns.object_sides):
        return 0.0
    short, long = columns.image_sides.min(1), columns.image_sides.max(1)
    scale = np.minimum(size.min_size / short, size.max_size / long)
    height, width = (columns.object_sides * scale[:, None]).astype(np.float32).T
    best = np.zeros_like(height)
    for side in chain.from_iterable(anchors.sizes):
        for ratio in anchors.aspect_ratios:
            shared = np.minimum(height, side * ratio**0.5) * np.minimum(width, side / ratio**0.5)
            np.maximum(best, shared / (height * width + side**2 - shared), out=best)
    return float((best < POOR_IOU).mean())
