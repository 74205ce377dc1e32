"""Training images prepared on the device: the loader's processes decode, and resizing, cropping, mirroring and drawing
masks happen where the model is (`data.on_device`).

Boxes, keypoints and all chance come from the transforms of the CPU (`data.transforms`), whose samples hold an
`ImageView` here, so that an image gets the same scale, crop and flip either way. Pixels then are two matrix products,
masks parities along rows: no loop over images or objects, and no wait for the device.

Legend: N images, (S, T) a canvas for the stored images, (H, W) the canvas of the batch, M objects, P polygons, E edges,
K objects with run lengths, R ends of runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detres.data.augment_colour import Colours
from detres.data.frame import Frame, Framed, Size
from detres.data.images import EncodedImage
from detres.data.masks import MaskViews, compressed, run_lengths
from detres.structures import Batch, ImageBatch, Movable


@dataclass(frozen=True)
class ImageView(Framed):
    """An image that is decoded in the end, and resized, cropped and mirrored on the device."""

    encoded: EncodedImage
    frame: Frame
    reduced: bool  # may be decoded at a reduced size
    colours: Colours | None = None  # before it is resized

    @property
    def shape(self) -> tuple[int, int, int]:
        return *self.frame.size, 3

    def pixels(self) -> np.ndarray:
        return self.encoded.pixels(self.frame.resized if self.reduced else None)


@dataclass(frozen=True)
class Frames(Movable):
    """`Frame` of N images, or of one for each of other things. Sizes and places are (N, 2): down, across."""

    stored: Tensor  # size of the pixels: the source's, or reduced
    source: Tensor
    resized: Tensor
    first: Tensor
    size: Tensor
    mirrored: Tensor  # (N,) bool

    @classmethod
    def of(cls, frames: Sequence[Frame], stored: Sequence[Size]) -> Frames:
        columns = [(frame.source, frame.resized, (frame.y, frame.x), frame.size) for frame in frames]
        return cls(*torch.tensor([stored, *zip(*columns)]), torch.tensor([frame.mirrored for frame in frames]))

    def rows(self, index: Tensor) -> Frames:
        return Frames(*(column[index] for column in vars(self).values()))

    def centres(self, axis: int, length: int) -> Tensor:
        """(N, length) pixel centres in the resized image, for each pixel of an axis of the canvas."""
        place = torch.arange(length, device=self.size.device).expand(len(self.size), -1)
        if axis:
            place = torch.where(self.mirrored[:, None], self.size[:, 1:] - 1 - place, place)
        return self.first[:, axis, None] + place + 0.5

    def inside(self, axis: int, length: int) -> Tensor:
        """(N, length) bool: not padding."""
        return torch.arange(length, device=self.size.device) < self.size[:, axis, None]


@dataclass(frozen=True)
class Outlines(Movable):
    """Segmentations of M objects as flat arrays, in pixels of the source."""

    image: Tensor  # (M,) of which image
    edges: Tensor  # (E, 4) float32 x1, y1, x2, y2
    polygon: Tensor  # (E,) of which polygon
    polygon_object: Tensor  # (P,)
    ends: Tensor  # (R,) where runs end, column by column
    run: Tensor  # (R,) of which object with run lengths
    run_object: Tensor  # (K,)

    @classmethod
    def of(cls, views: Sequence[MaskViews]) -> Outlines:
        items = [(item, *view.frame.source) for view in views for item in view.segmentations]
        polygons = [(row, np.asarray(polygon, np.float32).reshape(-1, 2)) for row, (item, *_) in enumerate(items)
                    if isinstance(item, list) for polygon in item]
        ends = [(row, _ends(*item)) for row, item in enumerate(items) if not isinstance(item[0], list)]
        edges = [np.hstack([points, np.roll(points, -1, 0)]) for _, points in polygons]
        return cls(_numbered([len(view) for view in views]), _joined(edges, (4,), np.float32),
                   _numbered(map(len, edges)), torch.tensor([row for row, _ in polygons], dtype=torch.long),
                   _joined([places for _, places in ends], (), np.int64), _numbered(len(places) for _, places in ends),
                   torch.tensor([row for row, _ in ends], dtype=torch.long))


@dataclass(frozen=True)
class StoredBatch(Movable):
    """What the loader's processes hand over: `prepare` makes a `Batch` of it."""

    batch: Batch  # without pixels and masks
    pixels: Tensor  # (N, S, T, 3) uint8
    frames: Frames
    colours: Tensor | None  # (N, 8) the numbers of `Colours`
    canvas: Size
    outlines: Outlines | None
    source_canvas: Size  # largest height and width of a source
    antialias: bool


def store(batch: Batch, images: Sequence[ImageView], masks: Sequence[MaskViews] | None, canvas: Size,
          antialias: bool) -> StoredBatch:
    """Decodes the images of a batch."""
    arrays = [image.pixels() for image in images]
    sizes = [array.shape[:2] for array in arrays]
    pixels = np.zeros((len(arrays), *map(max, zip(*sizes)), 3), np.uint8)
    for padded, array in zip(pixels, arrays):
        padded[:array.shape[0], :array.shape[1]] = array
    frames = [image.frame for image in images]
    colours = [image.colours and (*astuple(image.colours)[:5], *image.colours.order) for image in images]
    return StoredBatch(batch, torch.from_numpy(pixels), Frames.of(frames, sizes),
                       None if None in colours else torch.tensor(colours), canvas,
                       None if masks is None else Outlines.of(masks),
                       tuple(map(max, zip(*(frame.source for frame in frames)))), antialias)


def prepared(batches: Iterable[StoredBatch], device: torch.device) -> Iterator[Batch]:
    """The batches of a loader, on the device."""
    for stored in batches:
        yield prepare(stored.to(device, non_blocking=True))


@torch.no_grad()
def prepare(stored: StoredBatch) -> Batch:
    """The batch that the CPU would have made, on the device of its tensors."""
    pixels = stored.pixels.permute(0, 3, 1, 2).float()
    pixels = pixels if stored.colours is None else recolour(pixels, stored.colours)
    images = ImageBatch(resize(pixels, stored.frames, stored.canvas, stored.antialias), stored.frames.size)
    masks = stored.outlines and draw(stored.outlines, stored.frames, stored.canvas, stored.source_canvas)
    return replace(stored.batch, images=images, targets=replace(stored.batch.targets, masks=masks))


# Pixels


def recolour(images: Tensor, colours: Tensor) -> Tensor:
    """`Colours.apply` of (N, 3, S, T) floats: whole numbers in 0-255, but for those between saturation and hue."""
    shift, early, stretch, turn, late = colours[:, :5, None, None, None].unbind(1)  # (N, 1, 1, 1) each
    images = _bytes(_bytes(images + shift) * early)
    value, range_ = images.amax(1, keepdim=True), images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    red, green, blue = images.split(1, 1)
    safe = range_.clamp(min=1)
    hue = torch.where(value == red, (green - blue) / safe,
                      torch.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)) + turn * 6 / 256
    places = 5 - 2 * torch.arange(3, device=images.device)  # of the channels on the wheel
    place = (places[:, None, None] + hue) % 6
    images = _bytes(value - (range_ * stretch).minimum(value) * place.minimum(4 - place).clamp(0, 1))
    order = colours[:, 5:, None, None].long().expand_as(images)
    return _bytes(images * late).gather(1, order)


def _bytes(values: Tensor) -> Tensor:
    return values.round().clamp(0, 255)


def resize(images: Tensor, frames: Frames, canvas: Size, antialias: bool) -> Tensor:
    """(N, 3, S, T) floats to (N, 3, H, W): uint8, rounded after each direction as Pillow does, or float32."""
    down, across = (_weights(frames, axis, images.shape[axis + 2], canvas[axis], antialias) for axis in (0, 1))
    finish = (lambda x: (x + 0.5).floor()) if antialias else (lambda x: x)
    images = finish(images.flatten(1, 2) @ across.mT).unflatten(1, images.shape[1:3])  # (N, 3, S, W)
    images = finish(down[:, None] @ images)
    return images.to(torch.uint8) if antialias else images


def _weights(frames: Frames, axis: int, stored: int, length: int, antialias: bool) -> Tensor:
    """(N, length, stored): how much of each stored pixel is in each one of the canvas, by a triangle as wide as two
    pixels, of the resized image if that has fewer and `antialias`."""
    scale = (frames.stored / frames.resized)[:, axis, None, None]  # stored pixels in a resized one
    centre = frames.centres(axis, length)[..., None] * scale
    place = torch.arange(stored, device=scale.device)
    weights = 1 - (place + 0.5 - centre).abs() / (scale.clamp(min=1) if antialias else 1)
    weights = weights.clamp(min=0) * (place < frames.stored[:, axis, None, None])
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6) * frames.inside(axis, length)[..., None]


# Masks


def draw(outlines: Outlines, frames: Frames, canvas: Size, source_canvas: Size) -> Tensor:
    """(M, H, W) uint8, 1 inside."""
    masks = torch.zeros(len(outlines.image), *canvas, dtype=torch.uint8, device=outlines.image.device)
    if len(outlines.polygon_object):
        of_edges = frames.rows(outlines.image[outlines.polygon_object][outlines.polygon])
        inside = fill(outlines.edges, outlines.polygon, len(outlines.polygon_object), of_edges, canvas)
        masks.index_add_(0, outlines.polygon_object, inside).clamp_(max=1)  # the union
    if len(outlines.run_object):
        of_objects = frames.rows(outlines.image[outlines.run_object])
        masks[outlines.run_object] = unroll(outlines.ends, outlines.run, of_objects, canvas, source_canvas)
    return masks


def fill(edges: Tensor, polygon: Tensor, count: int, frames: Frames, canvas: Size) -> Tensor:
    """(P, H, W) uint8: pixels whose centres are inside each polygon. An edge that crosses the centre line of a row
    changes all pixels of that row to its right: a pixel is inside if it was changed an odd number of times."""
    height, width = canvas
    x1, y1, x2, y2 = _moved(edges, frames).T[..., None]  # (E, 1) each
    row = torch.arange(height, device=edges.device)
    crosses = ((y1 <= row + 0.5) != (y2 <= row + 0.5)) & frames.inside(0, height)  # (E, H)
    x = x1 + (row + 0.5 - y1) / (y2 - y1) * (x2 - x1)
    column = (x - 0.5).ceil().clamp(min=0).minimum(frames.size[:, 1:]).where(crosses, width).long()
    changes = torch.zeros(count * height * (width + 1), dtype=torch.uint8, device=edges.device)
    place = (polygon[:, None] * height + row) * (width + 1) + column
    changes.scatter_add_(0, place.flatten(), changes.new_ones(1).expand(place.numel()))
    return changes.view(count, height, width + 1)[..., :width].cumsum(-1, dtype=torch.uint8) & 1


def _moved(edges: Tensor, frames: Frames) -> Tensor:
    """Edges (E, 4) from pixels of the source to pixels of the canvas."""
    points = edges.view(-1, 2, 2) * (frames.resized / frames.source).flip(1)[:, None] - frames.first.flip(1)[:, None]
    x, y = points.unbind(-1)  # (E, 2) each
    return torch.stack([torch.where(frames.mirrored[:, None], frames.size[:, 1:] - x, x), y], -1).flatten(1)


def unroll(ends: Tensor, run: Tensor, frames: Frames, canvas: Size, source_canvas: Size) -> Tensor:
    """(K, H, W) uint8 of run lengths: likewise a parity, along the columns of the source; then the nearest pixels."""
    rows, columns = source_canvas
    height = frames.source[run, 0]
    changes = torch.zeros(len(frames.source), columns * rows, dtype=torch.uint8, device=ends.device)
    place = run * (columns * rows) + ends // height * rows + ends % height
    changes.view(-1).scatter_add_(0, place, changes.new_ones(1).expand(len(place)))
    masks = (changes.cumsum(-1, dtype=torch.uint8) & 1).view(-1, columns, rows)
    y, x = ((frames.centres(axis, canvas[axis]) * (frames.source / frames.resized)[:, axis, None]).long()
            .clamp(min=0).minimum(frames.source[:, axis, None] - 1) for axis in (0, 1))
    masks = masks.gather(1, x[..., None].expand(-1, -1, rows)).mT  # (K, S, W)
    masks = masks.gather(1, y[..., None].expand(-1, -1, canvas[1]))
    return masks * (frames.inside(0, canvas[0])[..., None] & frames.inside(1, canvas[1])[:, None])


# Packing


def _ends(segmentation: Any, height: int, width: int) -> np.ndarray:
    """Where the runs of a segmentation without polygons end, but for the last."""
    counts = compressed(segmentation, height, width)["counts"]
    lengths = run_lengths(counts if isinstance(counts, str) else counts.decode())
    return np.cumsum(lengths, dtype=np.int64)[:-1]


def _numbered(counts: Iterable[int]) -> Tensor:
    """0 as often as the first count says, then 1 ..."""
    counts = torch.tensor(list(counts), dtype=torch.long)
    return torch.repeat_interleave(torch.arange(len(counts)), counts)


def _joined(arrays: Sequence[np.ndarray], shape: tuple[int, ...], dtype: type) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros((0, *shape), dtype), *arrays]))
