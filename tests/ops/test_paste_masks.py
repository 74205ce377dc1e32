from __future__ import annotations

import pytest
import torch
from torchvision.models.detection.roi_heads import paste_masks_in_image

from detres.ops import paste_masks as module
from detres.ops.paste_masks import paste_masks


@pytest.mark.parametrize("paste", ["_paste_inside", "_paste_whole"])
def test_equals_torchvision(monkeypatch, paste):
    monkeypatch.setattr(module, "PIXELS_AT_ONCE", 160 * 208 * 7)  # several chunks
    monkeypatch.setattr(module, "_paste_inside", getattr(module, paste))
    masks = torch.rand(100, 28, 28)
    xy = torch.rand(100, 2) * 150 - 10
    boxes = torch.cat([xy, xy + torch.rand(100, 2) ** 3 * 90 + 0.5], 1)
    boxes = boxes.clamp(min=0).minimum(torch.tensor([208.0, 160, 208, 160]))
    expected = paste_masks_in_image(masks[:, None], boxes, (160, 208))[:, 0] >= 0.5
    assert torch.equal(paste_masks(masks, boxes, (160, 208)), expected)


def odd_boxes(count: int, height: int, width: int) -> torch.Tensor:
    """From far smaller than a pixel to far larger than the image, inside, across and beyond its edges."""
    size = torch.exp(torch.randn(count, 2) * 1.5 + 3)
    center = (torch.rand(count, 2) * 1.6 - 0.3) * torch.tensor([width, height])
    odd = torch.tensor([[-90.0, 5, -50, 20], [5, -90, 20, -50], [9e3, 5, 9.1e3, 20], [5, 9e3, 20, 9.1e3], [7, 7, 7, 7],
                        [9, 9, 4, 4], [-50, -50, 400, 400], [0, 0, width, height], [width, height, width, height]])
    return torch.cat([torch.cat([center - size / 2, center + size / 2], 1), odd])


@pytest.mark.parametrize("side", [1, 7, 28])
@pytest.mark.parametrize("size", [(160, 208), (1, 300), (37, 1)])
@pytest.mark.parametrize("convention", ["detectron2", "torchvision"])
def test_inside_boxes_only_gives_the_same_bits(side, size, convention, monkeypatch):
    """What the CPU does, and what a GPU does."""
    boxes = odd_boxes(200, *size)
    shape = (len(boxes), side, side)
    for masks in (torch.rand(shape), torch.full(shape, 0.5), torch.randint(0, 3, shape) / 2):  # many at the threshold
        expected = paste_masks(masks, boxes, size, convention=convention)
        with monkeypatch.context() as patch:
            patch.setattr(module, "_paste_inside", module._paste_whole)
            whole = paste_masks(masks, boxes, size, convention=convention)
        assert torch.equal(whole, expected) and (whole.any() or side == 1)


def test_equals_a_grid_sample_as_detectron2_pastes():
    """Half a pixel from the corner of a box is half a pixel from that of its mask, whatever is left and right of it."""
    masks, boxes, size = torch.rand(60, 28, 28), odd_boxes(51, 90, 120), (90, 120)
    boxes = boxes[(boxes[:, 2:] > boxes[:, :2]).all(1)]
    masks = masks[:len(boxes)]
    x = (torch.arange(size[1]) + 0.5 - boxes[:, :1]) / (boxes[:, 2:3] - boxes[:, :1]) * 2 - 1
    y = (torch.arange(size[0]) + 0.5 - boxes[:, 1:2]) / (boxes[:, 3:] - boxes[:, 1:2]) * 2 - 1
    grid = torch.stack([x[:, None].expand(-1, *size), y[..., None].expand(-1, *size)], -1)
    expected = torch.nn.functional.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
    differ = paste_masks(masks, boxes, size, convention="detectron2") ^ (expected >= 0.5)
    assert not differ[(expected - 0.5).abs() > 1e-4].any() and (expected >= 0.5).any()


def test_no_more_pixels_than_in_boxes_are_computed_on_the_cpu(monkeypatch):
    counts = []
    weights = module._weights
    monkeypatch.setattr(module, "_weights", lambda positions, side: counts.append(positions.numel()) or
                        weights(positions, side))
    paste_masks(torch.rand(3, 28, 28), torch.tensor([[10.0, 10, 20, 30]] * 3), (480, 640))
    assert sum(counts) <= 3 * (10 + 20 + 8)  # growing adds a few


def test_full_mask_fills_its_box_and_none_gives_none():
    found = paste_masks(torch.ones(1, 28, 28), torch.tensor([[4.0, 6, 12, 10]]), (20, 20))
    assert found[0, 6:10, 4:12].all() and found.sum() <= 10 * 6  # torchvision's may reach one pixel further
    none = torch.ones(0, 28, 28), torch.zeros(0, 4)
    assert paste_masks(*none, (20, 30)).shape == (0, 20, 30)
    assert module._paste_whole(torch.ones(0, 30, 30), none[1], (20, 30), 0.5, True).shape == (0, 20, 30)
