"""Given torchvision's weights, RetinaNet and FCOS compute its detections and losses; Detectron2's are read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from detres.build import build_model
from detres.config import Config, DenseHeadConfig
from detres.structures import ImageBatch, Targets
from detres.weights.export import export
from detres.weights.importers import convert, recognise
from detres.weights.torchvision import FAMILIES

from .test_torchvision_parity import partners

HEIGHT, WIDTH = 160, 208  # P6 and P7 are 3 x 4 and 2 x 2: torchvision takes their strides from the grid
SIZES = [(160, 208), (144, 176)]
CLASSES = 4
LOSSES = {"classification": "loss_cls", "bbox_regression": "loss_box", "bbox_ctrness": "loss_centerness"}


@torch.no_grad()
def calibrate(model: nn.Module, pixels: Tensor) -> None:
    """Random weights that behave like trained ones: normalised activations, varied scores and boxes, and class 0,
    which no box of a data set has, never found."""
    generator = torch.Generator().manual_seed(1)

    def set_statistics(module, inputs):
        module.running_mean.copy_(inputs[0].mean((0, 2, 3)))
        module.running_var.copy_(inputs[0].var((0, 2, 3)))

    norms = {name: module for name, module in model.named_modules() if hasattr(module, "running_mean")}
    handles = [module.register_forward_pre_hook(set_statistics) for module in norms.values()]
    for name, norm in norms.items():
        scale = 0.5 if name.endswith(("bn3", "downsample.1")) else 1.0
        norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * 0.4 + 0.5).mul_(scale)
    features = list(model.eval().backbone(pixels).values())
    for handle in handles:
        handle.remove()
    classes, boxes = model.head.classification_head, model.head.regression_head
    for layer in (*classes.conv.modules(), *boxes.conv.modules()):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=generator)
    outputs = [(classes.conv, classes.cls_logits, 1.0), (boxes.conv, boxes.bbox_reg, 0.1)]
    if hasattr(boxes, "bbox_ctrness"):
        outputs.append((boxes.conv, boxes.bbox_ctrness, 1.0))
        boxes.bbox_reg.bias.fill_(2.0)
    for tower, layer, std in outputs:
        layer.weight.normal_(generator=generator)
        values = torch.cat([(layer(tower(f)) - layer.bias[:, None, None]).flatten() for f in features])
        layer.weight.mul_(std / values.std())
    classes.cls_logits.bias.view(-1, CLASSES + 1)[:] = torch.tensor([-30.0, -3, -3, -3, -3])


@pytest.fixture(scope="module", params=["retinanet_resnet50_fpn", "retinanet_resnet50_fpn_v2", "fcos_resnet50_fpn"])
def pair(request):
    torch.manual_seed(0)
    theirs = getattr(torchvision.models.detection, request.param)(
        weights=None, weights_backbone=None, num_classes=CLASSES + 1, min_size=HEIGHT, max_size=WIDTH)
    theirs.transform = torchvision.models.detection.transform.GeneralizedRCNNTransform(
        HEIGHT, WIDTH, theirs.transform.image_mean, theirs.transform.image_std)
    theirs.transform.resize = lambda image, target: (image, target)  # images come at their sizes
    generator = torch.Generator().manual_seed(2)
    images = [nn.functional.interpolate(torch.rand(1, 3, h // 8, w // 8, generator=generator) * 255, (h, w),
                                        mode="bilinear")[0].byte() for h, w in SIZES]
    calibrate(theirs, theirs.transform([image / 255 for image in images])[0].tensors)
    weights = convert(theirs.state_dict(), Path(request.param))
    assert len(weights.meta.classes) == CLASSES
    ours = build_model(Config.model_validate(weights.meta.config).model, CLASSES)
    ours.load_state_dict(weights.tensors)
    return theirs.eval(), ours.eval(), images


def batch(images: list[Tensor]) -> ImageBatch:
    """On a canvas padded to a multiple of 32, as torchvision pads."""
    pixels = torch.zeros(len(images), 3, 160, 224, dtype=torch.uint8)
    for own, image in zip(pixels, images):
        own[:, :image.shape[1], :image.shape[2]] = image
    return ImageBatch(pixels, torch.tensor([image.shape[1:] for image in images]))


@torch.no_grad()
def test_detections_agree(pair):
    theirs, ours, images = pair
    expected = theirs([image.float() / 255 for image in images])
    found = ours(batch(images))
    for i, image in enumerate(expected):
        valid = found.valid[i]
        partners(found.boxes[i][valid], found.scores[i][valid], found.labels[i][valid] + 1, image)


def test_losses_agree(pair):
    """Every anchor and point trains; an image has an object that is no anchor's best by far, another none at all."""
    theirs, ours, images = pair
    boxes = torch.tensor([[[10.0, 20, 90, 100], [60, 40, 180, 150]], [[30, 30, 60, 70], [0, 0, 1, 1]]])
    labels = torch.tensor([[0, 3], [1, 0]])
    for valid in ([[True, True], [True, False]], [[True, True], [False, False]]):
        valid = torch.tensor(valid)
        targets = Targets(boxes=boxes, labels=labels, valid=valid, seeds=torch.zeros(2, dtype=torch.int64))
        theirs.train()
        for module in theirs.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        expected = theirs([image.float() / 255 for image in images],
                          [{"boxes": b[v], "labels": c[v] + 1} for b, c, v in zip(boxes, labels, valid)])
        theirs.eval()
        found = ours(batch(images), targets)
        assert {LOSSES[name] for name in expected} == set(found)
        for name, value in expected.items():
            assert value > 1e-3
            torch.testing.assert_close(found[LOSSES[name]], value, rtol=1e-4, atol=0)


def test_weights_go_back_to_torchvision(pair):
    theirs, ours, _ = pair
    weights = convert(theirs.state_dict(), Path("theirs.pth"))
    found = export(weights.tensors, Config.model_validate(weights.meta.config).model, CLASSES, FAMILIES)
    assert not found.differences and f"num_classes={CLASSES + 1})" in found.usage
    expected = {name: value for name, value in theirs.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert set(found.content) == set(expected)
    changed = [name for name, value in found.content.items() if not torch.equal(value, expected[name])]
    assert changed == ["head.classification_head.cls_logits.weight"]  # of channel 0, which is random in `theirs`


def test_old_names_of_torchvision_are_read():
    """As in its file retinanet_resnet50_fpn_coco: convolutions of a tower at 0, 2, 4 and 6, and a flat pyramid."""
    names = ["head.classification_head.conv.6.bias", "head.regression_head.conv.2.weight",
             "backbone.fpn.inner_blocks.0.weight"]
    family = recognise({"head.regression_head.bbox_reg.weight": torch.zeros(1)}, "file")
    found, unknown = family.keymap.to_ours({name: torch.zeros(1) for name in names})
    assert not unknown and set(found) == {"head.cls_tower.3.bias", "head.box_tower.1.weight",
                                          "backbone.fpn.lateral.0.weight"}


def shapes_of_detectron2(shared_data: Path, name: str) -> dict[str, Tensor]:
    content = json.loads((shared_data.parent / f"reference/detectron2/state_dicts/{name}.json").read_text())
    return {key: torch.empty(entry["shape"], device="meta") for key, entry in content["state_dict"].items()}


def test_detectron2s_retinanet_is_recognised(shared_data):
    weights = convert(shapes_of_detectron2(shared_data, "retinanet_R_50_FPN_1x"), Path("model_final.pth"))
    model = Config.model_validate(weights.meta.config).model
    assert len(weights.meta.classes) == 80 and (model.name, model.fpn.top) == ("retinanet", "c5")
    assert model.input.channel_order == "bgr" and model.backbone.stride_in_1x1
    assert model.anchors.sizes[0] == (32, 40.31747359663594, 50.79683366298238)  # of the resolved configuration
    assert model.anchors.sizes[4] == (512, 645.0795775461751, 812.7493386077181)
    assert model.dense_head == DenseHeadConfig()


@pytest.mark.parametrize("source, layout", [("faster_rcnn_R_50_C4_1x", "c4"), ("mask_rcnn_R_50_FPN_3x", "fpn")])
def test_detectron2s_rpn_is_a_detector_without_heads(shared_data, source, layout):
    state = {name: tensor for name, tensor in shapes_of_detectron2(shared_data, source).items()
             if not name.startswith("roi_heads.")}
    weights = convert(state, Path("model_final.pth"))
    model = Config.model_validate(weights.meta.config).model
    assert (model.name, model.backbone.layout, model.backbone.depth) == ("rpn", layout, 50)
    assert weights.meta.classes == ("object",) and model.rpn.pre_nms_topk_test == (6000 if layout == "c4" else 1000)
