"""Masks predicted inside boxes -> bitmaps of whole images."""

from __future__ import annotations

import torch
from torch import Tensor

PIXELS_AT_ONCE = 2**25  # bounds the float temporaries to about 128 MB


@torch.no_grad()
def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float = 0.5) -> Tensor:
    """Bitmaps (D, H, W) bool from masks (D, S, S) of probabilities and boxes (D, 4) in pixels of the image.

    As torchvision does: a frame of zeros around each mask, the box grown alike and cut to whole pixels, the mask
    resized to it bilinearly. Resizing is separable and linear in the mask, so pasting is two matrix products
    per mask, rows @ mask @ columns, with no loop over instances.
    """
    with torch.autocast(masks.device.type, enabled=False):  # bf16 products would move edges
        return _paste(masks, boxes, size, threshold)


def _paste(masks: Tensor, boxes: Tensor, size: tuple[int, int], threshold: float) -> Tensor:
    height, width = size
    side = masks.shape[-1]
    masks = torch.nn.functional.pad(masks.float(), (1, 1, 1, 1))
    grown = _grow(boxes.float(), (side + 2) / side).to(torch.int64)  # truncates towards zero
    chunk = max(1, PIXELS_AT_ONCE // (height * width))
    bitmaps = [(_resize(box[:, 1], box[:, 3], height, side + 2) @ mask
                @ _resize(box[:, 0], box[:, 2], width, side + 2).mT) >= threshold
               for mask, box in zip(masks.split(chunk), grown.split(chunk))]
    return torch.cat(bitmaps) if bitmaps else masks.new_zeros(0, height, width, dtype=torch.bool)


def _grow(boxes: Tensor, factor: float) -> Tensor:
    center = (boxes[:, :2] + boxes[:, 2:]) * 0.5
    half = (boxes[:, 2:] - boxes[:, :2]) * 0.5 * factor
    return torch.cat([center - half, center + half], 1)


def _resize(start: Tensor, end: Tensor, length: int, side: int) -> Tensor:
    """Matrices (D, length, side) that resize `side` cells bilinearly onto pixels start..end (inclusive) of an axis."""
    extent = (end - start + 1).clamp(min=1)[:, None]
    pixel = torch.arange(length, device=start.device)[None] - start[:, None]  # (D, length)
    inside = (pixel >= 0) & (pixel < extent)
    position = ((pixel + 0.5) * (side / extent) - 0.5).clamp(0, side - 1)
    cells = torch.arange(side, device=start.device)
    return (1 - (position[..., None] - cells).abs()).clamp(min=0) * inside[..., None]
