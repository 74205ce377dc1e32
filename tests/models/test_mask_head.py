from __future__ import annotations

import torch

from detres.models.roi_heads.mask_head import crop_masks
from detres.ops.paste_masks import paste_masks


def disc(radius, size=96):
    y, x = torch.meshgrid(torch.arange(size) + 0.5, torch.arange(size) + 0.5, indexing="ij")
    return ((x - 48.3) ** 2 + (y - 47.6) ** 2 < radius**2)[None]


def test_a_mask_that_fills_its_box_fills_the_target():
    masks = torch.zeros(2, 40, 40, dtype=torch.uint8)
    masks[1, 10:24, 6:20] = 1
    target = crop_masks(masks, torch.tensor([1]), torch.tensor([[6.0, 10, 20, 24]]), 14)
    assert torch.equal(target, torch.ones(1, 14, 14))
    half = crop_masks(masks, torch.tensor([1]), torch.tensor([[6.0, 10, 34, 24]]), 14)
    assert torch.equal(half[0, :, :7], torch.ones(14, 7)) and half[0, :, 8:].max() == 0


def test_crop_then_paste_gives_the_mask_back():
    for radius in (8, 20, 40):
        mask = disc(radius)
        box = torch.tensor([[48.3 - radius, 47.6 - radius, 48.3 + radius, 47.6 + radius]])
        pasted = paste_masks(crop_masks(mask.to(torch.uint8), torch.tensor([0]), box, 28), box, (96, 96))
        assert (pasted & mask).sum() / (pasted | mask).sum() > 0.85


def test_no_masks_no_target():
    assert crop_masks(torch.zeros(0, 9, 9, dtype=torch.uint8), torch.tensor([0]), torch.ones(1, 4), 5).sum() == 0
