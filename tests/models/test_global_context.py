"""Global context (arXiv 1512.03385, appendix B): the features of the whole image beside those of each region."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F

from detres.build import build_model
from detres.models.roi_heads.multi_scale import multi_scale_regions
from detres.ops.roi_align import roi_align
from detres.structures import ImageBatch

from .conftest import make_batch, small_config

SIZES = torch.tensor([[96, 128], [70, 90]])


def make_model(name="faster_rcnn", layout="fpn", seed=0, **box_head):
    torch.manual_seed(seed)
    resolution = 8 if layout == "c4" else 7
    config = small_config(name, layout, backbone={"norm": "gn"}, box_head={"resolution": resolution, **box_head})
    return build_model(config, 3)


def images_of_two_sizes():
    images, targets = make_batch(2)
    return ImageBatch(images.pixels, SIZES), targets


def naive(heads, regions, box, index, size):
    """Logits and deltas of one region, from two calls of the head for a single region each."""
    def features(box):
        hidden = heads.box_head(regions(box[None], torch.tensor([index]), heads.resolution))
        return hidden.mean((2, 3))[0] if hidden.dim() == 4 else hidden[0]

    whole = torch.tensor([0.0, 0.0, float(size[1]), float(size[0])])
    logits, deltas = heads.box_predictor(torch.cat([features(box), features(whole)])[None])
    return logits[0], deltas[0]


def single_scale(model, images):
    return partial(model.pool, model.backbone(model.normalize(images)))


def two_scales(model, images):
    half = ImageBatch(F.interpolate(images.pixels.float(), scale_factor=0.5), images.sizes // 2)
    pyramid = ImageBatch(images.pixels, images.sizes, (half, images))
    return multi_scale_regions(model.pool, lambda scaled: model.backbone(model.normalize(scaled)), pyramid, 224.0)


@pytest.mark.parametrize("make_regions", [single_scale, two_scales])
@pytest.mark.parametrize("layout", ["c4", "fpn", "dc5"])
def test_scores_are_those_of_regions_one_by_one(layout, make_regions):
    model = make_model(layout=layout, global_context=True)
    images, targets = images_of_two_sizes()
    valid = torch.tensor([[True, True], [False, True]])
    with torch.no_grad():
        regions = make_regions(model, images)
        probs, deltas = model.roi_heads.score(regions, targets.boxes, valid, SIZES)
        for i, p in valid.nonzero().tolist():
            logits, expected = naive(model.roi_heads, regions, targets.boxes[i, p], i, SIZES[i])
            torch.testing.assert_close(probs[i, p], logits.softmax(-1)[:-1], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(deltas[i, p], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("layout", ["c4", "fpn"])
def test_losses_are_those_of_regions_one_by_one(layout):
    model = make_model(layout=layout, global_context=True)
    images, targets = images_of_two_sizes()
    heads, regions = model.roi_heads, single_scale(model, images)
    proposals, _ = model.rpn(model.backbone(model.normalize(images)), (96, 128), SIZES, targets)
    found = heads.losses(regions, proposals, targets, SIZES)
    rois = heads.sample(proposals, targets)
    rows = rois.valid.nonzero().tolist()
    logits = torch.stack([naive(heads, regions, rois.boxes[i, r], i, SIZES[i])[0] for i, r in rows])
    torch.testing.assert_close(found["loss_cls"], F.cross_entropy(logits, rois.labels[rois.valid]), rtol=1e-4, atol=0)


def test_the_gradient_reaches_all_of_the_image_and_none_of_the_padding():
    """One small region: without context the rest of the map learns nothing from it."""
    box, valid, size = torch.tensor([[[4.0, 4, 20, 20]]]), torch.tensor([[True]]), torch.tensor([[64, 96]])
    reached = {}
    for context in (False, True):
        heads = make_model("faster_rcnn", "c4", global_context=context).roi_heads
        feature = torch.randn(1, 64, 8, 8, requires_grad=True)  # 128 x 128 pixels
        regions = partial(roi_align, [feature], [16])
        heads.box_predictor(heads.look(heads.box_head, regions, box[0], torch.tensor([0]), size)[1])[0].sum().backward()
        reached[context] = feature.grad[0].abs().sum(0) > 0
    assert not reached[False][2:].any() and not reached[False][:, 2:].any()
    assert reached[True][:4, :6].all()
    assert not reached[True][5:].any() and not reached[True][:, 7:].any()  # bilinear samples reach one cell further


@pytest.mark.parametrize("name, layout", [("mask_rcnn", "c4"), ("mask_rcnn", "fpn")])
def test_without_weight_on_it_context_changes_nothing(name, layout):
    """Losses, detections and masks: the mask head reads the same regions as ever."""
    plain, other = make_model(name, layout), make_model(name, layout, seed=1, global_context=True)
    weights = plain.state_dict()
    for key in ("roi_heads.box_predictor.cls.weight", "roi_heads.box_predictor.box.weight"):
        weights[key] = F.pad(weights[key], (0, weights[key].shape[1]))
    other.load_state_dict(weights)
    images, targets = images_of_two_sizes()
    expected = plain(images, targets)
    for key, value in other(images, targets).items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        expected, found = plain.eval()(images), other.eval()(images)
    assert expected.valid.any()
    for part in ("scores", "boxes", "valid", "masks"):
        torch.testing.assert_close(getattr(found, part), getattr(expected, part), rtol=1e-3, atol=1e-3)
