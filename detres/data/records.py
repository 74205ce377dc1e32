"""The records of a data set, packed into three arrays: tables of images and of annotations, and bytes of all else.

A million Python objects are a gigabyte, and each worker process that only looks at them gets a copy of its own: looking
counts references, which writes to the memory that they share. Of arrays nothing is written. They can be kept in a file
and mapped (`data.index`), and columns of them are at hand without making an object (`Records.table`).

Legend: N images, A annotations.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from detres.data.dataset import Annotation, ImageRecord
from detres.data.label_maps import InstanceMasks, LabelImage, SegmentImage
from detres.data.masks import PNGSegment
from detres.data.shard_files import ShardImage, ShardStore

# `rest` is where the image's other values are in the bytes, `first` and `last` where its annotations are.
# `block` numbers what lies together where images are read, a shard.
IMAGE = np.dtype([(name, "i8") for name in ("id", "height", "width", "first", "last", "rest", "rest_end", "block")])
_FLAGS = [(name, "?") for name in ("crowd", "difficult", "sized", "masked", "posed", "_1", "_2", "_3")]
# `masked`: has a segmentation; `posed`: has a keypoint that is labelled; `sized`: has the file's width and height.
ANNOTATION = np.dtype([("id", "i8"), ("label", "i8"), ("area", "f8"), ("box", "f8", 4), ("size", "f8", 2), *_FLAGS])
_SCALARS = np.dtype([(name, "i8") for name in ("id", "label")]
                    + [(name, "f8") for name in ("area", "x1", "y1", "x2", "y2", "width", "height")] + _FLAGS)
# Fields that are in the bytes.
_IMAGE_REST = {field.name: field.default for field in fields(ImageRecord)
               if field.name not in ("id", "path", "height", "width", "annotations")}
_ANNOTATION_REST = {field.name: field.default for field in fields(Annotation)
                    if field.name not in ("id", "label", "area", "box", "size", "crowd", "difficult")}


class Records(Sequence):
    """A sequence of `ImageRecord`, made when asked for; equal to the tuple of them.

    `images` (N,) of dtype IMAGE and `annotations` of dtype ANNOTATION are for use by columns; an image's annotations
    are the rows from its `first` to its `last`. `table()` has them in the order of the images. `store` is where shards
    are.
    """

    def __init__(self, images: np.ndarray, annotations: np.ndarray, rest: np.ndarray,
                 store: ShardStore | None = None):
        self.images, self.annotations, self.rest, self.store = images, annotations, rest, store

    @classmethod
    def of(cls, records: Iterable[Any]) -> Records:
        """Raises ValueError for numbers or texts that do not fit."""
        images, rest, shards = [], bytearray(), {}
        try:
            annotations = np.fromiter(_rows(records, images, rest, shards), _SCALARS).view(ANNOTATION)
            store = next(iter(shards)).store if shards else None
            return cls(np.array(images, IMAGE), annotations, np.frombuffer(rest, np.uint8), store)
        except (OverflowError, UnicodeEncodeError) as error:
            raise ValueError("ids and sizes must be whole numbers below 2^63, and texts valid Unicode, got one that is "
                             f"not ({error}). Correct the annotations.") from None

    @classmethod
    def joined(cls, parts: Sequence[Records]) -> Records:
        """One after another."""
        images, rows, rest = [], 0, 0
        for part in parts:
            own = part.images.copy()
            for names, shift in ((("first", "last"), rows), (("rest", "rest_end"), rest)):
                for name in names:
                    own[name] += shift
            images.append(own)
            rows, rest = rows + len(part.annotations), rest + len(part.rest)
        return cls(np.concatenate(images), np.concatenate([part.annotations for part in parts]),
                   np.concatenate([part.rest for part in parts]), parts[0].store)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(index)
        image_id, height, width, first, last, start, end, _ = self.images[index].tolist()
        text, path, values, others = self._decoded(start, end)
        if isinstance(path, ShardImage):
            path = replace(path, store=self.store)
        items = [Annotation(number, label, (x1, y1, x2, y2), area=area, crowd=crowd, difficult=difficult,
                             size=(w, h) if sized else None, **dict(zip(_ANNOTATION_REST, other)))
                 for (number, label, area, x1, y1, x2, y2, w, h, crowd, difficult, sized, *_), other in zip(
                     self.annotations[first:last].view(_SCALARS).tolist(), others)]
        return ImageRecord(image_id if text is None else text, path, height, width, tuple(items),
                      **dict(zip(_IMAGE_REST, values)))

    def __iter__(self) -> Iterator[Any]:
        return map(self.__getitem__, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, (Records, tuple)):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))

    __hash__ = None

    def __repr__(self) -> str:
        return f"Records({len(self)} images, {len(self.rows())} annotations)"

    def take(self, index: Any) -> Records:
        """Those at `index`, a slice or numbers, in its order; they share all but the table of images."""
        return Records(self.images[index], self.annotations, self.rest, self.store)

    def mapped(self, function: Callable[[Any], Any]) -> Records:
        """Those that `function` makes of each."""
        return Records.of(map(function, self))

    def ids(self) -> list[int | str]:
        """Of all images."""
        ids = self.images["id"].tolist()
        return [self._decoded(*self.images[["rest", "rest_end"]][place].tolist())[0] if number == _TEXT else number
                for place, number in enumerate(ids)] if _TEXT in ids else ids

    def paths(self) -> Iterator[Any]:
        """Of all images, without making records: ten times as quick."""
        for start, end in self.images[["rest", "rest_end"]].tolist():
            path = _decode_path(self.rest[start:end].data)[1]
            yield replace(path, store=self.store) if isinstance(path, ShardImage) else path

    def rows(self) -> np.ndarray:
        """(A,) rows of `annotations`, image by image."""
        return ranges(self.images["first"], self.counts())

    def counts(self) -> np.ndarray:
        """(N,) annotations of each image."""
        return self.images["last"] - self.images["first"]

    def image_of(self) -> np.ndarray:
        """(A,) the place of each annotation's image."""
        return np.repeat(np.arange(len(self)), self.counts())

    def table(self) -> np.ndarray:
        """(A,) of dtype ANNOTATION, image by image."""
        rows = self.rows()
        whole = len(rows) == len(self.annotations) and (rows == np.arange(len(rows))).all()
        return self.annotations if whole else self.annotations[rows]

    def trainable(self) -> np.ndarray:
        """(A,) bool: which annotations train, neither crowds (as in the references) nor difficult objects (as in
        py-faster-rcnn)."""
        table = self.table()
        return ~(table["crowd"] | table["difficult"])

    def without_masks(self, asked: Any = True) -> str:
        """Which of the annotations `asked` (A,) have no segmentation, for a message; "" if all have one."""
        bare = np.flatnonzero(~self.table()["masked"] & asked)
        if not len(bare):
            return ""
        path = self[int(self.image_of()[bare[0]])].path
        return f"{len(bare)} without, such as annotation {self.table()['id'][bare[0]]} of {path}"

    def _decoded(self, start: int, end: int) -> list[Any]:
        return decode(self.rest[start:end].data)


def ranges(first: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Whole numbers from each `first` on, as many as its count, one range after another."""
    return np.arange(counts.sum()) + np.repeat(first - np.cumsum(counts) + counts, counts)


# Packing

_TEXT = -2**63  # stands for an id that is a text


@dataclass(frozen=True)
class _Shard:
    store: ShardStore
    name: str


def _rows(records: Iterable[Any], images: list[tuple[int, ...]], rest: bytearray, shards: dict[_Shard, int]
          ) -> Iterator[tuple[Any, ...]]:
    """The annotations, as tuples for the table; fills the other arguments on the way. `shards` numbers them."""
    count = block = 0
    for record in records:
        text = isinstance(record.id, str)
        start, first, count = len(rest), count, count + len(record.annotations)
        others = [_trimmed(item, _ANNOTATION_REST) for item in record.annotations]
        rest += encode([plain(record.id) if text else None, plain(record.path),
                         _trimmed(record, _IMAGE_REST), others])
        if isinstance(record.path, ShardImage):
            block = shards.setdefault(_Shard(record.path.store, record.path.shard), len(shards))
        images.append((_TEXT if text else record.id, record.height, record.width, first, count, start, len(rest),
                       block))
        for item in record.annotations:
            yield (item.id, item.label, item.area, *item.box, *(item.size or (0.0, 0.0)), item.crowd, item.difficult,
                   item.size is not None, bool(item.segmentation), any((item.keypoints or ())[2::3]), 0, 0, 0)


def _trimmed(item: Any, defaults: dict[str, Any]) -> list[Any]:
    """The values of these fields, without the last ones that are as by default."""
    values = [(getattr(item, name), default) for name, default in defaults.items()]
    while values and values[-1][0] is values[-1][1]:
        values.pop()
    return [plain(value) for value, _ in values]


# What MessagePack does not know itself. A code of a class is _CLASSES + its place.
_ARRAY, _PATH, _TUPLE, _STRING, _CLASSES = range(1, 6)


def plain(value: Any) -> Any:
    """As something that can be encoded: tuples and dataclasses would come back as lists and dicts."""
    kind = type(value)
    if kind is tuple:
        return msgspec.msgpack.Ext(_TUPLE, encode([plain(item) for item in value]))
    if kind is str and not value.isascii():  # of file names, some are no Unicode
        return msgspec.msgpack.Ext(_STRING, value.encode("utf-8", "surrogatepass"))
    if kind in _CODES:
        return msgspec.msgpack.Ext(_CODES[kind], encode([
            plain(getattr(value, field.name)) for field in fields(value) if field.name != "store"]))
    return value


def _extend(value: Any) -> Any:
    if isinstance(value, array):
        return msgspec.msgpack.Ext(_ARRAY, value.typecode.encode() + value.tobytes())
    if isinstance(value, Path):
        return msgspec.msgpack.Ext(_PATH, os.fsencode(value))
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    raise TypeError(f"values of records must be of known types, got {type(value).__name__}")


def _retract(code: int, data: memoryview) -> Any:
    if code == _ARRAY:
        values = array(chr(data[0]))
        values.frombytes(data[1:])
        return values
    if code == _PATH:
        return Path(os.fsdecode(bytes(data)))
    if code == _STRING:
        return str(data, "utf-8", "surrogatepass")
    content = decode(data)
    return tuple(content) if code == _TUPLE else _KINDS[code - _CLASSES](*content)


_KINDS = (PNGSegment, LabelImage, InstanceMasks, SegmentImage, ShardImage)
_CODES = {kind: _CLASSES + place for place, kind in enumerate(_KINDS)}
encode = msgspec.msgpack.Encoder(enc_hook=_extend).encode
decode = msgspec.msgpack.Decoder(ext_hook=_retract).decode
_decode_path = msgspec.msgpack.Decoder(tuple[Any, Any, msgspec.Raw, msgspec.Raw], ext_hook=_retract).decode
