"""Masks predicted inside boxes -> bitmaps of whole images.

Legend: D detections, S side of a mask (with torchvision's frame of one cell around it, where it has one), (H, W) the
image, L its H or W.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PIXELS_AT_ONCE = 2**25  # bounds the float temporaries to about 128 MB

PasteConvention = Literal["detectron2", "torchvision"]


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5,
                convention: PasteConvention = "torchvision") -> Tensor:
    """Bitmaps (D, H, W) bool from masks (D, S, S) of probabilities and boxes (D, 4) in pixels of the image: where a
    mask, resized bilinearly to its box, is at least `threshold`.

    convention 'detectron2': cells lie evenly in the box as it is, and beyond them is zero. 'torchvision': a frame of
    zeros around each mask, the box grown alike and cut to whole pixels. Resizing is separable and linear in the mask,
    so pasting is two matrix products per mask, rows @ mask @ columns.
    """
    boxes, framed = boxes.float(), convention == "torchvision"
    if framed:
        side = masks.shape[-1] + 2
        boxes = _grow(boxes, side / (side - 2)).trunc()
        boxes = torch.cat([boxes[:, :2], torch.maximum(boxes[:, 2:], boxes[:, :2]) + 1], 1)  # its end is inclusive
        masks = torch.nn.functional.pad(masks, (1, 1, 1, 1))
    paste = _paste_inside if masks.device.type == "cpu" else _paste_whole
    with torch.autocast(masks.device.type, enabled=False):  # bf16 products would move edges
        return paste(masks.float(), boxes, size, threshold, framed)


def _paste_whole(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float, framed: bool) -> Tensor:
    """All pixels of the bitmaps, with no loop over instances."""
    height, width = size
    chunk = max(1, PIXELS_AT_ONCE // (height * width))
    bitmaps = [(_resize(box[:, 1], box[:, 3], height, mask.shape[-1], framed) @ mask
                @ _resize(box[:, 0], box[:, 2], width, mask.shape[-1], framed).mT) >= threshold
               for mask, box in zip(masks.split(chunk), boxes.split(chunk))]
    return torch.cat(bitmaps) if bitmaps else masks.new_zeros(0, height, width, dtype=torch.bool)


def _paste_inside(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float, framed: bool) -> Tensor:
    """The same bitmaps, of which only pixels inside boxes are computed: the others are most of the time on a CPU.

    The loop is over boxes, as they differ in size; one gather over the pixels of all of them is faster for small
    boxes, where both are fast, and several times slower for large ones: its indices are more to move than the pixels.
    """
    side = masks.shape[-1]
    bitmaps = masks.new_zeros(len(masks), *size, dtype=torch.bool)
    (y, inside_y), (x, inside_x) = (_positions(boxes[:, axis], boxes[:, axis + 2], length, side, framed)
                                    for axis, length in zip((1, 0), size))
    rows = _weights(y[inside_y], side).split(inside_y.sum(1).tolist())
    columns = _weights(x[inside_x], side).split(inside_x.sum(1).tolist())
    corners = zip(inside_y.int().argmax(1).tolist(), inside_x.int().argmax(1).tolist())
    for bitmap, mask, row, column, (top, left) in zip(bitmaps, masks, rows, columns, corners):
        bitmap[top:top + len(row), left:left + len(column)] = row @ mask @ column.mT >= threshold
    return bitmaps


def _grow(boxes: Tensor, factor: float) -> Tensor:
    center = (boxes[:, :2] + boxes[:, 2:]) * 0.5
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * factor
    return torch.cat([center - half, center + half], 1)


def _resize(start: Tensor, end: Tensor, length: int, side: int, framed: bool) -> Tensor:
    """Matrices (D, L, S) that resize `side` cells bilinearly onto the part start..end of an axis."""
    positions, inside = _positions(start, end, length, side, framed)
    return _weights(positions, side) * inside[..., None]


def _positions(start: Tensor, end: Tensor, length: int, side: int, framed: bool) -> tuple[Tensor, Tensor]:
    """Where the pixels of an axis lie in the mask (D, L), in cells, and whether they are in its reach at all (D, L).

    framed: the reach is the box, in which the outermost cells have no end; else half a cell more, where they fade to
    zero.
    """
    extent = (end - start)[:, None]
    offset = torch.arange(length, device=start.device) + 0.5 - start[:, None]
    positions = offset * (side / extent) - 0.5
    if framed:
        return positions.clamp(0, side - 1), (offset > 0) & (offset < extent)
    return positions, (positions > -1) & (positions < side) & (extent > 0)


def _weights(positions: Tensor, side: int) -> Tensor:
    """Bilinear weights (..., S) of the cells of an axis at positions (...)."""
    cells = torch.arange(side, device=positions.device)
    return (1 - (positions[..., None] - cells).abs()).clamp(min=0)
