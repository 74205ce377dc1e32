"""Regions at two scales each, against one region at a time with torchvision's kernels."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torchvision

from detres.build import build_model
from detres.models.roi_heads.multi_scale import lower_scale, multi_scale_regions
from detres.ops.roi_align import roi_align, roi_pool
from detres.structures import ImageBatch

from .conftest import make_batch, small_config

SIDES = (200, 400, 600, 800, 1000)


def growth(sides, ordinary=600):
    return torch.tensor([[(side / ordinary) ** 2 for side in sides]])


@pytest.mark.parametrize("side, pair", [
    (224, (600, 800)),  # 224 at 600; 149 at 400 is a factor of 1.5 away, 299 at 800 one of 1.33
    (600, (200, 400)),  # a whole image: 200 at 200
    (389, (200, 400)), (387, (400, 600)),  # 224 times the square root of 600 * 600 / (200 * 600) is 388
    (238, (400, 600)), (237, (600, 800)), (174, (600, 800)), (173, (800, 1000)), (50, (800, 1000)), (0, (800, 1000))])
def test_each_region_takes_the_two_scales_nearest_to_224(side, pair):
    lower = lower_scale(torch.tensor([float(side) ** 2]), growth(SIDES))
    assert (SIDES[lower], SIDES[lower + 1]) == pair


def test_of_two_neighbours_equally_near_the_smaller_is_taken():
    exact = torch.tensor([[0.25, 1.0, 4.0, 16.0]])
    assert lower_scale(torch.tensor([224.0**2]), exact).tolist() == [0]  # 112 and 448 are both a factor of 2 away
    assert lower_scale(torch.tensor([223.0**2]), exact).tolist() == [1]
    assert lower_scale(torch.tensor([224.0**2]), exact, canonical_side=225.0).tolist() == [1]


@pytest.mark.parametrize("scales", [1, 2])
def test_one_scale_or_two_are_all_there_is(scales):
    assert lower_scale(torch.tensor([1.0, 1e9]), torch.rand(2, scales).cumsum(1)).tolist() == [0, 0]


def naive_pair(box, ratio, side):
    """The nearest scale by log area, then the nearer of its neighbours. box (4,), ratio (S, 2) height, width."""
    width, height = (float(box[2] - box[0]), float(box[3] - box[1]))
    far = [abs(math.log(width * w * height * h / side**2)) for h, w in ratio.tolist()]
    nearest = min(range(len(far)), key=far.__getitem__)
    neighbours = [scale for scale in (nearest - 1, nearest + 1) if 0 <= scale < len(far)]
    return nearest, min(neighbours, key=far.__getitem__)


def naive_pool(kind, maps, strides, box, image, size):
    """One region with torchvision's kernels; in a pyramid of feature maps from the level that its size asks for."""
    level = 0
    if len(maps) > 1:
        area = float((box[2] - box[0]) * (box[3] - box[1]))
        level = min(max(math.floor(4 + math.log2(math.sqrt(area) / 224)), 2), 5) - 2
    options = {"align": {"sampling_ratio": 2, "aligned": True}, "pool": {}}[kind]
    op = {"align": torchvision.ops.roi_align, "pool": torchvision.ops.roi_pool}[kind]
    return op(maps[level][image:image + 1], [box[None]], size, 1 / strides[level], **options)[0]


@pytest.mark.parametrize("kind, side", [("align", 224), ("pool", 224), ("align", 120)])
@pytest.mark.parametrize("strides", [[16], [4, 8, 16, 32]], ids=["c4", "fpn"])
def test_the_larger_of_two_scales_for_each_region(kind, strides, side):
    generator = torch.Generator().manual_seed(0)
    images = ImageBatch(torch.zeros(2, 3, 608, 800), torch.tensor([[600, 787], [600, 431]]))
    sizes = [(images.sizes * short / 600).round().long() for short in SIDES]
    maps = [[torch.randn(2, 3, -(-short // s), -(-short * 4 // 3 // s), generator=generator) for s in strides]
            for short in SIDES]
    pyramid = tuple(ImageBatch(torch.full((2,), i), size) for i, size in enumerate(sizes))
    corner = torch.rand(80, 2, generator=generator) * 300
    sides = torch.exp(torch.rand(80, 2, generator=generator) * 3.5 + 2.5)  # 12 to 400 pixels
    boxes = torch.cat([corner, corner + sides], 1)
    boxes[0] = torch.tensor([0, 0, 787, 600])
    index = torch.arange(80) % 2
    pool = {"align": roi_align, "pool": roi_pool}[kind]
    regions = multi_scale_regions(lambda f, b, i, size: pool(f, strides, b, i, size),
                                  lambda scaled: maps[int(scaled.pixels[0])], replace(images, pyramid=pyramid), side)
    found = regions(boxes, index, 3)
    used = set()
    for row in range(80):
        ratio = torch.stack([size[index[row]] / images.sizes[index[row]] for size in sizes])
        pair = naive_pair(boxes[row], ratio, side)
        used.add(tuple(sorted(pair)))
        both = [naive_pool(kind, maps[s], strides, boxes[row] * ratio[s].flip(0).repeat(2), index[row], 3)
                for s in pair]
        torch.testing.assert_close(found[row], torch.maximum(*both), rtol=1e-4, atol=1e-4)
    assert used == {(0, 1), (1, 2), (2, 3), (3, 4)}, "every pair of neighbours is met"
    assert regions(boxes[:0], index[:0], 3).shape == (0, 3, 3, 3)


@pytest.mark.parametrize("layout, context", [("fpn", False), ("c4", True)])
def test_the_ordinary_scale_alone_changes_nothing_and_others_do(layout, context):
    config = small_config("mask_rcnn", layout, backbone={"norm": "gn"}, box_head={"global_context": context})
    model, (images, targets) = build_model(config, 3).eval(), make_batch()
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls.weight, std=0.5)
    plain = model(images)
    assert plain.valid.any()
    one = model(replace(images, pyramid=(images,)))
    for name in ("boxes", "scores", "labels", "valid", "masks"):
        torch.testing.assert_close(getattr(one, name), getattr(plain, name), rtol=1e-4, atol=1e-4)
    half = ImageBatch(images.pixels[..., ::2, ::2].contiguous(), images.sizes // 2)
    two = model(replace(images, pyramid=(half, images)))
    assert two.valid.any() and not torch.allclose(two.scores, plain.scores, atol=1e-3)
    model.canonical_side = 1.0  # every region is larger: the two smallest scales are nearest
    three = model(replace(images, pyramid=(half, images, images)))
    assert all(torch.equal(getattr(three, name), getattr(two, name)) for name in ("boxes", "scores", "labels"))
    model.canonical_side = 1000.0
    assert not torch.allclose(model(replace(images, pyramid=(half, images, images))).scores, two.scores, atol=1e-3)
    losses = model(replace(images, pyramid=(half, images)), targets)
    assert losses.keys() == set(model.loss_names) and all(map(torch.equal, losses.values(),
                                                              model(images, targets).values()))
