"""Given torchvision's weights, detres computes torchvision's outputs and losses."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.rpn import AnchorGenerator as TVAnchorGenerator

from detres.build import build_model
from detres.config import Config
from detres.ops.paste_masks import paste_masks
from detres.structures import ImageBatch, Proposals, Targets
from detres.weights.importers import convert
from detres.weights.torchvision import FAMILIES

HEIGHT, WIDTH = 160, 208  # P5 is 5 x 7: P6 has the odd grid whose stride torchvision rounds
SIZES = [(160, 208), (144, 176)]  # in a batch
NAMES = ["fasterrcnn_resnet50_fpn", "fasterrcnn_resnet50_fpn_v2", "maskrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn_v2"]


def converted(state):
    found, unknown = next(family for family in FAMILIES if family.fits(state)).keymap.to_ours(state)
    assert not unknown
    return found


def calibrate(model, images) -> None:
    """Random weights that behave like trained ones: normalised activations, varied scores and boxes."""
    generator = torch.Generator().manual_seed(1)
    for name, module in model.named_modules():
        if isinstance(module, (torchvision.ops.FrozenBatchNorm2d, torch.nn.BatchNorm2d)):
            module.requires_grad_(False).eval()
            module.weight.copy_(torch.rand(module.weight.shape, generator=generator) * 0.4 + 0.5)
            module.bias.copy_(torch.randn(module.bias.shape, generator=generator) * 0.1)
            if name.endswith(("bn3", "downsample.1")):
                module.weight.mul_(0.5)

            def set_statistics(module, inputs):
                module.running_mean.copy_(inputs[0].mean((0, 2, 3)))
                module.running_var.copy_(inputs[0].var((0, 2, 3)))
            module.handle = module.register_forward_pre_hook(set_statistics)
    if model.roi_heads.mask_predictor is not None:  # else every mask is 0.5, give or take rounding
        model.roi_heads.mask_predictor.mask_fcn_logits.weight.data.normal_(std=0.02, generator=generator)
    with torch.no_grad():
        features = model.backbone(images)
        pooled = torch.cat([features["0"][:, :, y:y + 7, x:x + 7] for y, x in ((0, 0), (9, 20), (20, 9), (30, 30))])
        hidden = model.roi_heads.box_head(pooled)  # norms of heads see what RoIs are like
        if model.roi_heads.mask_head is not None:
            model.roi_heads.mask_head(pooled)
        for module in model.modules():
            if hasattr(module, "handle"):
                module.handle.remove()
        rpn, box = model.rpn.head, model.roi_heads.box_predictor
        for layer, std in ((rpn.cls_logits, 0.05), (rpn.bbox_pred, 0.01)):
            layer.weight.normal_(std=std, generator=generator)
        for layer, std in ((box.cls_score, 0.15), (box.bbox_pred, 0.2)):  # else most scores are 0 or 1
            layer.weight.normal_(generator=generator)
            layer.weight.mul_(std / (layer(hidden) - layer.bias).std())


def batch(images) -> ImageBatch:
    """On a canvas padded to a multiple of 32, as torchvision pads."""
    pixels = torch.zeros(len(images), 3, HEIGHT, 224, dtype=torch.uint8)
    for own, image in zip(pixels, images):
        own[:, :image.shape[1], :image.shape[2]] = image
    return ImageBatch(pixels, torch.tensor([image.shape[1:] for image in images]))


@pytest.fixture(scope="module", params=NAMES)
def pair(request):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models.detection, request.param)(
        weights=None, weights_backbone=None, num_classes=5, min_size=HEIGHT, max_size=WIDTH)
    if not request.param.endswith("v2"):  # else plain BN without weights
        theirs.backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None,
                                              norm_layer=torchvision.ops.FrozenBatchNorm2d)
    theirs.transform.resize = lambda image, target: (image, target)  # images come at their sizes
    pixels = [torch.nn.functional.interpolate(torch.rand(1, 3, h // 8, w // 8) * 255, (h, w), mode="bilinear")[0].byte()
              for h, w in SIZES]
    calibrate(theirs, torch.randn(2, 3, HEIGHT, WIDTH))
    weights = convert(theirs.state_dict(), Path(request.param))
    ours = build_model(Config.model_validate(weights.meta.config).model, num_classes=4)
    ours.load_state_dict(weights.tensors)
    return theirs.eval(), ours.eval(), pixels


def partners(boxes, scores, labels, theirs, pixels=1e-2) -> torch.Tensor:
    """Which of torchvision's detections of an image each of ours (D,) is: all are found, with the same scores, and
    boxes at most `pixels` away. Their order may differ among equal scores. labels as torchvision counts them."""
    assert len(boxes) == len(theirs["boxes"]) >= 10
    torch.testing.assert_close(scores, theirs["scores"], atol=1e-4, rtol=0)
    distance = (boxes[:, None] - theirs["boxes"]).abs().amax(-1)
    distance[labels[:, None] != theirs["labels"]] = torch.inf
    nearest, partner = distance.min(1)
    assert nearest.max() < pixels and len(partner.unique()) == len(partner)
    return partner


@torch.no_grad()
def test_detections_agree(pair):
    theirs, ours, pixels = pair
    expected = theirs([image.float() / 255 for image in pixels])
    found = ours(batch(pixels))
    for i, image in enumerate(expected):
        valid = found.valid[i]
        partner = partners(found.boxes[i][valid], found.scores[i][valid], found.labels[i][valid] + 1, image)
        if found.masks is not None:
            # In their boxes: pasting cuts to whole pixels, where a difference of 1e-5 px may move an edge by one.
            bitmaps = paste_masks(found.masks[i][valid], image["boxes"][partner], SIZES[i], convention="torchvision")
            theirs_probs = image["masks"][partner, 0]
            differ, union = bitmaps ^ (theirs_probs >= 0.5), bitmaps | (theirs_probs >= 0.5)
            assert differ.sum() < 0.001 * union.sum()
            # Of each mask IoU is > 0.999, even 1 but for pixels whose probability rounding puts on a side of 0.5.
            assert not differ[(theirs_probs - 0.5).abs() > 1e-4].any()


def test_losses_agree_when_all_boxes_are_sampled(pair):
    """Sampling is fixed by asking for more boxes than there are, so both take all of them."""
    theirs, ours, pixels = pair
    boxes = torch.tensor([[[10.0, 20, 90, 100], [60, 40, 180, 150]], [[30, 30, 60, 70], [0, 0, 1, 1]]])
    labels = torch.tensor([[0, 3], [1, 0]])
    valid = torch.tensor([[True, True], [True, False]])
    masks = torch.zeros(3, HEIGHT, 224, dtype=torch.uint8)
    for mask, box in zip(masks, boxes[valid].int().tolist()):
        mask[box[1] + 5: box[3], box[0]: box[2] - 7] = 1
    targets = Targets(boxes=boxes, labels=labels, valid=valid, seeds=torch.zeros(2, dtype=torch.int64),
                      masks=masks)
    tv_targets = [{"boxes": b[v], "labels": c[v] + 1, "masks": m} for b, c, v, m in
                  zip(boxes, labels, valid, [own[:, :h, :w] for own, (h, w) in zip(masks.split([2, 1]), SIZES)])]
    everything = 10**6
    for module in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        module.batch_size_per_image, module.positive_fraction = everything, 0.5
    for module in (ours.rpn, ours.roi_heads):
        module.batch_per_image, module.positive_fraction = everything, 1.0
    kept = {}
    hook = theirs.rpn.register_forward_hook(lambda module, inputs, output: kept.update(boxes=output[0]))
    theirs.train()
    for module in theirs.modules():  # nothing but the losses changes
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eval()
    expected = theirs([image.float() / 255 for image in pixels], tv_targets)
    theirs.eval()
    hook.remove()
    images = batch(pixels)
    features = ours.backbone(ours.normalize(images))
    found = ours.rpn(features, images.pixels.shape[-2:], images.sizes, targets)[1]
    proposals = torch.nn.utils.rnn.pad_sequence(kept["boxes"], batch_first=True)  # the same for both
    counts = torch.tensor([len(b) for b in kept["boxes"]])
    valid = torch.arange(proposals.shape[1]) < counts[:, None]
    proposals = Proposals(proposals, torch.zeros(valid.shape), valid)
    found |= ours.roi_heads.losses(partial(ours.pool, features), proposals, targets, images.sizes)
    names = {"loss_objectness": "loss_rpn_cls", "loss_rpn_box_reg": "loss_rpn_box", "loss_classifier": "loss_cls",
             "loss_box_reg": "loss_box", "loss_mask": "loss_mask"}
    for name, value in expected.items():
        assert value > 1e-4
        torch.testing.assert_close(found[names[name]], value, rtol=1e-4, atol=0)


def test_anchors_agree_on_odd_grids():
    sizes, ratios = ((32,), (64,)), (0.5, 1.0, 2.0)
    theirs = TVAnchorGenerator(sizes, (ratios,) * 2)
    image_list = torchvision.models.detection.image_list.ImageList(torch.zeros(1, 3, 96, 160), [(96, 160)])
    maps = [torch.zeros(1, 1, 24, 40), torch.zeros(1, 1, 7, 13)]
    from detres.models.anchors import AnchorGenerator
    ours = AnchorGenerator(sizes, ratios, [4, 16], "torchvision")([(24, 40), (7, 13)], (96, 160), torch.device("cpu"))
    assert torch.equal(torch.cat(ours), theirs(image_list, maps)[0])
