"""A model that can be checked by eye: it finds red."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from detres.structures import Detections, ImageBatch


class RedFinder(nn.Module):
    """The box around the red pixels with score 0.9, and the whole image as "dull" with score 0.3."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.with_masks, self.batches, self.sizes = True, [], []

    def forward(self, images: ImageBatch, targets=None) -> Detections:
        self.batches.append(len(images.pixels))
        self.sizes += images.sizes.tolist()
        red = (images.pixels[:, 0] > 150) & (images.pixels[:, 1] < 50)  # (N, H, W)
        n = len(red)
        boxes, valid = torch.zeros(n, 2, 4), torch.zeros(n, 2, dtype=torch.bool)
        for i in range(n):
            y, x = red[i].nonzero(as_tuple=True)
            if len(x):
                boxes[i, 0] = torch.stack([x.min(), y.min(), x.max() + 1, y.max() + 1])
                valid[i, 0] = True
            boxes[i, 1, 2:], valid[i, 1] = images.sizes[i].flip(0), True
        masks = torch.ones(n, 2, 28, 28) if self.with_masks else None
        return Detections(boxes, torch.tensor([0.9, 0.3]).expand(n, 2), torch.tensor([0, 1]).expand(n, 2), valid, masks)


@pytest.fixture
def red_finder() -> RedFinder:
    return RedFinder()
