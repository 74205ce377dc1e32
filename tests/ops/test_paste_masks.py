from __future__ import annotations

import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detres.ops import paste_masks as module
from detres.ops.paste_masks import paste_masks


def test_equals_torchvision(monkeypatch):
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 160 * 208 * 7)  # several chunks
    masks = torch.rand(100, 28, 28)
    xy = torch.rand(100, 2) * 150 - 10
    boxes = torch.cat([xy, xy + torch.rand(100, 2) ** 3 * 90 + 0.5], 1)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([208.0, 160, 208, 160]))
    expected = paste_masks_in_image(masks[:, None], boxes, (160, 208))[:, 0] >= 0.5
    assert torch.equal(paste_masks(masks, boxes, (160, 208)), expected)


def test_full_mask_fills_its_box_and_none_gives_none():
    found = paste_masks(torch.ones(1, 28, 28), torch.tensor([[4.0, 6, 12, 10]]), (20, 20))
    assert found[0, 6:10, 4:12].all() and found.sum() <= 10 * 6  # torchvision's may reach one pixel further
    assert paste_masks(torch.ones(0, 28, 28), torch.zeros(0, 4), (20, 30)).shape == (0, 20, 30)
