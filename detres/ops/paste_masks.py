"""Masks predicted inside boxes -> bitmaps of whole images.

Legend: D detections, S side of a mask with a frame of one cell around it, (H, W) the image, L its H or W.
"""

from __future__ import annotations

import torch
from torch import Tensor

PIXELS_AT_ONCE = 2**25  # bounds the float temporaries to about 128 MB


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Bitmaps (D, H, W) bool from masks (D, S - 2, S - 2) of probabilities and boxes (D, 4) in pixels of the image.

    As torchvision does: a frame of zeros around each mask, the box grown alike and cut to whole pixels, the mask
    resized to it bilinearly. Resizing is separable and linear in the mask, so pasting is two matrix products
    per mask, rows @ mask @ columns.
    """
    side = masks.shape[-1] + 2
    grown = _grow(boxes.float(), side / (side - 2)).to(torch.int64)  # truncates towards zero
    masks = torch.nn.functional.pad(masks.float(), (1, 1, 1, 1))
    paste = _paste_inside if masks.device.type == "cpu" else _paste_whole
    with torch.autocast(masks.device.type, enabled=False):  # bf16 products would move edges
        return paste(masks, grown, size, threshold)


def _paste_whole(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """All pixels of the bitmaps, with no loop over instances."""
    height, width = size
    chunk = max(1, PIXELS_AT_ONCE // (height * width))
    bitmaps = [(_resize(box[:, 1], box[:, 3], height, masks.shape[-1]) @ mask
                @ _resize(box[:, 0], box[:, 2], width, masks.shape[-1]).mT) >= threshold
               for mask, box in zip(masks.split(chunk), boxes.split(chunk))]
    return torch.cat(bitmaps) if bitmaps else masks.new_zeros(0, height, width, dtype=torch.bool)


def _paste_inside(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    """The same bitmaps, of which only pixels inside boxes are computed: the others are most of the time on a CPU.

    The loop is over boxes, as they differ in size; one gather over the pixels of all of them is faster for small
    boxes, where both are fast, and several times slower for large ones: its indices are more to move than the pixels.
    """
    side = masks.shape[-1]
    bitmaps = masks.new_zeros(len(masks), *size, dtype=torch.bool)
    (y, inside_y), (x, inside_x) = (_positions(boxes[:, axis], boxes[:, axis + 2], length, side)
                                    for axis, length in zip((1, 0), size))
    rows = _weights(y[inside_y], side).split(inside_y.sum(1).tolist())
    columns = _weights(x[inside_x], side).split(inside_x.sum(1).tolist())
    for bitmap, mask, row, column, (left, top) in zip(bitmaps, masks, rows, columns, boxes[:, :2].clamp(0).tolist()):
        bitmap[top:top + len(row), left:left + len(column)] = row @ mask @ column.mT >= threshold
    return bitmaps


def _grow(boxes: Tensor, factor: float) -> Tensor:
    center = (boxes[:, :2] + boxes[:, 2:]) * 0.5
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * factor
    return torch.cat([center - half, center + half], 1)


def _resize(start: Tensor, end: Tensor, length: int, side: int) -> Tensor:
    """Matrices (D, L, S) that resize `side` cells bilinearly onto pixels start..end (inclusive) of an axis."""
    positions, inside = _positions(start, end, length, side)
    return _weights(positions, side) * inside[..., None]


def _positions(start: Tensor, end: Tensor, length: int, side: int) -> tuple[Tensor, Tensor]:
    """Where the pixels of an axis lie in the mask (D, L), in cells, and whether they are in the box at all (D, L)."""
    extent = (end - start + 1).clamp(min=1)[:, None]
    pixel = torch.arange(length, device=start.device)[None] - start[:, None]
    inside = (pixel >= 0) & (pixel < extent)
    return ((pixel + 0.5) * (side / extent) - 0.5).clamp(0, side - 1), inside


def _weights(positions: Tensor, side: int) -> Tensor:
    """Bilinear weights (..., S) of the cells of an axis at positions (...)."""
    cells = torch.arange(side, device=positions.device)
    return (1 - (positions[..., None] - cells).abs()).clamp(min=0)
