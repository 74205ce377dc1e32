"""The class of every pixel of an image, from a PNG or from instance masks: read where it is needed, in the loader's
workers, so that neither files nor maps are touched when a data set is opened.

A map is (H, W) uint8; pixels of 255 are ignored in training and evaluation.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from detres.data.images import ImageError
from detres.data.masks import last_segment_ids, rasterize

if TYPE_CHECKING:
    from detres.data.dataset import ImageRecord

IGNORED = 255
MAX_CLASSES = 255  # labels 0..254


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Where the map of an image comes from. `table[k]` is the label of what the source counts as k."""

    table: tuple[int, ...]

    def read(self, record: ImageRecord) -> np.ndarray:
        """The map of the image, (H, W) uint8. Raises ImageError, which names the file, for one that cannot be used."""
        raise NotImplementedError

    def renumbered(self, labels: Sequence[int]) -> LabelMap:
        """The same with `labels[k]` for the label k."""
        return replace(self, table=tuple(labels[k] for k in self.table))


@dataclass(frozen=True, slots=True)
class LabelImage(LabelMap):
    """An image file whose values, grey or palette indices, are k, or 255 where ignored (PASCAL VOC)."""

    path: Path

    def read(self, record: ImageRecord) -> np.ndarray:
        values = read_values(self.path)
        _check_size(self.path, values, record)
        lookup = np.full(256, -1, np.int16)
        lookup[:len(self.table)], lookup[IGNORED] = self.table, IGNORED
        labels = lookup[values]
        if (labels < 0).any():
            raise ImageError(f"values of a label map must be 0 to {len(self.table) - 1}, or {IGNORED} where ignored, "
                             f"got {sorted(set(values[labels < 0].tolist()))[:5]} ({self.path}). Correct the map, or "
                             "name all classes in classes.txt.")
        return labels.astype(np.uint8)


@dataclass(frozen=True, slots=True)
class InstanceMasks(LabelMap):
    """The annotations of the image, painted: k is 0 for background, and 1 + the label of an annotation.

    Pixels of several classes are ignored; those of a crowd are of its class. torchvision's reference script does so,
    too, but ignores pixels of two instances of one class as well.
    """

    def read(self, record: ImageRecord) -> np.ndarray:
        labels = np.full((record.height, record.width), self.table[0], np.uint8)
        painted = np.zeros(labels.shape, bool)
        for item in record.annotations:
            label, inside = self.table[1 + item.label], rasterize(item.segmentation, *labels.shape).view(bool)
            labels[inside & painted & (labels != label)] = IGNORED
            labels[inside & ~painted] = label
            painted |= inside
        return labels


@dataclass(frozen=True, slots=True)
class SegmentImage(LabelMap):
    """A PNG of COCO's panoptic format; `segments` has id, k and crowd (0 or 1) of each segment, one after another.

    Pixels of no segment are ignored; those of a crowd are of its class.
    """

    path: Path
    segments: array  # of 'q': numbers, not objects, of which 10^6 would fill the memory

    def columns(self) -> np.ndarray:
        """(3, S) int64: ids, k and crowd."""
        return np.array(self.segments, np.int64).reshape(-1, 3).T

    def ids(self, record: ImageRecord) -> np.ndarray:
        """(H, W) int32, 0 where there is no segment."""
        ids = last_segment_ids(self.path)
        _check_size(self.path, ids, record)
        return ids

    def read(self, record: ImageRecord) -> np.ndarray:
        ids = self.ids(record)
        labels, known = np.full(ids.shape, IGNORED, np.uint8), ids == 0
        for number, k, _ in self.columns().T.tolist():
            inside = ids == number
            labels[inside] = self.table[k]
            known |= inside
        if not known.all():
            raise ImageError(f"ids in a panoptic PNG must be 0 or those of its segments_info, got "
                             f"{np.unique(ids[~known])[:5].tolist()} (id = R + 256 G + 65536 B; {self.path}). Add them "
                             "to the JSON file, or paint them black.")
        return labels


def read_values(path: Path) -> np.ndarray:
    """(H, W) uint8 as stored: palettes are not looked up."""
    try:
        with Image.open(path) as image:
            mode = image.mode
            values = np.array(image)
    except Exception as error:  # Pillow's decoders raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ImageError(f"label map must be a readable PNG, got {reason} ({path}). Replace it.") from None
    if mode not in ("P", "L"):
        raise ImageError(f"label map must have one channel of 8 bits, grey or a palette, got mode {mode} ({path}). "
                         "Store the number of the class in each pixel, not its colour.")
    return values


def _check_size(path: Path, values: np.ndarray, record: ImageRecord) -> None:
    if values.shape != (record.height, record.width):
        raise ImageError(f"label map must have the size of its image, {record.width} x {record.height} px (width x "
                         f"height), got {values.shape[1]} x {values.shape[0]} ({path}, of {record.path}). Make it anew "
                         "from the same image.")
