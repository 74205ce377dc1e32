from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision

from detres.ops.roi_align import assign_levels, roi_align, roi_pool

STRIDES = [4, 8, 16, 32]


def pyramid(dtype=torch.float64, channels=3):
    return [torch.randn(2, channels, 256 // s, 192 // s, dtype=dtype) for s in STRIDES]


def regions(count=40, dtype=torch.float64):
    xy = torch.rand(count, 2, dtype=dtype) * 200 - 20  # some reach outside the image
    wh = torch.rand(count, 2, dtype=dtype) ** 3 * 900 + 1
    return torch.cat([xy, xy + wh], 1), torch.arange(count) % 2


@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 1, 2])
def test_equals_torchvision_level_by_level(aligned, sampling_ratio):
    features, (boxes, image) = pyramid(torch.float32), regions(dtype=torch.float32)
    found = roi_align(features, STRIDES, boxes, image, 5, sampling_ratio, aligned)
    level = assign_levels(boxes, 4)
    assert len(level.unique()) == 4
    rois = torch.cat([image[:, None].float(), boxes], 1)
    for i, stride in enumerate(STRIDES):
        expected = torchvision.ops.roi_align(features[i], rois[level == i], 5, 1 / stride, sampling_ratio, aligned)
        torch.testing.assert_close(found[level == i], expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("side", [224, 60])
def test_levels_are_torchvisions(side):
    boxes = regions(500, torch.float32)[0]
    mapper = torchvision.ops.poolers.LevelMapper(2, 5, canonical_scale=side)
    assert torch.equal(assign_levels(boxes, 4, canonical_side=side), mapper([boxes]))


@pytest.mark.parametrize("pool", [roi_align, partial(roi_align, sampling_ratio=0), roi_pool])
def test_boxes_of_the_canonical_side_are_pooled_from_p4(pool):
    maps = [torch.full((1, 1, 64, 64), float(level)) for level in (2, 3, 4, 5)]
    boxes = torch.tensor([[10.0, 10, 71, 71], [10, 10, 41, 41]])
    found = pool(maps, STRIDES, boxes, torch.zeros(2, dtype=torch.int64), 2, canonical_side=60.0)
    assert found[0].unique().tolist() == [4] and found[1].unique().tolist() == [3]


def test_gradients():
    features, (boxes, image) = pyramid(channels=1), regions(6)
    features = [f[:, :, :12, :12].requires_grad_() for f in features]
    assert torch.autograd.gradcheck(lambda *f: roi_align(list(f), STRIDES, boxes, image, 2), features)


def test_no_region_and_roi_pool():
    features, (boxes, image) = pyramid(torch.float32), regions(dtype=torch.float32)
    assert roi_align(features, STRIDES, boxes[:0], image[:0], 7).shape == (0, 3, 7, 7)
    found = roi_pool(features[2:3], [16], boxes, image, 4)
    rois = torch.cat([image[:, None].float(), boxes], 1)
    assert torch.equal(found, torchvision.ops.roi_pool(features[2], rois, 4, 1 / 16))


def test_bf16_features_have_exact_gradients():
    """Many regions on one spot: a sum in bf16 would lose most of them."""
    feature = torch.randn(1, 8, 16, 16)
    boxes, image = torch.tensor([[100.0, 100, 140, 140]]).repeat(500, 1), torch.zeros(500, dtype=torch.int64)
    grads = []
    for dtype in (torch.float32, torch.bfloat16):
        leaf = feature.clone().to(dtype).requires_grad_()
        roi_align([leaf], [16], boxes, image, 7).float().sum().backward()
        grads.append(leaf.grad.float())
    assert (grads[0] - grads[1]).norm() / grads[0].norm() < 0.01
