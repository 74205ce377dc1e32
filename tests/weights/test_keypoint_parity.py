"""Given the weights of torchvision's Keypoint R-CNN, detres computes its outputs and losses."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torchvision
from torch.nn.utils.rnn import pad_sequence
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads

from detres.build import build_model
from detres.structures import ImageBatch, Proposals, Targets
from detres.weights.torchvision import torchvision_config

from .test_torchvision_parity import calibrate, converted, partners

SIZES = [(160, 208), (208, 160)]  # in a batch


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    theirs = torchvision.models.detection.keypointrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3, num_keypoints=5, min_size=160, max_size=208,
        box_detections_per_img=30, keypoint_head=KeypointRCNNHeads(256, (512,)))
    theirs.backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None,  # else plain BN without weights
                                          norm_layer=torchvision.ops.FrozenBatchNorm2d)
    calibrate(theirs, torch.randn(2, 3, 160, 208))
    head = {"num_keypoints": 5, "convs": 1}  # theirs has 8, which take long
    config = torchvision_config("keypoint_rcnn", keypoint_head=head, box_head={"detections_per_image": 30})
    ours = build_model(config, num_classes=2)
    ours.load_state_dict(converted(theirs.state_dict()))
    pixels = [torch.nn.functional.interpolate(torch.rand(1, 3, h // 8, w // 8) * 255, (h, w), mode="bilinear")[0].byte()
              for h, w in SIZES]
    return theirs.eval(), ours.eval(), pixels


def batch(pixels) -> ImageBatch:
    """On a canvas padded to a multiple of 32, as torchvision pads."""
    canvas = torch.zeros(len(pixels), 3, 224, 224, dtype=torch.uint8)
    for place, image in zip(canvas, pixels):
        place[:, :image.shape[1], :image.shape[2]] = image
    return ImageBatch(canvas, torch.tensor(SIZES))


@torch.no_grad()
def test_detections_agree(pair):
    theirs, ours, pixels = pair
    found = ours(batch(pixels))
    for i, image in enumerate(theirs([image.float() / 255 for image in pixels])):
        valid = found.valid[i]
        partner = partners(found.boxes[i][valid], found.scores[i][valid], found.labels[i][valid] + 1, image)
        points, wanted = found.keypoints[i][valid], image["keypoints"][partner]
        torch.testing.assert_close(points[..., 2], image["keypoints_scores"][partner], atol=1e-3, rtol=1e-4)
        away = (points[..., :2] - wanted[..., :2]).norm(dim=-1)
        assert away.max() < 1e-2, away.sort(descending=True).values.flatten()[:10]


def test_losses_agree_when_all_boxes_are_sampled(pair):
    """Sampling is fixed by asking for more boxes than there are, so both take all of them."""
    theirs, ours, pixels = pair
    boxes = torch.tensor([[[10.0, 20, 90, 100], [60, 40, 180, 150]], [[30, 30, 90, 110], [0, 0, 1, 1]]])
    labels = torch.tensor([[0, 1], [1, 0]])
    valid = torch.tensor([[True, True], [True, False]])
    keypoints = torch.rand(2, 2, 5, 3, generator=torch.Generator().manual_seed(0))
    keypoints[..., :2] = boxes[:, :, None, :2] + keypoints[..., :2] * (boxes[:, :, None, 2:] - boxes[:, :, None, :2])
    keypoints[..., 2] = (keypoints[..., 2] * 3).floor()  # some of each visibility
    targets = Targets(boxes=boxes, labels=labels, valid=valid, seeds=torch.zeros(2, dtype=torch.int64),
                      keypoints=keypoints)
    tv_targets = [{"boxes": b[v], "labels": c[v] + 1, "keypoints": k[v]}
                  for b, c, v, k in zip(boxes, labels, valid, keypoints)]
    for module in (theirs.rpn.fg_bg_sampler, theirs.roi_heads.fg_bg_sampler):
        module.batch_size_per_image, module.positive_fraction = 10**6, 0.5
    for module in (ours.rpn, ours.roi_heads):
        module.batch_per_image, module.positive_fraction = 10**6, 1.0
    kept = {}
    hook = theirs.rpn.register_forward_hook(lambda module, inputs, output: kept.update(boxes=output[0]))
    theirs.train()  # frozen norms: nothing else changes
    expected = theirs([image.float() / 255 for image in pixels], tv_targets)
    theirs.eval()
    hook.remove()
    images = batch(pixels)
    features = ours.features(images)
    proposals = pad_sequence(kept["boxes"], batch_first=True)  # the same for both
    counts = torch.tensor([len(b) for b in kept["boxes"]])
    kept_valid = torch.arange(proposals.shape[1]) < counts[:, None]
    proposals = Proposals(proposals, torch.zeros(kept_valid.shape), kept_valid)
    found = ours.roi_heads.losses(partial(ours.pool, features), proposals, targets, images.sizes)
    for theirs_name, name in (("loss_classifier", "loss_cls"), ("loss_box_reg", "loss_box"),
                              ("loss_keypoint", "loss_keypoint")):
        assert expected[theirs_name] > 1e-3
        torch.testing.assert_close(found[name], expected[theirs_name], rtol=1e-4, atol=0)
