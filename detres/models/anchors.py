"""Anchor boxes over feature pyramids (Faster R-CNN, arXiv 1506.01497, section 3.1.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn


class AnchorGenerator(nn.Module):
    """Anchors of given sizes (square roots of areas, pixels) and aspect ratios (height / width), one tuple of sizes
    per level, at every cell of every level.

    convention 'detectron2': sizes vary slowest, strides are nominal. 'torchvision': ratios vary slowest, base
    anchors are rounded to whole pixels and a stride is canvas // grid. offset: of the middle of an anchor from the
    corner of its cell, in strides.
    """

    def __init__(self, sizes: Sequence[Sequence[float]], aspect_ratios: Sequence[float], strides: Sequence[int],
                 convention: Literal["detectron2", "torchvision"] = "detectron2", offset: float = 0.0):
        super().__init__()
        self.strides, self.convention, self.offset = list(strides), convention, offset
        self.per_cell = len(sizes[0]) * len(aspect_ratios)
        self.base = [self._base_anchors(level_sizes, aspect_ratios) for level_sizes in sizes]
        self._cache: dict[tuple, list[Tensor]] = {}

    def _base_anchors(self, sizes: Sequence[float], ratios: Sequence[float]) -> Tensor:
        if self.convention == "torchvision":
            pairs = [(size, ratio) for ratio in ratios for size in sizes]
        else:
            pairs = [(size, ratio) for size in sizes for ratio in ratios]
        size, ratio = torch.tensor(pairs, dtype=torch.float32).unbind(1)
        height = size * ratio.sqrt()
        width = size / ratio.sqrt()
        base = torch.stack([-width, -height, width, height], 1) / 2
        return base.round() if self.convention == "torchvision" else base

    def forward(self, grids: Sequence[tuple[int, int]], canvas: tuple[int, int], device: torch.device) -> list[Tensor]:
        """Grid sizes (height, width) of the levels -> anchors (H_l * W_l * per_cell, 4) of each; kept for reuse."""
        key = (tuple(grids), canvas, device)
        if key not in self._cache:
            if len(self._cache) >= 64:  # canvases vary with multi-scale training
                self._cache.clear()
            self._cache[key] = [self._level(i, grid, canvas).to(device) for i, grid in enumerate(grids)]
        return self._cache[key]

    def _level(self, level: int, grid: tuple[int, int], canvas: tuple[int, int]) -> Tensor:
        stride = (self.strides[level],) * 2
        if self.convention == "torchvision":
            stride = (canvas[0] // grid[0], canvas[1] // grid[1])
        y, x = torch.meshgrid(*((torch.arange(n) + self.offset) * s for n, s in zip(grid, stride)), indexing="ij")
        shift = torch.stack([x, y, x, y], -1).float()  # (H, W, 4)
        return (shift[:, :, None] + self.base[level]).view(-1, 4)
